"""The unit filler: the part of a relay that fills the lazy units which workers want into the mirror.

Owns its thread, and what must not get lost between reading a unit and writing it: the mirror goes on meanwhile.

::

    names are wanted ──► those that the mirror lacks are read at the authority, as of where the mirror stands
    the relay adds revisions to the mirror ──► what they change of those units is noted
    read ──► brought forward to where the mirror stands now ──► filled, and announced
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Final, TypeGuard

from veltrix_mw.background import BackgroundThread
from veltrix_mw.errors import StoreError, VeltrixError
from veltrix_mw.events import Events
from veltrix_mw.faults import told
from veltrix_mw.follower import CALL_TIMEOUT_S, halted_for_forks
from veltrix_mw.keys import is_key, unit_of
from veltrix_mw.last_changes import LastChanges
from veltrix_mw.protocols import Batch, Lease, Mirror, MirroredUnit, Position, RawUnit, Store, UnitFeed
from veltrix_mw.stores.units import bounded
from veltrix_mw.telemetry import Telemetry
from veltrix_mw.unit_portions import Portions, may_fit_halved, sizes_of
from veltrix_mw.values import Missing

__all__ = ["UnitFiller", "can_be_filled"]

AT_ONCE: Final = 500  # units in one reading at most: eight transactions of etcd, full ones
WAIT_S: Final = 0.25  # of one wait for names: who stops the filler waits for no longer
PAUSE_S: Final = 0.5  # after a failure: the relay's own thread finds out what is wrong


def can_be_filled(mirror: Mirror) -> TypeGuard[UnitFeed]:
    """Whether a mirror has what a filler needs."""
    return all(hasattr(mirror, name) for name in ("find_units", "want_units", "wanted_units", "fill_units"))


class UnitFiller:
    """Fills wanted units in a daemon thread, while the relay that it belongs to leads.

    The relay tells it where the mirror stands; all its other calls come from the relay's thread, too.
    """

    def __init__(self, authority: Store, mirror: UnitFeed, *, telemetry: Telemetry | None = None) -> None:
        self._authority = authority
        self._mirror = mirror
        self._lazy = authority.info.lazy
        self._events = Events(part="filler", namespace=authority.info.namespace, tier=authority.info.origin)
        self._telemetry = Telemetry("off") if telemetry is None else telemetry
        self._stopping = threading.Event()
        self._acting = threading.RLock()  # held while a fork has to wait
        # Protects what follows, and keeps the mirror from going on while units are written.
        self._lock = threading.Condition()
        self._lease: Lease | None = None
        self._position = Position("", 0)
        self._changed = LastChanges()
        self._portions = Portions(AT_ONCE)  # its thread's alone
        self._reading: dict[str, list[Batch]] = {}  # units that are read, and what changed of them since
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
                names = self._mirror.wanted_units(wait_s=WAIT_S, timeout_s=CALL_TIMEOUT_S)
                while names and not self._stopping.is_set():
                    portion = self._portions.first(names)
                    with self._acting:
                        if self._has_filled(portion):
                            names = names[len(portion) :]
            except VeltrixError:
                self._stopping.wait(PAUSE_S)  # who waits for the units reads the authority
            except Exception as exc:  # noqa: BLE001  # a defect of ours must not end the filling: go on, and say so
                self._events.tell("veltrix.filler_crashed", logging.ERROR, error=told(exc))
                self._stopping.wait(PAUSE_S)

    def _has_filled(self, names: Sequence[str]) -> bool:
        """Fill them, or find that they are too many at once, and fewer may do. Raises what else went wrong."""
        try:
            self._fill(names)
        except StoreError as exc:
            if may_fit_halved(exc) and self._portions.halve(names):
                return False
            raise
        return True

    def _fill(self, names: Sequence[str]) -> None:
        timeout_s = self._portions.grant_s(names, CALL_TIMEOUT_S)
        names = [name for name in names if is_key(name) and unit_of(name, self._lazy) == name]
        if not names:
            return
        there = self._mirror.find_units(names, timeout_s=timeout_s).units
        lacking = [name for name in names if name not in there]
        with self._lock:
            if self._lease is None or not self._position.revision:
                return
            position = self._position
            reading = self._reading = {name: [] for name in lacking}
        try:
            found = self._authority.read_units(lacking, position, timeout_s=timeout_s) if lacking else {}
            self._portions.learn(sizes_of({name: each.unit for name, each in there.items()} | found))
            with self._lock:
                lease = self._lease
                if lease is None or reading is not self._reading:
                    return  # the mirror was filled anew meanwhile
                # Of a unit beyond the bounds that changed meanwhile nobody knows whether it still is.
                units = {
                    name: self._brought_forward(name, raw)
                    for name, raw in found.items()
                    if not (raw.refused and reading[name])
                }
                self._mirror.fill_units(lease, self._position, units, names, timeout_s=CALL_TIMEOUT_S)
                self.filled += len(units)
        except StoreError as exc:
            self._events.tell("veltrix.fill_failed", logging.INFO, units=len(lacking), reason=str(exc))
            raise
        else:
            self._events.tell_end("veltrix.filled")
        finally:
            with self._lock:
                if reading is self._reading:
                    self._reading = {}

    def _brought_forward(self, name: str, raw: RawUnit) -> MirroredUnit:
        """The unit as of where the mirror stands. Needs the lock."""
        batches = self._reading[name]
        if batches:
            raw = bounded(name, _applied(raw, name, batches, self._lazy))
        return MirroredUnit(raw, self._position.revision, self._changed.of(name))


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
