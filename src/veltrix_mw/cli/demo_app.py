"""The demo's app: bare ASGI, wrapped as any app would be. Runs in the demo's workers.

Owns what it answers; `demo` starts it and asks. With OpenTelemetry's SDK it also traces requests that ask for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from veltrix_mw import ConfigClient, View
from veltrix_mw.asgi import ConfigMiddleware
from veltrix_mw.cli.trace_tree import finished

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExportResult

__all__ = ["app"]

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Callable[[], Awaitable[Message]], Send], Awaitable[None]]

SPANS_VARIABLE: Final = "VELTRIX_DEMO_SPANS"
"""Names the folder that each worker writes its spans to, a JSON text a line."""

_LINE_S: Final = 0.02  # between the lines of the stream: shorter than a change takes to arrive
_LINES_AFTER: Final = 3  # that the stream sends once its process serves a newer revision
_STREAM_S: Final = 15.0  # then the stream ends in any case


def app() -> App:
    """The app, wrapped; what a server calls in each of its workers."""
    provider = _provider(Path(os.environ[SPANS_VARIABLE]))
    # `lookups`, so that the trace shows each read; an app of the real world stays with the default, `requests`.
    client = ConfigClient(telemetry="lookups", tracer_provider=provider)
    return _traced(ConfigMiddleware(_shop(client), client=client), provider)


def _shop(client: ConfigClient) -> App:
    async def shop(scope: Message, _receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        if scope["type"] != "http":
            return
        config: View = scope["state"]["config"]
        if scope["path"] == "/stream":
            await _stream(client, config, send)
            return
        status = 200 if scope["path"] == "/" else 404
        body = json.dumps(_served(config)).encode() + b"\n"
        await _begin(send, status, [(b"content-length", b"%d" % len(body))])
        await send({"type": "http.response.body", "body": body})

    return shop


def _served(config: View) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "revision": config.revision,
        "max_items": config["checkout/max_items"],
        "headline": config["checkout/headline"],
    }


async def _begin(send: Send, status: int, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    content = (b"content-type", b"application/json")
    await send({"type": "http.response.start", "status": status, "headers": [content, *headers]})


async def _stream(client: ConfigClient, config: View, send: Send) -> None:
    """Line after line, until a few were sent that the process was ahead of."""
    await _begin(send, 200)
    end_s = time.monotonic() + _STREAM_S
    after = 0
    while after < _LINES_AFTER and time.monotonic() < end_s:
        newest = client.snapshot.revision
        line = json.dumps({**_served(config), "worker_revision": newest}).encode() + b"\n"
        await send({"type": "http.response.body", "body": line, "more_body": True})
        after += newest > config.revision
        await asyncio.sleep(_LINE_S)
    await send({"type": "http.response.body", "body": b""})


def _provider(folder: Path) -> TracerProvider | None:
    """Writes the spans of requests whose caller sampled them; None without the SDK."""
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
        from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
    except ModuleNotFoundError:
        return None

    class Lines(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            with (folder / f"spans-{os.getpid()}.jsonl").open("a") as file:
                file.writelines(json.dumps(asdict(span)) + "\n" for span in finished(spans))
            return SpanExportResult.SUCCESS

    provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(Lines()))
    return provider


def _traced(wrapped: App, provider: TracerProvider | None) -> App:
    """A server span around each request, as an instrumentation would make it."""
    if provider is None:
        return wrapped
    tracer = provider.get_tracer("veltrix_mw.cli.demo_app")
    extract = TraceContextTextMapPropagator().extract

    async def traced(scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        if scope["type"] != "http":
            await wrapped(scope, receive, send)
            return
        context = extract({name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]})
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        name = f"{scope['method']} {scope['path']}"
        with tracer.start_as_current_span(name, context, SpanKind.SERVER, attributes):
            await wrapped(scope, receive, send)

    return traced
