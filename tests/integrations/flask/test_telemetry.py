"""Telemetry: the server span says what config cost, once, whoever instrumented the app first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import flask
import pytest
from flask import Flask, Response, current_app, g
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind

from flask_veltrix import Veltrix, config
from tests.integrations.flask.conftest import change
from veltrix_mw import ConfigClient, current_view


@dataclass
class Told:
    """What OpenTelemetry was told."""

    tracer_provider: TracerProvider
    meter_provider: MeterProvider
    exporter: InMemorySpanExporter
    reader: InMemoryMetricReader
    client: ConfigClient

    @property
    def spans(self) -> list[ReadableSpan]:
        """The requests' spans."""
        return [span for span in self.exporter.get_finished_spans() if not span.name.startswith("veltrix.")]

    @property
    def records(self) -> int:
        """How often the histogram of requests was recorded."""
        data = self.reader.get_metrics_data()
        return sum(
            point.count
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == "veltrix.lookup.duration"
            for point in metric.data.data_points
        )

    def counts(self) -> list[Any]:
        """The lookups that each span tells, None for a span that tells nothing."""
        return [(span.attributes or {}).get("veltrix.lookup.count") for span in self.spans]


def telling(**options: Any) -> Iterator[Told]:
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(**options), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    with ConfigClient("memory://", tracer_provider=tracers, meter_provider=meters) as client:
        client.wait_ready()
        change(client, {"limit": 1, "tenants/acme/limit": 10})
        exporter.clear()
        yield Told(tracers, meters, exporter, reader, client)
    meters.shutdown()
    tracers.shutdown()


@pytest.fixture
def told() -> Iterator[Told]:
    yield from telling()


def get(app: Flask, path: str) -> Any:
    """A request whose body is read and closed, as servers do."""
    return app.test_client().get(path, buffered=True)


def index() -> str:
    return f"{config['limit']} {g.config['limit']} {current_view()['limit']}"


def stream() -> Response:
    return Response(str(config["limit"]) for _ in range(2))


def fail() -> str:
    raise ZeroDivisionError(config["limit"])


def read_early() -> None:
    config["limit"]


Order = Callable[..., Flask]
Hook = Callable[[], Any] | None


def veltrix_first(told: Told, *, hook: Hook = None, **options: Any) -> Flask:
    return make_app(told, "veltrix", hook or "", "otel", **options)


def otel_first(told: Told, *, hook: Hook = None, **options: Any) -> Flask:
    return make_app(told, "otel", hook or "", "veltrix", **options)


def otel_replaces_flask(told: Told, *, hook: Hook = None, **options: Any) -> Flask:
    instrumentor = FlaskInstrumentor()
    instrumentor.instrument(tracer_provider=told.tracer_provider, meter_provider=told.meter_provider)
    try:
        return make_app(told, hook or "", "veltrix", **options)
    finally:
        instrumentor.uninstrument()


def make_app(told: Told, *steps: Any, **options: Any) -> Flask:
    app = flask.Flask(__name__)  # by this name the instrumentor replaces it
    for step in steps:
        match step:
            case "veltrix":
                Veltrix(app, client=told.client, **options)
            case "otel":
                FlaskInstrumentor.instrument_app(
                    app, tracer_provider=told.tracer_provider, meter_provider=told.meter_provider
                )
            case hook if callable(hook):
                app.before_request(hook)
    for view in (index, stream, fail):
        app.add_url_rule(f"/{view.__name__}", view_func=view)
    return app


ORDERS = pytest.mark.parametrize("make", [veltrix_first, otel_first, otel_replaces_flask])


@ORDERS
def test_the_server_span_tells_what_the_request_read(make: Order, told: Told) -> None:
    app = make(told)
    for _ in range(2):
        assert get(app, "/index").text == "1 1 1"
    assert told.counts() == [3, 3]
    for span in told.spans:
        attributes = span.attributes or {}
        assert span.kind is SpanKind.SERVER
        assert attributes["veltrix.revision"] == told.client.snapshot.revision
        assert attributes["veltrix.origin"] == "memory"
        assert attributes["veltrix.stale"] is False
        assert 0 < attributes["veltrix.lookup.total"] < 60  # type: ignore[operator]
        assert attributes["http.route"] == "/index"
    assert told.records == 2


@ORDERS
def test_reads_below_layers_are_counted(make: Order, told: Told) -> None:
    app = make(told, layers=lambda _: ["tenants/acme/"])
    assert get(app, "/index").text == "10 10 10"
    assert get(app, "/stream").text == "1010"
    assert told.counts()[0] == 3
    assert told.records == 2


@ORDERS
def test_a_request_that_fails_or_is_not_found_tells_too(make: Order, told: Told) -> None:
    app = make(told)
    assert get(app, "/fail").status_code == 500
    assert get(app, "/no-such-route").status_code == 404
    assert told.counts() == [1, 0]
    assert told.records == 2


@ORDERS
def test_an_error_that_leaves_the_app_is_told_too(make: Order, told: Told) -> None:
    app = make(told)
    app.testing = True
    with pytest.raises(ZeroDivisionError):
        get(app, "/fail")
    assert told.counts() == [1]
    assert told.records == 1


@ORDERS
def test_a_streamed_body_is_recorded_when_it_ends_though_its_span_ended_before(make: Order, told: Told) -> None:
    answer = make(told).test_client().get("/stream")
    assert told.records == 0
    assert answer.text == "11"
    answer.close()
    assert told.counts() == [0]  # the span ended before the body began
    assert told.records == 1


@ORDERS
def test_hooks_between_the_two_are_counted_as_far_as_the_span_has_begun(make: Order, told: Told) -> None:
    app = make(told, hook=read_early)
    get(app, "/index")
    get(app, "/index")
    assert told.counts() == ([3, 3] if make is veltrix_first else [4, 4])
    assert told.records == 2


@ORDERS
def test_hooks_between_the_two_read_below_layers(make: Order, told: Told) -> None:
    seen: list[int] = []
    app = make(told, hook=lambda: seen.append(g.config["limit"]), layers=lambda _: ["tenants/acme/"])
    get(app, "/index")
    get(app, "/index")
    assert seen == [10, 10]


@pytest.mark.parametrize("make", [otel_first, otel_replaces_flask])
def test_a_body_that_a_middleware_gathered_is_told_once(make: Order, told: Told) -> None:
    app = make(told)
    inside = app.wsgi_app.app._app  # type: ignore[attr-defined]

    def gathering(environ: Any, start_response: Any) -> list[bytes]:
        with closing(inside(environ, start_response)) as body:
            return [*body]

    app.wsgi_app.app._app = gathering  # type: ignore[attr-defined]
    assert get(app, "/index").text == "1 1 1"
    assert told.records == 1


def test_a_read_of_layers_itself_is_counted(told: Told) -> None:
    app = make_app(told, "veltrix", layers=lambda _: ["tenants/acme/"] if config["limit"] else [])
    with told.tracer_provider.get_tracer("app").start_as_current_span("request"), app.test_request_context("/index"):
        app.full_dispatch_request()
    assert told.counts() == [4]


@ORDERS
def test_a_request_that_an_earlier_hook_answered_tells_its_revision(make: Order, told: Told) -> None:
    app = make(told)
    app.before_request_funcs[None].insert(0, lambda: "no")
    app.before_request(lambda: pytest.fail("answered before"))
    get(app, "/index")
    assert told.records == len(told.spans)  # as many as the instrumentation began


@ORDERS
def test_without_wsgi_the_span_tells_once(make: Order, told: Told) -> None:
    app = make(told)
    with app.test_request_context("/index"):
        app.full_dispatch_request()
    with app.test_request_context("/index"):
        app.full_dispatch_request()
    assert told.counts()[-1] == 3
    assert told.records == 2


def test_a_span_that_the_app_itself_begins_in_a_hook_tells_the_revision(told: Told) -> None:
    app = make_app(told, "veltrix")
    tracer = told.tracer_provider.get_tracer("app")

    @app.before_request
    def begin() -> None:
        g.span = tracer.start_as_current_span("request", kind=SpanKind.SERVER)
        g.span.__enter__()

    app.teardown_request(lambda _: g.span.__exit__(None, None, None))  # type: ignore[arg-type]
    get(app, "/index")
    assert (told.spans[0].attributes or {})["veltrix.revision"] == told.client.snapshot.revision
    assert told.records == 1


@pytest.mark.parametrize("layers", [None, lambda _: ["tenants/acme/"]])
@pytest.mark.parametrize("instrumented", [True, False])
def test_a_server_span_of_the_wsgi_server_tells_the_whole_body_and_no_inner_span_repeats_it(
    told: Told, instrumented: bool, layers: Any
) -> None:
    app = make_app(told, "veltrix", "otel" if instrumented else "", layers=layers)
    app.wsgi_app = OpenTelemetryMiddleware(  # type: ignore[method-assign]
        app.wsgi_app, tracer_provider=told.tracer_provider, meter_provider=told.meter_provider
    )
    assert get(app, "/stream").text == ("1010" if layers else "11")
    assert get(app, "/index").text == ("10 10 10" if layers else "1 1 1")
    counts = {(span.kind, count) for span, count in zip(told.spans, told.counts(), strict=True)}
    inner = {(SpanKind.INTERNAL, None)} if instrumented else set()
    assert counts == {(SpanKind.SERVER, 2), (SpanKind.SERVER, 3)} | inner
    assert told.records == 2


@pytest.fixture
def sampled_out() -> Iterator[Told]:
    yield from telling(sampler=ALWAYS_OFF)


def test_what_does_not_record_counts_nothing(sampled_out: Told) -> None:
    app = veltrix_first(sampled_out)
    app.add_url_rule("/kind", view_func=lambda: type(g.config).__name__)
    assert get(app, "/kind").text == type(sampled_out.client.view()).__name__
    assert sampled_out.records == 0


def test_the_hooks_stand_by_the_apps_own_functions_whatever_their_number(told: Told) -> None:
    app = veltrix_first(told)
    own = [lambda: None for _ in range(3)]
    for hook in own:
        app.before_request(hook)
    get(app, "/index")
    get(app, "/index")
    hooks = app.before_request_funcs[None]
    assert [hook for hook in hooks if hook in own] == own
    assert len(hooks) == 6  # ours are two, OpenTelemetry's is one
    assert hooks.index(current_before_request(app)) < hooks.index(own[0])


def current_before_request(app: Flask) -> Any:
    with app.app_context():
        return current_app._before_request  # type: ignore[attr-defined]
