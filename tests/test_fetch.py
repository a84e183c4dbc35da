"""Fetching: what a view reads below lazy prefixes, and what that asks of the store."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.stores.contract import WITHIN_S, in_a_fork
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, Put, View
from veltrix_mw.errors import (
    Compacted,
    HeldBack,
    InvalidKey,
    InvalidValue,
    KeyMissing,
    NotLoaded,
    NotReady,
    Overloaded,
    SettingsError,
    StoreUnavailable,
)
from veltrix_mw.protocols import ChangeRecord, Position, RawOperation, RawUnit
from veltrix_mw.rate import Rate
from veltrix_mw.stores.memory import MemoryStore
from veltrix_mw.values import MISSING

LIMIT, ZONE = "tenants/acme/limit", "tenants/acme/zone"


class GatedStore(MemoryStore):
    """Notes which units it is asked for, and answers while its gate is open."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lazy=("tenants/", "users/"), **options)
        self.asked: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> dict[str, RawUnit]:
        self.asked.append(list(names))
        self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return super().read_units(names, position, timeout_s=timeout_s)


@pytest.fixture
def store() -> Iterator[GatedStore]:
    store = GatedStore()
    yield store
    store.gate.set()


Start = Callable[..., ConfigClient]


def eventually(predicate: Callable[[], Any]) -> None:
    """Wait for what the client's own threads do."""
    wait_until(predicate, WITHIN_S, reason="the client comes that far")


@pytest.fixture
def start(store: GatedStore) -> Iterator[Start]:
    started: list[ConfigClient] = []

    def start(**options: Any) -> ConfigClient:
        client = ConfigClient(store, **options)
        started.append(client)
        client.start()
        client.wait_ready()
        return client

    yield start
    for client in started:
        client.close()


@pytest.fixture
def client(start: Start) -> ConfigClient:
    client = start(fetch_timeout_s=10)
    write(client, **{"a": 1, LIMIT: 5, ZONE: "eu", "limit": 1})
    return client


def write(client: ConfigClient, **values: Any) -> None:
    for key, value in values.items():
        revision = client.put(key, value)
    client.wait_for(revision)


def commit(client: ConfigClient, store: GatedStore, *operations: RawOperation) -> None:
    """Write what the client itself would refuse."""
    client.wait_for(store.commit(operations, ChangeRecord(), timeout_s=1))


def let_go(client: ConfigClient) -> None:
    """Hold no unit any more."""
    assert client._views.units is not None
    client._views.units._cache.clear()


# --- what is read


def test_one_fetch_brings_all_of_a_unit(client: ConfigClient, store: GatedStore) -> None:
    view = client.view()
    assert view.fetch(LIMIT) == 5
    assert (view[ZONE], view.get(ZONE), ZONE in view) == ("eu", "eu", True)
    assert dict(view.section("tenants/acme/")) == {"limit": 5, "zone": "eu"}
    assert (view.get("tenants/acme/none", 7), "tenants/acme/none" in view) == (7, False)
    with pytest.raises(KeyMissing):
        view["tenants/acme/none"]
    assert store.asked == [["tenants/acme"]]


@pytest.mark.parametrize(
    "read",
    [
        lambda view: view[LIMIT],
        lambda view: view.get(LIMIT),
        lambda view: LIMIT in view,
        lambda view: view.section("tenants/acme/"),
        lambda view: view.bind(dict, "tenants/acme/"),
        lambda view: view.derive(lambda inner: inner[LIMIT]),
        lambda view: view.section("tenants/"),
    ],
)
def test_what_was_not_fetched_is_not_loaded(client: ConfigClient, read: Callable[[View], Any]) -> None:
    with pytest.raises(NotLoaded):
        read(client.view())


def test_all_of_a_lazy_prefix_can_never_be_read(client: ConfigClient) -> None:
    view = client.view()
    view.fetch(LIMIT)
    with pytest.raises(NotLoaded, match="one unit"):
        view.section("tenants/")
    assert set(view) == {"a", "limit"}


def test_an_absent_key_raises_or_gives_its_default(client: ConfigClient, store: GatedStore) -> None:
    for unit in ("acme", "none"):
        with pytest.raises(KeyMissing):
            client.view().fetch(f"tenants/{unit}/x")
        assert client.view().fetch(f"tenants/{unit}/x", default=None) is None
    assert store.asked == [["tenants/acme"], ["tenants/none"]]


def test_many_are_fetched_at_once_and_those_left_out_that_are_absent(client: ConfigClient, store: GatedStore) -> None:
    write(client, **{"users/1": "ann"})
    found = client.view().fetch_many([ZONE, "users/1", "a", "none", "users/2", LIMIT])
    assert found == {ZONE: "eu", "users/1": "ann", "a": 1, LIMIT: 5}
    assert sorted(itertools.chain(*store.asked)) == ["tenants/acme", "users/1", "users/2"]


def test_tasks_fetch_without_blocking_their_loop(client: ConfigClient, store: GatedStore) -> None:
    async def main() -> None:
        store.gate.clear()
        fetched = asyncio.ensure_future(client.view().afetch(LIMIT))
        while not store.asked:
            await asyncio.sleep(0)  # the loop goes on
        store.gate.set()
        assert await fetched == 5
        assert await client.view().afetch_many([ZONE, "users/2"]) == {ZONE: "eu"}
        assert await client.view().afetch("users/2", default=3) == 3

    asyncio.run(main())


def test_a_key_that_is_not_lazy_asks_nothing_of_the_store(client: ConfigClient, store: GatedStore) -> None:
    assert client.view().fetch("a") == 1
    assert client.view(overrides={LIMIT: 9}).fetch(LIMIT) == 9
    assert store.asked == []


def test_what_is_no_key_is_refused(client: ConfigClient, store: GatedStore) -> None:
    for key in ("tenants//x", "tenants/../x", "", "tenants/acme/"):
        with pytest.raises(InvalidKey):
            client.view().fetch(key)
    with pytest.raises(InvalidKey, match="sequence"):
        client.view().fetch_many(LIMIT)
    assert store.asked == []


def test_a_unit_is_looked_for_in_the_layers_too(client: ConfigClient, store: GatedStore) -> None:
    view = client.view(layers=("tenants/acme/", "tenants/none/"))
    with pytest.raises(NotLoaded):
        view["limit"]
    assert view.fetch("limit") == 5
    assert (view["zone"], view["a"], sorted(view)) == ("eu", 1, ["a", "limit", "zone"])
    assert dict(view.section("tenants/acme/")) == {"limit": 5, "zone": "eu"}
    assert sorted(itertools.chain(*store.asked)) == ["tenants/acme", "tenants/none"]


def test_a_view_before_the_first_list_is_not_ready(store: GatedStore) -> None:
    client = ConfigClient(store, defaults={LIMIT: 2})
    client._closed = True  # nothing begins to follow
    assert client.view().fetch(LIMIT) == 2
    with pytest.raises(NotReady):
        client.view().fetch(ZONE)
    assert store.asked == []


def test_before_the_first_write_every_unit_is_absent(store: GatedStore, start: Start) -> None:
    client = start()
    early = client.view()
    assert early.fetch(LIMIT, default=0) == 0
    write(client, **{LIMIT: 5})
    assert (early.fetch(ZONE, default=0), client.view().fetch(LIMIT)) == (0, 5)


def test_models_and_derived_values_go_with_the_unit(client: ConfigClient) -> None:
    def limit(view: View) -> int:
        value: int = view[LIMIT]
        return value

    view = client.view()
    view.fetch(LIMIT)
    schema = {"type": "object", "required": ["limit"]}
    assert view.bind(schema, "tenants/acme/") == {"limit": 5, "zone": "eu"}
    assert view.derive(limit) == 5
    write(client, **{LIMIT: 6})
    later = client.view()
    assert (later.derive(limit), later.bind(schema, "tenants/acme/")["limit"]) == (6, 6)
    assert view.derive(limit) == 5


@pytest.mark.parametrize("how", ["key", "section"])
def test_what_was_derived_without_a_unit_does_not_outlive_that(client: ConfigClient, how: str) -> None:
    def limit(view: View) -> Any:
        try:
            return view[LIMIT] if how == "key" else view.section("tenants/acme/")["limit"]
        except NotLoaded:
            return "not loaded"

    view = client.view()
    assert view.derive(limit) == "not loaded"
    view.fetch(LIMIT)
    assert client.view().derive(limit) == 5
    let_go(client)
    write(client, a=2)
    assert client.view().derive(limit) == "not loaded"


def test_who_joins_a_computation_takes_nothing_of_a_view_that_lacked_a_unit(client: ConfigClient) -> None:
    lacking, may_end = threading.Event(), threading.Event()

    def limit(view: View) -> Any:
        try:
            return view[LIMIT]
        except NotLoaded:
            lacking.set()
            assert may_end.wait(WITHIN_S)
            return "not loaded"

    early, late, flights = client.view(), client.view(), client._views.flights
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(early.derive, limit)
        assert lacking.wait(WITHIN_S)
        assert late.fetch(LIMIT) == 5
        second = pool.submit(late.derive, limit)
        eventually(lambda: flights._followed)
        may_end.set()
        assert (first.result(WITHIN_S), second.result(WITHIN_S)) == ("not loaded", 5)


def test_a_layer_of_the_client_that_is_lazy_is_read_as_of_each_view(store: GatedStore, start: Start) -> None:
    client = start(layers=("tenants/acme/",))
    write(client, **{LIMIT: 5, "limit": 1})
    early = client.view()
    assert (early.fetch("limit"), early["limit"]) == (5, 5)
    write(client, **{LIMIT: 6})
    assert (client.view()["limit"], early["limit"]) == (6, 5)


# --- one revision


def test_a_view_goes_on_reading_its_own_revision_of_a_unit(client: ConfigClient) -> None:
    early = client.view()
    assert early.fetch(LIMIT) == 5
    write(client, **{LIMIT: 6, ZONE: "us"})
    late = client.view()
    assert (late[LIMIT], late[ZONE]) == (6, "us")
    assert (early[LIMIT], early[ZONE], early.renew()[LIMIT]) == (5, "eu", 6)


def test_a_unit_that_changed_since_the_view_was_pinned_is_read_as_it_was_then(
    client: ConfigClient, store: GatedStore
) -> None:
    early = client.view()
    write(client, **{LIMIT: 6})
    assert early.fetch(LIMIT) == 5
    assert client.view().fetch(LIMIT) == 6
    assert store.asked == [["tenants/acme"], ["tenants/acme"]]
    assert early[ZONE] == "eu"


def test_one_that_did_not_change_needs_no_history(client: ConfigClient, store: GatedStore) -> None:
    write(client, **{LIMIT: 5})
    early = client.view()
    write(client, **{"users/1": 1, "a": 2})
    assert early.fetch(LIMIT) == 5
    assert store.asked == [["tenants/acme"]]


def test_a_change_that_comes_while_the_unit_is_read_is_not_lost(client: ConfigClient, store: GatedStore) -> None:
    store.gate.clear()
    early = client.view()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(early.fetch, LIMIT)
        eventually(lambda: store.asked)
        write(client, **{LIMIT: 6})
        late = client.view()
        second = pool.submit(late.fetch, LIMIT)
        store.gate.set()
        assert (first.result(), second.result()) == (5, 6)
    assert store.asked == [["tenants/acme"]]


def test_history_that_is_gone_is_said(store: GatedStore, start: Start) -> None:
    store._keep_revisions = 2
    client = start()
    write(client, **{LIMIT: 5})
    early = client.view()
    write(client, **{LIMIT: 6, ZONE: "eu", "a": 1})
    with pytest.raises(Compacted, match="renew"):
        early.fetch(LIMIT)
    with pytest.raises(NotLoaded, match=r"could not be loaded: .*renew"):
        early[LIMIT]
    assert early.renew().fetch(LIMIT) == 6


def test_a_view_of_a_history_that_was_replaced_cannot_fetch(client: ConfigClient, store: GatedStore) -> None:
    early = client.view()
    held = client.view()
    held.fetch(LIMIT)
    store.renew_incarnation(early.incarnation, timeout_s=1)
    eventually(lambda: client.view().incarnation != early.incarnation)
    with pytest.raises(Compacted, match="renew"):
        early.fetch(LIMIT)
    assert held[LIMIT] == 5
    assert early.renew().fetch(LIMIT) == 5
    assert len(store.asked) == 2


def test_a_value_that_does_not_decode_is_held_back(client: ConfigClient, store: GatedStore) -> None:
    commit(client, store, RawOperation("tenants/acme/bad", b"{"))
    view = client.view(layers=("tenants/acme/",))
    with pytest.raises(HeldBack, match="not JSON"):
        view.fetch("bad")
    with pytest.raises(HeldBack, match="not JSON"):
        view.section("tenants/acme/")["bad"]
    assert view["limit"] == 5


def test_what_a_view_was_given_it_keeps(client: ConfigClient, store: GatedStore) -> None:
    view = client.view()
    view.fetch(LIMIT)
    let_go(client)
    write(client, **{LIMIT: 6})
    assert (view[ZONE], view.fetch(LIMIT)) == ("eu", 5)
    assert len(store.asked) == 1


def test_but_no_more_than_a_request_can_want(client: ConfigClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veltrix_mw.view._UNITS", 3)
    view = client.view()
    for number in range(10):
        view.fetch(f"users/{number}", default=None)
    assert list(view._units) == ["users/7", "users/8", "users/9"]


def test_under_a_storm_of_writes_every_view_reads_its_own_revision(start: Start, store: GatedStore) -> None:
    store._keep_revisions = store._keep_bytes = 1_000_000_000  # as of all of them it is asked what is right
    client = start(lazy_max_bytes=6_000)  # a few units: most are read again and again
    keys = [f"users/{user}/{name}" for user in range(8) for name in ("a", "b")]
    done = threading.Event()

    def storm() -> None:
        random = Random(1)
        turn = 0
        while not done.is_set():
            turn += 1
            picked = random.sample(keys, 2)
            raw = [MISSING if random.random() < 0.2 else b"%d" % turn for _ in picked]
            with contextlib.suppress(KeyMissing):
                store.commit(list(map(RawOperation, picked, raw)), ChangeRecord(), timeout_s=10)

    def check(seed: int) -> int:
        random, differing = Random(seed), 0
        for _ in range(150):
            view = client.view()
            picked = random.sample(keys, 3)
            first = view.fetch_many(picked[:2])
            found = first | view.fetch_many(picked)
            truth = client.read(picked, revision=view.revision)
            assert found == {key: entry.value for key, entry in truth.items()}
            differing += any(client.read(picked).get(key) != truth.get(key) for key in picked)
        return differing

    with ThreadPoolExecutor(5) as pool:
        writing = pool.submit(storm)
        checking = [pool.submit(check, seed) for seed in range(4)]
        try:
            differing = [each.result(60) for each in checking]
        finally:
            done.set()
        writing.result(10)
    assert sum(differing) > 0  # else nothing was written meanwhile


# --- what it asks of the store


def test_all_who_ask_for_a_cold_unit_cost_one_read(client: ConfigClient, store: GatedStore) -> None:
    store.gate.clear()
    together = threading.Barrier(33)

    def fetch() -> Any:
        together.wait(10)
        return client.view().fetch(LIMIT)

    async def afetch() -> list[Any]:
        return await asyncio.gather(*(client.view().afetch(ZONE) for _ in range(100)))

    def tasks() -> list[Any]:
        together.wait(10)
        return asyncio.run(afetch())

    with ThreadPoolExecutor(33) as pool:
        threads = [pool.submit(fetch) for _ in range(30)]
        loops = [pool.submit(tasks) for _ in range(2)]
        together.wait(10)
        eventually(lambda: store.asked)
        store.gate.set()
        assert [thread.result(10) for thread in threads] == [5] * 30
        assert [loop.result(10) for loop in loops] == [["eu"] * 100] * 2
    assert store.asked == [["tenants/acme"]]


def test_what_waits_while_the_store_is_asked_goes_in_batches(client: ConfigClient, store: GatedStore) -> None:
    store.gate.clear()

    async def main() -> None:
        fetches = [asyncio.ensure_future(client.view().afetch(f"users/{n}", default=n)) for n in range(100)]
        while not store.asked:
            await asyncio.sleep(0)
        store.gate.set()
        assert await asyncio.gather(*fetches) == list(range(100))

    asyncio.run(main())
    assert sorted(itertools.chain(*store.asked)) == sorted(f"users/{n}" for n in range(100))
    assert len(store.asked) <= 4


def test_an_absent_unit_is_held_as_absent_until_it_is_written(client: ConfigClient, store: GatedStore) -> None:
    assert client.view().fetch("users/1", default=None) is None
    assert client.view().fetch("users/1", default=None) is None
    write(client, **{"users/1": 1})
    assert client.view()["users/1"] == 1
    assert len(store.asked) == 1


def test_a_failure_is_told_to_each_and_not_kept(client: ConfigClient, store: GatedStore) -> None:
    store.error = StoreUnavailable("away")
    view = client.view()
    errors = []
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="away") as caught:
            view.fetch(LIMIT)
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    with pytest.raises(NotLoaded, match="away"):
        view[LIMIT]
    store.error = None
    assert view.fetch(LIMIT) == 5
    assert len(store.asked) == 3


def test_a_defect_of_the_store_is_of_its_unit_alone(client: ConfigClient, store: GatedStore) -> None:
    store.error = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        client.view().fetch(LIMIT)
    store.error = None
    assert client.view().fetch(LIMIT) == 5


def test_a_store_that_hangs_costs_its_caller_the_timeout(start: Start, store: GatedStore) -> None:
    client = start(fetch_timeout_s=0.05)
    write(client, **{LIMIT: 5})
    store.gate.clear()
    with pytest.raises(StoreUnavailable, match="again"):
        client.view().fetch(LIMIT)
    with pytest.raises(StoreUnavailable, match="again"):
        asyncio.run(client.view().afetch(LIMIT, timeout_s=0.01))
    store.gate.set()
    assert client.view().fetch(LIMIT, timeout_s=10) == 5


def test_who_asks_while_a_call_hangs_is_given_a_whole_one(start: Start, store: GatedStore) -> None:
    client = start(fetch_timeout_s=0.2)
    write(client, **{LIMIT: 5})
    store.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.view().fetch, LIMIT)
        eventually(lambda: store.asked)
        second = pool.submit(client.view().fetch, LIMIT, timeout_s=WITHIN_S)
        eventually(lambda: len(store.asked) == 2)
        store.gate.set()
        with pytest.raises(StoreUnavailable):
            first.result()
        assert second.result() == 5


def test_a_caller_that_is_cancelled_harms_nobody(client: ConfigClient, store: GatedStore) -> None:
    store.gate.clear()

    async def main() -> None:
        leader = asyncio.ensure_future(client.view().afetch(LIMIT))
        while not store.asked:
            await asyncio.sleep(0)
        follower = asyncio.ensure_future(client.view().afetch(ZONE))
        await asyncio.sleep(0)
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        store.gate.set()
        assert await follower == "eu"

    asyncio.run(main())
    assert store.asked == [["tenants/acme"]]


def test_a_unit_beyond_the_bounds_is_refused_and_asked_for_once(client: ConfigClient, store: GatedStore) -> None:
    huge = [RawOperation(f"users/huge/{n}", b'"' + b"x" * 1_000_000 + b'"') for n in range(5)]
    commit(client, store, *huge)
    for _ in range(2):
        with pytest.raises(InvalidValue, match=r"users/huge.*4 MiB"):
            client.view().fetch("users/huge/1")
    assert len(store.asked) == 1
    commit(client, store, RawOperation("users/huge/4", MISSING))
    assert len(client.view().fetch("users/huge/1")) == 1_000_000


def test_beyond_the_rate_of_misses_only_what_is_held_is_read(client: ConfigClient, store: GatedStore) -> None:
    now_s = [0.0]
    client._views.reader._rate = Rate(1, 2, clock=lambda: now_s[0])  # type: ignore[union-attr]
    assert client.view().fetch(LIMIT) == 5
    assert client.view().fetch("users/1", default=0) == 0
    with pytest.raises(Overloaded):
        client.view().fetch("users/2")
    assert client.view().fetch(ZONE) == "eu"
    now_s[0] = 1.0
    assert client.view().fetch("users/2", default=0) == 0
    assert len(store.asked) == 3


def test_what_is_held_stays_within_its_bound(start: Start, store: GatedStore) -> None:
    client = start(lazy_max_bytes=100_000)
    write(client, a=1)
    view = client.view()
    for number in range(500):
        view.fetch(f"users/{number}", default=None)
    assert len(store.asked) == 500
    lazy = client.status().lazy
    assert lazy is not None
    assert 0 < lazy.bytes <= lazy.max_bytes == 100_000
    assert 0 < lazy.held < 100


def test_hot_units_stay_while_invented_ones_are_fetched_by_the_thousand(start: Start, store: GatedStore) -> None:
    hot = [f"tenants/hot{number}/x" for number in range(200)]
    client = start(lazy_max_bytes=1_000_000)
    client._views.reader._rate = Rate(1, 1_000_000)  # type: ignore[union-attr]  # beyond it they would be refused
    client.wait_for(client.write([Put(key, "v" * 100) for key in hot]), WITHIN_S)
    rng, fetched = Random(5), 0
    for number in range(0, 20_000, 50):
        assert client.view().fetch_many([f"tenants/invented{number + each}/x" for each in range(50)]) == {}
        lazy = client.status().lazy
        assert lazy is not None
        assert lazy.bytes <= 1_000_000
        for key in rng.choices(hot, k=50):
            assert client.view().fetch(key) == "v" * 100
            fetched += 1
    missed = sum(name.startswith("tenants/hot") for asked in store.asked for name in asked)
    assert missed < fetched * 0.05


def test_after_a_fork_both_sides_fetch(client: ConfigClient, store: GatedStore) -> None:
    assert client.view().fetch(LIMIT) == 5

    def child() -> None:
        store.gate = threading.Event()
        store.gate.set()
        client.wait_ready()
        assert client.view().fetch(ZONE) == "eu"
        assert client.view().fetch("users/1", default=2) == 2

    in_a_fork(child)
    assert client.view().fetch("users/1", default=2) == 2


# --- what is told


def test_what_waits_is_told_and_what_is_held_is_only_counted(store: GatedStore, start: Start) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    client = start(tracer_provider=provider, fetch_timeout_s=10)
    write(client, **{LIMIT: 5})

    def told() -> list[tuple[Any, Any]]:
        spans = [span for span in exporter.get_finished_spans() if "veltrix.unit_count" in (span.attributes or {})]
        exporter.clear()
        return [(span.attributes["veltrix.result"], span.attributes["veltrix.unit_count"]) for span in spans]  # type: ignore[index]

    client.view().fetch_many([LIMIT, "users/1"])
    assert told() == [("miss", 2)]
    client.view().fetch(LIMIT)
    assert told() == []
    store.error = StoreUnavailable("away")
    with pytest.raises(StoreUnavailable):
        client.view().fetch("users/2")
    assert told() == [("error", 1)]
    store.error = None
    store.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.view().fetch, "users/3", None)
        eventually(lambda: ["users/3"] in store.asked)
        second = pool.submit(lambda: asyncio.run(client.view().afetch("users/3", None)))
        reader = client._views.reader
        assert reader is not None
        eventually(lambda: any(flight._waiting for flight in reader._batcher._flights._flights.values()))  # the task's
        store.gate.set()
        assert (first.result(), second.result()) == (None, None)
    fetches = [span for span in exporter.get_finished_spans() if "veltrix.unit_count" in (span.attributes or {})]
    leader, follower = sorted(fetches, key=lambda span: len(span.links))
    assert [link.context for link in follower.links] == [leader.context]
    assert sorted(told()) == [("absent", 1), ("coalesced", 1)]
    lazy = client.status().lazy
    assert lazy is not None
    assert lazy.fetches == client._stats.fetches == {"hit": 1, "miss": 1, "absent": 1, "coalesced": 1, "error": 1}
    assert lazy.units_read == {"mirror": 0, "authority": 4, "wanted": 0}


def test_more_units_than_a_view_keeps_can_be_fetched_at_once(client: ConfigClient) -> None:
    keys = [f"tenants/t{number}/limit" for number in range(1_100)]
    for start in range(0, len(keys), 100):
        revision = client.write([Put(key, 1) for key in keys[start : start + 100]])
    client.wait_for(revision, WITHIN_S)
    pinned = client.view()
    assert len(pinned.fetch_many(keys[:900])) == 900
    assert len(pinned.fetch_many(keys)) == 1_100


# --- writing


def test_a_write_is_judged_with_the_rest_of_its_unit(store: GatedStore, start: Start) -> None:
    schema = {
        "type": "object",
        "required": ["max"],
        "properties": {"max": {"type": "integer"}, "min": {"type": "integer"}},
    }
    client = start(schemas={"tenants/acme/limits/": schema})
    with pytest.raises(InvalidValue, match="limits"):
        client.put("tenants/acme/limits/min", 1)
    client.write([Put("tenants/acme/limits/max", 9), Put("tenants/beta/limits/min", "of nobody's schema")])
    client.wait_for(client.put("tenants/acme/limits/min", 1))
    with pytest.raises(InvalidValue, match="limits"):
        client.delete("tenants/acme/limits/max")
    with pytest.raises(InvalidValue, match="limits"):
        client.put("tenants/acme/limits/max", "many")
    assert client.view().fetch_many(["tenants/acme/limits/max", "tenants/acme/limits/min"]) == {
        "tenants/acme/limits/max": 9,
        "tenants/acme/limits/min": 1,
    }


# --- settings


@pytest.mark.parametrize("option", [{"lazy_max_bytes": 0}, {"lazy_max_bytes": 1.5}, {"fetch_timeout_s": 0}])
def test_settings_that_are_none_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(option))):
        ConfigClient("memory://", lazy=("users/",), **option)


@dataclass(frozen=True)
class Clock:
    now_s: list[float]

    def __call__(self) -> float:
        return self.now_s[0]


def test_a_rate_lets_through_so_many_a_second_and_some_at_once() -> None:
    clock = Clock([0.0])
    rate = Rate(2, 3, clock=clock)
    assert [rate.take() for _ in range(4)] == [True, True, True, False]
    clock.now_s[0] = 0.5
    assert [rate.take() for _ in range(2)] == [True, False]
    clock.now_s[0] = 100.0
    assert [rate.take() for _ in range(4)] == [True, True, True, False]
