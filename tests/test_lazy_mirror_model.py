"""Lazy units by a mirror against a model: whatever a worker, a mirror and its relays do in which order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.support.scripted_mirror import ScriptedMirror
from tests.test_lazy import ACME, BETA, Rig, expected
from veltrix_mw.errors import Compacted, LeaseLost, StoreUnavailable
from veltrix_mw.last_changes import LastChanges
from veltrix_mw.lazy import Reading, Unit
from veltrix_mw.protocols import Batch, FoundUnits, Lease, MirroredUnit, Position, RawUnit
from veltrix_mw.stores.memory import MemoryStore
from veltrix_mw.stores.mirrored import MirroredStore
from veltrix_mw.unit_filler import UnitFiller

LAZY = ("tenants/", "users/")
UNITS = (ACME, BETA, "users/1")
KEYS = (f"{ACME}/a", f"{ACME}/b", ACME, f"{BETA}/a", "users/1")


def at(revision: int, incarnation: str = "one") -> Position:
    return Position(incarnation, revision)


# --- where the mirror stands, against where this process does


class Standing(ScriptedMirror):
    """One that holds a unit."""

    def __init__(self, position: Position) -> None:
        super().__init__(LAZY, position)
        self.units[ACME] = {f"{ACME}/a": (b"1", 1)}, 1


@pytest.mark.parametrize(
    ("stands", "asked", "found"),
    [
        (at(5), at(5), {ACME}),  # where this process is, which is where it mostly stands
        (at(6), at(5), {ACME}),  # ahead: the unit is as of then, and waits until this process is there
        (at(4), at(5), None),  # behind: it lacks what this process has seen already
        (at(5, "two"), at(5), None),
        (at(0, ""), at(5), None),  # empty
    ],
)
def test_a_mirror_is_asked_for_units_only_where_it_is_not_behind_this_process(
    stands: Position, asked: Position, found: set[str] | None
) -> None:
    store = MirroredStore(MemoryStore(lazy=LAZY), Standing(stands))
    units = store.find_units([ACME, BETA], asked, timeout_s=1.0)
    assert (units if units is None else set(units.units)) == found
    assert units is None or units.units[ACME].revision == stands.revision


# --- the model


class Authority(MemoryStore):
    """Reads units out of a rig's history; much may happen between its reading and its answer."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(lazy=LAZY)
        self._rig = rig
        self.meanwhile: Callable[[], None] = lambda: None
        self.fails = False

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> dict[str, RawUnit]:
        found = {name: self._rig.raw(name, position.revision) for name in names}
        self.meanwhile()
        if self.fails:
            raise StoreUnavailable("it went away")
        return found


class Fleet:
    """A worker, a mirror, and relays that take over from each other, over one authority."""

    def __init__(
        self,
        data: st.DataObject,
        store: type[MirroredStore],
        filler: type[UnitFiller],
        mirror: type[ScriptedMirror],
    ) -> None:
        self.data = data
        self.rig = Rig()
        self.rig.write(x=b"0")
        self.views = [self.rig.follow(listing=True)]
        self.authority = Authority(self.rig)
        self.mirror = mirror(LAZY, at(1))
        self.store = store(self.authority, self.mirror)
        self.copies = [self.mirror.copy()]
        self.early: list[tuple[Reading, str, MirroredUnit]] = []
        self.landed: list[tuple[str, Unit]] = []
        self.depth = 0
        self._new_filler = filler
        self.take_over()

    # The relay

    def take_over(self) -> None:
        """Another relay is elected, and goes on from what the mirror holds."""
        self.lease: Lease = self.mirror.elect()
        self.filler = self._new_filler(self.authority, self.mirror)
        self.filler._thread = threading.current_thread()  # so that it begins none: it is called from here
        self.filler.stands(self.lease, self.mirror.position)

    def feed(self) -> None:
        """The relay brings the next revision to the mirror, or fills it anew where it does not stand there."""
        filler, lease, revision = self.filler, self.lease, self.mirror.position.revision + 1
        if revision >= len(self.rig.history):
            return
        batch = Batch(at(revision), filler._position.revision, (), lazy=LAZY, lazy_changes=self.rig.changes(revision))
        try:
            with filler.adding([batch]):
                self.mirror.append(lease, batch)
        except Compacted:
            self.refill()

    def refill(self) -> None:
        self.mirror.refill(self.lease, at(len(self.rig.history) - 1))
        self.filler.stands(self.lease, self.mirror.position)

    def fill(self, names: Sequence[str]) -> None:
        """The relay reads units, and fills them late: others go on meanwhile."""
        self.authority.fails = self.data.draw(st.sampled_from([False, False, False, True]))
        with suppress(LeaseLost, Compacted, StoreUnavailable):
            self.filler._fill_all(names)

    # The worker

    def look(self, names: Sequence[str]) -> None:
        """Read what the mirror holds of these; what is as of a revision that is still to come waits for it."""
        units = self.rig.units
        reading = self.rig.begin(*names)
        found = self.store.find_units(names, reading.position, timeout_s=1.0)
        for name, unit in ({} if found is None else found.units).items():
            if units.has_reached(unit.revision):
                self.landed += units.land_mirrored(reading, {name: unit}).items()
            else:
                self.early.append((units.keep(reading, [name]), name, unit))
        units.end(reading)

    def follow(self) -> None:
        newest = len(self.rig.history) - 1
        self.views.append(self.rig.follow(to=self.data.draw(st.integers(self.rig.followed, newest))))
        due = [early for early in self.early if self.rig.units.has_reached(early[2].revision)]
        self.early = [early for early in self.early if early not in due]
        for reading, name, unit in due:
            self.landed += self.rig.units.land_mirrored(reading, {name: unit}).items()
            self.rig.units.end(reading)

    # All of them

    ACTIONS = ("write", "write", "feed", "feed", "follow", "follow", "look", "look", "fill", "fill", "evict", "rare")

    MEANWHILE = ("write", "write", "feed", "feed", "follow", "look", "fill", "rare", "rare")

    def act(self, actions: Sequence[str] = ACTIONS) -> None:
        action = self.data.draw(st.sampled_from(actions))
        if action == "write":
            keys = sorted(self.data.draw(st.sets(st.sampled_from(KEYS), min_size=1, max_size=3)))
            value = b"%d" % len(self.rig.history)
            self.rig.write_keys({key: self.data.draw(st.sampled_from([value, None])) for key in keys})
        elif action == "feed":
            self.feed()
            self.copies.append(self.mirror.copy())
        elif action == "follow":
            self.follow()
        elif action == "look":
            self.look(sorted(self.data.draw(st.sets(st.sampled_from(UNITS), min_size=1))))
        elif action == "fill" and self.depth < 2:
            names = sorted(self.data.draw(st.sets(st.sampled_from(UNITS), min_size=1)))
            with self.deeper():
                self.fill(names)
        elif action == "evict":
            name = self.data.draw(st.sampled_from(UNITS))
            if self.data.draw(st.booleans()):
                self.rig.cache.discard(name)
            else:
                self.mirror.units.pop(name, None)
        elif action == "rare":
            how = self.data.draw(st.sampled_from(["takeover", "refill", "replica"]))
            if how == "takeover":
                self.take_over()
            elif how == "refill":
                self.refill()
            else:
                self.mirror.go_back(self.data.draw(st.sampled_from(self.copies)))
                self.filler.rest()

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """What happens while a relay reads, from here on: a few actions, and none within those within these."""
        before = self.authority.meanwhile
        self.depth += 1
        self.authority.meanwhile = self.some
        try:
            yield
        finally:
            self.depth -= 1
            self.authority.meanwhile = before

    def some(self) -> None:
        if self.depth < 2:
            for _ in range(self.data.draw(st.integers(0, 4))):
                self.act(self.MEANWHILE)

    def check(self) -> None:
        rig = self.rig
        for view in self.views:
            for name in UNITS:
                found = rig.units.get(name, view)
                assert found is None or dict(found) == expected(rig, name, view.revision)
            for name, unit in self.landed:
                of_unit = unit.at(view)
                assert of_unit is None or dict(of_unit) == expected(rig, name, view.revision)

    def settle(self) -> None:
        """Nothing happens any more: each unit comes by the mirror."""
        rig = self.rig
        self.take_over()
        self.refill()
        self.authority.meanwhile = lambda: None
        self.authority.fails = False
        self.filler._fill_all(UNITS)
        self.views.append(rig.follow())
        rig.cache.clear()
        self.look(UNITS)
        for name in UNITS:
            found = rig.units.get(name, rig.pinned)
            assert found is not None
            assert dict(found) == expected(rig, name, rig.followed)


def check_against_a_model(
    data: st.DataObject,
    store: type[MirroredStore] = MirroredStore,
    filler: type[UnitFiller] = UnitFiller,
    mirror: type[ScriptedMirror] = ScriptedMirror,
) -> None:
    fleet = Fleet(data, store, filler, mirror)
    for _ in range(data.draw(st.integers(1, 30))):
        fleet.act()
        fleet.check()
    fleet.settle()
    fleet.check()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_mirror_and_relays_do_a_view_reads_its_own_revision_or_nothing(data: st.DataObject) -> None:
    check_against_a_model(data)


# --- its worth: with one defect each, it must fail


class AsksAMirrorThatIsBehind(MirroredStore):
    def find_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> FoundUnits | None:
        return super().find_units(names, at(0), timeout_s=timeout_s)


class AsksOnlyAMirrorThatIsAhead(MirroredStore):
    def find_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> FoundUnits | None:
        return super().find_units(names, at(position.revision + 1), timeout_s=timeout_s)


class FillsWhatItRead(UnitFiller):
    """What changed while it read is lost."""

    def _brought_forward(self, name: str, raw: RawUnit) -> MirroredUnit:
        return MirroredUnit(raw, self._position.revision, self._changed.of(name))


class FillsAfterARefill(UnitFiller):
    """The mirror was filled anew meanwhile, and what changed up to there is not known."""

    def stands(self, lease: Lease, position: Position) -> None:
        reading = self._reading
        super().stands(lease, position)
        self._reading = reading


class HoldsItForUnchanged(UnitFiller):
    """A unit is said to be as it is since ever."""

    def stands(self, lease: Lease, position: Position) -> None:
        super().stands(lease, position)
        self._changed = LastChanges()


class KeepsUnitsOverARefill(ScriptedMirror):
    def refill(self, lease: Lease, position: Position) -> None:
        units = self.units
        super().refill(lease, position)
        self.units = units


MUTANTS: list[dict[str, Any]] = [
    {"store": AsksAMirrorThatIsBehind},
    {"store": AsksOnlyAMirrorThatIsAhead},
    {"filler": FillsWhatItRead},
    {"filler": FillsAfterARefill},
    {"filler": HoldsItForUnchanged},
    {"mirror": KeepsUnitsOverARefill},
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: next(iter(mutant.values())).__name__)
def test_a_defect_is_caught(mutant: dict[str, Any]) -> None:
    @settings(max_examples=2_000, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        check_against_a_model(data, **mutant)

    with pytest.raises(AssertionError) as caught:
        check()
    assert "check_against_a_model" in {entry.name for entry in caught.traceback}, "the model, and nothing else, fails"
