"""The lazy units that a process holds: which version a view reads, whatever comes in which order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veltrix_mw.errors import HeldBack
from veltrix_mw.lazy import LazyUnits, Reading, Unit
from veltrix_mw.protocols import MirroredUnit, Position, RawChange, RawUnit
from veltrix_mw.replica import Publication
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.stores.units import MAX_UNIT_BYTES
from veltrix_mw.validation import Schemas
from veltrix_mw.values import MISSING

ACME, BETA = "tenants/acme", "tenants/beta"


class Kept:
    """A cache without bounds."""

    def __init__(self) -> None:
        self.units: dict[str, Unit] = {}
        self.sizes: dict[str, int] = {}

    def get(self, name: str, default: None) -> Unit | None:
        return self.units.get(name, default)

    def put(self, name: str, value: Unit, size_bytes: int) -> None:
        self.units[name], self.sizes[name] = value, size_bytes

    def replace(self, name: str, value: Unit, size_bytes: int) -> bool:
        if name in self.units:
            self.put(name, value, size_bytes)
        return name in self.units

    def __contains__(self, name: str) -> bool:
        return name in self.units

    def __len__(self) -> int:
        return len(self.units)

    @property
    def bytes(self) -> int:
        return sum(self.sizes[name] for name in self.units)

    def discard(self, name: str) -> None:
        self.units.pop(name, None)

    def clear(self) -> None:
        self.units.clear()


class Rig:
    """Lazy units, and a store's history beside them: what each revision left of each key."""

    def __init__(self, *, schemas: Mapping[str, Any] | None = None, kind: type[LazyUnits] = LazyUnits) -> None:
        self.cache = Kept()
        self.units = kind(("tenants/", "users/"), Schemas(schemas or {}), self.cache)
        self.history: list[dict[str, tuple[bytes, int]]] = [{}]
        self.incarnation = "one"
        self.followed = 0
        self.pinned = Snapshot()

    def write(self, **changes: bytes | None) -> int:
        """A revision that sets or deletes keys of acme, by their names there."""
        return self.write_keys({f"{ACME}/{name}": raw for name, raw in changes.items()})

    def write_keys(self, changes: Mapping[str, bytes | None]) -> int:
        state, revision = dict(self.history[-1]), len(self.history)
        for key, raw in changes.items():
            state.pop(key, None)
            if raw is not None:
                state[key] = (raw, revision)
        self.history.append(state)
        return revision

    def changes(self, revision: int) -> tuple[RawChange, ...]:
        """What that revision changed."""
        before, after = self.history[revision - 1], self.history[revision]
        changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
        return tuple(RawChange(key, after[key][0] if key in after else MISSING) for key in changed)

    def follow(self, *, listing: bool = False, to: int | None = None) -> Snapshot:
        """Take all that was written since, or what was up to a revision, in one publication.

        Returns what views are pinned to from then on.
        """
        newest = len(self.history) - 1 if to is None else to
        told = [(revision, self.changes(revision)) for revision in range(self.followed + 1, newest + 1)]
        self.followed = newest
        self.pinned = Snapshot(revision=self.followed, incarnation=self.incarnation, origin="memory")
        position = Position(self.incarnation, self.followed)
        changed_keys = None if listing else frozenset[str]()
        self.units.take(Publication(self.pinned, changed_keys, (), position, lazy_changes=tuple(told)))
        return self.pinned

    def begin(self, *names: str) -> Reading:
        reading = self.units.begin(names)
        assert reading is not None
        return reading

    def raw(self, name: str, revision: int) -> RawUnit:
        state = self.history[revision]
        return RawUnit(
            tuple((k, *entry) for k, entry in sorted(state.items()) if k == name or k.startswith(f"{name}/"))
        )

    def land(self, reading: Reading) -> dict[str, Unit]:
        return self.units.land(reading, {name: self.raw(name, reading.position.revision) for name in reading.awaited})

    def land_from_a_mirror(self, reading: Reading, data: st.DataObject) -> dict[str, Unit]:
        """As of whatever revisions up to what was followed, each unchanged since some that is right."""
        units = {}
        for name in reading.awaited:
            revision = data.draw(st.integers(reading.position.revision, self.followed))
            raw, changed = self.raw(name, revision), revision
            while changed and self.raw(name, changed - 1) == raw:
                changed -= 1
            units[name] = MirroredUnit(raw, revision, data.draw(st.integers(changed, revision)))
        landed = self.units.land_mirrored(reading, units)
        self.units.end(reading)
        return landed

    def load(self, *names: str) -> dict[str, Unit]:
        return self.land(self.begin(*names))


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.follow(listing=True)
    return rig


def read(unit: Unit | Snapshot | None, pinned: Snapshot | None = None) -> dict[str, Any] | None:
    found = unit.at(pinned) if isinstance(unit, Unit) and pinned is not None else unit
    assert not isinstance(found, Unit)
    return None if found is None else {key.rpartition("/")[2]: value for key, value in found.items()}


def held(rig: Rig, pinned: Snapshot, name: str = ACME) -> dict[str, Any] | None:
    return read(rig.units.get(name, pinned))


def test_nothing_is_begun_before_anything_is_followed() -> None:
    assert Rig().units.begin([ACME]) is None


def test_what_was_read_is_held_and_goes_on_with_what_is_followed(rig: Rig) -> None:
    rig.write(a=b"1")
    first = rig.follow()
    assert held(rig, first) is None
    assert read(rig.load(ACME)[ACME], first) == {"a": 1}
    assert held(rig, first) == {"a": 1}
    rig.write(a=b"2", b=b"1")
    rig.write_keys({f"{BETA}/a": b"9", "tenants/acme.x/a": b"9"})
    second = rig.follow()
    assert held(rig, second) == {"a": 2, "b": 1}
    assert held(rig, first) == {"a": 1}
    rig.write(a=None, b=None)
    assert held(rig, rig.follow()) == {}
    assert held(rig, second) == {"a": 2, "b": 1}


def test_an_absent_unit_is_held_as_absent(rig: Rig) -> None:
    rig.load(ACME)
    assert held(rig, rig.pinned) == {}
    rig.write(a=b"1")
    assert held(rig, rig.follow()) == {"a": 1}


def test_what_changes_while_it_is_read_is_neither_lost_nor_taken_twice(rig: Rig) -> None:
    rig.write(a=b"1")
    first = rig.follow()
    reading = rig.begin(ACME)
    rig.write(a=b"2")
    second = rig.follow()
    rig.write(a=None)
    rig.write(b=b"3")
    third = rig.follow()
    unit = rig.land(reading)[ACME]
    for pinned, expected in ((first, {"a": 1}), (second, {"a": 2}), (third, {"b": 3})):
        assert read(unit, pinned) == expected
        assert held(rig, pinned) == expected


def test_a_view_from_before_the_last_change_that_is_known_does_not_read_a_later_version(rig: Rig) -> None:
    rig.write(a=b"1")
    first = rig.follow()
    rig.write_keys({f"{BETA}/a": b"1"})
    second = rig.follow()
    rig.write(a=b"2")
    third = rig.follow()
    loaded = rig.load(ACME, BETA)
    assert [read(loaded[ACME], pinned) for pinned in (first, second, third)] == [None, None, {"a": 2}]
    assert [read(loaded[BETA], pinned) for pinned in (first, second, third)] == [None, {"a": 1}, {"a": 1}]
    assert held(rig, first) is None


def test_of_times_before_a_list_nothing_is_known(rig: Rig) -> None:
    first = rig.follow()
    rig.load(ACME)
    rig.write_keys({f"{BETA}/a": b"1"})
    second = rig.follow(listing=True)
    assert held(rig, second) is None
    unit = rig.load(ACME)[ACME]
    assert (read(unit, first), read(unit, second)) == (None, {})


def test_what_is_known_of_the_last_changes_is_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veltrix_mw.last_changes._MOST", 2)
    rig.write(a=b"1")
    first = rig.follow()
    rig.write(a=b"2")
    second = rig.follow()
    for number in range(5):
        rig.write_keys({f"users/{number}": b"1"})
    third = rig.follow()
    loaded = rig.load(ACME)
    assert [read(loaded[ACME], pinned) for pinned in (first, second, third)] == [None, None, {"a": 2}]


def test_only_so_many_earlier_versions_are_kept(rig: Rig) -> None:
    rig.load(ACME)
    pinned = []
    for turn in range(20):
        rig.write(a=b"%d" % turn)
        pinned.append(rig.follow())
    assert held(rig, pinned[-1]) == {"a": 19}
    assert held(rig, pinned[-2]) == {"a": 18}
    assert held(rig, pinned[0]) is None


@pytest.mark.parametrize("how", ["list", "incarnation"])
def test_a_list_and_another_history_let_go_of_everything_and_of_what_is_on_its_way(rig: Rig, how: str) -> None:
    rig.write(a=b"1")
    first = rig.follow()
    rig.load(BETA)
    reading = rig.begin(ACME)
    if how == "incarnation":
        rig.incarnation = "two"
    rig.write(a=b"2")
    second = rig.follow(listing=how == "list")
    unit = rig.land(reading)[ACME]
    # Who waited for it with an older view may have it; it says nothing of what is now.
    assert (read(unit, first), read(unit, second)) == ({"a": 1}, None)
    assert held(rig, second) is None
    assert held(rig, second, BETA) is None
    assert held(rig, first, BETA) is None
    rig.load(ACME)
    assert held(rig, second) == {"a": 2}


def test_a_unit_of_a_mirror_is_as_of_a_later_revision_and_takes_what_came_after_it(rig: Rig) -> None:
    rig.write(a=b"1")
    first = rig.follow()
    reading = rig.begin(ACME)
    rig.write(b=b"2")
    rig.write_keys({f"{BETA}/x": b"1"})
    third = rig.follow()
    rig.write(a=b"4")
    fourth = rig.follow()
    assert rig.units.has_reached(4)
    assert not rig.units.has_reached(5)
    raw = rig.raw(ACME, 3)
    # The mirror knows no more than that it did not change after revision 3; the changes that came tell that it was 2.
    unit = rig.units.land_mirrored(reading, {ACME: MirroredUnit(raw, 3, 3)})[ACME]
    rig.units.end(reading)
    second = Snapshot(revision=2, incarnation="one", origin="memory")
    assert [read(unit, view) for view in (first, second, third, fourth)] == [
        None,
        {"a": 1, "b": 2},
        {"a": 1, "b": 2},
        {"a": 4, "b": 2},
    ]
    assert held(rig, fourth) == {"a": 4, "b": 2}


def test_a_mirror_may_know_better_since_when_a_unit_is_unchanged(rig: Rig) -> None:
    rig.write(a=b"1")
    first = rig.follow()
    rig.write_keys({f"{BETA}/x": b"1"})
    second = rig.follow(listing=True)
    reading = rig.begin(ACME)
    unit = rig.units.land_mirrored(reading, {ACME: MirroredUnit(rig.raw(ACME, 2), 2, 1)})[ACME]
    assert (read(unit, first), read(unit, second)) == ({"a": 1}, {"a": 1})


def test_the_kept_part_of_a_reading_goes_on_when_the_rest_ends(rig: Rig) -> None:
    rig.write(a=b"1")
    rig.follow()
    whole = rig.begin(ACME, BETA)
    kept = rig.units.keep(whole, [ACME])
    rig.units.end(whole)
    rig.write(a=b"2")
    second = rig.follow()
    rig.units.land_mirrored(kept, {ACME: MirroredUnit(rig.raw(ACME, 1), 1, 1)})
    rig.units.end(kept)
    assert held(rig, second) == {"a": 2}
    rig.follow(listing=True)
    gone = rig.units.keep(kept, [ACME])
    unit = rig.units.land_mirrored(gone, {ACME: MirroredUnit(rig.raw(ACME, 2), 2, 2)})[ACME]
    assert read(unit, second) == {"a": 2}
    assert held(rig, second) is None, "a list may have passed over changes"


def test_a_view_of_another_history_reads_nothing_of_it(rig: Rig) -> None:
    rig.load(ACME)
    other = Snapshot(revision=rig.followed, incarnation="other", origin="memory")
    assert held(rig, other) is None
    assert rig.units.position_of("other", rig.followed) is None
    assert rig.units.position_of("one", rig.followed) == Position("one", rig.followed)


def test_a_unit_that_is_refused_is_not_read_again_until_it_changes(rig: Rig) -> None:
    reading = rig.begin(ACME)
    assert rig.units.land(reading, {ACME: RawUnit((), "too large")}) == {}
    assert rig.units.refused(ACME) == "too large"
    rig.write(a=b"1")
    rig.follow()
    assert rig.units.refused(ACME) == ""
    reading = rig.begin(ACME)
    rig.write(a=b"2")
    rig.follow()
    rig.units.land(reading, {ACME: RawUnit((), "too large")})
    assert rig.units.refused(ACME) == ""


def test_a_unit_that_grows_beyond_the_bounds_is_held_no_more(rig: Rig) -> None:
    rig.load(ACME)
    large = b'"' + b"x" * (MAX_UNIT_BYTES // 4 - 2) + b'"'
    for turn in range(4):
        rig.write(**{f"k{turn}": large})
        assert held(rig, rig.follow()) is not None  # to the last byte that a reading takes
    rig.write(more=b"1")
    assert held(rig, rig.follow()) is None


def test_one_that_was_read_at_its_bound_is_held_with_what_is_held_back(rig: Rig) -> None:
    large = b'"' + b"x" * (MAX_UNIT_BYTES // 4 - 2) + b'"'
    rig.write(**{f"k{turn}": large for turn in range(3)}, bad=b"{" * (MAX_UNIT_BYTES // 4))
    rig.follow()
    rig.load(ACME)
    assert held(rig, rig.pinned) is not None


def test_one_that_is_let_go_of_while_it_changes_is_read_as_it_is_then(rig: Rig) -> None:
    rig.load(ACME)
    rig.cache.discard(ACME)
    rig.write(a=b"1")
    pinned = rig.follow()
    assert held(rig, pinned) is None
    rig.load(ACME)
    assert held(rig, pinned) == {"a": 1}


def test_a_size_grows_with_what_is_held(rig: Rig) -> None:
    rig.load(ACME)
    empty = rig.cache.sizes[ACME]
    rig.write(a=b'"' + b"x" * 1_000 + b'"')
    rig.follow()
    assert rig.cache.sizes[ACME] >= empty + 1_000
    rig.load(ACME)
    assert rig.cache.sizes[ACME] >= empty + 1_000


def test_keys_that_the_watch_brings_weigh_as_much_as_those_that_were_read(rig: Rig) -> None:
    rig.load(ACME)
    rig.write(**{f"key{number}": b"1" for number in range(100)})
    rig.follow()
    by_watch = rig.cache.sizes[ACME]
    rig.cache.clear()
    rig.load(ACME)
    assert by_watch >= rig.cache.sizes[ACME]


def test_a_value_that_is_not_json_is_held_back_and_what_is_good_is_served(rig: Rig) -> None:
    rig.write(a=b"{", b=b"1")
    pinned = rig.follow()
    rig.load(ACME)
    unit = rig.units.get(ACME, pinned)
    assert unit is not None
    with pytest.raises(HeldBack):
        unit.entry(f"{ACME}/a")
    assert read(unit) == {"b": 1}
    rig.write(a=b"2")
    assert held(rig, rig.follow()) == {"a": 2, "b": 1}


def test_a_bad_change_is_held_back_and_the_last_good_value_served(rig: Rig) -> None:
    rig.write(a=b"1")
    rig.follow()
    rig.load(ACME)
    rig.write(a=b"{", b=b"1")
    pinned = rig.follow()
    unit = rig.units.get(ACME, pinned)
    assert unit is not None
    assert read(unit) == {"a": 1}
    assert set(unit.rejected) == {f"{ACME}/a", f"{ACME}/b"}
    rig.write(a=b"2")
    assert held(rig, rig.follow()) == {"a": 2, "b": 1}  # what came with it is good by itself


def test_a_schema_of_a_part_of_a_unit_is_checked_for_that_unit() -> None:
    schema = {"type": "object", "properties": {"max": {"type": "integer"}}}
    rig = Rig(schemas={f"{ACME}/limits/": schema})
    rig.write_keys({f"{ACME}/limits/max": b'"many"', f"{BETA}/limits/max": b'"many"', f"{ACME}/zone": b'"eu"'})
    pinned = rig.follow(listing=True)
    rig.load(ACME, BETA)
    assert held(rig, pinned) == {"zone": "eu"}
    assert held(rig, pinned, BETA) == {"max": "many"}


def test_after_a_fork_nothing_is_held_and_what_follows_is_right(rig: Rig) -> None:
    rig.write(a=b"1")
    rig.follow()
    rig.load(ACME)
    rig.units.after_fork()
    assert held(rig, rig.pinned) is None
    rig.write(a=b"2")
    second = rig.follow()
    rig.load(ACME)
    assert held(rig, second) == {"a": 2}


# --- against a model


_KEYS = (f"{ACME}/a", f"{ACME}/b", ACME, f"{BETA}/a", "users/1")
_UNITS = (ACME, BETA, "users/1")


def expected(rig: Rig, name: str, revision: int) -> dict[str, Any]:
    state = rig.history[revision]
    return {key: int(raw) for key, (raw, _) in state.items() if key == name or key.startswith(f"{name}/")}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_comes_in_which_order_a_view_reads_its_own_revision_or_nothing(data: st.DataObject) -> None:
    check_against_a_model(data, LazyUnits)


def check_against_a_model(data: st.DataObject, kind: type[LazyUnits]) -> None:
    rig = Rig(kind=kind)
    views = [rig.follow(listing=True)]
    flying: list[Reading] = []
    landed: list[tuple[str, Unit]] = []
    for step in range(data.draw(st.integers(1, 40))):
        action = data.draw(
            st.sampled_from(["write", "write", "follow", "follow", "begin", "land", "land", "evict", "rare"])
        )
        if action == "write":
            keys = data.draw(st.sets(st.sampled_from(_KEYS), min_size=1, max_size=3))
            rig.write_keys({key: data.draw(st.sampled_from([b"%d" % step, None])) for key in keys})
        elif action == "follow":
            views.append(rig.follow())
        elif action == "rare":
            how = data.draw(st.sampled_from(["list", "another history", "fork"]))
            if how == "another history":
                rig.incarnation = f"of step {step}"
            if how == "fork":
                rig.units.after_fork()
            else:
                views.append(rig.follow(listing=how == "list"))
        elif action == "begin":
            flying.append(rig.begin(*data.draw(st.sets(st.sampled_from(_UNITS), min_size=1))))
        elif action == "evict":
            rig.cache.discard(data.draw(st.sampled_from(_UNITS)))
        elif flying:
            reading = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
            if reading.incarnation != rig.incarnation or data.draw(st.booleans()):
                landed += rig.land(reading).items()
            else:
                landed += rig.land_from_a_mirror(reading, data).items()
        for view in views:
            is_of_now = view.incarnation == rig.incarnation
            for name in _UNITS:
                found = rig.units.get(name, view)
                assert found is None or (is_of_now and dict(found) == expected(rig, name, view.revision))
            for name, unit in landed:
                found = unit.at(view)
                assert found is None or dict(found) == expected(rig, name, view.revision)
    for name, unit in rig.load(*_UNITS).items():
        assert unit.at(rig.pinned) is not None
        assert rig.units.get(name, rig.pinned) is not None
