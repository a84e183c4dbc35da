"""The relay's thread: does what the relay decides, in the background, at the authority and the mirror.

Owns the thread, the authority's watch and the clock's edge; decides nothing (`relay` does).
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol, TypeGuard

from veltrix_mw.background import BackgroundThread
from veltrix_mw.errors import StoreError, VeltrixError
from veltrix_mw.events import Events, settle
from veltrix_mw.faults import told
from veltrix_mw.follower import CALL_TIMEOUT_S, LIST_TIMEOUT_S, halted_for_forks, tell
from veltrix_mw.protocols import Lease, Mirror, MirrorWriter, Position, Store, Watch
from veltrix_mw.relay import (
    KEEP_S,
    LEASE_S,
    Append,
    Elect,
    Elected,
    Fill,
    Follow,
    Followed,
    Inspect,
    Inspected,
    Keep,
    Kept,
    Look,
    Looked,
    Prove,
    Refused,
    Relay,
    RelayEvent,
    RelayStep,
    Resign,
    Rest,
    Rested,
    Written,
)
from veltrix_mw.replica import (
    Confirm,
    Confirmed,
    Event,
    Failed,
    List,
    Listed,
    Next,
    OpenWatch,
    Received,
    Renew,
    Renewed,
    Sleep,
    Slept,
    Watching,
)
from veltrix_mw.telemetry import Telemetry
from veltrix_mw.unit_filler import UnitFiller, can_be_filled

__all__ = ["FedMirror", "RelayThread", "can_be_fed"]

_ANY_KEY: Final = "veltrix"  # whether it is there does not matter
FILL_TIMEOUT_S: Final = 60.0  # the whole keyspace, in parts


class FedMirror(Mirror, MirrorWriter, Protocol):
    """A mirror that can be read and fed."""


def can_be_fed(mirror: Mirror) -> TypeGuard[FedMirror]:
    """Whether a mirror has what a relay needs: one that was handed in may be for reading only."""
    return all(hasattr(mirror, name) for name in ("elect", "keep", "fill", "append", "prove", "clock", "revisions"))


class RelayThread:
    """Runs a relay in a daemon thread.

    Survives whatever the stores raise; `stop` ends it within its timeout, and gives up the lease.
    """

    def __init__(
        self,
        authority: Store,
        mirror: FedMirror,
        *,
        instance: str,
        relay: Relay | None = None,
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._authority = authority
        self._mirror = mirror
        self._instance = instance
        self._lazy = authority.info.lazy
        namespace = authority.info.namespace
        self._events = Events(part="relay", namespace=namespace, tier=authority.info.origin)
        self._mirror_events = Events(part="relay", namespace=namespace, tier=mirror.info.origin)
        self.relay = Relay(lazy=self._lazy) if relay is None else relay
        self._telemetry = Telemetry("off") if telemetry is None else telemetry
        self._clock = clock
        self._stopping = threading.Event()
        # Held by whoever takes a step, except while something is waited for: a fork waits for it (see `follower`).
        self._acting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._watch: Watch | None = None
        self._filler = (
            UnitFiller(authority, mirror, telemetry=self._telemetry) if self._lazy and can_be_filled(mirror) else None
        )
        self.crashes = 0

    @property
    def alive(self) -> bool:
        """Whether its thread runs in this process."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def filled(self) -> int:
        """Lazy units that it filled into the mirror so far, each of them read from the authority for that."""
        return 0 if self._filler is None else self._filler.filled

    def start(self) -> None:
        """Start the thread; returns at once. Raises `RuntimeError` where no thread can be started."""
        halted_for_forks(self)
        # An empty context: what runs in the background is no child of the request that happened to start it.
        self._thread = BackgroundThread(target=contextvars.Context().run, args=(self._run,), name="veltrix-relay")
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread, waiting for at most `timeout_s`."""
        deadline_s = self._clock() + timeout_s
        self._stopping.set()
        if self._filler is not None:
            self._filler.stop(timeout_s)
        watch = self._watch
        if watch is not None:
            watch.close()
        thread = self._thread
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join(max(0.0, deadline_s - self._clock()))

    def run(self) -> None:
        """Do what a relay does in the calling thread, until `stop`."""
        halted_for_forks(self)
        self._run()

    def _run(self) -> None:
        with self._telemetry.background():
            self._relay()

    def _relay(self) -> None:
        event: RelayEvent = Rested(self._clock())
        while not self._stopping.is_set():
            try:
                while not self._stopping.is_set():
                    event = self._handled(event)
            except Exception as exc:  # noqa: BLE001  # a defect of ours must not end the feeding: begin anew, and say so
                self.crashes += 1
                self._events.tell("veltrix.relay_crashed", logging.ERROR, error=told(exc))
                self._stopping.wait(1.0)
                event = Refused(self._clock(), StoreError(f"the relay crashed ({type(exc).__name__}); see the log"))
            finally:
                self._drop_watch()
        self._leave()

    def _handled(self, event: RelayEvent) -> RelayEvent:
        """Let the relay decide, tell its notices, and take its step."""
        with self._acting:
            decision = self.relay.handle(event)
            for notice in decision.notices:
                is_of_mirror = notice.event.startswith(("veltrix.relay_", "veltrix.mirror_"))
                tell(notice, self._mirror_events if is_of_mirror else self._events)
            settle()
        step = decision.step
        if self._filler is not None and isinstance(step, (Elect, Resign, Rest)):
            self._filler.rest()
        try:
            if isinstance(step, Rest):
                self._drop_watch()
                self._stopping.wait(step.delay_s)
                return Rested(self._clock())
            if isinstance(step, Follow):
                return self._followed(step)
            with self._acting:
                return self._looked() if isinstance(step, Look) else self._written(step)
        except VeltrixError as exc:
            return Refused(self._clock(), exc)

    def _looked(self) -> Looked:
        try:
            self._authority.read((_ANY_KEY,), None, timeout_s=CALL_TIMEOUT_S)
        except StoreError as exc:
            return Looked(self._clock(), exc)
        return Looked(self._clock())

    def _written(self, step: RelayStep) -> RelayEvent:
        mirror, clock = self._mirror, self._clock
        match step:
            case Elect():
                lease, holder, left_s = mirror.elect(self._instance, ttl_s=LEASE_S, timeout_s=CALL_TIMEOUT_S)
                return Elected(clock(), lease, holder, left_s)
            case Inspect(lease):
                self._drop_watch()
                with self._keeping(lease):
                    state = mirror.keep(lease, ttl_s=LEASE_S, timeout_s=CALL_TIMEOUT_S)
                    position, revisions = mirror.revisions(timeout_s=LIST_TIMEOUT_S)
                self._stands(lease, position)
                return Inspected(clock(), state, position, revisions)
            case Keep(lease):
                return Kept(clock(), mirror.keep(lease, ttl_s=LEASE_S, timeout_s=CALL_TIMEOUT_S))
            case Fill(lease, listing, digest):
                with self._keeping(lease):
                    mirror.fill(lease, listing, digest=digest, lazy=self._lazy, timeout_s=FILL_TIMEOUT_S)
                self._stands(lease, listing.position)
            case Append(lease, batches, counts):
                with contextlib.nullcontext() if self._filler is None else self._filler.adding(batches):
                    mirror.append(lease, batches, counts=counts, timeout_s=CALL_TIMEOUT_S)
            case Prove(lease, position, asked_at_us):
                mirror.prove(lease, position, asked_at_us=asked_at_us, timeout_s=CALL_TIMEOUT_S)
            case Resign(lease):
                self._drop_watch()
                with contextlib.suppress(StoreError):
                    mirror.resign(lease, timeout_s=CALL_TIMEOUT_S)
            case _:
                raise AssertionError(f"{type(step).__name__} is no step at the mirror")
        return Written(clock())

    def _stands(self, lease: Lease, position: Position) -> None:
        if self._filler is not None:
            self._filler.stands(lease, position)

    def _followed(self, follow: Follow) -> RelayEvent:
        """Take the replica's step; the mirror's clock is read before, so that no proof is younger than it."""
        step = follow.step
        asked_at_us = 0
        if isinstance(step, (List, Confirm)):
            with self._acting:
                asked_at_us = self._mirror.clock(timeout_s=CALL_TIMEOUT_S)
        try:
            if isinstance(step, (Next, Sleep)):
                return Followed(self._waited(step))
            with self._acting:
                return Followed(self._asked(follow), asked_at_us)
        except StoreError as exc:
            return Followed(Failed(self._clock(), exc, own_label=secrets.token_hex(8)))

    def _waited(self, step: Next | Sleep) -> Event:
        if isinstance(step, Next):
            assert self._watch is not None
            batches = self._watch.next(step.timeout_s)
            return Received(self._clock(), batches)
        self._drop_watch()
        self._stopping.wait(step.delay_s)
        return Slept(self._clock())

    def _asked(self, follow: Follow) -> Event:
        authority, clock = self._authority, self._clock
        sent_at_s = clock()
        match follow.step:
            case List():
                self._drop_watch()
                with self._keeping(follow.lease):
                    listing = authority.list(timeout_s=LIST_TIMEOUT_S)
                return Listed(clock(), sent_at_s, listing)
            case OpenWatch(position):
                self._drop_watch()
                self._watch = authority.watch(position, timeout_s=CALL_TIMEOUT_S)
                if self._stopping.is_set():
                    self._watch.close()
                return Watching(clock())
            case Confirm(position):
                confirmation = authority.confirm(position, timeout_s=CALL_TIMEOUT_S)
                return Confirmed(clock(), sent_at_s, confirmation)
            case Renew(known):
                return Renewed(clock(), authority.renew_incarnation(known, timeout_s=CALL_TIMEOUT_S))
            case _:
                raise AssertionError(f"a relay does not take the step {type(follow.step).__name__}")

    @contextlib.contextmanager
    def _keeping(self, lease: Lease) -> Iterator[None]:
        """Hold the lease on during the block, whose length grows with the keyspace."""
        done = threading.Event()

        def keep() -> None:
            with self._telemetry.background():
                while not done.wait(KEEP_S):
                    # What is wrong with the lease, the step after the block hears.
                    with contextlib.suppress(VeltrixError):
                        self._mirror.keep(lease, ttl_s=LEASE_S, timeout_s=CALL_TIMEOUT_S)

        keeper = BackgroundThread(target=contextvars.Context().run, args=(keep,), name="veltrix-lease")
        keeper.start()
        try:
            yield
        finally:
            done.set()
            keeper.join()

    def _leave(self) -> None:
        """Let another process lead at once, instead of when the lease has run out."""
        lease = self.relay._lease
        if lease is not None:
            with contextlib.suppress(VeltrixError):
                self._mirror.resign(lease, timeout_s=0.5)

    def _drop_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()
