"""The follower: one background thread that does what the replica decides.

Owns the thread, the watch and the clock's edge; decides nothing (`replica` does) and knows nothing of who reads
(it hands each publication on).
"""

from __future__ import annotations

import contextvars
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol
from weakref import WeakSet

from veltrix_mw.background import BackgroundThread
from veltrix_mw.disk import LastKnownGood, Saved
from veltrix_mw.errors import StoreError
from veltrix_mw.events import Events, Field, settle
from veltrix_mw.faults import told
from veltrix_mw.forking import FOLLOWERS, around_forks
from veltrix_mw.protocols import Moved, Position, RawVersion, Store, Watch
from veltrix_mw.replica import (
    Begun,
    Confirm,
    Confirmed,
    Crashed,
    Decision,
    Event,
    Failed,
    HistoryRead,
    List,
    Listed,
    Next,
    Notice,
    OpenWatch,
    Publication,
    ReadHistory,
    Received,
    Renew,
    Renewed,
    Replica,
    Resumed,
    Sleep,
    Slept,
    Step,
    Watching,
)
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.telemetry import RefreshOutcome, Telemetry

__all__ = ["CALL_TIMEOUT_S", "LIST_TIMEOUT_S", "Follower", "halted_for_forks", "tell"]

CALL_TIMEOUT_S: Final = 2.0  # a call of a few milliseconds that takes this long is a failure
LIST_TIMEOUT_S: Final = 30.0  # the one call whose length grows with the keyspace
HISTORY_LIMIT: Final = 20  # versions of a key that are looked through for a good one
FORK_TIMEOUT_S: Final = 5.0  # a fork waits no longer for a step to end: servers fork at their start, or to heal
PART: Final = 32  # revisions of a burst that are applied at a stretch: a millisecond of holding the interpreter
YIELD_S: Final = 0.0005  # between parts: a request that waits for the interpreter gets it

_LEVELS: Final = {"info": logging.INFO, "warning": logging.WARNING}


class Follower:
    """Follows a store in a daemon thread; hands each publication to `publish`, each failure to `failed`.

    `prepare` runs in that thread before anything else.

    Survives whatever the store or a callback raises; `stop` ends it within its timeout.
    """

    def __init__(
        self,
        store: Store,
        *,
        replica: Replica,
        publish: Callable[[Follower, Publication], bool],
        failed: Callable[[Follower, StoreError], None],
        telemetry: Telemetry,
        prepare: Callable[[], None],
        disk: LastKnownGood | None = None,
        resumed: Publication | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._events = Events(part="follower", namespace=store.info.namespace, tier=store.info.origin)
        self.replica = replica
        self._publish = publish
        self._failed = failed
        self._telemetry = telemetry
        self._prepare = prepare
        self._disk = disk
        self._resumed = resumed
        self._clock = clock
        self._stopping = threading.Event()
        # Held by whoever takes a step, except while the watch is waited for: a fork waits for it, and so finds no
        # lock of a driver, of an import or of ours held by a thread that the child does not have.
        self._acting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._watch: Watch | None = None
        self.crashes = 0

    @property
    def alive(self) -> bool:
        """Whether its thread runs in this process."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread; returns at once."""
        halted_for_forks(self)
        # An empty context: what runs in the background is no child of the request that happened to start it.
        self._thread = BackgroundThread(target=contextvars.Context().run, args=(self._run,), name="veltrix-follower")
        self._thread.start()

    def catch_up(self) -> None:
        """Take the first steps in the calling thread, to the first list or the first failure, and leave it there."""
        with self._telemetry.background():
            self._prepare()
            step = self._settle(self._first_event()).step
            while not isinstance(step, (OpenWatch, Next, Sleep)):
                step = self._advance(step).step

    def stop(self, timeout_s: float) -> None:
        """End the thread, waiting for at most `timeout_s`."""
        self._stopping.set()
        watch = self._watch
        if watch is not None:
            watch.close()
        thread = self._thread
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def _run(self) -> None:
        with self._telemetry.background():
            self._follow()

    def _follow(self) -> None:
        with self._acting:
            try:
                self._prepare()
            except Exception as exc:  # noqa: BLE001  # telemetry that cannot be set up must not keep config from coming
                self._events.tell("veltrix.telemetry_failed", logging.ERROR, error=told(exc))
            event = self._first_event()
        while not self._stopping.is_set():
            try:
                with self._acting:
                    step = self._settle(event).step
                while not self._stopping.is_set():
                    step = self._advance(step).step
            except Exception as exc:  # noqa: BLE001
                # A defect of ours or of a callback must not end the following: go on, and say so.
                self.crashes += 1
                self._events.tell("veltrix.follower_crashed", logging.ERROR, error=told(exc))
                event = Crashed(self._clock(), StoreError(f"the follower crashed ({type(exc).__name__}); see the log"))
            finally:
                self._drop_watch()

    def _first_event(self) -> Event:
        if self._resumed is not None:
            return Resumed(self._clock(), self._resumed)
        return Begun(self._clock(), self._last_known_good())

    def _advance(self, step: Step) -> Decision:
        """Take a step and settle what came of it."""
        try:
            if isinstance(step, (Next, Sleep)):
                event = self._taken(step)
                with self._acting:
                    return self._told(event)
            with self._acting:
                return self._acted(step)
        except StoreError as exc:
            if self._stopping.is_set():
                return Decision(step)  # our own closing of the watch
            with self._acting:
                decision = self._settle(Failed(self._clock(), exc, own_label=secrets.token_hex(8)))
                if not isinstance(exc, Moved):
                    self._failed(self, exc)
                return decision

    def _acted(self, step: Step) -> Decision:
        if isinstance(step, List):
            with self._telemetry.refresh("list", self._store.info.origin) as refresh:
                return self._settle(self._taken(step), refresh)
        return self._settle(self._taken(step))

    def _told(self, event: Event) -> Decision:
        """Settle what was waited for; a burst of changes is one `veltrix.refresh` span."""
        if not isinstance(event, Received) or not event.batches:
            return self._settle(event)
        telemetry = self._telemetry
        links = [batch.record.traceparent for batch in event.batches]
        with telemetry.refresh("watch", self._store.info.origin, links=links) as refresh:
            decision = self._settle_in_parts(event, refresh)
        now_s, reached = time.time(), self.replica.snapshot.revision
        for batch in event.batches:
            if batch.position.revision <= reached:  # a burst may break off
                telemetry.propagated(batch.record.time_s, now_s)
        return decision

    def _settle_in_parts(self, event: Received, refresh: RefreshOutcome) -> Decision:
        """Apply a burst part by part, letting other threads run in between."""
        batches = event.batches
        decision = self._settle(Received(event.now_s, batches[:PART]), refresh)
        for start in range(PART, len(batches), PART):
            if not isinstance(decision.step, (Next, Confirm)):
                break
            self._stopping.wait(YIELD_S)
            decision = self._settle(Received(self._clock(), batches[start : start + PART]), refresh)
        return decision

    def _settle(self, event: Event, refresh: RefreshOutcome | None = None) -> Decision:
        """Let the replica decide, tell its notices, and hand on what it publishes."""
        decision = self.replica.handle(event)
        for notice in decision.notices:
            tell(notice, self._events, self.replica.snapshot)
        settle()
        publication = decision.publication
        if publication is not None:
            if refresh is not None:
                refresh.revision, refresh.origin = publication.snapshot.revision, publication.snapshot.origin
                refresh.changes = None if publication.changed is None else len(publication.changed)
            self._hand_on(publication)
        return decision

    def _last_known_good(self) -> tuple[Position, list[tuple[str, object, int]]] | None:
        saved = self._disk.load() if self._disk is not None else None
        return None if saved is None else (saved.position, list(saved.entries))

    def _hand_on(self, publication: Publication) -> None:
        taken = self._publish(self, publication)
        if taken and self._disk is not None and publication.snapshot.origin != "disk":
            snapshot, position = publication.snapshot, publication.position
            self._disk.offer(lambda: _saved(snapshot, position))

    def _taken(self, step: Step) -> Event:
        store, clock = self._store, self._clock
        match step:
            case Next(timeout_s):
                assert self._watch is not None
                batches = self._watch.next(timeout_s)
                return Received(clock(), batches)
            case Confirm(position):
                sent_at_s = clock()
                confirmation = store.confirm(position, timeout_s=CALL_TIMEOUT_S)
                return Confirmed(clock(), sent_at_s, confirmation)
            case List():
                self._drop_watch()
                sent_at_s = clock()
                listing = store.list(timeout_s=LIST_TIMEOUT_S)
                return Listed(clock(), sent_at_s, listing)
            case OpenWatch(position):
                self._drop_watch()
                self._watch = store.watch(position, timeout_s=CALL_TIMEOUT_S)
                if self._stopping.is_set():
                    self._watch.close()
                return Watching(clock())
            case ReadHistory(keys):
                versions: dict[str, list[RawVersion]] = {}
                for key in keys:
                    versions[key] = list(store.history(key, limit=HISTORY_LIMIT, timeout_s=CALL_TIMEOUT_S))
                return HistoryRead(clock(), versions)
            case Renew(known):
                return Renewed(clock(), store.renew_incarnation(known, timeout_s=CALL_TIMEOUT_S))
            case Sleep(delay_s):
                self._drop_watch()
                self._stopping.wait(delay_s)
                return Slept(clock())

    def _drop_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()


def _saved(snapshot: Snapshot, position: Position) -> Saved:
    return Saved(
        # The label we serve under is what a later start compares with.
        position=Position(position.incarnation, position.revision, position.fingerprint),
        digest=snapshot.digest,
        saved_at_s=time.time(),
        entries=list(snapshot._entries.items()),
    )


_events = Events()


def tell(notice: Notice, events: Events = _events, served: Snapshot | None = None) -> None:
    """Log what an operator may want to know: as one of `events`, with what was served then."""
    about: dict[str, Field] = {} if served is None else {"revision": served.revision, "origin": served.origin}
    events.tell(notice.event, _LEVELS[notice.level], once=True, about=about, **notice.fields)


# Forks


class Acting(Protocol):
    """Takes steps in a thread, each while it holds `_acting`."""

    @property
    def _acting(self) -> threading.RLock: ...


_running: WeakSet[Acting] = WeakSet()
_halted: list[Acting] = []


def halted_for_forks(acting: Acting) -> None:
    """From here on, let no fork happen in the middle of a step of `acting`; in a child it is forgotten."""
    _running.add(acting)


def _before_fork() -> None:
    """Wait until no follower is in the middle of anything; for at most as long as a call to a store may take."""
    deadline_s = time.monotonic() + FORK_TIMEOUT_S
    for follower in list(_running):
        if follower._acting.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            _halted.append(follower)  # noqa: PERF401  # each as soon as it is held


def _after_fork_in_parent() -> None:
    while _halted:
        _halted.pop()._acting.release()


def _after_fork_in_child() -> None:
    _halted.clear()
    _running.clear()  # their threads stayed in the parent


around_forks(FOLLOWERS, before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
