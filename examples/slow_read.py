"""A herd on one slow read, and the spans that explain it.

    pip install "veltrix-mw[etcd,trace]"
    export VELTRIX_URL=etcd://127.0.0.1:2379/shop
    python examples/slow_read.py herd.jsonl

Eight requests, some milliseconds apart, need the settings of one large tenant that this process has not read yet. The
first has them read; the others wait for it. Their spans go to the file, one a line, and what they say to the terminal:
how long each request waited for config, and for whom. docs/slow-read.md tells how to find such a read in production.

It writes 3,000 keys below tenants/slow-read/ in 30 revisions, and deletes them at the end.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.trace import SpanKind

from veltrix_mw import ConfigClient, Delete, Put, VeltrixError

REQUESTS = 8
APART_S = 0.003
TENANT = "tenants/slow-read"
KEYS = [f"{TENANT}/discounts/rule-{number:04}" for number in range(3_000)]  # what makes it slow: most tenants have ten
AT_ONCE = 100  # operations in one revision


def main(path):
    with path.open("w") as file, ConfigClient(telemetry="off") as writer:
        provider = TracerProvider()
        lines = ConsoleSpanExporter(out=file, formatter=lambda span: span.to_json(indent=None) + "\n")
        provider.add_span_processor(SimpleSpanProcessor(lines))
        write(writer, [Put(key, "x" * 100) for key in KEYS])
        try:
            with ConfigClient(lazy=("tenants/",), tracer_provider=provider) as client:
                client.wait_ready()
                herd(client, provider.get_tracer("shop"))
        finally:
            write(writer, [Delete(key) for key in KEYS])
        provider.shutdown()
    for line in path.read_text().splitlines():
        tell(json.loads(line))


def write(writer, operations):
    for at in range(0, len(operations), AT_ONCE):
        writer.write(operations[at : at + AT_ONCE])


def herd(client, tracer):
    def request(number):
        time.sleep(number * APART_S)
        # In earnest the server's instrumentation makes this span, and the middleware pins the view.
        with tracer.start_as_current_span("GET /discounts", kind=SpanKind.SERVER), client.pinned() as config:
            config.fetch(KEYS[7])

    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(request, range(REQUESTS)))


def tell(span):
    attributes = span["attributes"]
    if span["name"] == "veltrix.fetch":
        led_by = [link["context"]["span_id"] for link in span["links"]]
        print(f"fetch {span['context']['span_id']}: {attributes['veltrix.result']}", *led_by)
    elif "veltrix.lookup.total" in attributes:
        print(f"request: {1000 * attributes['veltrix.lookup.total']:.0f} ms for config")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/slow_read.py SPANS.jsonl")
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        sys.exit("OTEL_SDK_DISABLED is set, so there are no spans: unset it")
    try:
        main(Path(sys.argv[1]))
    except VeltrixError as exc:
        sys.exit(f"error: {exc}")
