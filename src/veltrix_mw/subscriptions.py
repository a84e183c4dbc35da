"""Subscriptions: callbacks that hear of changes below a prefix.

Owns their threads and what each has not heard yet; knows nothing of how changes come about.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator

from veltrix_mw.background import BackgroundThread
from veltrix_mw.events import Events, told_after
from veltrix_mw.faults import told
from veltrix_mw.forking import anew_after_fork
from veltrix_mw.snapshot import Change, Entry, Snapshot
from veltrix_mw.sorted_map import Item
from veltrix_mw.values import MISSING, Missing

__all__ = ["Callback", "Subscriptions", "changes_between"]

Callback = Callable[[tuple[Change, ...], Snapshot], None]

_MANY = 10_000  # changed keys that are kept by name; beyond, the snapshots are compared


def changes_between(old: Snapshot, new: Snapshot, prefix: str, changed: Iterable[str] | None) -> tuple[Change, ...]:
    """What differs between two snapshots below `prefix` ("" for all), ascending by key.

    `changed` names the keys that may differ; None: compare all of the prefix.
    """
    if changed is None:
        return tuple(_compared(old.below(prefix), new.below(prefix)))
    named = sorted(key for key in changed if key.startswith(prefix))
    found = (Change(key, _entry(old, key), _entry(new, key)) for key in named)
    return tuple(change for change in found if change.old != change.new)


def _entry(snapshot: Snapshot, key: str) -> Entry | Missing:
    item = snapshot._entries.item(key)
    return MISSING if item is None else Entry(item[1], item[2])


def _compared(old: Iterator[Item], new: Iterator[Item]) -> Iterator[Change]:
    """The differences of two ascending runs of items, in one pass."""
    before, after = next(old, None), next(new, None)
    while before is not None or after is not None:
        if after is None or (before is not None and before[0] < after[0]):
            assert before is not None
            yield Change(before[0], Entry(before[1], before[2]), MISSING)
            before = next(old, None)
        elif before is None or after[0] < before[0]:
            yield Change(after[0], MISSING, Entry(after[1], after[2]))
            after = next(new, None)
        else:
            if before[2] != after[2] or (before[1] is not after[1] and before[1] != after[1]):
                yield Change(before[0], Entry(before[1], before[2]), Entry(after[1], after[2]))
            before, after = next(old, None), next(new, None)


class _Subscription:
    """One callback, its thread, and what it has not heard yet.

    A slow callback skips states, never a key's last one; what waits for it is bounded by the keyspace.
    """

    def __init__(self, prefix: str, callback: Callback, snapshot: Snapshot) -> None:
        self._prefix = prefix
        self._callback = callback
        self._events = Events(part="subscription")
        self._condition = threading.Condition()  # protects what follows
        self._heard = snapshot
        self._newest = snapshot
        self._changed: set[str] | None = set()
        self._running = False  # whether a thread of this process runs
        self._paused = False
        self._ended = False

    def offer(self, snapshot: Snapshot, changed: frozenset[str] | None) -> None:
        with self._condition:
            if self._ended:
                return
            named = None if changed is None else [key for key in changed if key.startswith(self._prefix)]
            if named == [] and self._changed is not None and self._newest is self._heard:
                # Nothing to tell. Keeping the older one would keep all the leaves alive that it no longer shares.
                self._newest = self._heard = snapshot
                return
            self._newest = snapshot
            self._paused = False
            if named is None or self._changed is None or len(self._changed) + len(named) > _MANY:
                self._changed = None
            else:
                self._changed.update(named)
            self._condition.notify()
            if not self._running:
                self._start()

    def doubt(self) -> None:
        """Compare whole snapshots at the next change: one may have been missed."""
        with self._condition:
            self._changed = None

    def pause(self) -> None:
        """End the thread until the next change."""
        with self._condition:
            self._paused = True
            self._condition.notify()

    def resume(self) -> None:
        """Go on after a pause with what was not heard."""
        with self._condition:
            self._paused = False
            if self._newest is not self._heard and not self._ended and not self._running:
                self._start()
            self._condition.notify()

    def end(self) -> None:
        with self._condition:
            self._ended = True
            self._condition.notify()

    def after_fork(self) -> None:
        """Begin anew in a forked child: the thread stayed in the parent, and it or another may have held the lock."""
        self._condition = threading.Condition()
        self._running = False
        self._changed = None  # the fork may have come between the two assignments of an offer

    def _start(self) -> None:
        try:
            BackgroundThread(target=self._run, name="veltrix-subscription").start()
        except RuntimeError as exc:
            # No thread is to be had (the process ends, or is at its limit). The follower goes on; a later change
            # tries again, and brings what was missed.
            self._events.tell("veltrix.subscriber_not_started", logging.ERROR, prefix=self._prefix, error=told(exc))
        else:
            self._running = True
            self._events.tell_end("veltrix.subscriber_started", prefix=self._prefix)

    def _run(self) -> None:
        condition = self._condition
        try:
            while True:
                with condition:
                    condition.wait_for(lambda: self._ended or self._paused or self._newest is not self._heard)
                    if self._ended or self._paused:
                        self._running = False
                        return
                    old, new, changed = self._heard, self._newest, self._changed
                    self._heard, self._changed = new, set()
                self._tell(old, new, changed)
        except BaseException:
            # Killed out of its callback (a greenlet, or SystemExit): the next change starts another.
            with condition:
                self._running = False
            raise

    def _tell(self, old: Snapshot, new: Snapshot, changed: set[str] | None) -> None:
        changes = changes_between(old, new, self._prefix, changed)
        if not changes or self._ended:
            return
        try:
            self._callback(changes, new)
        except Exception as exc:  # noqa: BLE001  # the caller's code may raise anything, with a value in what it says
            self._events.tell("veltrix.subscriber_failed", logging.ERROR, prefix=self._prefix, error=told(exc))
        else:
            self._events.tell_end("veltrix.subscriber_recovered", prefix=self._prefix)


class Subscriptions:
    """The subscriptions of one client. Each has a thread of its own, started with the first change it hears."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects what follows
        self._all: tuple[_Subscription, ...] = ()
        self._newest: Snapshot | None = None
        anew_after_fork(self)

    def add(self, prefix: str, callback: Callback, snapshot: Snapshot) -> Callable[[], None]:
        """Call `callback` for changes below `prefix` from `snapshot` on; returns the function that ends it.

        A call that is under way when that is called goes on; none follows it.
        """
        subscription = _Subscription(prefix, callback, snapshot)
        with told_after(), self._lock:
            self._all = (*self._all, subscription)
            # What was offered between the caller's look at the snapshot and this lock would never be heard.
            if self._newest is not None and self._newest is not snapshot:
                if _is_older(snapshot, self._newest):
                    subscription.offer(self._newest, None)
                else:
                    subscription.doubt()

        def end() -> None:
            with self._lock:
                self._all = tuple(other for other in self._all if other is not subscription)
            subscription.end()

        return end

    def offer(self, snapshot: Snapshot, changed: frozenset[str] | None) -> None:
        """Tell all of a new snapshot; never blocks on a callback."""
        with told_after(), self._lock:
            self._newest = snapshot
            for subscription in self._all:
                subscription.offer(snapshot, changed)

    def close(self) -> None:
        """End the threads; the subscriptions stay, and begin again with the next change."""
        with self._lock:
            for subscription in self._all:
                subscription.pause()

    def resume(self) -> None:
        """Begin again after `close`, or in a forked child: what was not heard then is heard now."""
        with told_after(), self._lock:
            for subscription in self._all:
                subscription.resume()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        for subscription in self._all:
            subscription.after_fork()


def _is_older(one: Snapshot, other: Snapshot) -> bool:
    """Whether `one` was surely served before `other`: of two incarnations only the first list tells."""
    if one.incarnation == other.incarnation:
        return one.revision < other.revision
    return one.origin == "none"
