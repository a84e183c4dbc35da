"""OpenTelemetry's own instrumentation of ASGI, Starlette and FastAPI, with our middleware in the app.

The server's span keeps what the framework knows (`http.route`), and gets what config cost the request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.starlette import StarletteInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.opentelemetry import OpenTelemetryMiddleware as StarlettesOwn
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from starlette_veltrix import ConfigMiddleware, RequestConfig
from veltrix_mw import ConfigClient, current_view


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    provider.shutdown()


@pytest.fixture
def metering() -> Iterator[MeterProvider]:
    provider = MeterProvider()
    yield provider
    provider.shutdown()


def server_span(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    return span


def reported(span: ReadableSpan) -> dict[str, Any]:
    return {key: value for key, value in (span.attributes or {}).items() if key.startswith("veltrix.")}


async def items(request: Request) -> Response:
    config = request.state.config
    return PlainTextResponse(f"{config['checkout/max_items']} {config.get('absent')}")


def test_starlettes_span_keeps_its_route_and_tells_what_config_cost(
    client: ConfigClient, exporter: InMemorySpanExporter, tracing: TracerProvider, metering: MeterProvider
) -> None:
    app = Starlette(routes=[Mount("/shop", routes=[Route("/items/{item}", items)])])
    app.add_middleware(ConfigMiddleware, client=client)
    StarletteInstrumentor.instrument_app(app, tracer_provider=tracing, meter_provider=metering)
    try:
        assert TestClient(app).get("/shop/items/3").text == "41 None"
    finally:
        StarletteInstrumentor.uninstrument_app(app)
    span = server_span(exporter)
    plain = _route_without_us(exporter, tracing, metering)
    assert (span.attributes or {})["http.route"] == plain
    told = reported(span)
    assert told["veltrix.revision"] == client.snapshot.revision
    assert told["veltrix.origin"] == "memory"
    assert told["veltrix.stale"] is False
    assert 2 in told.values(), "two reads were counted"


@pytest.mark.parametrize("whose", ["Starlette's own", "the instrumentation's"])
@pytest.mark.parametrize("outermost", ["ours", "theirs"])
def test_whoever_stands_further_out_the_servers_span_tells_what_config_cost(
    client: ConfigClient, exporter: InMemorySpanExporter, tracing: TracerProvider, whose: str, outermost: str
) -> None:
    theirs: Any
    if whose == "Starlette's own":
        theirs = Middleware(StarlettesOwn, tracer_provider=tracing)
    else:
        theirs = Middleware(OpenTelemetryMiddleware, tracer_provider=tracing)
    both = [Middleware(ConfigMiddleware, client=client), theirs]
    app = Starlette(
        routes=[Route("/items/{item}", items)], middleware=both if outermost == "ours" else [*reversed(both)]
    )
    assert TestClient(app).get("/items/3").text == "41 None"
    told = reported(server_span(exporter))
    assert told["veltrix.revision"] == client.snapshot.revision
    assert told["veltrix.lookup.count"] == 2


def _route_without_us(exporter: InMemorySpanExporter, tracing: TracerProvider, metering: MeterProvider) -> Any:
    exporter.clear()

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("")

    app = Starlette(routes=[Mount("/shop", routes=[Route("/items/{item}", endpoint)])])
    StarletteInstrumentor.instrument_app(app, tracer_provider=tracing, meter_provider=metering)
    try:
        TestClient(app).get("/shop/items/3")
    finally:
        StarletteInstrumentor.uninstrument_app(app)
    return (server_span(exporter).attributes or {})["http.route"]


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_fastapis_span_keeps_its_route_whoever_was_added_first(
    client: ConfigClient,
    exporter: InMemorySpanExporter,
    tracing: TracerProvider,
    metering: MeterProvider,
    first: str,
) -> None:
    app = FastAPI()

    @app.get("/items/{item}")
    async def endpoint(item: int, config: RequestConfig) -> int:
        return int(config["checkout/max_items"])

    if first == "ours":
        app.add_middleware(ConfigMiddleware, client=client)
    FastAPIInstrumentor.instrument_app(app, tracer_provider=tracing, meter_provider=metering)
    if first == "theirs":
        app.add_middleware(ConfigMiddleware, client=client)
    try:
        assert TestClient(app).get("/items/3").json() == 41
    finally:
        FastAPIInstrumentor.uninstrument_app(app)
    span = server_span(exporter)
    assert span.name == "GET /items/{item}"
    assert (span.attributes or {})["http.route"] == "/items/{item}"
    assert reported(span)["veltrix.revision"] == client.snapshot.revision


def test_a_span_around_the_whole_app_counts_the_reads_of_a_streamed_body(
    client: ConfigClient, exporter: InMemorySpanExporter, tracing: TracerProvider, metering: MeterProvider
) -> None:
    async def endpoint(request: Request) -> Response:
        return StreamingResponse(str(current_view()["checkout/max_items"]) for _ in range(3))

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(ConfigMiddleware, client=client)
    traced = OpenTelemetryMiddleware(app, tracer_provider=tracing, meter_provider=metering)
    assert TestClient(traced).get("/").text == "414141"
    assert 3 in reported(server_span(exporter)).values()


def test_without_a_recording_span_the_plain_view_is_served(client: ConfigClient) -> None:
    kinds: list[str] = []

    async def endpoint(request: Request) -> Response:
        kinds.append(type(request.state.config).__name__)
        return PlainTextResponse("")

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(ConfigMiddleware, client=client)
    TestClient(app).get("/")
    assert kinds == ["View"]
