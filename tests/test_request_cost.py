"""What a request pays to OpenTelemetry: the calls that are made of the SDK, counted. P12 measures what they take."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

from tests.support.sdk import Sdk
from veltrix_mw import ConfigClient, asgi, current_view, wsgi

ATTRIBUTES = {"veltrix.revision", "veltrix.origin", "veltrix.stale", "veltrix.lookup.count", "veltrix.lookup.total"}


class Counted(trace.NonRecordingSpan):
    """A span that records, and counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__(trace.SpanContext(1, 1, is_remote=False))
        self.calls: Counter[str] = Counter()
        self.attributes: list[str] = []

    def is_recording(self) -> bool:
        return True

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        self.calls["set_attributes"] += 1
        self.attributes += attributes

    def set_attribute(self, key: str, value: Any) -> None:
        self.calls["set_attribute"] += 1
        self.attributes.append(key)

    def add_event(self, *_: Any, **__: Any) -> None:
        self.calls["add_event"] += 1


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def client_of(stack: ExitStack, sdk: Sdk, level: str, **settings: Any) -> ConfigClient:
    client = ConfigClient(
        "memory://",
        telemetry=level,
        tracer_provider=sdk.tracer_provider,
        meter_provider=sdk.meter_provider,
        **settings,
    )
    stack.enter_context(client)
    client.put("k", 1)
    client.wait_for(client.put("tenants/acme/k", 2))
    return client


def serving(interface: str, client: ConfigClient, **settings: Any) -> Callable[[], None]:
    """What sends a request that reads ten times to an app behind the middleware: one middleware, however many requests.

    The first of them waits for the client's start; the ones after it go the way that most requests go.
    """

    def read() -> None:
        for _ in range(10):
            current_view()["k"]

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        read()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(_message: Any) -> None:
        pass

    def plain(_environ: Any, start_response: Any) -> list[bytes]:
        read()
        start_response("204 No Content", [])
        return []

    if interface == "ASGI":
        over_asgi = asgi.ConfigMiddleware(app, client=client, **settings)
        return lambda: asyncio.run(over_asgi({"type": "http"}, None, send))  # type: ignore[arg-type]
    over_wsgi = wsgi.ConfigMiddleware(plain, client=client, **settings)
    return lambda: list(over_wsgi({}, lambda *_: lambda _: None)).clear()


@pytest.mark.parametrize("interface", ["ASGI", "WSGI"])
def test_the_default_level_sets_five_attributes_at_once_and_records_once(interface: str, stack: ExitStack) -> None:
    sdk, span = Sdk(), Counted()
    client = client_of(stack, sdk, "requests")
    serve = serving(interface, client)
    serve()
    sdk.exporter.clear()
    before = sdk.points("veltrix.lookup.duration")
    with trace.use_span(span):
        serve()
    assert span.calls == {"set_attributes": 1}
    assert sorted(span.attributes) == sorted(ATTRIBUTES)
    assert before == {}
    [(count, total_s)] = sdk.points("veltrix.lookup.duration").values()
    assert (count, total_s > 0) == (1, True)
    assert sdk.spans() == []


@pytest.mark.parametrize("interface", ["ASGI", "WSGI"])
@pytest.mark.parametrize("level", ["off", "requests", "lookups"])
def test_off_and_a_span_that_does_not_record_cost_no_call(interface: str, level: str, stack: ExitStack) -> None:
    sdk = Sdk(ALWAYS_ON if level == "off" else ALWAYS_OFF)
    client = client_of(stack, sdk, level)
    span = Counted() if level == "off" else sdk.app.start_span("GET /")
    serve = serving(interface, client)
    serve()
    with trace.use_span(span):
        serve()
    assert not getattr(span, "calls", None)
    assert sdk.points("veltrix.lookup.duration") == {}
    assert sdk.spans() == []


@pytest.mark.parametrize("interface", ["ASGI", "WSGI"])
def test_what_a_request_waited_for_lazy_units_is_part_of_what_config_cost_it(interface: str, stack: ExitStack) -> None:
    sdk = Sdk()
    client = client_of(stack, sdk, "requests", lazy=("tenants/",))
    with sdk.app.start_as_current_span("GET /"):
        serving(interface, client, layers=lambda _: ["tenants/acme/"])()
    [fetch] = [span for span in sdk.spans("veltrix.fetch") if "veltrix.prefix" in (span.attributes or {})]
    request = sdk.span("GET /")
    assert fetch.parent is not None
    assert fetch.parent.span_id == request.context.span_id
    assert request.attributes is not None
    assert 1e9 * request.attributes["veltrix.lookup.total"] >= fetch.end_time - fetch.start_time  # type: ignore[operator]
    assert request.attributes["veltrix.lookup.count"] == 10


def test_the_exemplar_names_the_request_also_when_its_body_is_closed_after_its_span(stack: ExitStack) -> None:
    sdk = Sdk()
    client = client_of(stack, sdk, "requests")

    def app(_environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        yield current_view()["k"]

    with sdk.app.start_as_current_span("GET /") as span:
        body: Any = wsgi.ConfigMiddleware(app, client=client)({}, lambda *_: lambda _: None)
        assert list(body) == [1]
    body.close()
    (point,) = sdk.metrics()["veltrix.lookup.duration"].data.data_points
    assert [exemplar.span_id for exemplar in point.exemplars] == [span.get_span_context().span_id]
