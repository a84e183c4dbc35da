"""What telemetry emits, level by level: exact spans, parents, links, attributes and metric points."""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import baggage, trace
from opentelemetry import context as otel_context
from opentelemetry.metrics import MeterProvider as ApiMeterProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace import TracerProvider as ApiTracerProvider

from tests.support.sdk import Sdk
from veltrix_mw import instruments
from veltrix_mw import telemetry as module
from veltrix_mw.errors import HeldBack, KeyMissing, NotReady, SettingsError, StoreUnavailable
from veltrix_mw.instruments import Observed
from veltrix_mw.telemetry import LEVELS, MAX_LINKS, FetchOutcome, Telemetry

SOURCE = Path(module.__file__).parents[1]
INSTRUMENTS = {
    "veltrix.lookup.duration": "s",
    "veltrix.fetch.duration": "s",
    "veltrix.refresh.duration": "s",
    "veltrix.propagation.duration": "s",
    "veltrix.views": "{view}",
    "veltrix.rejected": "{change}",
    "veltrix.layers.dropped": "{layer}",
    "veltrix.fetches": "{fetch}",
    "veltrix.reconnects": "{reconnect}",
    "veltrix.failovers": "{failover}",
    "veltrix.snapshot.age": "s",
    "veltrix.snapshot.revision": "{revision}",
    "veltrix.snapshot.entries": "{entry}",
    "veltrix.lazy.entries": "{entry}",
    "veltrix.relay.held": "{relay}",
}
LOOKUP_BUCKETS = (1e-6, 5e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.05, 0.1, 0.5, 1, 5)
REFRESH_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
PROPAGATION_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60)
REQUEST: dict[str, Any] = {"revision": 41, "origin": "sqlite", "stale": False, "count": 3, "total_s": 0.002}
COST: dict[str, Any] = {"origin": "sqlite", "total_s": 0.002}
REQUEST_ATTRIBUTES = {
    "veltrix.revision": 41,
    "veltrix.origin": "sqlite",
    "veltrix.stale": False,
    "veltrix.lookup.count": 3,
    "veltrix.lookup.total": 0.002,
}


@pytest.fixture
def sdk() -> Iterator[Sdk]:
    made = Sdk()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """OpenTelemetry logs what it is told wrongly; it has nothing to say here."""
    caplog.set_level(logging.WARNING)
    yield
    assert [record.getMessage() for record in caplog.get_records("call")] == []


CONFIRMED = Observed(1.5, 41, 7)


@dataclass(eq=False)
class Client:
    """What a client shows."""

    namespace: str = "shop"
    views: int = 0
    reconnects: int = 0
    failovers: int = 0
    rejections: int = 0
    dropped_layers: int = 0
    fetches: dict[str, int] = field(default_factory=lambda: {"hit": 4, "miss": 1})
    lazy_entries: int | None = 5
    relay_held: int | None = 1
    now: Observed | Exception = CONFIRMED

    def observe(self) -> Observed:
        if isinstance(self.now, Exception):
            raise self.now
        return self.now


def of(namespace: str) -> tuple[tuple[str, Any], ...]:
    return (("veltrix.namespace", namespace),)


def use_everything(telemetry: Telemetry, span: trace.Span) -> None:
    telemetry.recording_span()
    telemetry.annotate_request(span, **REQUEST)
    telemetry.record_request(trace.set_span_in_context(span), **COST)
    with telemetry.lookup("a/b"):
        pass
    with telemetry.fetch(FetchOutcome("miss"), {"veltrix.unit_count": 1}):
        pass
    with telemetry.refresh("list", "sqlite", links=[PARENT]) as refreshed:
        refreshed.revision = 1
    telemetry.propagated(1.0, 2.0)
    with telemetry.write() as written:
        written.revision = 2


PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


# Levels


def test_an_unknown_level_is_refused_with_the_levels_there_are() -> None:
    with pytest.raises(SettingsError, match=r"telemetry='loud' .* off, requests, lookups"):
        Telemetry("loud")


def test_the_default_level_is_requests() -> None:
    assert Telemetry().level == "requests"
    assert LEVELS == ("off", "requests", "lookups")


class Untouchable(ApiTracerProvider, ApiMeterProvider):
    """A provider that must not be asked for anything."""

    def get_tracer(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a tracer was made")

    def get_meter(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a meter was made")


@pytest.mark.parametrize("level", LEVELS)
def test_constructing_creates_nothing(level: str) -> None:
    Telemetry(level, tracer_provider=Untouchable(), meter_provider=Untouchable())


def test_at_level_off_nothing_is_emitted_created_or_registered(sdk: Sdk) -> None:
    telemetry = Telemetry("off", tracer_provider=Untouchable(), meter_provider=Untouchable())
    client = Client()
    with sdk.app.start_as_current_span("GET /") as span:
        use_everything(telemetry, span)
        telemetry.observe(client)
        assert telemetry.recording_span() is None
        assert telemetry.traceparent() == ""
        with telemetry.write(), telemetry.refresh("list", "sqlite"):
            assert trace.get_current_span() is span
    assert sdk.span("GET /").attributes == {}


def test_at_level_requests_there_is_a_span_for_what_blocks_and_none_for_a_read(sdk: Sdk) -> None:
    with sdk.app.start_as_current_span("GET /") as span:
        use_everything(sdk.telemetry("requests"), span)
    assert [span.name for span in sdk.spans()] == ["veltrix.fetch", "veltrix.refresh", "veltrix.write", "GET /"]


def test_at_level_lookups_a_read_has_its_span_too(sdk: Sdk) -> None:
    with sdk.app.start_as_current_span("GET /") as span:
        use_everything(sdk.telemetry("lookups"), span)
    assert [span.name for span in sdk.spans()] == [
        "veltrix.lookup",
        "veltrix.fetch",
        "veltrix.refresh",
        "veltrix.write",
        "GET /",
    ]


# Requests


def test_recording_span_is_the_current_span_while_it_records(sdk: Sdk) -> None:
    telemetry = sdk.telemetry()
    assert telemetry.recording_span() is None
    with sdk.app.start_as_current_span("GET /", end_on_exit=False) as span:
        assert telemetry.recording_span() is span
        span.end()
        assert telemetry.recording_span() is None
    with Sdk(ALWAYS_OFF).app.start_as_current_span("GET /"):
        assert telemetry.recording_span() is None


@pytest.mark.parametrize("is_known", [True, False])
def test_recording_span_takes_that_of_a_context_by_the_apis_own_key_for_it_or_without(
    is_known: bool, sdk: Sdk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module._SPAN_KEY is not None
    if not is_known:
        monkeypatch.setattr(module, "_SPAN_KEY", None)
    telemetry = sdk.telemetry()
    span = sdk.app.start_span("GET /")
    with sdk.app.start_as_current_span("another"):
        assert telemetry.recording_span(trace.set_span_in_context(span)) is span
        assert telemetry.recording_span(otel_context.Context()) is None
        span.end()
        assert telemetry.recording_span(trace.set_span_in_context(span)) is None


def test_a_request_is_five_attributes_on_its_span_and_one_histogram_record(sdk: Sdk) -> None:
    with sdk.app.start_as_current_span("GET /") as span:
        sdk.telemetry().annotate_request(span, **REQUEST)
        sdk.telemetry().record_request(trace.set_span_in_context(span), **COST)
    assert sdk.span("GET /").attributes == REQUEST_ATTRIBUTES
    assert sdk.points("veltrix.lookup.duration") == {(("veltrix.origin", "sqlite"),): (1, 0.002)}
    assert sdk.points("veltrix.refresh.duration") == {}


def test_a_request_may_be_annotated_again(sdk: Sdk) -> None:
    telemetry = sdk.telemetry()
    with sdk.app.start_as_current_span("GET /") as span:
        telemetry.annotate_request(span, **REQUEST)
        telemetry.annotate_request(span, **{**REQUEST, "count": 4})
    assert sdk.span("GET /").attributes == {**REQUEST_ATTRIBUTES, "veltrix.lookup.count": 4}
    assert sdk.points("veltrix.lookup.duration") == {}


def test_a_request_whose_span_has_ended_is_still_counted(sdk: Sdk) -> None:
    telemetry = sdk.telemetry()
    with sdk.app.start_as_current_span("GET /") as span:
        pass
    telemetry.annotate_request(span, **REQUEST)  # an attribute set now would be logged as a mistake
    telemetry.record_request(trace.set_span_in_context(span), **COST)
    assert sdk.span("GET /").attributes == {}
    assert sdk.points("veltrix.lookup.duration") == {(("veltrix.origin", "sqlite"),): (1, 0.002)}


def test_the_exemplar_names_the_request_also_when_its_span_is_no_longer_current(sdk: Sdk) -> None:
    span = sdk.app.start_span("GET /")
    sdk.telemetry().record_request(trace.set_span_in_context(span), **COST)
    span.end()
    (point,) = sdk.metrics()["veltrix.lookup.duration"].data.data_points
    assert [exemplar.span_id for exemplar in point.exemplars] == [span.get_span_context().span_id]


# Lookups


def test_a_lookup_is_a_child_of_the_current_span(sdk: Sdk) -> None:
    with sdk.app.start_as_current_span("GET /") as request, sdk.telemetry("lookups").lookup("checkout/max_items"):
        assert trace.get_current_span() is request
    span = sdk.span("veltrix.lookup")
    assert span.kind is SpanKind.INTERNAL
    assert span.parent is not None
    assert span.parent.span_id == request.get_span_context().span_id
    assert span.attributes == {"veltrix.key": "checkout/max_items", "veltrix.result": "hit"}
    assert span.status.status_code is StatusCode.UNSET


def test_a_lookup_that_the_caller_calls_a_miss_is_one(sdk: Sdk) -> None:
    with sdk.telemetry("lookups").lookup("a") as outcome:
        outcome.result = "miss"
    assert sdk.span("veltrix.lookup").attributes == {"veltrix.key": "a", "veltrix.result": "miss"}


def test_key_missing_is_a_miss_and_no_error(sdk: Sdk) -> None:
    with pytest.raises(KeyMissing), sdk.telemetry("lookups").lookup("a"):
        raise KeyMissing("there is no key a")
    span = sdk.span("veltrix.lookup")
    assert span.attributes == {"veltrix.key": "a", "veltrix.result": "miss"}
    assert span.status.status_code is StatusCode.UNSET
    assert span.events == ()


@pytest.mark.parametrize("error", [HeldBack("a was rejected"), NotReady("nothing was listed yet")])
def test_another_exception_is_an_error_of_the_lookup(sdk: Sdk, error: Exception) -> None:
    with pytest.raises(type(error)), sdk.telemetry("lookups").lookup("a"):
        raise error
    span = sdk.span("veltrix.lookup")
    assert span.attributes == {"veltrix.key": "a", "veltrix.result": "error", "error.type": type(error).__name__}
    assert span.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize(
    ("asked", "shown"), [("k" * 5000, "k" * 512), ("caf\xe9/\ud800", "caf\\xe9/\\ud800"), (5, "5")]
)
def test_whatever_key_is_asked_for_the_span_can_carry_it(sdk: Sdk, asked: Any, shown: str) -> None:
    with sdk.telemetry("lookups").lookup(asked):
        pass
    assert sdk.span("veltrix.lookup").attributes == {"veltrix.key": shown, "veltrix.result": "hit"}


# Refreshes


# Fetches


def test_a_fetch_is_a_child_of_the_current_span_and_says_how_it_came_by_its_units(sdk: Sdk) -> None:
    telemetry, outcome = sdk.telemetry(), FetchOutcome()
    with sdk.app.start_as_current_span("GET /") as outer:
        with telemetry.fetch(outcome, {"veltrix.unit_count": 3}):
            outcome.result, outcome.origin = "miss", "etcd"
            assert trace.get_current_span() is outer
        failed = FetchOutcome("error", StoreUnavailable("the store is away"))
        with telemetry.fetch(failed, {"veltrix.unit_count": 1}):
            pass
    one, other = sdk.spans("veltrix.fetch")
    assert one.parent == outer.get_span_context()
    assert one.attributes == {"veltrix.unit_count": 3, "veltrix.result": "miss", "veltrix.origin": "etcd"}
    assert one.status.status_code is StatusCode.UNSET
    assert other.attributes == {
        "veltrix.unit_count": 1, "veltrix.result": "error", "error.type": "StoreUnavailable",
    }  # fmt: skip
    assert other.status.status_code is StatusCode.ERROR
    assert set(sdk.points("veltrix.fetch.duration")) == {
        (("veltrix.origin", "etcd"), ("veltrix.result", "miss")),
        (("veltrix.result", "error"),),
    }


def test_fetches_of_several_clients_are_summed_by_namespace_and_result(sdk: Sdk) -> None:
    clients = [Client(), Client(fetches={"miss": 2}), Client(namespace="other", fetches={})]
    for client in clients:
        sdk.telemetry().observe(client)
    shop = of("shop")
    assert sdk.points("veltrix.fetches") == {
        (*shop, ("veltrix.result", "hit")): 4,
        (*shop, ("veltrix.result", "miss")): 3,
    }


def test_a_refresh_is_a_new_root_also_within_a_request(sdk: Sdk) -> None:
    telemetry = sdk.telemetry()
    token = otel_context.attach(baggage.set_baggage("user", "ada"))
    with sdk.app.start_as_current_span("GET /") as request:
        with telemetry.refresh("batch", "sqlite") as outcome:
            assert baggage.get_all() == {}
            with sdk.app.start_as_current_span("store"):
                pass
            outcome.revision, outcome.changes = 42, 3
        assert trace.get_current_span() is request
        assert baggage.get_all() == {"user": "ada"}
    otel_context.detach(token)
    span = sdk.span("veltrix.refresh")
    assert span.parent is None
    assert span.context.trace_id != request.get_span_context().trace_id
    assert span.kind is SpanKind.INTERNAL
    assert span.links == ()
    assert span.attributes == {
        "veltrix.refresh.kind": "batch",
        "veltrix.origin": "sqlite",
        "veltrix.revision": 42,
        "veltrix.changes": 3,
    }
    assert sdk.span("store").parent == span.context


def test_the_duration_of_a_refresh_is_in_seconds_and_recorded_once(sdk: Sdk) -> None:
    telemetry = sdk.telemetry()
    before = time.perf_counter()
    with telemetry.refresh("list", "sqlite"):
        sum(range(10_000))
    whole_s = time.perf_counter() - before
    (point,) = sdk.metrics()["veltrix.refresh.duration"].data.data_points
    assert (point.attributes, point.count) == ({}, 1)
    assert 0 < point.sum <= whole_s
    assert [exemplar.span_id for exemplar in point.exemplars] == [sdk.span("veltrix.refresh").context.span_id]


def test_a_refresh_that_failed_says_so_and_has_no_duration(sdk: Sdk) -> None:
    with pytest.raises(StoreUnavailable), sdk.telemetry().refresh("list", "sqlite"):
        raise StoreUnavailable("the database is locked")
    span = sdk.span("veltrix.refresh")
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes == {
        "veltrix.refresh.kind": "list",
        "veltrix.origin": "sqlite",
        "error.type": "StoreUnavailable",
    }
    assert sdk.points("veltrix.refresh.duration") == {}


def test_a_refresh_links_to_the_writes_it_applied(sdk: Sdk) -> None:
    telemetry = sdk.telemetry()
    told = []
    for _ in range(2):
        with telemetry.write():
            told.append(telemetry.traceparent())
    with telemetry.refresh("batch", "sqlite", links=told):
        pass
    written = [(span.context.trace_id, span.context.span_id) for span in sdk.spans("veltrix.write")]
    assert [(link.context.trace_id, link.context.span_id) for link in sdk.span("veltrix.refresh").links] == written


def test_malformed_traceparents_are_ignored(sdk: Sdk) -> None:
    malformed = [
        "",
        "x",
        PARENT[:-3],
        PARENT.replace("01234567", "00000000x"),
        f"00-{'0' * 32}-{'0' * 16}-01",
        "ff" + PARENT[2:],
    ]
    with sdk.telemetry().refresh("batch", "sqlite", links=[*malformed, PARENT, *malformed]):
        pass
    (link,) = sdk.span("veltrix.refresh").links
    assert (link.context.trace_id, link.context.span_id) == (0x0123456789ABCDEF0123456789ABCDEF, 0x0123456789ABCDEF)


def test_a_burst_links_to_its_newest_changes_only(sdk: Sdk) -> None:
    told = [f"00-{'1' * 32}-{number:016x}-01" for number in range(1, 101)]
    with sdk.telemetry().refresh("batch", "sqlite", links=told):
        pass
    linked = [link.context.span_id for link in sdk.span("veltrix.refresh").links]
    assert len(linked) == MAX_LINKS == 32
    assert linked == list(range(69, 101))


def test_a_sampler_sees_the_links_and_what_is_known_at_the_start() -> None:
    seen: list[tuple[Any, Any]] = []

    class Watching(Sampler):
        def should_sample(self, parent_context: Any, trace_id: int, name: str, *more: Any, **kw: Any) -> Any:
            _, attributes, links = more[:3]
            seen.append((dict(attributes), len(links)))
            return ALWAYS_ON.should_sample(parent_context, trace_id, name, *more, **kw)

        def get_description(self) -> str:
            return "watching"

    with Sdk(Watching()).telemetry().refresh("batch", "sqlite", links=["malformed", PARENT]):
        pass
    assert seen == [({"veltrix.refresh.kind": "batch", "veltrix.origin": "sqlite"}, 1)]


@pytest.mark.parametrize(
    ("written_at_s", "now_s", "points"),
    [(100.0, 100.25, {(): (1, 0.25)}), (100.25, 100.0, {(): (1, 0.0)}), (0.0, 100.0, {})],
    ids=["later", "clocks that differ", "time not known"],
)
def test_propagation_is_from_write_to_application(
    sdk: Sdk, written_at_s: float, now_s: float, points: dict[Any, Any]
) -> None:
    sdk.telemetry().propagated(written_at_s, now_s)
    assert sdk.points("veltrix.propagation.duration") == points


# Writes


def test_a_write_is_a_child_of_the_current_span_and_current_itself(sdk: Sdk) -> None:
    telemetry = sdk.telemetry()
    with sdk.app.start_as_current_span("POST /") as request:
        with telemetry.write() as outcome:
            told = telemetry.traceparent()
            outcome.revision = 42
        assert trace.get_current_span() is request
    span = sdk.span("veltrix.write")
    assert span.parent == request.get_span_context()
    assert span.kind is SpanKind.INTERNAL
    assert span.attributes == {"veltrix.revision": 42}
    assert span.status.status_code is StatusCode.UNSET
    context = span.context
    assert told == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def test_without_a_span_there_is_no_traceparent() -> None:
    assert Telemetry().traceparent() == ""


SECRET = "hunter2"


def fail_with_ours() -> None:
    try:
        raise RuntimeError(f"driver: cannot store {SECRET}")
    except RuntimeError as exc:
        raise StoreUnavailable("the database is locked") from exc


def fail_with_theirs() -> None:
    raise ValueError("hunter2 is no good")


@pytest.mark.parametrize(
    ("fail", "error_type", "event", "description"),
    [
        (
            fail_with_ours,
            "StoreUnavailable",
            {
                "exception.type": "veltrix_mw.errors.StoreUnavailable",
                "exception.message": "the database is locked",
            },
            "the database is locked",
        ),
        (fail_with_theirs, "ValueError", {"exception.type": "builtins.ValueError"}, None),
    ],
)
def test_a_failed_write_says_why_and_holds_no_value(
    sdk: Sdk, fail: Callable[[], None], error_type: str, event: dict[str, str], description: str | None
) -> None:
    with pytest.raises(Exception), sdk.telemetry().write():  # noqa: B017
        fail()
    span = sdk.span("veltrix.write")
    assert span.attributes == {"error.type": error_type}
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, description)
    assert [(told.name, dict(told.attributes or {})) for told in span.events] == [("exception", event)]
    assert SECRET not in span.to_json()


def test_a_cancelled_write_is_ended_and_no_error(sdk: Sdk) -> None:
    with pytest.raises(asyncio.CancelledError), sdk.telemetry().write():
        raise asyncio.CancelledError
    assert sdk.span("veltrix.write").status.status_code is StatusCode.UNSET


# Clients


def test_a_clients_numbers_are_exported_with_its_namespace_alone(sdk: Sdk) -> None:
    client = Client(views=10, reconnects=2, failovers=1, rejections=1, dropped_layers=3)
    sdk.telemetry().observe(client)
    at = of("shop")
    assert {name: sdk.points(name) for name in INSTRUMENTS if not name.endswith("duration")} == {
        "veltrix.views": {at: 10},
        "veltrix.rejected": {at: 1},
        "veltrix.layers.dropped": {at: 3},
        "veltrix.fetches": {(*at, ("veltrix.result", "hit")): 4, (*at, ("veltrix.result", "miss")): 1},
        "veltrix.reconnects": {at: 2},
        "veltrix.failovers": {at: 1},
        "veltrix.snapshot.age": {at: 1.5},
        "veltrix.snapshot.revision": {at: 41},
        "veltrix.snapshot.entries": {at: 7},
        "veltrix.lazy.entries": {at: 5},
        "veltrix.relay.held": {at: 1},
    }
    client.views += 1
    assert sdk.points("veltrix.views") == {at: 11}


def test_observing_twice_counts_once(sdk: Sdk) -> None:
    client = Client(views=10)
    telemetry = sdk.telemetry()
    telemetry.observe(client)
    telemetry.observe(client)
    assert sdk.points("veltrix.views") == {of("shop"): 10}


def test_an_age_before_the_first_confirmation_is_not_reported(sdk: Sdk) -> None:
    client = Client(now=Observed(math.inf, 0, 0))
    sdk.telemetry().observe(client)
    assert sdk.points("veltrix.snapshot.age") == {}
    assert sdk.points("veltrix.snapshot.revision") == {of("shop"): 0}


def test_several_clients_share_one_provider(sdk: Sdk) -> None:
    one, two = Client("shop", views=1), Client("pay", views=2)
    sdk.telemetry().observe(one)
    sdk.telemetry("lookups").observe(two)
    assert sdk.points("veltrix.views") == {of("shop"): 1, of("pay"): 2}


def test_clients_of_one_namespace_are_summed_and_the_oldest_is_shown(sdk: Sdk) -> None:
    clients = [
        Client(views=1, now=Observed(1.0, 44, 8), lazy_entries=3),
        Client(views=2, now=Observed(9.0, 40, 5), lazy_entries=None),
        Client(views=4, now=Observed(2.0, 43, 7), lazy_entries=4),
    ]
    for client in clients:
        sdk.telemetry().observe(client)
    shop = of("shop")
    assert sdk.points("veltrix.views") == {shop: 7}
    assert sdk.points("veltrix.snapshot.age") == {shop: 9.0}
    assert sdk.points("veltrix.snapshot.revision") == {shop: 40}
    assert sdk.points("veltrix.snapshot.entries") == {shop: 5}
    assert sdk.points("veltrix.lazy.entries") == {shop: 7}


def test_a_client_without_lazy_prefixes_has_no_lazy_entries_to_show(sdk: Sdk) -> None:
    client = Client(lazy_entries=None)
    sdk.telemetry().observe(client)
    assert sdk.points("veltrix.lazy.entries") == {}


def test_a_relay_is_held_where_each_client_that_has_a_mirror_sees_one(sdk: Sdk) -> None:
    clients = [
        *(Client("shop", relay_held=held) for held in (1, 0, None)),
        *(Client("pay", relay_held=held) for held in (None, 1)),
        Client("alone", relay_held=None),
    ]
    for client in clients:
        sdk.telemetry().observe(client)
    assert sdk.points("veltrix.relay.held") == {of("shop"): 0, of("pay"): 1}


def test_clients_of_two_providers_are_kept_apart(sdk: Sdk) -> None:
    other, one, two = Sdk(), Client("shop", views=1), Client("pay", views=2)
    sdk.telemetry().observe(one)
    other.telemetry().observe(two)
    assert sdk.points("veltrix.views") == {of("shop"): 1}
    assert other.points("veltrix.views") == {of("pay"): 2}


def test_a_client_that_is_gone_is_no_longer_exported(sdk: Sdk) -> None:
    client, gone = Client("shop", views=1), Client("gone", views=2)
    telemetry = sdk.telemetry()
    telemetry.observe(client)
    telemetry.observe(gone)
    del gone
    gc.collect()
    assert len(telemetry._metrics()._stats) == 1
    assert sdk.points("veltrix.views") == {of("shop"): 1}


def test_a_client_that_fails_does_not_hide_the_others(sdk: Sdk) -> None:
    failing, client = Client("broken", now=RuntimeError("closed")), Client("shop")
    telemetry = sdk.telemetry()
    telemetry.observe(failing)
    telemetry.observe(client)
    assert sdk.points("veltrix.snapshot.revision") == {of("shop"): 41}


# Instruments


def test_every_instrument_has_its_unit_and_buckets(sdk: Sdk) -> None:
    telemetry = sdk.telemetry()
    client = Client()
    telemetry.observe(client)
    use_everything(telemetry, trace.INVALID_SPAN)
    metrics = sdk.metrics()
    assert {name: metric.unit for name, metric in metrics.items()} == INSTRUMENTS
    assert {
        name: metric.data.data_points[0].explicit_bounds for name, metric in metrics.items() if "duration" in name
    } == {
        "veltrix.lookup.duration": LOOKUP_BUCKETS,
        "veltrix.fetch.duration": LOOKUP_BUCKETS,
        "veltrix.refresh.duration": REFRESH_BUCKETS,
        "veltrix.propagation.duration": PROPAGATION_BUCKETS,
    }
    assert {name for name, metric in metrics.items() if getattr(metric.data, "is_monotonic", False)} == {
        "veltrix.views",
        "veltrix.rejected",
        "veltrix.layers.dropped",
        "veltrix.fetches",
        "veltrix.reconnects",
        "veltrix.failovers",
    }
    assert all(metric.description for metric in metrics.values())


def test_the_scope_names_the_package_its_version_and_schema(sdk: Sdk) -> None:
    expected = ("veltrix_mw", importlib.metadata.version("veltrix-mw"), instruments.SCHEMA_URL)
    telemetry = sdk.telemetry()
    with telemetry.write():
        telemetry.propagated(1.0, 2.0)
    scope = sdk.span("veltrix.write").instrumentation_scope
    assert scope is not None
    assert (scope.name, scope.version, scope.schema_url) == expected
    data = sdk.reader.get_metrics_data()
    assert data is not None
    (scoped,) = data.resource_metrics[0].scope_metrics
    assert (scoped.scope.name, scoped.scope.version, scoped.schema_url) == expected


def test_threads_that_come_first_together_share_one_set_of_instruments(sdk: Sdk) -> None:
    made: list[str] = []
    two_at_once = threading.Event()

    class Counting(ApiMeterProvider):
        def get_meter(self, name: str, *args: Any, **kw: Any) -> Any:
            made.append(name)
            if len(made) > 1:
                two_at_once.set()
            two_at_once.wait(0.2)  # time for another thread to come in, if it can
            return sdk.meter_provider.get_meter(name, *args, **kw)

    provider, together = Counting(), threading.Barrier(8)

    def first(number: int) -> Client:
        client = Client(f"app{number}", views=number)
        telemetry = Telemetry(tracer_provider=sdk.tracer_provider, meter_provider=provider)
        together.wait(30)
        telemetry.observe(client)
        with telemetry.write():
            pass
        return client

    with ThreadPoolExecutor(8) as pool:
        clients = list(pool.map(first, range(8)))
    assert made == ["veltrix_mw"]
    assert sdk.points("veltrix.views") == {of(client.namespace): client.views for client in clients}
    assert len(sdk.spans("veltrix.write")) == 8


def test_clients_may_come_while_an_export_runs(sdk: Sdk) -> None:
    telemetry = sdk.telemetry()
    coming: list[Client] = []

    class Bringing(Client):
        def observe(self) -> Observed:
            coming.append(Client(f"app{len(coming)}"))
            telemetry.observe(coming[-1])
            return super().observe()

    first = Bringing()
    telemetry.observe(first)
    assert of("shop") in sdk.points("veltrix.snapshot.revision")
    assert coming


# Processes and loops


def run_python(code: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        env={"PYTHONPATH": str(SOURCE), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


GLOBAL = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
from types import SimpleNamespace
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from veltrix_mw.instruments import Observed
from veltrix_mw.telemetry import Telemetry

class Client:
    reconnects = failovers = rejections = dropped_layers = 0
    def __init__(self, namespace, views):
        self.namespace, self.views = namespace, views
    def observe(self):
        return Observed(1.0, 1, 1)

def use(telemetry):
    with telemetry.write():
        telemetry.propagated(1.0, 2.0)

exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
tracers, meters = TracerProvider(), MeterProvider([reader])
tracers.add_span_processor(SimpleSpanProcessor(exporter))
clients = [Client("first", 1), Client("second", 2), Client("third", 3)]

def configure():
    trace.set_tracer_provider(tracers)
    metrics.set_meter_provider(meters)

first = Telemetry()
second = Telemetry(tracer_provider=tracers, meter_provider=meters)
third = Telemetry()
steps = {
    "configure": configure,
    "first": lambda: (use(first), first.observe(clients[0])),
    "second": lambda: (use(second), second.observe(clients[1])),
    "third": lambda: (use(third), third.observe(clients[2])),
}
for step in sys.argv[1:]:
    steps[step]()
exporter.clear()
for telemetry in (first, second, third):
    use(telemetry)
found = {m.name: m for r in reader.get_metrics_data().resource_metrics for s in r.scope_metrics for m in s.metrics}
print(len(exporter.get_finished_spans()))
print(sorted((p.attributes["veltrix.namespace"], p.value) for p in found["veltrix.views"].data.data_points))
print(sum(p.count for p in found["veltrix.propagation.duration"].data.data_points))
"""


@pytest.mark.parametrize(
    ("steps", "records"),
    [
        (("first", "configure", "second", "third"), 5),  # what was recorded before the SDK came is nowhere
        (("configure", "first", "second", "third"), 6),
        (("second", "configure", "first", "third"), 6),
        (("first", "third", "configure", "second"), 4),
    ],
    ids=lambda steps: ",".join(steps) if isinstance(steps, Sequence) else "",
)
def test_the_global_providers_serve_whenever_they_are_set(steps: tuple[str, ...], records: int) -> None:
    out = run_python(GLOBAL, *steps)
    assert out.splitlines() == ["3", "[('first', 1), ('second', 2), ('third', 3)]", str(records)]


def test_a_fork_while_instruments_are_made_leaves_no_lock_behind() -> None:
    code = """
import os, signal, time
from veltrix_mw import instruments, telemetry
with instruments._making:
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends the child, if it hangs, with a status that is not 0
        telemetry.Telemetry().propagated(1.0, 2.0)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""
    assert run_python(code) == "0\n"


def test_importing_it_loads_nothing_that_can_wait() -> None:
    code = """
import sys
import opentelemetry.trace
before = set(sys.modules)
import veltrix_mw.telemetry
print(*sorted(set(sys.modules) - before))
"""
    loaded = run_python(code).split()
    assert "veltrix_mw.telemetry" in loaded
    heavy = (
        "opentelemetry.metrics",
        "opentelemetry.sdk",
        "opentelemetry.trace.propagation.",
        "importlib.metadata",
    )
    assert [name for name in loaded if name.startswith(heavy)] == []


def test_once_a_client_is_observed_nothing_blocks_an_event_loop() -> None:
    code = """
import asyncio, os, threading
from blockbuster import blockbuster_ctx
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import set_span_in_context
from veltrix_mw.instruments import Observed
from veltrix_mw.telemetry import Telemetry

class Client:
    namespace, views, reconnects, failovers, rejections, dropped_layers = "shop", 0, 0, 0, 0, 0
    def observe(self):
        return Observed(1.0, 1, 1)

tracers = TracerProvider()
telemetry = Telemetry("lookups", tracer_provider=tracers, meter_provider=MeterProvider([InMemoryMetricReader()]))
client = Client()
follower = threading.Thread(target=telemetry.observe, args=(client,))
follower.start()
follower.join()

async def request():
    with tracers.get_tracer("app").start_as_current_span("GET /"):
        span = telemetry.recording_span()
        with telemetry.lookup("a"):
            pass
        with telemetry.write():
            assert telemetry.traceparent()
        telemetry.annotate_request(span, revision=1, origin="sqlite", stale=False, count=1, total_s=0.1)
        telemetry.record_request(set_span_in_context(span), "sqlite", 0.1)
        telemetry.propagated(1.0, 2.0)

with blockbuster_ctx():
    asyncio.run(request())
print("done", flush=True)
os._exit(0)  # blockbuster 1.5.29, once used, crashes CPython 3.11 while it shuts down
"""
    assert run_python(code) == "done\n"
