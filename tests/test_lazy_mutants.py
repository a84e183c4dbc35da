"""The worth of the model of lazy units: units with one defect each, and every one must be caught."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.test_lazy import check_against_a_model
from veltrix_mw.keyspace import Keyspace
from veltrix_mw.last_changes import LastChanges
from veltrix_mw.lazy import LazyUnits, Reading, Unit
from veltrix_mw.protocols import MirroredUnit, RawChange
from veltrix_mw.replica import Publication
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.values import Missing

Step = tuple[int, tuple[RawChange, ...]]


class LosesWhatCameMeanwhile(LazyUnits):
    """A change that comes while the unit is read is lost."""

    def land_mirrored(self, reading: Reading, units: Mapping[str, MirroredUnit]) -> dict[str, Unit]:
        for awaited in reading.awaited.values():
            awaited.steps = []
        return super().land_mirrored(reading, units)


class LosesTheLastThatCameMeanwhile(LazyUnits):
    """Of several publications that come while the unit is read the last is lost."""

    def land_mirrored(self, reading: Reading, units: Mapping[str, MirroredUnit]) -> dict[str, Unit]:
        for awaited in reading.awaited.values():
            awaited.steps = awaited.steps[:-1]
        return super().land_mirrored(reading, units)


class TakesWhatIsInItAlready(LazyUnits):
    """A mirror's unit is taken for one as of when it was asked for."""

    def land_mirrored(self, reading: Reading, units: Mapping[str, MirroredUnit]) -> dict[str, Unit]:
        then = reading.position.revision
        early = {name: replace(unit, revision=then, since=min(unit.since, then)) for name, unit in units.items()}
        return super().land_mirrored(reading, early)


class IsOfAllTimes(LazyUnits):
    """What is read is taken to have been so from the beginning."""

    def begin(self, names: Iterable[str]) -> Reading | None:
        reading = super().begin(names)
        if reading is not None:
            for awaited in reading.awaited.values():
                awaited.since = 0
        return reading


class KnowsThePastOfAList(LazyUnits):
    """What changed before a list is taken for unchanged."""

    def _forget_all(self, revision: int) -> None:
        super()._forget_all(revision)
        self._changed = LastChanges(0)


class HoldsOverAList(LazyUnits):
    """What is held outlives a list, whose gap nobody told it."""

    def _forget_all(self, revision: int) -> None:
        kept = dict(getattr(self._cache, "units", {}))
        super()._forget_all(revision)
        for name, unit in kept.items():
            self._cache.put(name, Unit(self._incarnation, unit.versions, None, unit.size), unit.size)


class LandsAfterAList(LazyUnits):
    """What was on its way when a list came is held as if nothing had been missed."""

    def _forget_all(self, revision: int) -> None:
        kept = set(self._readings)
        super()._forget_all(revision)
        self._readings |= kept


class HandsOnForEver(LazyUnits):
    """Who waited for a unit may read it as of all later revisions."""

    def _known(self, unit: Unit) -> Unit:
        return Unit(unit.incarnation, unit.versions, None, unit.size)


class ServesTheNewest(LazyUnits):
    """A view reads what is newest."""

    def get(self, name: str, pinned: Snapshot) -> Snapshot | None:
        unit = self._cache.get(name, None)
        return None if unit is None or pinned._incarnation != unit.incarnation else unit.versions[0][1]


class ServesAnyHistory(LazyUnits):
    """A view of another history reads what is held now."""

    def get(self, name: str, pinned: Snapshot) -> Snapshot | None:
        unit = self._cache.get(name, None)
        if unit is None:
            return None
        return next((version for since, version in unit.versions if since <= pinned._revision), None)


class LosesDeletions(LazyUnits):
    """A key that is deleted stays."""

    def _by_unit(self, changes: Iterable[tuple[int, Sequence[RawChange]]]) -> dict[str, list[Step]]:
        return super()._by_unit(
            (revision, [change for change in changed if not isinstance(change.value, Missing)])
            for revision, changed in changes
        )


class TakesTheFirstUnitAlone(LazyUnits):
    """Of a revision that changes several units one is told."""

    def _by_unit(self, changes: Iterable[tuple[int, Sequence[RawChange]]]) -> dict[str, list[Step]]:
        found = super()._by_unit(changes)
        return dict(list(found.items())[:1])


class TakesTheLastRevisionAlone(LazyUnits):
    """Of several revisions in one publication the last is taken."""

    def _by_unit(self, changes: Iterable[tuple[int, Sequence[RawChange]]]) -> dict[str, list[Step]]:
        return super()._by_unit(list(changes)[-1:])


class StandsStill(LazyUnits):
    """What is held is not kept current."""

    def _hold(self, name: str, unit: Unit, *, is_new: bool = True) -> None:
        if is_new:
            super()._hold(name, unit)


class ForgetsEarlierVersions(LazyUnits):
    """The newest version is taken to have held since the one before it."""

    def _advanced(self, name: str, unit: Unit, steps: Sequence[Step]) -> Unit:
        newest = super()._advanced(name, unit, steps).versions[0][1]
        return Unit(unit.incarnation, ((unit.versions[0][0], newest),), unit.until, unit.size)


class BeginsAnew(LazyUnits):
    """A change is taken for all that the unit has."""

    def _advanced(self, name: str, unit: Unit, steps: Sequence[Step]) -> Unit:
        empty = Keyspace(self._schemas)
        empty.resume(Snapshot(revision=unit.versions[0][0], incarnation=unit.incarnation, origin="lazy"))
        bare = ((unit.versions[0][0], empty.snapshot), *unit.versions[1:])
        changed = super()._advanced(name, Unit(unit.incarnation, bare, unit.until, unit.size), steps)
        return Unit(unit.incarnation, (changed.versions[0], *unit.versions), unit.until, unit.size)


class MissesAnotherHistory(LazyUnits):
    """A history that was replaced is taken for the same one."""

    def take(self, publication: Publication) -> None:
        if self._position is not None and publication.changed is not None:
            self._incarnation = publication.snapshot.incarnation
            same = replace(publication.position, incarnation=self._position.incarnation)
            publication = replace(publication, position=same)
        super().take(publication)


MUTANTS = [
    LosesWhatCameMeanwhile,
    LosesTheLastThatCameMeanwhile,
    TakesWhatIsInItAlready,
    IsOfAllTimes,
    KnowsThePastOfAList,
    HoldsOverAList,
    LandsAfterAList,
    HandsOnForEver,
    ServesTheNewest,
    ServesAnyHistory,
    LosesDeletions,
    TakesTheFirstUnitAlone,
    TakesTheLastRevisionAlone,
    StandsStill,
    ForgetsEarlierVersions,
    BeginsAnew,
    MissesAnotherHistory,
]


@pytest.mark.parametrize("kind", MUTANTS, ids=lambda kind: kind.__name__)
def test_units_with_a_defect_are_caught(kind: type[LazyUnits]) -> None:
    @settings(max_examples=2_000, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        check_against_a_model(data, kind)

    with pytest.raises(AssertionError) as caught:
        check()
    assert "check_against_a_model" in {entry.name for entry in caught.traceback}, "the model, and nothing else, fails"
