"""The watch of an etcd store: messages of three watchers in, whole revisions out.

Owns how entries, records and labels that etcd tells apart come together again (`Assembly`, pure), and the open watch
around it. Knows nothing of how a position is verified, nor of how messages travel.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from random import SystemRandom
from typing import Final, Protocol

from veltrix_mw.errors import StoreUnavailable
from veltrix_mw.protocols import Batch, ChangeRecord, Position, RawChange, Restored
from veltrix_mw.stores.etcd_members import WatchStream
from veltrix_mw.stores.etcd_messages import Event, Watched
from veltrix_mw.stores.etcd_space import Change, Space, foreign_mark, is_derived
from veltrix_mw.stores.etcd_witness import Witness
from veltrix_mw.values import MISSING, Missing

__all__ = ["CHANGE", "ENTRIES", "LABEL", "Assembly", "EtcdWatch", "Opened", "Source"]

_random: Final = SystemRandom()  # not the module's generator, which an application may have seeded for itself

# The watchers' ids in the stream.
ENTRIES: Final = 1
CHANGE: Final = 2
LABEL: Final = 3

_MAX_BATCHES: Final = 256  # revisions one `next` returns at most: a follower publishes between two calls ...
_MAX_BATCH_BYTES: Final = 1024 * 1024  # ... and bytes of values, but for one revision that is larger itself
_HOLD_S: Final = 0.002  # how long a revision waits for its record, a moment before or after it; then it is asked for
_OVERTIME_S: Final = 10.0  # beyond `next`'s own timeout, while a huge revision keeps coming
_LOOK_S: Final = 0.1  # then, how often it is looked whether it still does
_LATE_S: Final = 1.0  # etcd has the record, and the watch does not bring it: it is out of step


@dataclass(slots=True)
class _Pending:
    """A revision that is complete but for its record."""

    revision: int
    changes: dict[str, bytes | Missing]
    lazy_changes: dict[str, bytes | Missing]
    put: list[tuple[bytes, bytes]]
    arrived_s: float
    size: int


class Assembly:
    """Makes revisions whole: all fragments, all events, and the record that came on another watcher.

    A revision goes out once it is known whether it has a record, in order, and once. Single-threaded.
    """

    def __init__(self, space: Space, position: Position, *, label: str, cluster_id: str) -> None:
        """`label` is the one that is stored, empty for none."""
        self._space = space
        self._revision = position.revision
        self._label = label
        self._derived = f"{cluster_id}?"
        self._label_known_to = 0
        self._events: list[Event] = []
        self._pending: deque[_Pending] = deque()
        self._changes: dict[int, Change] = {}
        self._change_seen = 0
        self._resolved = 0  # up to here every record there is has come
        self._missing: tuple[int, float] | None = None  # a record that has not come, and since when that is known
        self.ignored_changed = False

    @property
    def is_amid(self) -> bool:
        """Whether there are fragments of a revision, and not yet all of them."""
        return bool(self._events)

    def take(self, message: Watched, now_s: float) -> None:
        """Take one message. Raises `Restored` where the label was replaced."""
        match message.watch_id:
            case i if i == ENTRIES:
                self._events += message.events
                if not message.fragment:
                    events, self._events = self._events, []
                    self._take_entries(events, now_s)
            case i if i == CHANGE:
                for event in message.events:
                    self._take_change(event)
            case i if i == LABEL:
                for event in message.events:
                    self.take_label("" if event.type == "DELETE" else event.kv.value.decode("utf-8", "replace"))
            case _:
                pass

    def take_label(self, label: str) -> None:
        """The stored label is this now. Raises `Restored` unless it is the one followed, or the first one."""
        if label == self._label:
            return
        if not is_derived(self._label):
            raise Restored("the namespace was given another incarnation; list again")
        self._label = label

    def _take_change(self, event: Event) -> None:
        revision = event.kv.mod_revision
        self._change_seen = max(self._change_seen, revision)
        self._resolved = max(self._resolved, revision)
        if event.type == "PUT" and revision > self._revision:
            self._changes[revision] = Change.of(event.kv)

    def _take_entries(self, events: Sequence[Event], now_s: float) -> None:
        known_to = max(self._revision, self._pending[-1].revision if self._pending else 0)
        for event in events:
            stored = event.kv
            if stored.mod_revision <= known_to:
                continue  # a message that came twice
            key = self._space.key(stored.key)
            if key is None:
                self.ignored_changed = True
                continue
            last = self._pending[-1] if self._pending else None
            if last is None or last.revision != stored.mod_revision:
                last = _Pending(stored.mod_revision, {}, {}, [], now_s, 0)
                self._pending.append(last)
            if event.type == "PUT":
                last.put.append((stored.key, stored.value))
                last.size += len(stored.value)
            changes = last.lazy_changes if self._space.is_lazy(key) else last.changes
            changes[key] = MISSING if event.type == "DELETE" else self._space.value(stored.value)

    @property
    def unresolved(self) -> int:
        """The newest revision of which it is not known yet whether it has a record; 0 if there is none."""
        return self._pending[-1].revision if self._pending and not self._is_ready(self._pending[0]) else 0

    @property
    def due_s(self) -> float:
        """When to ask for what did not come; inf while nothing waits."""
        return self._pending[0].arrived_s + _HOLD_S if self.unresolved else float("inf")

    def resolve(self, asked: int, newest: Change | None, label: str, now_s: float) -> None:
        """Up to the revision `asked`, `newest` is the newest record there is, and `label` is stored now.

        Raises `StoreUnavailable` where the watch should have brought that record long ago.
        """
        self.take_label(label)
        self._label_known_to = asked
        seen = max(self._change_seen, self._revision)
        if newest is None or newest.revision <= seen:
            self._resolved = max(self._resolved, asked)
            self._missing = None
        elif self._missing is None or self._missing[0] <= seen:
            self._missing = newest.revision, now_s  # the one before has come: while writes go on, there is a next one
        elif now_s - self._missing[1] > _LATE_S:
            raise StoreUnavailable("the watch brings a part of what was written only; watch again")

    def _is_ready(self, pending: _Pending) -> bool:
        if pending.revision > self._resolved:
            return False
        # The first write of ours brings a label, too.
        return not (
            is_derived(self._label) and pending.revision in self._changes and pending.revision > self._label_known_to
        )

    def ready(self) -> list[Batch]:
        """The next revisions that are whole, as many as one `next` returns."""
        batches: list[Batch] = []
        size = 0
        while self._pending and len(batches) < _MAX_BATCHES and self._is_ready(self._pending[0]):
            size += self._pending[0].size
            if batches and size > _MAX_BATCH_BYTES:
                break
            batches.append(self._batch(self._pending.popleft()))
        if batches:
            for revision in [each for each in self._changes if each <= self._revision]:
                del self._changes[revision]
        return batches

    def _batch(self, pending: _Pending) -> Batch:
        revision, previous = pending.revision, self._revision
        self._revision = revision
        change = self._changes.get(revision)
        fingerprint = change.fingerprint if change else foreign_mark(pending.put)
        return Batch(
            Position(self._label or self._derived, revision, fingerprint),
            previous,
            _changes(pending.changes),
            change.record if change else ChangeRecord(),
            lazy_changes=_changes(pending.lazy_changes),
        )


def _changes(changes: dict[str, bytes | Missing]) -> tuple[RawChange, ...]:
    return tuple(RawChange(key, changes[key]) for key in sorted(changes))


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream that follows a verified position, and what was found there."""

    stream: WatchStream
    label: str
    cluster_id: str


class Source(Protocol):
    """What a watch asks of its store."""

    def open_stream(self, position: Position, deadline_s: float) -> Opened:
        """Verify the position, then open what follows it."""
        ...

    def newest_change(self, revision: int, deadline_s: float) -> tuple[Change | None, str]:
        """The newest record up to `revision`, and the label that is stored."""
        ...

    def ignored_changed(self) -> None:
        """A key that is none of ours was written or deleted."""
        ...


class EtcdWatch:
    """A watch: a stream that is opened anew, in silence, now and then, and where its member failed.

    Opening verifies the position again and asks etcd for permission again, which an open stream never does.
    """

    def __init__(
        self, source: Source, witness: Witness, space: Space, position: Position, *, renew_s: float, timeout_s: float
    ) -> None:
        self._source = source
        self._witness = witness
        self._space = space
        self._position = position
        self._renew_s = renew_s
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        # Protects `_is_closed`, `_is_reading` and the stream's closing: a descriptor must not be closed under who
        # reads from it.
        self._lock = threading.Lock()
        self._is_closed = False
        self._is_reading = False
        self._epoch = 0
        self._stream: WatchStream | None = None
        self._assembly = Assembly(space, position, label="", cluster_id="")
        self._renew_at_s = 0.0

    def open(self, deadline_s: float) -> None:
        """Open the stream, in place of the one there is."""
        self._drop()
        self._epoch = self._witness.seen.epoch
        opened = self._source.open_stream(self._position, deadline_s)
        with self._lock:
            self._stream = opened.stream
            if self._is_closed:
                opened.stream.close()
        self._assembly = Assembly(self._space, self._position, label=opened.label, cluster_id=opened.cluster_id)
        # Jittered, so that a fleet does not reconnect in step.
        self._renew_at_s = time.monotonic() + self._renew_s * _random.uniform(0.8, 1.2)

    def next(self, timeout_s: float) -> Sequence[Batch]:
        deadline_s = time.monotonic() + timeout_s
        self._check()
        if batches := self._taken():
            return batches
        while True:
            now_s = time.monotonic()
            if now_s >= self._renew_at_s or self._stream is None or self._stream.is_left:
                self.open(now_s + self._timeout_s)
                self._check()
            until_s = deadline_s if now_s < deadline_s else now_s + _LOOK_S
            self._receive(min(until_s, self._assembly.due_s, self._renew_at_s))
            if self._assembly.due_s <= now_s:
                self._ask(now_s)
            batches = self._taken()
            if batches or not self._goes_on(deadline_s):
                return batches
            self._check()

    def close(self) -> None:
        if self._pid != os.getpid():
            return  # the fork closed what was the parent's
        with self._lock:
            self._is_closed = True
            stream = self._stream
            if stream is None:
                return
            if self._is_reading:
                stream.interrupt()
            else:
                stream.close()

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise StoreUnavailable("the watch was opened before a fork; watch again")
        if self._is_closed:
            raise StoreUnavailable("the watch was closed; watch again")
        self._witness.check(self._epoch)

    def _goes_on(self, deadline_s: float) -> bool:
        """Whether to wait on: until the deadline, and longer in the middle of a revision.

        To break off there is to begin again, and to come no further then.
        """
        now_s = time.monotonic()
        if now_s < deadline_s:
            return True
        stream = self._stream
        amid = stream is not None and (self._assembly.is_amid or stream.is_amid(now_s))
        return amid and now_s < deadline_s + _OVERTIME_S

    def _receive(self, by_s: float) -> None:
        stream = self._stream
        assert stream is not None
        with self._lock:
            if self._is_closed:
                raise StoreUnavailable("the watch was closed; watch again")
            self._is_reading = True
        try:
            messages = stream.receive(by_s)
        finally:
            self._end_reading(stream)
        now_s = time.monotonic()
        for message in messages:
            self._assembly.take(message, now_s)
        if self._assembly.ignored_changed:
            self._assembly.ignored_changed = False
            self._source.ignored_changed()

    def _end_reading(self, stream: WatchStream) -> None:
        with self._lock:
            self._is_reading = False
            if self._is_closed:
                stream.close()

    def _ask(self, now_s: float) -> None:
        """Ask for what should have come with a revision, and may not be there at all."""
        asked = self._assembly.unresolved
        newest, label = self._source.newest_change(asked, now_s + self._timeout_s)
        self._assembly.resolve(asked, newest, label, time.monotonic())

    def _taken(self) -> Sequence[Batch]:
        batches = self._assembly.ready()
        if batches:
            self._position = batches[-1].position
            self._witness.remember(self._position, self._position.revision, self._epoch)
        return batches

    def _drop(self) -> None:
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
