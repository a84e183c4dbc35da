"""The lease: one holder in the fleet for a piece of work, with a token that fences what it writes.

Owns when a lease is held as this process may know it, and the thread that keeps it up. Knows no store.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Final

from veltrix_mw.background import BackgroundThread
from veltrix_mw.errors import LeaseLost, Overloaded, StoreError, VeltrixError
from veltrix_mw.forking import anew_after_fork
from veltrix_mw.protocols import Lease as Granted
from veltrix_mw.protocols import LeaseStore

__all__ = ["TTL_S", "Lease"]

TTL_S: Final = 5.0  # how long the work stands still when its holder dies
CALL_TIMEOUT_S: Final = 2.0  # for as long as etcd checks a password on a busy machine
RETRY_S: Final = 0.2  # after a renewal that failed; and a floor for how often one who waits asks
LEAST_S: Final = 0.1  # what a store has to answer in, however little of a caller's time is left


class Lease:
    """Held by one in the fleet at most, for as long as that keeps it up. `open_lease` makes one.

    It is held no longer than `ttl_s` after the last renewal was *sent*, by this process's own clock: the store lets
    another have it later than that. A process that is stopped in between does not know; so give `token` to whatever is
    written to, and let that refuse a smaller one.

    As a context manager it is waited for, and closed at the end. Thread-safe: threads that share the object share what
    it holds, and do not shut each other out. A forked child does not hold it, and may ask for it as anybody else.
    """

    def __init__(
        self,
        store: LeaseStore,
        name: str,
        *,
        holder: str | None = None,
        ttl_s: float = TTL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`holder` says who holds it, to others and in the store. Nothing is asked for before `hold` or `try_hold`."""
        self._store = store
        self._name = name
        self._named_holder = holder
        self._ttl_s = ttl_s
        # A third of it passes between renewals: one that hangs leaves time for another.
        self._timeout_s = min(CALL_TIMEOUT_S, ttl_s / 3)
        self._clock = clock
        self._begin_anew()
        anew_after_fork(self)

    def _begin_anew(self) -> None:
        self._asking = threading.Lock()  # held while the store is asked for it: one at a time
        self._lock = threading.Lock()  # protects what follows; held for assignments only
        self._granted: Granted | None = None
        self._until_s = -math.inf
        self._given_up = threading.Event()  # of the grant that is held
        self._closing = threading.Event()  # ends those who wait; another one from then on
        self._attempt = self._new_attempt()

    def __enter__(self) -> Lease:
        try:
            self.hold()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        return self._name

    @property
    def held(self) -> bool:
        """Whether it is held now, as far as this process may know."""
        return self._granted is not None and self._clock() < self._until_s

    @property
    def token(self) -> int:
        """The fencing token: larger than that of any holder before. Raises `LeaseLost` where it is not held.

        Ask for it before each step of the work, not once.
        """
        with self._lock:
            granted = self._granted
            if granted is None or self._clock() >= self._until_s:
                raise LeaseLost(f"the lease {self._name!r} is not held; stop what it was held for")
            return granted.token

    def try_hold(self) -> bool:
        """Take it if nobody has it, and keep it up in the background; tells whether it is held.

        Raises `StoreError` where the store does not answer, or does not allow it.
        """
        return self.held or not self._ask(self._closing, self._timeout_s)

    def hold(self, *, timeout_s: float | None = None) -> None:
        """Wait until it is held, `timeout_s` at most; without it for ever. It is asked for at least once.

        Raises `LeaseLost` where another has it until then, or it is closed meanwhile; `StoreError` as `try_hold`.
        """
        closing, until_s = self._closing, math.inf if timeout_s is None else self._clock() + timeout_s
        while not self.held:
            taken_by = self._ask(closing, min(self._timeout_s, until_s - self._clock()))
            if not taken_by:
                return
            holder, left_s = taken_by
            left_of_mine_s = until_s - self._clock()
            if left_of_mine_s <= 0:
                raise LeaseLost(f"the lease {self._name!r} is held by {holder}; try again later")
            # Until it runs out, but no longer than a third: its holder may give it up. Jittered: many may wait.
            pause_s = max(RETRY_S, min(left_s, self._ttl_s / 3)) * random.uniform(0.75, 1.25)
            if closing.wait(min(pause_s, left_of_mine_s)):
                raise LeaseLost(f"the lease {self._name!r} was closed while it was waited for")

    def release(self) -> None:
        """Give it up, so that another can have it at once. What the store says to that is not told: it ends anyway."""
        # What another thread is being given right now is given up as well.
        asking = self._asking
        waited = asking.acquire(timeout=self._timeout_s)
        try:
            with self._lock:
                granted, self._granted = self._granted, None
                self._given_up.set()
            if granted is not None:
                with contextlib.suppress(StoreError):
                    self._store.release(self._name, granted, timeout_s=self._timeout_s)
        finally:
            if waited:
                asking.release()

    def close(self) -> None:
        """Give it up, end those who wait for it, and close what is open to the store. It may be held again."""
        closing, self._closing = self._closing, threading.Event()
        closing.set()
        self.release()
        self._store.close()

    def _ask(self, closing: threading.Event, timeout_s: float) -> tuple[str, float] | None:
        """Take it; who has it otherwise, and for how long at most."""
        asking, until_s = self._asking, self._clock() + timeout_s
        if not asking.acquire(timeout=max(0.0, timeout_s)):
            return self._holder, RETRY_S  # another thread asks, for both
        try:
            if self.held:
                return None
            if closing.is_set():
                return self._holder, 0.0
            sent_s = self._clock()
            granted, by, left_s = self._store.acquire(
                self._name, self._attempt, ttl_s=self._ttl_s, timeout_s=max(LEAST_S, until_s - sent_s)
            )
            if granted is None:
                return by, left_s
            self._keep(granted, sent_s)
        finally:
            asking.release()
        return None

    def _keep(self, granted: Granted, sent_s: float) -> None:
        given_up = threading.Event()
        with self._lock:
            self._given_up.set()  # of one that ran out
            self._granted, self._until_s, self._given_up = granted, sent_s + self._ttl_s, given_up
        self._attempt = self._new_attempt()
        # An empty context: what runs in the background is no child of the request that happened to start it.
        keeper = BackgroundThread(
            target=contextvars.Context().run,
            args=(self._keep_up, granted, given_up),
            name="veltrix-lease",
        )
        try:
            keeper.start()
        except RuntimeError as exc:
            self._lose(granted)
            with contextlib.suppress(StoreError):
                self._store.release(self._name, granted, timeout_s=self._timeout_s)
            raise Overloaded("no thread can be started to keep a lease up; try again later") from exc

    @property
    def _holder(self) -> str:
        return self._named_holder or f"{os.uname().nodename}:{os.getpid()}"

    def _new_attempt(self) -> str:
        """A name for one attempt to hold it: another one by the same holder is not to take it for its own."""
        return f"{self._holder}:{os.urandom(4).hex()}"

    def _keep_up(self, granted: Granted, given_up: threading.Event) -> None:
        pause_s = self._ttl_s / 3
        while not given_up.wait(pause_s):
            sent_s = self._clock()
            try:
                self._store.renew(self._name, granted, ttl_s=self._ttl_s, timeout_s=self._timeout_s)
            except LeaseLost:
                self._lose(granted)
                return
            except VeltrixError:
                if self._clock() >= self._until_s:
                    self._lose(granted)
                    return
                pause_s = min(RETRY_S, self._ttl_s / 3)
            else:
                with self._lock:
                    if self._granted is granted:
                        self._until_s = sent_s + self._ttl_s
                pause_s = self._ttl_s / 3

    def _lose(self, granted: Granted) -> None:
        with self._lock:
            if self._granted is granted:
                self._granted = None

    def _after_fork(self) -> None:
        self._begin_anew()
