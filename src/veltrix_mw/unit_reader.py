"""The unit reader: reads the lazy units that are not held, once for all who ask.

Owns the way of a miss: one flight for all who want a unit, a batch, then the mirror, else the authority, within rates
that protect both. Which version of a unit a view may read is `lazy`'s to say; how flights wait and batches form,
`coalesce`'s.

::

    batch ──► portion ──► the mirror has it, and it was reached ──► landed
                ├─ beyond what one reply holds ──► again in the next batch
                ├─ it is of a revision that is still on its way ──► again once that was taken
                ├─ it has none ──► wanted, once a process ──► again once it is announced that it was filled
                └─ not followed, no relay, no announcement in time ──► batch ──► the authority ──► landed
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from veltrix_mw.coalesce.batcher import Batcher, Elsewhere
from veltrix_mw.coalesce.flight import Flight
from veltrix_mw.errors import AuthFailed, Compacted, InvalidValue, NotReady, Overloaded, StoreError, StoreUnavailable
from veltrix_mw.events import Events
from veltrix_mw.follower import HISTORY_LIMIT, tell
from veltrix_mw.lazy import LazyUnits, Reading, Remember, Unit
from veltrix_mw.protocols import Filled, FoundUnits, MirroredUnit, MirrorState, Position, RawUnit, RawVersion, Unitary
from veltrix_mw.rate import Rate
from veltrix_mw.replica import HISTORY_KEYS, Notice, Publication
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.telemetry import FetchOutcome, Telemetry
from veltrix_mw.unit_portions import Portions, may_fit_halved, sizes_of

if TYPE_CHECKING:
    from opentelemetry.context import Context

__all__ = ["FETCH_TIMEOUT_S", "UnitReader"]

FETCH_TIMEOUT_S: Final = 2.0
"""As long as any call to a store: what takes milliseconds and is not there by then has failed."""

MISSES_PER_S: Final = 1_000
"""Units a second that one process may ask the store for; invented names are bounded by it, and cost a range each."""

MISSES_AT_ONCE: Final = 5_000
"""More than that for a moment: a worker that has just started meets all its popular tenants at once."""

BATCH: Final = 500
"""The most units in one call: eight transactions of etcd; a stall of 2,000 cold tenants is over in six calls."""

FILLED_WITHIN_S: Final = 0.3
"""How long the relay may take: it reads a unit in the time of one call, and a relay's takeover takes seconds."""

FILLED_MOST_S: Final = 1.0
"""How long it may take while it fills others: it is there, and who went to the authority would only keep it busy."""

PAUSE_SHARE: Final = 0.25
"""Of what a fill takes: so long after a look at the mirror, while fills are awaited, the next one waits for company."""

PAUSE_MOST_S: Final = 0.02

DIRECT_PER_S: Final = 200
"""Units a second that one process reads from the authority in the mirror's stead: a fleet without a relay is many."""

DIRECT_AT_ONCE: Final = 2_000

_HISTORY_SHARE: Final = 0.75  # of a call's time, within which histories of keys may be read beside the units
_RECOVERED_WITHIN_S: Final = 1.0  # then a unit of the mirror's is given out without what the authority remembers
_BARRED_S: Final = 60.0  # how long a process does not ask whom the mirror does not let ask
_SWEEP_S: Final = 1.0
_MOST_TOLD: Final = 20  # rejections at a time that are logged one by one

# What a flight is for: a unit that is held from then on, by its name; or one as of a view's revision, which is not.
_Past = tuple[str, str, int]  # name, incarnation, revision
_Wanted = str | _Past

_Brought = dict[_Wanted, Any]  # a `Unit`, of a past one its `Snapshot`, or an exception

_Loaded = dict[str, Snapshot | Exception]
_Loading = Generator[Flight[Any], bool, _Loaded]

W = TypeVar("W", str, _Past)


def _too_many() -> Overloaded:
    return Overloaded("more lazy units were to be read than one process may read; retry later")


class Source(Unitary, Protocol):
    """The store that units are read from, and the history of their keys."""

    def history(self, key: str, *, limit: int, timeout_s: float) -> Sequence[RawVersion]: ...


class Mirrored(Protocol):
    """A mirror of the store that is followed, or not, and may hold units."""

    on_filled: Filled | None

    @property
    def mirror_origin(self) -> str: ...
    def find_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> FoundUnits | None: ...
    def want_units(self, names: Sequence[str], *, timeout_s: float) -> None: ...


@dataclass(slots=True)
class _Awaited:
    """A unit that is to come by the mirror, until `due_s`; then, or once `is_direct`, it is read from the authority."""

    due_s: float
    ends_s: float
    most_s: float = -math.inf  # until when the relay may take while it fills others
    is_direct: bool = False
    # What the mirror has of it: of a revision that is not reached; or, where it is direct, with keys that lack a good
    # value, which the authority may remember.
    early: tuple[Reading, MirroredUnit] | None = None


class UnitReader:
    """Loads lazy units for views: from what is held, else from the mirror or the store.

    Whoever asks for a unit that is under way waits for that. Thread-safe; for threads and tasks alike.
    """

    def __init__(
        self,
        store: Source,
        units: LazyUnits,
        *,
        mirrored: Mirrored | None = None,
        origin: str = "",
        prefixes: Sequence[str] = (),
        timeout_s: float = FETCH_TIMEOUT_S,
        rate: Rate | None = None,
        direct_rate: Rate | None = None,
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`timeout_s` is each call's, and that of who waits and says nothing else; the rates are of units, one of all
        that are read, one of those that are read from the store although there is a mirror. `origin`, the store's, and
        `prefixes`, the lazy ones, are for telemetry.
        """
        self._store = store
        self._units = units
        self._mirrored = mirrored
        self._origin = origin
        self._events = Events(part="reader", tier=origin)
        self._prefixes = prefixes
        self._timeout_s = timeout_s
        self._rate = Rate(MISSES_PER_S, MISSES_AT_ONCE, clock=clock) if rate is None else rate
        self._direct_rate = Rate(DIRECT_PER_S, DIRECT_AT_ONCE, clock=clock) if direct_rate is None else direct_rate
        self._telemetry = Telemetry("off") if telemetry is None else telemetry
        self._clock = clock
        self._batcher, self._direct = self._new_batchers()
        # What one call takes of the store and of the mirror, as they need not be alike.
        self._portions, self._mirror_portions = Portions(BATCH), Portions(BATCH)
        # These three are the first batcher's thread's, but for one that hangs, and for who looks into them.
        self._awaited: dict[str, _Awaited] = {}
        self._early: set[str] = set()
        self._brought: dict[str, Any] = {}  # by the second batcher
        self._sweep_at_s = 0.0
        self._barred_until_s = 0.0
        self._filled_at_s = -math.inf  # when the relay last filled anything; the follower's to write
        self._fill_s = FILLED_WITHIN_S  # how long the last fill took that was awaited
        if mirrored is not None:
            mirrored.on_filled = self._filled
        # Figures for people: what two threads count at once may count as one.
        self.units_read = {"mirror": 0, "authority": 0, "wanted": 0}  # by where, and those that were asked for
        # By result.
        self.fetches = {"hit": 0, "miss": 0, "absent": 0, "coalesced": 0, "error": 0}

    def _new_batchers(self) -> tuple[Batcher[_Wanted, Any], Batcher[_Wanted, Any]]:
        around = self._telemetry.leading
        # Two: what is in the mirror need not wait behind an authority that hangs.
        return (
            Batcher(
                self._read,
                max_items=BATCH,
                timeout_s=self._timeout_s,
                around=around,
                pause_s=self._pause_s,
                clock=self._clock,
            ),
            Batcher(self._read_direct, max_items=BATCH, timeout_s=self._timeout_s, around=around, clock=self._clock),
        )

    def close(self, *, timeout_s: float) -> None:
        """End the threads that read; a later load begins others. Idempotent."""
        closing = self._batcher, self._direct
        self._batcher, self._direct = self._new_batchers()
        deadline_s = self._clock() + timeout_s
        for batcher in closing:
            batcher.close(timeout_s=max(0.0, deadline_s - self._clock()))
        self._forget_awaited()

    def follow(self, publication: Publication) -> None:
        """Take what is about to be served, and let those units land that waited for it."""
        self._units.take(publication)
        if self._early:
            self._batcher.wake(self._early.copy())

    def tell_rejected(self) -> None:
        """Log what was held back in units since this was called last."""
        untold = self._units.untold()
        for key, why in untold[:_MOST_TOLD]:
            found = {"key": key, "revision": why.revision, "reason": why.reason}
            tell(Notice("veltrix.rejected", "warning", found), self._events)
        if len(untold) > _MOST_TOLD:
            tell(Notice("veltrix.rejected", "warning", {"more": len(untold) - _MOST_TOLD}), self._events)

    def _filled(self, names: Sequence[str]) -> None:
        self._filled_at_s = self._clock()
        self._batcher.wake(names)

    def load(
        self,
        names: Sequence[str],
        pinned: Snapshot,
        timeout_s: float | None = None,
        context: Context | None = None,
    ) -> _Loaded:
        """Each of the units as a view of that snapshot reads it, or why it cannot be had.

        `context` is OpenTelemetry's, if the wait does not belong to the current one.
        """
        loaded, missing = self._held(names, pinned)
        if missing:
            until_s, outcome = self._until(timeout_s), self._outcome(missing)
            with self._telemetry.fetch(outcome, self._attributes(missing), context):
                loading = self._loading(missing, pinned, until_s, outcome)
                try:
                    flight = next(loading)
                    while True:
                        flight = loading.send(flight.wait_until(until_s))
                except StopIteration as done:
                    loaded.update(done.value)
        return loaded

    async def aload(
        self,
        names: Sequence[str],
        pinned: Snapshot,
        timeout_s: float | None = None,
        context: Context | None = None,
    ) -> _Loaded:
        """`load` without blocking the event loop: asyncio's or trio's."""
        loaded, missing = self._held(names, pinned)
        if missing:
            until_s, outcome = self._until(timeout_s), self._outcome(missing)
            with self._telemetry.fetch(outcome, self._attributes(missing), context):
                loading = self._loading(missing, pinned, until_s, outcome)
                try:
                    flight = next(loading)
                    while True:
                        flight = loading.send(await flight.await_until(until_s))
                except StopIteration as done:
                    loaded.update(done.value)
        return loaded

    def after_fork(self) -> None:
        """Make what is ours anew in a forked child; flights and batches do so by themselves."""
        self._rate.after_fork()
        self._direct_rate.after_fork()
        self._forget_awaited()

    def _forget_awaited(self) -> None:
        self._awaited = {}
        self._early = set()
        self._brought = {}

    def _until(self, timeout_s: float | None) -> float:
        return self._clock() + (self._timeout_s if timeout_s is None else timeout_s)

    def _held(self, names: Sequence[str], pinned: Snapshot) -> tuple[_Loaded, list[str]]:
        """Those that need not be waited for, and the names of the others."""
        loaded: _Loaded = {}
        missing: list[str] = []
        for name in names:
            # Where nothing was written yet the history has no label.
            held = self._units.get(name, pinned) if pinned._revision else Snapshot()
            if held is None:
                missing.append(name)
            else:
                loaded[name] = held
        if not missing:
            self.fetches["hit"] += 1
        return loaded, missing

    def _outcome(self, missing: Sequence[str]) -> FetchOutcome:
        outcome = FetchOutcome()
        for name in missing:
            outcome.follows(self._batcher.leader_of(name))
        return outcome

    def _attributes(self, missing: Sequence[str]) -> dict[str, str | int]:
        """What a span may tell: of names only the prefix that was configured."""
        attributes: dict[str, str | int] = {"veltrix.unit_count": len(missing)}
        prefix = next((prefix for prefix in self._prefixes if missing[0].startswith(prefix)), None)
        return attributes if prefix is None else {**attributes, "veltrix.prefix": prefix}

    def _loading(self, missing: Sequence[str], pinned: Snapshot, until_s: float, outcome: FetchOutcome) -> _Loading:
        """Yields each flight that is to be waited for; is told whether it landed in time."""
        loaded = yield from self._reading(missing, pinned, until_s, outcome)
        outcome.error = next((each for each in loaded.values() if isinstance(each, Exception)), None)
        if outcome.error is not None:
            outcome.result = "error"
        elif outcome.result == "miss" and not any(len(each) for each in loaded.values() if isinstance(each, Snapshot)):
            outcome.result = "absent"
        self.fetches[outcome.result] += 1
        return loaded

    def _reading(self, missing: Sequence[str], pinned: Snapshot, until_s: float, outcome: FetchOutcome) -> _Loading:
        loaded: _Loaded = {}
        changed: list[_Past] = []
        brought = yield from self._flying(missing, until_s, outcome)
        for name in missing:
            unit = brought[name]
            version = unit.at(pinned) if isinstance(unit, Unit) else unit
            if version is None:
                version = self._units.get(name, pinned)
            if version is None:
                changed.append((name, pinned._incarnation, pinned._revision))
            else:
                loaded[name] = version
        # What has changed since the view was pinned is read from the store's history.
        brought = yield from self._flying(changed, until_s, outcome)
        loaded.update({past[0]: brought[past] for past in changed})
        return loaded

    def _flying(
        self, wanted: Sequence[W], until_s: float, outcome: FetchOutcome
    ) -> Generator[Flight[Any], bool, _Brought]:
        """What all the flights bring, or the exceptions that they end in."""
        asked_s = self._clock()
        brought: _Brought = {}
        flights: dict[W, Flight[Any]] = {}
        for each in wanted:
            try:
                flights[each] = self._submitted(each, outcome)
                if flights[each].began_s >= asked_s:
                    outcome.result = "miss"
            except Exception as exc:  # noqa: BLE001  # whatever it is, it is of this unit alone
                brought[each] = exc
        for each, flight in flights.items():
            landed = yield flight
            try:
                current = flight
                while not landed and self._clock() < until_s:
                    # It was under way before we asked, perhaps, and hangs; we have more time than is left to it.
                    current = self._submitted(each, outcome)
                    landed = yield current
                brought[each] = current.outcome() if landed else current.too_late(until_s)
                if isinstance(current.leader, FetchOutcome) and current.leader.origin is not None:
                    outcome.origin = current.leader.origin
            except Exception as exc:  # noqa: BLE001
                brought[each] = exc
        return brought

    def _submitted(self, wanted: _Wanted, outcome: FetchOutcome) -> Flight[Any]:
        flight = self._batcher_of(wanted).submit(wanted, leader=outcome)
        outcome.follows(flight.leader)
        return flight

    def _batcher_of(self, wanted: _Wanted) -> Batcher[Any, Any]:
        # What is as of a view's revision only the authority has; the mirror's units do not wait behind it.
        return self._batcher if self._mirrored is None or isinstance(wanted, str) else self._direct

    def _came_from(self, origin: str, wanted: Iterable[_Wanted]) -> None:
        for each in wanted:
            leader = self._batcher_of(each).leader_of(each)
            if isinstance(leader, FetchOutcome):
                leader.origin = origin

    # --- the batch

    def _read(self, wanted: Sequence[_Wanted]) -> _Brought:
        """Called in the batcher's thread, by one at a time unless the store hangs."""
        read: _Brought = {}
        names: list[str] = []
        pasts: list[_Past] = []
        for each in wanted:
            # A flight that landed since who wanted it looked may have brought it already.
            if not isinstance(each, str):
                pasts.append(each)
            elif (known := self._known(each)) is not None:
                read[each] = known
                self._let_go(each)
            else:
                names.append(each)
        if self._mirrored is None:
            read.update(self._read_newest(names, self._rate))
        else:
            admitted = [name for name in names if name in self._awaited or self._rate.take()]
            read.update({name: _too_many() for name in set(names).difference(admitted)})
            if admitted:
                read.update(self._read_mirrored(admitted, self._mirrored))
        read.update(self._read_pasts(pasts, self._rate))
        self.tell_rejected()
        return read

    def _known(self, name: str) -> Unit | InvalidValue | None:
        why = self._units.refused(name)
        return InvalidValue(why) if why else self._units.newest(name)

    def _read_newest(self, names: Sequence[str], *rates: Rate) -> dict[str, Any]:
        """As many of them as go in one reading of the authority; the others go with the next batch."""
        portion = self._portions.first(names)
        asked = _admitted(portion, rates)
        read: dict[str, Any] = dict.fromkeys(names[len(portion) :], Elsewhere(self._clock()))
        read.update({name: _too_many() for name in set(portion).difference(asked)})
        if asked:
            read.update(self._read_portion(asked))
        return read

    def _read_portion(self, names: Sequence[str]) -> dict[str, Any]:
        asked_s = self._clock()
        try:
            reading = self._units.begin(names)
            if reading is None:
                raise NotReady("nothing was listed yet, so no lazy unit can be read")
            try:
                found = self._ask(names, reading.position)
                self._came_from(self._origin, names)
                landed = self._units.land(reading, found, self._remembering(asked_s))
                return {name: landed.get(name) or InvalidValue(raw.refused) for name, raw in found.items()}
            finally:
                self._units.end(reading)
        except Compacted as exc:
            # Whoever follows finds that out, too, and lists: then there is a position to read at again.
            error = StoreUnavailable(f"the store no longer keeps what this process serves: {exc}; retry")
            error.__cause__ = exc
            return dict.fromkeys(names, error)
        except Exception as exc:  # noqa: BLE001  # of these units alone, not of all in the batch
            return dict.fromkeys(names, self._again_or(exc, names))

    def _ask(self, names: Sequence[str], position: Position) -> dict[str, RawUnit]:
        self.units_read["authority"] += len(names)
        granted_s = self._portions.grant_s(names, self._timeout_s)
        found = self._store.read_units(names, position, timeout_s=granted_s)
        self._portions.learn(sizes_of(found))
        return found

    def _remembering(self, asked_s: float) -> Remember:
        """Reads the history of keys, in what is left of the time of a reading that was begun then.

        Who waits for the unit is given it all the same where the history does not come: as at a start.
        """
        until_s = asked_s + self._timeout_s * _HISTORY_SHARE

        def remember(keys: Sequence[str], revision: int) -> Mapping[str, Sequence[RawVersion]]:
            versions: dict[str, Sequence[RawVersion]] = {}
            for key in keys[:HISTORY_KEYS]:
                left_s = until_s - self._clock()
                if left_s <= 0:
                    break
                try:
                    kept = self._store.history(key, limit=HISTORY_LIMIT, timeout_s=left_s)
                except StoreError as exc:
                    tell(Notice("veltrix.history_unread", "warning", {"reason": str(exc)}), self._events)
                    break
                versions[key] = [version for version in kept if version.revision <= revision]
            return versions

        return remember

    def _again_or(self, error: Exception, names: Sequence[str]) -> Exception | Elsewhere:
        """What becomes of units whose reading failed: another one at once, of fewer, where that may do."""
        again = may_fit_halved(error) and self._portions.halve(names)
        return Elsewhere(self._clock()) if again else error

    # --- by the mirror

    def _read_mirrored(self, names: Sequence[str], mirrored: Mirrored) -> dict[str, Any]:
        now_s = self._clock()
        self._sweep(now_s)
        for name in names:
            if (ended := self._awaited.get(name)) is not None and ended.ends_s <= now_s and ended.early is None:
                self._let_go(name)  # who waited for that has given up, and somebody else asks
        awaited = {name: self._awaited.setdefault(name, _Awaited(math.inf, now_s + self._timeout_s)) for name in names}
        read: dict[str, Any] = {}
        self._land_early(awaited, read)
        direct, looked = dict[str, _Awaited](), dict[str, _Awaited]()
        for name, unit in awaited.items():
            if unit.is_direct:
                self._take_direct(name, unit, now_s, read)
            elif name not in read and unit.due_s <= now_s:
                unit.due_s = max(unit.due_s, min(self._filled_at_s + FILLED_WITHIN_S, unit.most_s))
                if unit.due_s <= now_s:
                    direct[name] = unit
            elif name not in read and unit.early is None:
                looked[name] = unit
        put_off = self._put_off(looked)
        if looked:
            found = self._look(looked, mirrored, read, put_off)
            lacking = {
                name: unit
                for name, unit in looked.items()
                if name not in read and name not in put_off and unit.early is None
            }
            direct |= self._want(lacking, None if found is None else found.state, mirrored)
        for name, unit in direct.items():
            self._go_direct(name, unit, read)
        # What was reached meanwhile was not woken, if it was not known yet that it is early.
        self._land_early(awaited, read)
        for name in read:
            self._let_go(name)
        for name, unit in awaited.items():
            until_s = now_s if name in put_off else unit.ends_s if unit.is_direct else unit.due_s
            read.setdefault(name, Elsewhere(until_s))
        return read

    def _pause_s(self) -> float:
        """The least time between two looks: where much is awaited more comes, and a call each would be many."""
        return min(PAUSE_MOST_S, PAUSE_SHARE * self._fill_s) if self._awaited else 0.0

    def _put_off(self, looked: dict[str, _Awaited]) -> set[str]:
        """Leave to the next batch, which comes at once, what is more than one reply of the mirror's may hold."""
        portion = self._mirror_portions.first(list(looked))
        put_off = set(looked).difference(portion)
        for name in put_off:
            del looked[name]
        return put_off

    def _look(
        self, looked: Mapping[str, _Awaited], mirrored: Mirrored, read: dict[str, Any], put_off: set[str]
    ) -> FoundUnits | None:
        """Land the units that the mirror holds and whose revision was reached; note those whose was not.

        Where they were too many for one reply, fewer are looked for in the next batch.
        """
        portions = self._mirror_portions
        reading = self._units.begin(looked)
        if reading is None:
            read |= dict.fromkeys(looked, NotReady("nothing was listed yet, so no lazy unit can be read"))
            return None
        try:
            asked_s, granted_s = self._clock(), portions.grant_s(list(looked), self._timeout_s)
            found = mirrored.find_units(list(looked), reading.position, timeout_s=granted_s)
            if found is None:
                # Why is not said; one that does not answer in time may have too much to say.
                if self._clock() - asked_s >= granted_s and portions.halve(list(looked)):
                    put_off.update(looked)
                return None
            portions.learn(dict.fromkeys(looked, 0) | sizes_of({name: each.unit for name, each in found.units.items()}))
            self.units_read["mirror"] += len(found.units)
            reached = {name: unit for name, unit in found.units.items() if self._units.has_reached(unit.revision)}
            self._land(reading, reached, read, looked)
            for unit in (looked[name] for name in reached if looked[name].most_s > -math.inf):
                self._fill_s = max(0.0, self._clock() - (unit.most_s - FILLED_MOST_S))
            early = [name for name in found.units if name not in reached]
            for name in early:
                # A reading each, as each ends by itself: after that no changes are kept for what is in it.
                looked[name].early = self._units.keep(reading, [name]), found.units[name]
                looked[name].due_s = self._clock() + FILLED_WITHIN_S
                self._early.add(name)
            return found
        finally:
            self._units.end(reading)

    def _land(
        self,
        reading: Reading,
        units: Mapping[str, MirroredUnit],
        read: dict[str, Any],
        awaited: Mapping[str, _Awaited],
    ) -> None:
        judged = self._units.judge(reading, units)
        recovering = {
            name
            for name, each in judged.items()
            if each.wanting
            and not awaited[name].is_direct
            and self._recovers(name, awaited[name], reading, units[name])
        }
        landed = self._units.settle(reading, {name: each for name, each in judged.items() if name not in recovering})
        if self._mirrored is not None:
            self._came_from(self._mirrored.mirror_origin, landed)
        for name, mirrored in units.items():
            if name not in recovering:
                read[name] = landed.get(name) or InvalidValue(mirrored.unit.refused)

    def _recovers(self, name: str, awaited: _Awaited, reading: Reading, mirrored: MirroredUnit) -> bool:
        """Whether the authority is asked for a unit whose last good values the mirror does not know."""
        refused: dict[str, Any] = {}
        self._go_direct(name, awaited, refused)
        if refused:
            return False
        if awaited.early is None:
            awaited.early = self._units.keep(reading, [name]), mirrored
        self._early.discard(name)
        awaited.ends_s = min(awaited.ends_s, self._clock() + _RECOVERED_WITHIN_S)
        return True

    def _land_early(self, awaited: Mapping[str, _Awaited], read: dict[str, Any]) -> None:
        for name, unit in awaited.items():
            if name in read or unit.early is None or unit.is_direct:
                continue
            reading, mirrored = unit.early
            if self._units.has_reached(mirrored.revision):
                self._land(reading, {name: mirrored}, read, awaited)

    def _want(
        self, lacking: Mapping[str, _Awaited], state: MirrorState | None, mirrored: Mirrored
    ) -> dict[str, _Awaited]:
        """Ask the relay for units, each once, if there is one that fills them; returns those that it does not."""
        if state is None or not state.relay or self._clock() < self._barred_until_s:
            return dict(lacking)
        filled = {name: unit for name, unit in lacking.items() if name.startswith(state.lazy)}
        fresh = [name for name, unit in filled.items() if unit.due_s == math.inf]
        if fresh:
            try:
                mirrored.want_units(fresh, timeout_s=self._timeout_s)
            except AuthFailed:
                self._barred_until_s = self._clock() + _BARRED_S
                return dict(lacking)
            except StoreError:
                return dict(lacking)
            self.units_read["wanted"] += len(fresh)
            for name in fresh:
                filled[name].due_s = self._clock() + FILLED_WITHIN_S
                filled[name].most_s = self._clock() + FILLED_MOST_S
        return {name: unit for name, unit in lacking.items() if name not in filled}

    def _go_direct(self, name: str, awaited: _Awaited, read: dict[str, Any]) -> None:
        """Have the authority asked, in another thread."""
        if not self._direct_rate.take():
            read[name] = _too_many()
            return
        try:
            self._direct.submit(name, leader=self._batcher.leader_of(name))
        except StoreError as exc:
            read[name] = exc
        else:
            awaited.is_direct = True

    def _read_direct(self, wanted: Sequence[_Wanted]) -> _Brought:
        """Called in the thread of the second batcher."""
        names = [each for each in wanted if isinstance(each, str)]
        read: _Brought = {}
        if names:
            read.update(self._read_newest(names))  # who had them submitted has asked the rates
            brought = {name: each for name, each in read.items() if not isinstance(each, Elsewhere)}
            self._brought.update({name: each for name, each in brought.items() if name in self._awaited})
            self._batcher.wake((name for name in names if name in brought), at_once=True)
        pasts = [each for each in wanted if not isinstance(each, str)]
        read.update(self._read_pasts(pasts, self._rate, self._direct_rate))
        self.tell_rejected()
        return read

    def _take_direct(self, name: str, awaited: _Awaited, now_s: float, read: dict[str, Any]) -> None:
        brought = self._brought.get(name)
        if brought is None and awaited.ends_s > now_s:
            return
        if awaited.early is not None and not isinstance(brought, Unit):
            reading, mirrored = awaited.early  # without what the authority might have remembered
            self._land(reading, {name: mirrored}, read, {name: awaited})
        else:
            read[name] = brought or StoreUnavailable("the store gave no answer in time; try again")

    def _let_go(self, name: str) -> None:
        awaited = self._awaited.pop(name, None)
        self._brought.pop(name, None)
        self._early.discard(name)
        if awaited is not None and awaited.early is not None:
            self._units.end(awaited.early[0])

    def _sweep(self, now_s: float) -> None:
        """Let go of what nobody waits for any more."""
        if now_s >= self._sweep_at_s:
            self._sweep_at_s = now_s + _SWEEP_S
            for name in [name for name, awaited in tuple(self._awaited.items()) if awaited.ends_s <= now_s]:
                self._let_go(name)
            for name in self._brought.keys() - self._awaited.keys():  # brought at the moment when it was let go of
                self._brought.pop(name, None)

    # --- as of earlier

    def _read_pasts(self, pasts: Sequence[_Past], *rates: Rate) -> _Brought:
        """As many of them as are of one revision and go in one reading; the others go with the next batch."""
        read: _Brought = dict.fromkeys(pasts, Elsewhere(self._clock()))
        if pasts:
            _, incarnation, revision = pasts[0]
            alike = [past[0] for past in pasts if past[1:] == (incarnation, revision)]
            portion = self._portions.first(alike)
            asked = _admitted(portion, rates)
            read.update({(name, incarnation, revision): _too_many() for name in set(portion).difference(asked)})
            if asked:
                read.update(self._read_past(asked, incarnation, revision))
        return read

    def _read_past(self, names: Sequence[str], incarnation: str, revision: int) -> _Brought:
        pasts = {name: (name, incarnation, revision) for name in names}
        asked_s = self._clock()
        try:
            position = self._units.position_of(incarnation, revision)
            if position is None:
                raise Compacted("the store's history was replaced")
            found = self._ask(names, position)
            self._came_from(self._origin, pasts.values())
            remember = self._remembering(asked_s)
            return {
                pasts[name]: InvalidValue(raw.refused)
                if raw.refused
                else self._units.past(raw, incarnation, revision, remember)
                for name, raw in found.items()
            }
        except Compacted as exc:
            error = Compacted(f"lazy units can no longer be read as of revision {revision}: {exc}; renew the view")
            error.__cause__ = exc
            return dict.fromkeys(pasts.values(), error)
        except Exception as exc:  # noqa: BLE001
            return dict.fromkeys(pasts.values(), self._again_or(exc, names))


def _admitted(names: Sequence[str], rates: Sequence[Rate]) -> list[str]:
    """Those that all of the rates let through now."""
    return [name for name in names if all(rate.take() for rate in rates)]
