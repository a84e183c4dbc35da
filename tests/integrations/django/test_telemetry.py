"""Telemetry: the server's span tells once what config cost a request, and the histogram has one record of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, Client
from opentelemetry.instrumentation.django import DjangoInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

from django_veltrix import config
from veltrix_mw import ConfigClient

MIDDLEWARE = "django_veltrix.ConfigMiddleware"


class Ended(SpanProcessor):
    """Every span that ended, as it was then."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)

    def one(self, name: str) -> dict[str, Any]:
        found = [span for span in self.spans if span.name == name]
        assert len(found) == 1, [span.name for span in self.spans]
        return dict(found[0].attributes or {})


class Told:
    """What OpenTelemetry was told in one test."""

    def __init__(self) -> None:
        self.ended = Ended()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(self.ended)
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader])

    def client(self) -> ConfigClient:
        return ConfigClient("memory://", tracer_provider=self.tracers, meter_provider=self.meters)

    def close(self) -> None:
        self.tracers.shutdown()
        self.meters.shutdown()

    def recorded(self) -> int:
        """How many requests `veltrix.lookup.duration` has."""
        data = self._reader.get_metrics_data()
        points = [
            point
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == "veltrix.lookup.duration"
            for point in metric.data.data_points
        ]
        return sum(point.count for point in points)


@pytest.fixture
def told() -> Iterator[Told]:
    told = Told()
    yield told
    told.close()


@pytest.fixture
def instrumented(told, site) -> Iterator[Told]:
    """Django under its own instrumentation; ask for it after `site` has set MIDDLEWARE."""
    yield told
    if DjangoInstrumentor().is_instrumented_by_opentelemetry:
        DjangoInstrumentor().uninstrument()


def instrument(told: Told) -> None:
    DjangoInstrumentor().instrument(tracer_provider=told.tracers, meter_provider=told.meters)


def view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"{request.config['greeting']} {config.get('other')} {'greeting' in config}")


async def async_view(request: HttpRequest) -> HttpResponse:
    return view(request)


def get(path: str = "/") -> Any:
    return Client(raise_request_exception=False).get(path)


def aget(path: str = "/") -> Any:
    return async_to_sync(AsyncClient(raise_request_exception=False).get)(path)


@pytest.mark.parametrize("fetch", [get, aget])
@pytest.mark.parametrize("handler", [view, async_view], ids=["sync", "async"])
def test_the_servers_span_tells_of_a_request_once(site, put, told, fetch, handler):
    client = site(handler, veltrix={"CLIENT": told.client})
    revision = put(client, "greeting", "hello")
    with told.tracers.get_tracer("server").start_as_current_span("server"):
        assert fetch().content == b"hello None True"
    attributes = told.ended.one("server")
    assert attributes.pop("veltrix.lookup.total") > 0
    assert attributes == {
        "veltrix.revision": revision,
        "veltrix.origin": "memory",
        "veltrix.stale": False,
        "veltrix.lookup.count": 3,
    }
    assert told.recorded() == 1


def test_listed_twice_the_span_counts_each_read_once(site, put, told):
    client = site(view, veltrix={"CLIENT": told.client}, MIDDLEWARE=[MIDDLEWARE, MIDDLEWARE])
    put(client, "greeting", "hello")
    with told.tracers.get_tracer("server").start_as_current_span("server"):
        get()
    assert told.ended.one("server")["veltrix.lookup.count"] == 3
    assert told.recorded() == 1


def test_without_a_span_nothing_is_recorded(site, put, told):
    put(site(view, veltrix={"CLIENT": told.client}), "greeting", "hello")
    get()
    assert told.recorded() == 0


def parts(request: HttpRequest) -> Iterator[bytes]:
    yield str(config["greeting"]).encode()
    yield str(config["greeting"]).encode()


async def parts_async(request: HttpRequest) -> AsyncIterator[bytes]:
    yield str(config["greeting"]).encode()
    yield str(config["greeting"]).encode()


def test_a_streamed_bodys_reads_are_told_when_it_is_closed_and_recorded_once(site, put, told):
    client = site(lambda request: StreamingHttpResponse(parts(request)), veltrix={"CLIENT": told.client})
    put(client, "greeting", "hello")
    with told.tracers.get_tracer("server").start_as_current_span("server"):
        response = get()
        assert told.recorded() == 0
        assert b"".join(response) == b"hellohello"
        response.close()
        response.close()
    assert told.ended.one("server")["veltrix.lookup.count"] == 2
    assert told.recorded() == 1


def test_an_async_bodys_reads_are_told_when_it_is_closed_and_recorded_once(site, put, told):
    client = site(lambda request: StreamingHttpResponse(parts_async(request)), veltrix={"CLIENT": told.client})
    put(client, "greeting", "hello")

    async def run() -> None:
        with told.tracers.get_tracer("server").start_as_current_span("server"):
            response = await AsyncClient().get("/")
            assert [part async for part in response] == [b"hello", b"hello"]
            response.close()

    asyncio.run(run())
    assert told.ended.one("server")["veltrix.lookup.count"] == 2
    assert told.recorded() == 1


# Under Django's own instrumentation


@pytest.mark.parametrize("fetch", [get, aget])
@pytest.mark.parametrize("handler", [view, async_view], ids=["sync", "async"])
def test_djangos_own_instrumentation_gets_the_attributes_on_its_span(site, put, instrumented, fetch, handler):
    client = site(handler, veltrix={"CLIENT": instrumented.client}, MIDDLEWARE=[MIDDLEWARE])
    instrument(instrumented)
    revision = put(client, "greeting", "hello")
    assert fetch().content == b"hello None True"
    attributes = instrumented.ended.one("GET")
    assert (attributes["veltrix.revision"], attributes["veltrix.lookup.count"]) == (revision, 3)
    assert instrumented.recorded() == 1


@pytest.mark.parametrize("fetch", [get, aget])
def test_a_stream_is_on_the_instrumentations_span_that_ends_before_the_body_does(site, put, instrumented, fetch):
    def streamed(request: HttpRequest) -> StreamingHttpResponse:
        assert request.config["greeting"] == "hello"
        return StreamingHttpResponse((parts if fetch is get else parts_async)(request))

    client = site(streamed, veltrix={"CLIENT": instrumented.client}, MIDDLEWARE=[MIDDLEWARE])
    instrument(instrumented)
    revision = put(client, "greeting", "hello")
    response = fetch()
    attributes = instrumented.ended.one("GET")
    assert (attributes["veltrix.revision"], attributes["veltrix.lookup.count"]) == (revision, 1)
    if fetch is get:
        b"".join(response)
    response.close()
    assert instrumented.recorded() == 1


@pytest.mark.parametrize("fetch", [get, aget])
def test_a_view_that_raises_is_told_of_too(site, put, instrumented, fetch):
    def fails(request: HttpRequest) -> HttpResponse:
        raise RuntimeError(config["greeting"])

    client = site(fails, veltrix={"CLIENT": instrumented.client}, MIDDLEWARE=[MIDDLEWARE])
    instrument(instrumented)
    put(client, "greeting", "hello")
    assert fetch().status_code == 500
    assert instrumented.ended.one("GET")["veltrix.lookup.count"] == 1
    assert instrumented.recorded() == 1


def test_level_off_tells_nothing(site, put, instrumented):
    def client() -> ConfigClient:
        return ConfigClient("memory://", telemetry="off", meter_provider=instrumented.meters)

    put(site(view, veltrix={"CLIENT": client}, MIDDLEWARE=[MIDDLEWARE]), "greeting", "hello")
    instrument(instrumented)
    get()
    assert not [name for name in instrumented.ended.one("GET") if name.startswith("veltrix.")]
    assert instrumented.recorded() == 0
