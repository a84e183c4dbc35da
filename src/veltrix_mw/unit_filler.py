"""The unit filler: the part of a relay that fills the lazy units which workers want into the mirror.

Owns its thread, the cap on what it reads, and what must not get lost between reading a unit and writing it: the mirror
goes on meanwhile.

::

    names are wanted ──► those that were filled a moment ago, and are there yet ──► announced again
                    └──► the others, within the rate ──► read at the authority, as of where the mirror stands
                               └─ beyond it ──► dropped: who waits for one reads the authority, within a rate of its own
    the relay adds revisions to the mirror ──► what they change of those units is noted
    read ──► brought forward to where the mirror stands now ──► filled, and announced
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeGuard, TypeVar

from veltrix_mw.background import BackgroundThread
from veltrix_mw.errors import StoreError, VeltrixError
from veltrix_mw.events import WINDOW_S, Events
from veltrix_mw.faults import told
from veltrix_mw.follower import CALL_TIMEOUT_S, halted_for_forks
from veltrix_mw.keys import is_key, unit_of
from veltrix_mw.last_changes import LastChanges
from veltrix_mw.protocols import Batch, Lease, Mirror, MirroredUnit, Position, RawUnit, Store, UnitFeed
from veltrix_mw.rate import Rate
from veltrix_mw.stores.units import bounded
from veltrix_mw.telemetry import Telemetry
from veltrix_mw.unit_portions import Portions, may_fit_halved, sizes_of
from veltrix_mw.values import Missing

__all__ = ["UnitFiller", "can_be_filled"]

_T = TypeVar("_T")

FILLS_PER_S: Final = 1_000
"""Units a second that a relay reads for its whole fleet: as many as one process may where there is no mirror."""

FILLS_AT_ONCE: Final = 10_000
"""More than that for a moment, and all that the queue holds: a fleet that starts meets all its tenants at once."""

AT_ONCE: Final = 504
"""The most units in one reading: eight transactions of etcd, full ones. Each one is announced to every worker ..."""

FIRST: Final = 126
"""... and the first of many comes soon, as workers that are told of no fill for 0.3 s ask the authority themselves."""

_AHEAD: Final = 2  # readings under way: the next ones go on while one is filled

_WANTED_S: Final = 1.0  # how long names are read once they were taken: longer than that no worker waits for the relay
_FILLED_S: Final = 10.0  # how long it is remembered what was filled: who did not see it yet, asks within a fetch's time
WAIT_S: Final = 0.25  # of one wait for names: who stops the filler waits for no longer
PAUSE_S: Final = 0.5  # after a failure: the relay's own thread finds out what is wrong


def can_be_filled(mirror: Mirror) -> TypeGuard[UnitFeed]:
    """Whether a mirror has what a filler needs."""
    return all(hasattr(mirror, name) for name in ("wanted_units", "current_units", "fill_units"))


class UnitFiller:
    """Fills wanted units in a daemon thread, while the relay that it belongs to leads.

    However many names are wanted, the authority is read within a rate; what the mirror holds costs nothing of it. The
    relay tells it where the mirror stands; all its other calls come from the relay's thread, too.
    """

    def __init__(
        self,
        authority: Store,
        mirror: UnitFeed,
        *,
        telemetry: Telemetry | None = None,
        rate: Rate | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`rate` is of units that are read at the authority."""
        self._authority = authority
        self._mirror = mirror
        self._lazy = authority.info.lazy
        self._events = Events(part="filler", namespace=authority.info.namespace, tier=authority.info.origin)
        self._telemetry = Telemetry("off") if telemetry is None else telemetry
        self._rate = Rate(FILLS_PER_S, FILLS_AT_ONCE, clock=clock) if rate is None else rate
        self._clock = clock
        self._taken: Sequence[str] = ()  # from the queue, and not looked at yet
        self._dropped = 0  # units, since that was told
        self._log_at_s = -math.inf
        self._stopping = threading.Event()
        self._acting = threading.RLock()  # held while a fork has to wait
        # Protects what follows, and keeps the mirror from going on while units are written.
        self._lock = threading.Condition()
        self._lease: Lease | None = None
        self._position = Position("", 0)
        self._changed = LastChanges()
        self._portions = Portions(AT_ONCE)
        self._reading: dict[str, list[Batch]] = {}  # units that are read, and what changed of them since
        # Units that the mirror was given, and when; oldest first.
        self._filled_s: OrderedDict[str, float] = OrderedDict()
        self._thread: threading.Thread | None = None
        self.filled = 0  # units, for people

    def stop(self, timeout_s: float) -> None:
        """End the thread, waiting for at most `timeout_s`."""
        self._stopping.set()
        with self._lock:
            self._lock.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    # --- told by the relay

    def stands(self, lease: Lease, position: Position) -> None:
        """The mirror stands there, by whatever way it came; fill from here on."""
        with self._lock:
            self._lease, self._position = lease, position
            self._changed = LastChanges(position.revision)
            self._reading = {}
            self._filled_s.clear()
            if self._thread is None and not self._stopping.is_set():
                halted_for_forks(self)
                self._thread = BackgroundThread(
                    target=contextvars.Context().run, args=(self._run,), name="veltrix-filler"
                )
                self._thread.start()
            self._lock.notify_all()

    @contextlib.contextmanager
    def adding(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Around adding revisions to the mirror; where that fails nothing is known of where it stands."""
        with self._lock:
            try:
                yield
            except BaseException:
                self._lease = None
                raise
            for batch in batches:
                self._position = batch.position
                for name in {unit_of(change.key, self._lazy) for change in batch.lazy_changes}:
                    self._changed.note(name, batch.position.revision)
                    if name in self._reading:
                        self._reading[name].append(batch)

    def rest(self) -> None:
        """The relay leads no more."""
        with self._lock:
            self._lease = None

    # --- its thread

    def _run(self) -> None:
        with self._telemetry.background():
            self._fill_wanted()

    def _fill_wanted(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                while self._lease is None and not self._stopping.is_set():
                    self._lock.wait()
            if self._stopping.is_set():
                return
            try:
                names, self._taken = self._taken or self._take(WAIT_S), ()
                with self._acting:
                    self._fill_all(names)
            except VeltrixError:
                self._stopping.wait(PAUSE_S)  # who waits for the units reads the authority
            except Exception as exc:  # noqa: BLE001  # a defect of ours must not end the filling: go on, and say so
                self._events.tell("veltrix.filler_crashed", logging.ERROR, error=told(exc))
                self._stopping.wait(PAUSE_S)

    def _take(self, wait_s: float) -> Sequence[str]:
        return self._mirror.wanted_units(wait_s=wait_s, timeout_s=CALL_TIMEOUT_S)

    def _fill_all(self, names: Sequence[str]) -> None:
        names = [name for name in names if is_key(name) and unit_of(name, self._lazy) == name]
        there = self._still_there(names)
        if there:
            with self._lock:
                if self._lease is not None:
                    self._mirror.fill_units(self._lease, self._position, {}, sorted(there), timeout_s=CALL_TIMEOUT_S)
        lacking = [name for name in names if name not in there]
        allowed = [name for name in lacking if self._rate.take()]
        self._note_dropped(len(lacking) - len(allowed))
        if allowed:
            self._fill(allowed)

    def _still_there(self, names: Sequence[str]) -> Collection[str]:
        """Those that were filled a moment ago, and that who asks had not seen when it looked.

        What was filled before that was seen: it is gone again, and to be filled anew.
        """
        with self._lock:
            since_s = self._clock() - _FILLED_S
            while self._filled_s and next(iter(self._filled_s.values())) < since_s:
                self._filled_s.popitem(last=False)
            filled = [name for name in names if name in self._filled_s]
        return self._mirror.current_units(filled, timeout_s=CALL_TIMEOUT_S) if filled else ()

    def _note_dropped(self, count: int) -> None:
        self._dropped += count
        if self._dropped and self._clock() >= self._log_at_s:
            self._events.tell("veltrix.fills_capped", logging.WARNING, once=True, units=self._dropped)
            self._dropped, self._log_at_s = 0, self._clock() + WINDOW_S

    def _fill(self, names: Sequence[str]) -> None:
        with self._lock:
            if self._lease is None or not self._position.revision:
                return
            position = self._position
            reading = self._reading = {name: [] for name in names}
        left = len(names)
        try:
            for part, found in self._read_ahead(names, position):
                if not self._give(reading, found, part):
                    return
                left -= len(part)
            self._note_dropped(left)
        except StoreError as exc:
            self._events.tell("veltrix.fill_failed", logging.INFO, units=left, reason=str(exc))
            raise
        else:
            self._events.tell_end("veltrix.filled")
        finally:
            with self._lock:
                if reading is self._reading:
                    self._reading = {}

    def _read_ahead(
        self, names: Sequence[str], position: Position
    ) -> Iterator[tuple[Sequence[str], Mapping[str, RawUnit]]]:
        """What the authority holds of the units, part by part, each as large as a reply may be.

        The next parts are read, or taken from the queue, while one is filled. One that was too much for a reply is read
        again by half.
        """
        ends_s = self._clock() + _WANTED_S
        with ThreadPoolExecutor(_AHEAD, "veltrix-filler") as pool:
            left, most = names, FIRST
            ahead: deque[tuple[Sequence[str], Future[Mapping[str, RawUnit]]]] = deque()
            taken: Future[Sequence[str]] | None = None
            while left or ahead:
                while left and len(ahead) < _AHEAD:
                    part = self._portions.first(left[:most])
                    left, most = left[len(part) :], AT_ONCE
                    if not (left or ahead):  # nothing is to be done meanwhile
                        ahead.append((part, _done(self._read, part, position)))
                    else:
                        ahead.append((part, pool.submit(contextvars.copy_context().run, self._read, part, position)))
                part, reading = ahead.popleft()
                error = reading.exception()
                if error is not None:
                    if isinstance(error, StoreError) and may_fit_halved(error) and self._portions.halve(part):
                        left = [*part, *left]
                        continue
                    raise error
                if self._stopping.is_set() or self._clock() >= ends_s:
                    left = ()
                if not (left or ahead) and len(part) < len(names):
                    taken = pool.submit(contextvars.copy_context().run, self._take, 0.0)
                yield part, reading.result()
            if taken is not None:
                self._taken = taken.result()

    def _read(self, names: Sequence[str], position: Position) -> Mapping[str, RawUnit]:
        """Read units, and learn how many to read at a time: fewer while they are large."""
        timeout_s = self._portions.grant_s(names, CALL_TIMEOUT_S)
        found = self._authority.read_units(names, position, timeout_s=timeout_s)
        self._portions.learn(sizes_of(found))
        return found

    def _give(
        self, reading: Mapping[str, Sequence[Batch]], found: Mapping[str, RawUnit], announced: Sequence[str]
    ) -> bool:
        """Fill what was read into the mirror; False where that was filled anew meanwhile, or is another relay's."""
        with self._lock:
            lease = self._lease
            if lease is None or reading is not self._reading:
                return False
            # Of a unit beyond the bounds that changed meanwhile nobody knows whether it still is.
            units = {
                name: self._brought_forward(name, raw)
                for name, raw in found.items()
                if not (raw.refused and reading[name])
            }
            self._mirror.fill_units(lease, self._position, units, announced, timeout_s=CALL_TIMEOUT_S)
            self.filled += len(units)
            for name in units:
                self._filled_s[name] = self._clock()
                self._filled_s.move_to_end(name)
        return True

    def _brought_forward(self, name: str, raw: RawUnit) -> MirroredUnit:
        """The unit as of where the mirror stands. Needs the lock."""
        batches = self._reading[name]
        if batches:
            raw = bounded(name, _applied(raw, name, batches, self._lazy))
        return MirroredUnit(raw, self._position.revision, self._changed.of(name))


def _done(call: Callable[[Sequence[str], Position], _T], names: Sequence[str], position: Position) -> Future[_T]:
    """What the call brings, made in this thread."""
    future: Future[_T] = Future()
    try:
        future.set_result(call(names, position))
    except Exception as exc:  # noqa: BLE001  # raised by who asks for the result
        future.set_exception(exc)
    return future


def _applied(
    raw: RawUnit, name: str, batches: Sequence[Batch], lazy: Sequence[str]
) -> Sequence[tuple[str, bytes, int]]:
    entries: dict[str, tuple[bytes, int]] = {key: (value, revision) for key, value, revision in raw.entries}
    for batch in batches:
        for change in batch.lazy_changes:
            if unit_of(change.key, lazy) == name:
                entries.pop(change.key, None)
                if not isinstance(change.value, Missing):
                    entries[change.key] = change.value, batch.position.revision
    return [(key, *entry) for key, entry in sorted(entries.items())]
