"""Lazy units: those that this process holds and keeps current, and those that are on their way.

Owns which version of a unit a view reads. Reads nothing itself (`unit_reader` does), and knows no thread, socket or
clock.

::

    begin(names) ──► they are read as of the position that it gives ──► land: held, and current from then on
    take(publication): what is held goes on to its next version; what is on its way catches up when it lands
    a list, another history: nothing is held any more

A view of revision R reads the version that was current at R. As all changes up to R are taken before a view of R is
given out, no view sees a unit that is older than its snapshot, nor one that is newer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from veltrix_mw.keys import unit_of
from veltrix_mw.keyspace import Keyspace
from veltrix_mw.last_changes import LastChanges
from veltrix_mw.protocols import Batch, Listing, MirroredUnit, Position, RawChange, RawUnit, RawVersion
from veltrix_mw.replica import Publication
from veltrix_mw.snapshot import Rejection, Snapshot
from veltrix_mw.stores.units import MAX_UNIT_BYTES, MAX_UNIT_KEYS
from veltrix_mw.validation import Schemas
from veltrix_mw.values import Missing

__all__ = ["Cache", "Judged", "LazyUnits", "Reading", "Remember", "Unit"]

_EARLIER: Final = 4  # versions of a held unit beside the newest: a request reads one that is seconds old at most
_REFUSED: Final = 1_000
_UNIT_BYTES: Final = 1_000  # what a unit takes beside its keys and values ...
_ENTRY_BYTES: Final = 200  # ... and a key beside its name and its JSON text

# What one revision changed of one unit.
_Step = tuple[int, tuple[RawChange, ...]]

Remember = Callable[[Sequence[str], int], Mapping[str, Sequence[RawVersion]]]
"""Gives the versions of keys that are known up to a revision, newest first; of as many keys as it can."""


class Unit:
    """One lazy unit as it was from one change to the next: versions, the newest first, up to a revision.

    `incarnation` is the one that views of it are of. Replaced whole, never changed.
    """

    __slots__ = ("incarnation", "size", "until", "versions")

    def __init__(
        self, incarnation: str, versions: tuple[tuple[int, Snapshot], ...], until: int | None, size: int
    ) -> None:
        self.incarnation = incarnation
        self.versions = versions  # (the revision from which it holds, what it is)
        self.until = until  # the last revision that it is known for; None while it is kept current
        self.size = size

    def at(self, pinned: Snapshot) -> Snapshot | None:
        """What a view of that snapshot reads of it; None where that is not known."""
        revision = pinned._revision
        if pinned._incarnation != self.incarnation or (self.until is not None and revision > self.until):
            return None
        return next((version for since, version in self.versions if since <= revision), None)


class Cache(Protocol):
    """Holds units within bounds of its own, which may let any of them go at any time."""

    def get(self, name: str, default: None) -> Unit | None: ...
    def put(self, name: str, value: Unit, size_bytes: int) -> None: ...
    def replace(self, name: str, value: Unit, size_bytes: int) -> bool: ...
    def discard(self, name: str) -> None: ...
    def clear(self) -> None: ...
    def __contains__(self, name: str) -> bool: ...
    def __len__(self) -> int: ...
    @property
    def bytes(self) -> int: ...


@dataclass(slots=True)
class _Awaited:
    """A unit that is on its way: since when it is unchanged, and what changed of it meanwhile."""

    since: int
    steps: list[list[_Step]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Reading:
    """Units that are read as of `position`, in one go."""

    position: Position
    incarnation: str
    awaited: dict[str, _Awaited]


@dataclass(slots=True)
class Judged:
    """A unit that was read, decoded and validated."""

    mirrored: MirroredUnit
    keyspace: Keyspace
    size: int

    @property
    def wanting(self) -> tuple[str, ...]:
        """Its keys that are held back and of which no good value is known: history may know one."""
        return self.keyspace.wanting


class LazyUnits:
    """The lazy units of one namespace in this process.

    Thread-safe. `take` is called by one thread, before the snapshot of its publication is given out.
    """

    def __init__(self, lazy: Sequence[str], schemas: Schemas, cache: Cache) -> None:
        """`schemas` are those of single units. The cache is not to be used by others."""
        self._lazy = tuple(lazy)
        self._schemas = schemas
        # Protects all that follows; held while changes are applied, and for dictionary operations.
        self._lock = threading.Lock()
        self._cache = cache
        self._position: Position | None = None
        self._incarnation = ""
        self._readings: set[Reading] = set()
        self._changed = LastChanges()  # of units that are held or not
        self._refused: dict[str, str] = {}  # units that are beyond the bounds, until they change
        self._keyspaces: dict[str, Keyspace] = {}  # of held units of which something is held back
        self._rejected: dict[str, Mapping[str, Rejection]] = {}  # by unit, held or not, until it changes
        self._told: dict[str, int] = {}  # the revisions of keys whose rejection was counted
        self._untold: list[tuple[str, Rejection]] = []
        self.rejections = 0  # changes held back so far, each counted once however often its unit is read

    def get(self, name: str, pinned: Snapshot) -> Snapshot | None:
        """The unit as a view of that snapshot reads it, if it is held."""
        with self._lock:
            unit = self._cache.get(name, None)
        return None if unit is None else unit.at(pinned)

    def newest(self, name: str) -> Unit | None:
        """The unit, if it is held, as who waits for it to be read may read it."""
        with self._lock:
            unit = self._cache.get(name, None)
            return None if unit is None else self._known(unit)

    def refused(self, name: str) -> str:
        """Why the unit cannot be read, where that is known already; else empty."""
        return self._refused.get(name, "")

    @property
    def held(self) -> int:
        """How many units are held, absent ones too."""
        return len(self._cache)

    @property
    def bytes(self) -> int:
        """What holding them takes of this process's memory."""
        return self._cache.bytes

    @property
    def rejected(self) -> dict[str, Rejection]:
        """The keys that are held back, as far as their units were read."""
        with self._lock:
            return {key: why for rejected in self._rejected.values() for key, why in rejected.items()}

    def untold(self) -> list[tuple[str, Rejection]]:
        """What was held back since this was asked last."""
        if not self._untold:
            return []
        with self._lock:
            untold, self._untold = self._untold, []
            return untold

    def judged_with(self, keys: Iterable[str]) -> list[str]:
        """The units that a schema judges as a whole when these keys of them change."""
        return sorted({unit_of(key, self._lazy) for key in keys if self._schemas.touched([key])})

    # --- what is followed

    def take(self, publication: Publication) -> None:
        """Go on to what is about to be served."""
        revision = publication.position.revision
        with self._lock:
            is_other = self._position is None or publication.position.incarnation != self._position.incarnation
            self._position = publication.position
            if is_other or publication.changed is None or publication.snapshot.incarnation != self._incarnation:
                if self._incarnation != publication.snapshot.incarnation:
                    self._told = {}
                self._incarnation = publication.snapshot.incarnation
                self._forget_all(revision)
                return
            for name, steps in self._by_unit(publication.lazy_changes).items():
                self._changed.note(name, steps[-1][0])
                self._refused.pop(name, None)
                self._rejected.pop(name, None)
                for reading in self._readings:
                    if (awaited := reading.awaited.get(name)) is not None:
                        awaited.steps.append(steps)
                # That it changes counts as a use: what is written all the time is read, as a rule.
                if (held := self._cache.get(name, None)) is not None:
                    self._hold(name, self._advanced(name, held, steps), is_new=False)

    def after_fork(self) -> None:
        """In a forked child: forget what is held, and a lock that a thread of the parent may have held."""
        self._lock = threading.Lock()
        self._forget_all(0 if self._position is None else self._position.revision)

    def _by_unit(self, changes: Iterable[tuple[int, Sequence[RawChange]]]) -> dict[str, list[_Step]]:
        found: dict[str, list[_Step]] = {}
        for revision, changed in changes:
            of_units: dict[str, list[RawChange]] = {}
            for change in changed:
                of_units.setdefault(unit_of(change.key, self._lazy), []).append(change)
            for name, mine in of_units.items():
                found.setdefault(name, []).append((revision, tuple(mine)))
        return found

    def _forget_all(self, revision: int) -> None:
        self._changed = LastChanges(revision)
        self._cache.clear()
        self._readings.clear()
        self._refused.clear()
        self._keyspaces.clear()
        self._rejected.clear()

    # --- what is read

    def begin(self, names: Iterable[str]) -> Reading | None:
        """From here on changes of these units are kept for them; None where nothing is followed yet."""
        with self._lock:
            if self._position is None:
                return None
            awaited = {name: _Awaited(self._changed.of(name)) for name in names}
            reading = Reading(self._position, self._incarnation, awaited)
            self._readings.add(reading)
            return reading

    def end(self, reading: Reading) -> None:
        """It brought nothing. Idempotent."""
        with self._lock:
            self._readings.discard(reading)

    def keep(self, reading: Reading, names: Iterable[str]) -> Reading:
        """The part of a reading that goes on when the rest of it ends."""
        with self._lock:
            kept = Reading(reading.position, reading.incarnation, {name: reading.awaited[name] for name in names})
            if reading in self._readings:
                self._readings.add(kept)
            return kept

    def has_reached(self, revision: int) -> bool:
        """Whether all changes up to that revision were taken."""
        with self._lock:
            return self._position is not None and self._position.revision >= revision

    def land(self, reading: Reading, units: Mapping[str, RawUnit], remember: Remember | None = None) -> dict[str, Unit]:
        """Hold what was read as of the reading's position, but for what was refused; the reading ends.

        Of what has no good value `remember` is asked. Returns what may be read of each by who waited for it.
        """
        since = {name: reading.awaited[name].since for name in units}
        as_of = {name: MirroredUnit(raw, reading.position.revision, since[name]) for name, raw in units.items()}
        judged = self.judge(reading, as_of)
        if remember is not None:
            for each in judged.values():
                _recover(each.keyspace, reading.position.revision, remember)
        landed = self.settle(reading, judged)
        self.end(reading)
        return landed

    def land_mirrored(self, reading: Reading, units: Mapping[str, MirroredUnit]) -> dict[str, Unit]:
        """As `land`, of units that are as of revisions since the reading's position, which were reached."""
        return self.settle(reading, self.judge(reading, units))

    def judge(self, reading: Reading, units: Mapping[str, MirroredUnit]) -> dict[str, Judged]:
        """Decode and validate what was read, but for what was refused. Takes no lock, as it takes its time."""
        judged: dict[str, Judged] = {}
        for name, mirrored in units.items():
            if mirrored.unit.refused:
                self._note_refused(reading, name, mirrored)
                continue
            position = Position(reading.position.incarnation, mirrored.revision)
            keyspace = self._keyspace_of(mirrored.unit, position, reading.incarnation)
            judged[name] = Judged(mirrored, keyspace, _size_of(mirrored.unit))
        return judged

    def settle(self, reading: Reading, judged: Mapping[str, Judged]) -> dict[str, Unit]:
        """Let what was judged catch up, and hold it."""
        landed: dict[str, Unit] = {}
        for name, each in judged.items():
            with self._lock:
                landed[name] = self._landed(reading, name, each.mirrored, each.keyspace, each.size)
        return landed

    def past(self, raw: RawUnit, incarnation: str, revision: int, remember: Remember | None = None) -> Snapshot:
        """What was read as of a revision that views are of; it is not held."""
        keyspace = self._keyspace_of(raw, Position(incarnation, revision), incarnation)
        if remember is not None:
            _recover(keyspace, revision, remember)
        return keyspace.snapshot

    def position_of(self, incarnation: str, revision: int) -> Position | None:
        """Where to read what a view of that revision reads; None where its history was replaced."""
        with self._lock:
            position = self._position
            if position is None or incarnation != self._incarnation:
                return None
            return position if position.revision == revision else Position(position.incarnation, revision)

    def _landed(self, reading: Reading, name: str, mirrored: MirroredUnit, keyspace: Keyspace, size: int) -> Unit:
        """Let it catch up, and hold it; a unit of a history or a time that nothing follows is only handed on."""
        awaited, revision = reading.awaited[name], mirrored.revision
        if reading not in self._readings:
            return Unit(reading.incarnation, ((mirrored.since, keyspace.snapshot),), revision, size)
        # What it has in it already may tell more exactly since when it is as it is than who read it could.
        in_it = [at for steps in awaited.steps for at, _ in steps if at <= revision]
        versions = ((min(mirrored.since, in_it[-1] if in_it else awaited.since), keyspace.snapshot),)
        self._note_rejected(name, keyspace)
        unit = Unit(reading.incarnation, versions, None, size)
        for steps in awaited.steps:
            later = [step for step in steps if step[0] > revision]
            if later:
                unit = self._advanced(name, unit, later)
        self._hold(name, unit)
        return self._known(unit)

    def _known(self, unit: Unit) -> Unit:
        """For who may ask of it later, when it has changed since and is held no more."""
        assert self._position is not None
        return Unit(unit.incarnation, unit.versions, self._position.revision, unit.size)

    def _note_refused(self, reading: Reading, name: str, mirrored: MirroredUnit) -> None:
        with self._lock:
            later = any(at > mirrored.revision for steps in reading.awaited[name].steps for at, _ in steps)
            if reading in self._readings and not later:
                if len(self._refused) >= _REFUSED:
                    self._refused.clear()
                self._refused[name] = mirrored.unit.refused

    def _note_rejected(self, name: str, keyspace: Keyspace) -> None:
        rejected = keyspace.snapshot.rejected
        if not rejected:
            self._keyspaces.pop(name, None)
            self._rejected.pop(name, None)
            return
        self._keyspaces[name] = keyspace
        if len(self._rejected) >= _REFUSED:
            self._rejected.clear()
        self._rejected[name] = rejected
        for key, why in rejected.items():
            if self._told.get(key) != why.revision:
                if len(self._told) >= _REFUSED:
                    self._told.clear()
                self._told[key] = why.revision
                self.rejections += 1
                if len(self._untold) < _REFUSED:
                    self._untold.append((key, why))

    def _keyspace_of(self, raw: RawUnit, position: Position, incarnation: str) -> Keyspace:
        keyspace = Keyspace(self._schemas)
        keyspace.restore(Listing(position, raw.entries), incarnation=incarnation, origin="lazy", proved_at_s=0.0)
        return keyspace

    def _advanced(self, name: str, unit: Unit, steps: Sequence[_Step]) -> Unit:
        """The unit after changes that came in one publication: no view is of a revision in between."""
        keyspace = self._keyspaces.get(name)
        if keyspace is None:
            keyspace = Keyspace(self._schemas)
            keyspace.resume(unit.versions[0][1])
        size = unit.size
        for revision, changes in steps:
            keyspace.apply(Batch(Position(unit.incarnation, revision), 0, changes))
            # What it replaces is not taken off: a unit that is changed again and again is read anew now and then.
            size += sum(_grown_by(change, unit.versions[0][1]) for change in changes)
        self._note_rejected(name, keyspace)
        versions = ((steps[-1][0], keyspace.snapshot), *unit.versions[:_EARLIER])
        return Unit(unit.incarnation, versions, unit.until, size)

    def _hold(self, name: str, unit: Unit, *, is_new: bool = True) -> None:
        if _is_beyond(unit):
            self._cache.discard(name)  # whoever asks for it reads it anew, and is told if it is beyond the bounds
        elif is_new:
            self._cache.put(name, unit, unit.size)
        else:
            self._cache.replace(name, unit, unit.size)
        if len(self._keyspaces) > _REFUSED:
            # Units with a fault that the cache let go of.
            self._keyspaces = {name: kept for name, kept in self._keyspaces.items() if name in self._cache}


def _recover(keyspace: Keyspace, revision: int, remember: Remember) -> None:
    """Let what has no good value have the last one that was good up to that revision."""
    if wanting := keyspace.wanting:
        keyspace.recover(remember(wanting, revision))


def _is_beyond(unit: Unit) -> bool:
    """Whether it may be more than a reading of it would take: its size is no less than what it has."""
    newest = unit.versions[0][1]
    if len(newest) > MAX_UNIT_KEYS:
        return True
    if unit.size <= MAX_UNIT_BYTES:
        return False
    named = (
        *newest,
        *(key for key, why in newest.rejected.items() if not why.deleted and newest._entries.item(key) is None),
    )
    return unit.size > MAX_UNIT_BYTES + _UNIT_BYTES + sum(_ENTRY_BYTES + len(key) for key in named)


def _grown_by(change: RawChange, before: Snapshot) -> int:
    if isinstance(change.value, Missing):
        return 0
    return len(change.value) + (0 if before._entries.item(change.key) else _ENTRY_BYTES + len(change.key))


def _size_of(raw: RawUnit) -> int:
    return _UNIT_BYTES + sum(_ENTRY_BYTES + len(key) + len(value) for key, value, _ in raw.entries)
