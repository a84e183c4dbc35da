"""A collector of OpenTelemetry's: takes spans and metrics over HTTP, as protobuf messages, and keeps them."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

__all__ = ["Collector", "collector"]


class Collector:
    """What has arrived so far. A worker is told from another by its `service.instance.id`."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.spans: list[Any] = []
        self.unknown: list[str] = []
        self._newest: dict[tuple[str, str], Any] = {}  # (worker, metric) -> its newest

    def take(self, path: str, body: bytes) -> None:
        if path == "/v1/traces":
            traces = ExportTraceServiceRequest.FromString(body)
            for resource in traces.resource_spans:
                self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        elif path == "/v1/metrics":
            metrics = ExportMetricsServiceRequest.FromString(body)
            for resource in metrics.resource_metrics:
                worker = _plain(resource.resource.attributes)["service.instance.id"]
                for scope in resource.scope_metrics:
                    self._newest.update({(worker, metric.name): metric for metric in scope.metrics})
        else:
            self.unknown.append(path)

    @property
    def workers(self) -> set[str]:
        return {worker for worker, _ in self._newest}

    def count(self, metric: str) -> int:
        """The sum over all workers: of a histogram's records, of a counter's value."""
        newest = [each for (_, name), each in list(self._newest.items()) if name == metric]
        histograms = sum(point.count for each in newest for point in each.histogram.data_points)
        return histograms + sum(point.as_int for each in newest for point in each.sum.data_points)

    def attributes(self, name: str) -> list[dict[str, Any]]:
        """Those of each span of that name."""
        return [_plain(span.attributes) for span in list(self.spans) if span.name == name]


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector that listens until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            found.take(self.path, body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        found = Collector(server.server_address[1])
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield found
        finally:
            server.shutdown()
            serving.join()


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in attributes}
