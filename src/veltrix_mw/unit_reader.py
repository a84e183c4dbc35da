"""The unit reader: reads the lazy units that are not held, once for all who ask.

Owns the way of a miss: one flight for all who want a unit, a batch, then the store, within a rate that protects it.
Which version of a unit a view may read is `lazy`'s to say; how flights wait and batches form, `coalesce`'s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, TypeVar

from veltrix_mw.coalesce.batcher import Batcher
from veltrix_mw.coalesce.flight import Flight
from veltrix_mw.errors import Compacted, InvalidValue, NotReady, Overloaded, StoreUnavailable
from veltrix_mw.lazy import LazyUnits, Unit
from veltrix_mw.protocols import Unitary
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.telemetry import FetchOutcome, Telemetry

__all__ = ["FETCH_TIMEOUT_S", "Rate", "UnitReader"]

FETCH_TIMEOUT_S: Final = 2.0
"""As long as any call to a store: what takes milliseconds and is not there by then has failed."""

MISSES_PER_S: Final = 1_000
"""Units a second that one process may ask the store for; invented names are bounded by it, and cost a range each."""

MISSES_AT_ONCE: Final = 5_000
"""More than that for a moment: a worker that has just started meets all its popular tenants at once."""

BATCH: Final = 240
"""Units in one call: four transactions of etcd, at once; a stall of 2,000 cold tenants is over in ten round trips."""

# What a flight is for: a unit that is held from then on, by its name; or one as of a view's revision, which is not.
_Past = tuple[str, str, int]  # name, incarnation, revision
_Wanted = str | _Past

_Brought = dict[_Wanted, Any]  # a `Unit`, of a past one its `Snapshot`, or an exception

_Loaded = dict[str, Snapshot | Exception]
_Loading = Generator[Flight[Any], bool, _Loaded]

W = TypeVar("W", str, _Past)


class Rate:
    """Lets through so many a second, and a number at once after a pause. Thread-safe."""

    def __init__(self, per_s: float, at_once: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._at_once = at_once
        self._clock = clock
        self._lock = threading.Lock()  # protects the two below
        self._left = float(at_once)
        self._at_s = clock()

    def take(self) -> bool:
        """Whether one more is let through now."""
        with self._lock:
            now_s = self._clock()
            self._left = min(self._at_once, self._left + (now_s - self._at_s) * self._per_s)
            self._at_s = now_s
            if self._left < 1:
                return False
            self._left -= 1
            return True

    def after_fork(self) -> None:
        """Make the lock anew in a forked child: a thread of the parent may have held it."""
        self._lock = threading.Lock()


class UnitReader:
    """Loads lazy units for views: from what is held, else from the store.

    Whoever asks for a unit that is under way waits for that. Thread-safe; for threads and tasks alike.
    """

    def __init__(
        self,
        store: Unitary,
        units: LazyUnits,
        *,
        timeout_s: float = FETCH_TIMEOUT_S,
        rate: Rate | None = None,
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`timeout_s` is each call's, and that of who waits and says nothing else; `rate` is of units."""
        self._store = store
        self._units = units
        self._timeout_s = timeout_s
        self._rate = Rate(MISSES_PER_S, MISSES_AT_ONCE, clock=clock) if rate is None else rate
        self._telemetry = Telemetry("off") if telemetry is None else telemetry
        self._clock = clock
        self._batcher = self._new_batcher()
        # By result. Two threads at once may be counted as one: the figures are for people.
        self.fetches = {"hit": 0, "miss": 0, "coalesced": 0, "error": 0}

    def _new_batcher(self) -> Batcher[_Wanted, Any]:
        return Batcher(self._read, max_items=BATCH, timeout_s=self._timeout_s, clock=self._clock)

    def close(self, *, timeout_s: float) -> None:
        """End the thread that reads; a later load begins another. Idempotent."""
        closing, self._batcher = self._batcher, self._new_batcher()
        closing.close(timeout_s=timeout_s)

    def load(self, names: Sequence[str], pinned: Snapshot, timeout_s: float | None = None) -> _Loaded:
        """Each of the units as a view of that snapshot reads it, or why it cannot be had."""
        until_s, outcome = self._until(timeout_s), FetchOutcome()
        loading = self._loading(names, pinned, until_s, outcome)
        try:
            flight = next(loading)
            with self._telemetry.fetch(outcome, len(names)):
                while True:
                    flight = loading.send(flight.wait_until(until_s))
        except StopIteration as done:
            loaded: _Loaded = done.value
            return loaded

    async def aload(self, names: Sequence[str], pinned: Snapshot, timeout_s: float | None = None) -> _Loaded:
        """`load` without blocking the event loop: asyncio's or trio's."""
        until_s, outcome = self._until(timeout_s), FetchOutcome()
        loading = self._loading(names, pinned, until_s, outcome)
        try:
            flight = next(loading)
            with self._telemetry.fetch(outcome, len(names)):
                while True:
                    flight = loading.send(await flight.await_until(until_s))
        except StopIteration as done:
            loaded: _Loaded = done.value
            return loaded

    def after_fork(self) -> None:
        """Make what is ours anew in a forked child; flights and batches do so by themselves."""
        self._rate.after_fork()

    def _until(self, timeout_s: float | None) -> float:
        return self._clock() + (self._timeout_s if timeout_s is None else timeout_s)

    def _loading(self, names: Sequence[str], pinned: Snapshot, until_s: float, outcome: FetchOutcome) -> _Loading:
        """Yields each flight that is to be waited for; is told whether it landed in time."""
        loaded = yield from self._reading(names, pinned, until_s, outcome)
        outcome.error = next((each for each in loaded.values() if isinstance(each, Exception)), None)
        if outcome.error is not None:
            outcome.result = "error"
        self.fetches[outcome.result] += 1
        return loaded

    def _reading(self, names: Sequence[str], pinned: Snapshot, until_s: float, outcome: FetchOutcome) -> _Loading:
        loaded: _Loaded = {}
        if not pinned._revision:
            outcome.result = "hit"
            return loaded | dict.fromkeys(names, Snapshot())  # nothing was written yet, and the history has no label
        missing: list[str] = []
        for name in names:
            held = self._units.get(name, pinned)
            if held is None:
                missing.append(name)
            else:
                loaded[name] = held
        if not missing:
            outcome.result = "hit"
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
                flights[each] = self._batcher.submit(each)
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
                    current = self._batcher.submit(each)
                    landed = yield current
                brought[each] = current.outcome() if landed else current.too_late(until_s)
            except Exception as exc:  # noqa: BLE001
                brought[each] = exc
        return brought

    # --- the batch

    def _read(self, wanted: Sequence[_Wanted]) -> _Brought:
        """Called in the batcher's thread, by one at a time unless the store hangs."""
        read: _Brought = {}
        names: list[str] = []
        pasts: dict[tuple[str, int], list[str]] = {}
        for each in wanted:
            # A flight that landed since who wanted it looked may have brought it already.
            known = self._known(each) if isinstance(each, str) else None
            if known is not None:
                read[each] = known
            elif not self._rate.take():
                read[each] = Overloaded("more lazy units were to be read than the store is asked for; retry later")
            elif isinstance(each, str):
                names.append(each)
            else:
                pasts.setdefault(each[1:], []).append(each[0])
        if names:
            read.update(self._read_newest(names))
        for (incarnation, revision), changed in pasts.items():
            read.update(self._read_past(changed, incarnation, revision))
        return read

    def _known(self, name: str) -> Unit | InvalidValue | None:
        why = self._units.refused(name)
        return InvalidValue(why) if why else self._units.newest(name)

    def _read_newest(self, names: Sequence[str]) -> _Brought:
        try:
            reading = self._units.begin(names)
            if reading is None:
                raise NotReady("nothing was listed yet, so no lazy unit can be read")
            try:
                found = self._store.read_units(names, reading.position, timeout_s=self._timeout_s)
                landed = self._units.land(reading, found)
                return {name: landed.get(name) or InvalidValue(raw.refused) for name, raw in found.items()}
            finally:
                self._units.end(reading)
        except Compacted as exc:
            # Whoever follows finds that out, too, and lists: then there is a position to read at again.
            error = StoreUnavailable(f"the store no longer keeps what this process serves: {exc}; retry")
            error.__cause__ = exc
            return dict.fromkeys(names, error)
        except Exception as exc:  # noqa: BLE001  # of these units alone, not of all in the batch
            return dict.fromkeys(names, exc)

    def _read_past(self, names: Sequence[str], incarnation: str, revision: int) -> _Brought:
        pasts = {name: (name, incarnation, revision) for name in names}
        try:
            position = self._units.position_of(incarnation, revision)
            if position is None:
                raise Compacted("the store's history was replaced")
            found = self._store.read_units(names, position, timeout_s=self._timeout_s)
            return {
                pasts[name]: InvalidValue(raw.refused) if raw.refused else self._units.past(raw, incarnation, revision)
                for name, raw in found.items()
            }
        except Compacted as exc:
            error = Compacted(f"lazy units can no longer be read as of revision {revision}: {exc}; renew the view")
            error.__cause__ = exc
            return dict.fromkeys(pasts.values(), error)
        except Exception as exc:  # noqa: BLE001
            return dict.fromkeys(pasts.values(), exc)
