"""Portions: units of whatever size come, in as few readings as their sizes allow."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, Put, StoreUnavailable
from veltrix_mw.coalesce.batcher import Elsewhere
from veltrix_mw.coalesce.unit_cache import UnitCache
from veltrix_mw.lazy import LazyUnits
from veltrix_mw.protocols import (
    Filled,
    FoundUnits,
    Lease,
    MirroredUnit,
    MirrorState,
    Position,
    RawChange,
    RawUnit,
    Silent,
    TooMuch,
)
from veltrix_mw.rate import Rate
from veltrix_mw.replica import Publication
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.stores.memory import MemoryStore
from veltrix_mw.stores.units import MAX_UNIT_BYTES
from veltrix_mw.unit_filler import UnitFiller
from veltrix_mw.unit_portions import FIRST_UNITS, PORTION_BYTES, Portions, sizes_of
from veltrix_mw.unit_reader import UnitReader
from veltrix_mw.validation import Schemas

WITHIN_S = 30.0
LAZY = ("users/",)
NAMES = [f"users/{number}" for number in range(150)]


class NarrowStore(MemoryStore):
    """Answers for so many bytes at once and no more: it fails by `error`, as one whose reply is never over."""

    def __init__(self, most_bytes: int, error: type[StoreUnavailable] = Silent) -> None:
        super().__init__(lazy=LAZY)
        self._most_bytes = most_bytes
        self.error = error
        self.asked: list[list[str]] = []

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> dict[str, RawUnit]:
        self.asked.append(list(names))
        found = super().read_units(names, position, timeout_s=timeout_s)
        if sum(sizes_of(found).values()) > self._most_bytes:
            raise self.error("too much")
        return found


def client_of(store: NarrowStore, value: str) -> ConfigClient:
    client = ConfigClient(store, fetch_timeout_s=WITHIN_S, lazy_max_bytes=1 << 30)
    client.start()
    client.wait_for(client.write([Put(name, value) for name in NAMES]), WITHIN_S)
    return client


@pytest.mark.parametrize("error", [Silent, TooMuch])
def test_units_that_are_too_much_for_one_reply_all_come(error: type[StoreUnavailable]) -> None:
    store = NarrowStore(200_000, error)
    with client_of(store, "x" * 20_000) as client:
        assert len(client.view().fetch_many(NAMES)) == len(NAMES)
    assert {name for asked in store.asked for name in asked} == set(NAMES)


@pytest.mark.parametrize("value_bytes", [1_000, 400_000])
def test_as_many_go_in_one_reading_as_their_sizes_allow(value_bytes: int) -> None:
    store = NarrowStore(1 << 40)
    with client_of(store, "x" * value_bytes) as client:
        reader, left = client._views.reader, list(NAMES)
        assert reader is not None
        while left:
            read = reader._read(left)  # as a batch, when all of them wait
            left = [name for name in left if isinstance(read[name], Elsewhere)]
    first, *others = map(len, store.asked)
    most = min(len(NAMES), PORTION_BYTES // (value_bytes + 10))
    assert first == FIRST_UNITS
    assert others[:-1] == [most] * (len(others) - 1)
    assert sum(others) == len(NAMES) - first


def test_one_that_is_too_much_alone_fails_alone() -> None:
    store = NarrowStore(200_000)
    with client_of(store, "small") as client:
        client.wait_for(client.put("users/7/x", "x" * 300_000), WITHIN_S)
        view = client.view()
        with pytest.raises(StoreUnavailable, match="too much"):
            view.fetch_many(NAMES)
        assert [view.get(name) for name in NAMES if name != "users/7"] == ["small"] * (len(NAMES) - 1)
        assert ["users/7"] in store.asked


def test_a_store_that_fails_otherwise_is_not_asked_again() -> None:
    store = NarrowStore(0, StoreUnavailable)
    with client_of(store, "small") as client:
        with pytest.raises(StoreUnavailable, match="too much"):
            client.view().fetch_many(NAMES[:10])
        names = [name for asked in store.asked for name in asked]
    assert sorted(names) == sorted(NAMES[:10])


def test_past_revisions_are_read_in_portions_too() -> None:
    store = NarrowStore(200_000)
    with client_of(store, "x" * 20_000) as client:
        early = client.view()
        client.wait_for(client.write([Put(name, "y" * 20_000) for name in NAMES]), WITHIN_S)
        assert set(early.fetch_many(NAMES).values()) == {"x" * 20_000}
        assert set(client.view().fetch_many(NAMES).values()) == {"y" * 20_000}


def test_what_is_known_steers_the_next_portion() -> None:
    portions = Portions(500)
    names = [f"users/{number}" for number in range(1_000)]
    assert len(portions.first(names)) == FIRST_UNITS
    portions.learn(dict.fromkeys(names[:4], 1_000))
    assert len(portions.first(names)) == 500
    portions.learn(dict.fromkeys(names[:20], 1_000_000))
    assert len(portions.first(names)) == PORTION_BYTES // 1_000_000
    for _ in range(20):
        portions.learn(dict.fromkeys(names[500:600], 1_000))
    # The others are taken for small ones again, those that are known are not.
    assert len(portions.first(names[600:])) == 400
    assert len(portions.first(names)) == PORTION_BYTES // 1_000_000
    portions.learn(dict.fromkeys(names[:20], 1_000))
    assert len(portions.first(names)) == 500


def test_absent_units_say_nothing_of_those_that_are_there() -> None:
    portions = Portions(500)
    names = [f"users/{number}" for number in range(1_000)]
    for count in (FIRST_UNITS, 16, 32, 64, 128, 256, 500, 500):
        assert len(portions.first(names)) == count
        portions.learn(dict.fromkeys(names[:count], 0))
    portions.learn({"users/a": 2_000_000})
    for _ in range(20):
        portions.learn(dict.fromkeys(names, 0))
    assert len(portions.first(names)) == PORTION_BYTES // 2_000_000


def test_what_failed_is_tried_by_half_and_in_half_the_time() -> None:
    portions = Portions(500)
    names = [f"users/{number}" for number in range(500)]
    assert portions.grant_s(names[:16], 2.0) == 1.0
    assert portions.halve(names[:16])
    assert len(portions.first(names)) == 8
    assert portions.halve(names[:8])
    assert len(portions.first(names)) == 4
    portions.learn(dict.fromkeys(names[:8], 1_000))
    assert len(portions.first(names)) == 8
    portions.learn(dict.fromkeys(names[:8], 1_000))
    assert [portions.grant_s(names[:count], 2.0) for count in (1, 8, 9)] == [2.0, 2.0, 1.0]
    for count in (16, 32, 64, 128, 256, 500):
        assert len(portions.first(names)) == count
        portions.learn(dict.fromkeys(names[:8], 1_000))
    assert portions.halve(names[:2])
    assert not portions.halve(names[:1])
    assert len(portions.first(names)) == 1
    assert portions.grant_s(names[:1], 2.0) == 2.0


def test_the_bytes_that_failed_are_not_asked_for_at_once_again() -> None:
    portions = Portions(500)
    names = [f"users/{number}" for number in range(500)]
    portions.learn(dict.fromkeys(names[:4], 100_000))
    failed = portions.first(names)
    assert portions.halve(failed)
    counts = []
    for _ in range(20):
        portion = portions.first(names)
        counts.append(len(portion))
        portions.learn(dict.fromkeys(portion, 100_000))
    assert counts[0] == len(failed) // 2
    assert all(count < len(failed) for count in counts[:5])
    assert counts[-1] == len(failed)


def test_a_unit_beyond_the_bounds_counts_as_the_largest() -> None:
    assert sizes_of({"a": RawUnit((), "too large"), "b": RawUnit((("b", b"12", 1),)), "c": RawUnit(())}) == {
        "a": MAX_UNIT_BYTES,
        "b": 3,
        "c": 0,
    }


# --- by a mirror


class NarrowMirror:
    """Holds every unit, and has so many in one reply; for more it takes all the time that it is granted."""

    def __init__(self, most: int, now_s: list[float], revision: int = 1) -> None:
        self.on_filled: Filled | None = None
        self.mirror_origin = "redis"
        self.looked: list[int] = []
        self._most = most
        self._now_s = now_s
        self._revision = revision

    def find_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> FoundUnits | None:
        self.looked.append(len(names))
        if len(names) > self._most:
            self._now_s[0] += timeout_s
            return None
        units = {name: MirroredUnit(RawUnit(((name, b"1", 1),)), self._revision, self._revision) for name in names}
        return FoundUnits(MirrorState(position, lazy=LAZY, relay="the-relay"), units)

    def want_units(self, names: Sequence[str], *, timeout_s: float) -> None:
        raise AssertionError("the mirror holds them all")


def test_a_mirror_with_too_much_to_say_is_asked_for_fewer_and_not_left_for_the_authority() -> None:
    now_s = [100.0]
    mirror = NarrowMirror(3, now_s)
    units, position = LazyUnits(LAZY, Schemas({}), UnitCache()), Position("one", 1)
    units.take(Publication(Snapshot(revision=1, incarnation="one", origin="redis"), None, (), position))
    reader = UnitReader(NarrowStore(0), units, mirrored=mirror, clock=lambda: now_s[0], timeout_s=1_000)
    left: list[Any] = NAMES[:12]
    while left:
        read = reader._read(left)
        assert all(each.until_s <= now_s[0] for each in read.values() if isinstance(each, Elsewhere))
        left = [name for name in left if isinstance(read[name], Elsewhere)]
    assert mirror.looked[:3] == [FIRST_UNITS, 4, 2]
    assert units.held == 12
    assert reader.units_read["authority"] == 0


@pytest.fixture
def filler() -> Iterator[tuple[UnitFiller, NarrowStore, FedMirror]]:
    store, mirror = NarrowStore(200_000), FedMirror()
    made = UnitFiller(store, mirror)  # type: ignore[arg-type]  # what a filler calls of it
    yield made, store, mirror
    made.stop(WITHIN_S)


class FedMirror:
    """Notes what it is filled with."""

    def __init__(self) -> None:
        self.wanted: list[str] = []
        self.filled: list[list[str]] = []
        self.came = threading.Event()

    def find_units(self, names: Sequence[str], *, timeout_s: float) -> FoundUnits:
        return FoundUnits(MirrorState(Position("one", 1)), {})

    def wanted_units(self, *, wait_s: float, timeout_s: float) -> Sequence[str]:
        self.came.wait(wait_s)
        self.came.clear()
        wanted, self.wanted = self.wanted, []
        return wanted

    def fill_units(self, lease: Lease, position: Position, units: Any, names: Sequence[str], **_: Any) -> None:
        self.filled.append(list(units))


def test_a_relay_fills_units_that_are_too_much_for_one_reply_in_portions(
    filler: tuple[UnitFiller, NarrowStore, FedMirror],
) -> None:
    made, store, mirror = filler
    with client_of(store, "x" * 20_000) as writer:
        position = store.list(timeout_s=WITHIN_S).position
        mirror.wanted = NAMES.copy()
        mirror.came.set()
        made.stands(Lease("me", 1), position)
        wait_until(lambda: made.filled == len(NAMES), WITHIN_S, reason="all units to be filled")
    assert writer.namespace
    assert sorted(name for filled in mirror.filled for name in filled) == sorted(NAMES)


# --- past revisions, beside a mirror


class GatedStore(NarrowStore):
    """Lets what it is asked for as of a past revision wait."""

    def __init__(self) -> None:
        super().__init__(1 << 40)
        self.gate, self.came = threading.Event(), threading.Event()
        self.past = 0

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> dict[str, RawUnit]:
        if position.revision <= self.past:
            self.came.set()
            assert self.gate.wait(WITHIN_S)
        return super().read_units(names, position, timeout_s=timeout_s)


@pytest.fixture
def past() -> Iterator[tuple[UnitReader, GatedStore, Snapshot, Snapshot, NarrowMirror]]:
    """A reader beside a mirror, and what a view from before the last change is pinned to, and one of after it."""
    store, units, mirror = GatedStore(), LazyUnits(LAZY, Schemas({}), UnitCache()), NarrowMirror(1_000, [0.0], 2)
    with ConfigClient(store) as client:
        client.wait_ready(WITHIN_S)
        store.past = client.put("users/1", 5)
        before = position = store.list(timeout_s=WITHIN_S).position
        early = Snapshot(revision=position.revision, incarnation=position.incarnation, origin="redis")
        units.take(Publication(early, None, (), position))
        client.put("users/1", 6)
        position = store.list(timeout_s=WITHIN_S).position
    late = Snapshot(revision=position.revision, incarnation=position.incarnation, origin="redis")
    changes = store.watch(before, timeout_s=WITHIN_S).next(WITHIN_S)
    lazy_changes = tuple((each.position.revision, each.lazy_changes) for each in changes)
    units.take(Publication(late, frozenset(), (), position, lazy_changes=lazy_changes))
    reader = UnitReader(store, units, mirrored=mirror, timeout_s=WITHIN_S, direct_rate=Rate(0, 1))
    yield reader, store, early, late, mirror
    store.gate.set()
    reader.close(timeout_s=WITHIN_S)


def test_who_reads_the_past_holds_up_nobody_who_reads_the_mirror(
    past: tuple[UnitReader, GatedStore, Snapshot, Snapshot, NarrowMirror],
) -> None:
    reader, store, early, late, mirror = past
    found: list[Any] = []
    reading = threading.Thread(target=lambda: found.append(reader.load(["users/1"], early)))
    reading.start()
    assert store.came.wait(WITHIN_S)
    assert isinstance(reader.load(["users/2"], late)["users/2"], Snapshot)
    assert mirror.looked == [1, 1]
    store.gate.set()
    reading.join(WITHIN_S)
    assert dict(found[0]["users/1"]) == {"users/1": 5}


def test_reads_of_the_past_count_as_direct_ones(
    past: tuple[UnitReader, GatedStore, Snapshot, Snapshot, NarrowMirror],
) -> None:
    reader, store, early, _, _ = past
    store.gate.set()
    assert isinstance(reader.load(["users/1"], early)["users/1"], Snapshot)
    refused = reader.load(["users/1"], early)["users/1"]
    assert type(refused).__name__ == "Overloaded", refused
    assert len(store.asked) == 1


# --- units that are ahead of what is followed


class AheadMirror(NarrowMirror):
    """Holds units as of revisions that are not reached yet, each its own."""

    def find_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> FoundUnits | None:
        units = {
            name: MirroredUnit(RawUnit(((name, b"1", 1),)), at, at)
            for name, at in zip(("users/1", "users/2"), (2, 3), strict=True)
            if name in names
        }
        return FoundUnits(MirrorState(position, lazy=LAZY, relay="the-relay"), units)


def test_units_that_were_found_ahead_in_one_look_land_each_by_itself_and_are_held() -> None:
    units, mirror = LazyUnits(LAZY, Schemas({}), UnitCache()), AheadMirror(9, [0.0])

    def follow(revision: int, *changes: RawChange) -> Snapshot:
        pinned = Snapshot(revision=revision, incarnation="one", origin="redis")
        changed = None if revision == 1 else frozenset[str]()
        lazy_changes = ((revision, changes),) if changes else ()
        units.take(Publication(pinned, changed, (), Position("one", revision), lazy_changes=lazy_changes))
        return pinned

    follow(1)
    reader = UnitReader(NarrowStore(0), units, mirrored=mirror, clock=lambda: 0.0)
    first = reader._read(["users/1", "users/2"])
    assert all(isinstance(each, Elsewhere) for each in first.values())
    follow(2)
    assert not isinstance(reader._read(["users/1"])["users/1"], Elsewhere)
    follow(3)
    pinned = follow(4, RawChange("users/2", b"2"))
    assert not isinstance(reader._read(["users/2"])["users/2"], Elsewhere)
    assert units.held == 2
    found = units.get("users/2", pinned)
    assert found is not None
    assert dict(found) == {"users/2": 2}
    assert not units._readings


class AbsentMirror(NarrowMirror):
    """One that is not followed."""

    def find_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> FoundUnits | None:
        return None


class Unanswered:
    """A batcher whose calls never return."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def submit(self, wanted: Any, *, leader: object) -> None:
        self.asked.append(wanted)


def test_who_asks_when_others_have_given_up_does_not_give_up_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, units, direct = [100.0], LazyUnits(LAZY, Schemas({}), UnitCache()), Unanswered()
    position = Position("one", 1)
    units.take(Publication(Snapshot(revision=1, incarnation="one", origin="redis"), None, (), position))
    mirror = AbsentMirror(9, now_s)
    reader = UnitReader(NarrowStore(0), units, mirrored=mirror, timeout_s=2, clock=lambda: now_s[0])
    monkeypatch.setattr(reader, "_direct", direct)
    assert reader._read(["users/1"])["users/1"].until_s == 102.0
    reader._sweep_at_s = 200.0
    now_s[0] = 102.0
    assert reader._read(["users/1"])["users/1"].until_s == 104.0
    assert direct.asked == ["users/1"] * 2
