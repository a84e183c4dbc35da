"""An SDK that fails, whatever fails in it: config comes, writes are what they are, and the log says so once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import Sampler

from tests.support.sdk import Sdk
from tests.test_request_cost import serving
from veltrix_mw import ConfigClient

WITHIN_S = 20.0


class Boom(Exception):
    pass


def boom(*_: Any, **__: Any) -> Any:
    raise Boom


def of_processor(method: str) -> TracerProvider:
    class Failing(SpanProcessor):
        pass

    setattr(Failing, method, boom)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Failing())
    return provider


def of_sampler() -> TracerProvider:
    class Failing(Sampler):
        should_sample = boom

        def get_description(self) -> str:
            return "failing"

    return TracerProvider(sampler=Failing(), shutdown_on_exit=False)


def of_meters(**failing: Callable[..., Any]) -> MeterProvider:
    provider = MeterProvider(shutdown_on_exit=False)
    for name, method in failing.items():
        setattr(provider, name, method)
    return provider


PROVIDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "on_start": lambda: {"tracer_provider": of_processor("on_start")},
    "on_end": lambda: {"tracer_provider": of_processor("on_end")},
    "sampler": lambda: {"tracer_provider": of_sampler()},
    "meter": lambda: {"meter_provider": of_meters(get_meter=boom)},
    "no meter": lambda: {"meter_provider": of_meters(get_meter=lambda *_, **__: None)},
}


@pytest.fixture(params=PROVIDERS)
def client(request: pytest.FixtureRequest) -> Iterator[ConfigClient]:
    with ConfigClient("memory://", lazy=("tenants/",), telemetry="lookups", **PROVIDERS[request.param]()) as client:
        yield client


def test_config_comes_and_a_write_is_acknowledged(client: ConfigClient, caplog: pytest.LogCaptureFixture) -> None:
    sdk = Sdk()
    with caplog.at_level(logging.ERROR, logger="veltrix_mw"):
        client.wait_for(client.put("k", 1), WITHIN_S)
        client.wait_for(client.put("tenants/acme/k", 2), WITHIN_S)
        with sdk.app.start_as_current_span("GET /"):
            for interface in ("ASGI", "WSGI"):
                serving(interface, client, layers=lambda _: ["tenants/acme/"])()
            with client.pinned() as view:
                assert view.fetch("tenants/acme/k") == 2
    told = [record.getMessage() for record in caplog.get_records("setup") + caplog.records]
    failures = [each for each in told if each.startswith("veltrix.telemetry_failed")]
    assert len(failures) == 1, "once, and then not again for a while"
    assert "error=" in failures[0]


def test_a_span_of_the_request_that_fails_harms_nobody() -> None:
    class Failing(trace.NonRecordingSpan):
        def is_recording(self) -> bool:
            return True

        set_attributes = set_attribute = add_event = set_status = boom

    with ConfigClient("memory://") as client:
        client.wait_for(client.put("k", 1), WITHIN_S)
        with trace.use_span(Failing(trace.SpanContext(1, 1, is_remote=False))):
            serving("ASGI", client)()
            serving("WSGI", client)()
