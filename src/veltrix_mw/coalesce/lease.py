"""The lease: one holder in the fleet for a piece of work, with a token that fences what it writes.

Owns when a lease is held as this process may know it, and the thread that keeps it up. Knows no store.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import random
import threading
import time
from collections.abc import Callable
from typing import Final

from veltrix_mw.errors import LeaseLost, Overloaded, StoreError, VeltrixError
from veltrix_mw.forking import anew_after_fork
from veltrix_mw.protocols import Lease as Granted
from veltrix_mw.protocols import LeaseStore

__all__ = ["Lease"]

TTL_S: Final = 5.0  # how long the work stands still when its holder dies
CALL_TIMEOUT_S: Final = 1.0  # a third of a lease passes between renewals: one that hangs leaves time for another
RETRY_S: Final = 0.2  # after a renewal that failed; and a floor for how often one who waits asks


class Lease:
    """Held by one process in the fleet at most, for as long as that keeps it up.

    It is held no longer than `ttl_s` after the last renewal was *sent*, by this process's own clock: the store lets
    another have it later than that. A process that is stopped in between does not know; so give `token` to whatever is
    written to, and let that refuse a smaller one. Thread-safe; a forked child does not hold it.
    """

    def __init__(
        self,
        store: LeaseStore,
        name: str,
        *,
        holder: str,
        ttl_s: float = TTL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`holder` says who holds it, to others and in the store. Nothing is asked for before `hold` or `try_hold`."""
        self._store = store
        self._name = name
        self._holder = holder
        self._ttl_s = ttl_s
        self._timeout_s = min(CALL_TIMEOUT_S, ttl_s / 3)
        self._clock = clock
        self._lock = threading.Lock()  # protects what follows; held for assignments only
        self._granted: Granted | None = None
        self._until_s = -math.inf
        self._given_up = threading.Event()  # of the grant that is held
        anew_after_fork(self)

    def __enter__(self) -> Lease:
        self.hold()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether it is held now, as far as this process may know."""
        return self._granted is not None and self._clock() < self._until_s

    @property
    def token(self) -> int:
        """The fencing token: larger than that of any holder before. Raises `LeaseLost` where it is not held."""
        with self._lock:
            granted = self._granted
            if granted is None or self._clock() >= self._until_s:
                raise LeaseLost(f"the lease {self._name!r} is not held; stop what it was held for")
            return granted.token

    def try_hold(self) -> bool:
        """Take it if nobody has it, and keep it up in the background; tells whether it is held.

        Raises `StoreError` where the store does not answer, or does not allow it.
        """
        return self.held or self._ask()[0]

    def hold(self, *, timeout_s: float | None = None) -> None:
        """Wait until it is held. Raises `LeaseLost` where it is not to be had in time; `StoreError` as `try_hold`."""
        until_s = math.inf if timeout_s is None else self._clock() + timeout_s
        never = threading.Event()
        while not self.held:
            taken, left_s = self._ask()
            if taken:
                return
            left_of_mine_s = until_s - self._clock()
            if left_of_mine_s <= 0:
                raise LeaseLost(f"the lease {self._name!r} is another's; try again later")
            # Until it runs out, but no longer than a third: its holder may give it up. Jittered: many may wait.
            pause_s = max(RETRY_S, min(left_s, self._ttl_s / 3)) * random.uniform(0.75, 1.25)
            never.wait(min(pause_s, left_of_mine_s))

    def release(self) -> None:
        """Give it up, so that another can have it at once. What the store says to that is not told: it ends anyway."""
        with self._lock:
            granted, self._granted = self._granted, None
            self._given_up.set()
        if granted is not None:
            with contextlib.suppress(StoreError):
                self._store.release(self._name, granted, timeout_s=self._timeout_s)

    def _ask(self) -> tuple[bool, float]:
        sent_s = self._clock()
        granted, _, left_s = self._store.acquire(self._name, self._holder, ttl_s=self._ttl_s, timeout_s=self._timeout_s)
        if granted is None:
            return False, left_s
        given_up = threading.Event()
        with self._lock:
            self._given_up.set()  # of one that ran out
            self._granted, self._until_s, self._given_up = granted, sent_s + self._ttl_s, given_up
        # An empty context: what runs in the background is no child of the request that happened to start it.
        keeper = threading.Thread(
            target=contextvars.Context().run,
            args=(self._keep_up, granted, given_up),
            name="veltrix-lease",
            daemon=True,
        )
        try:
            keeper.start()
        except RuntimeError as exc:
            self.release()
            raise Overloaded("no thread can be started to keep a lease up; try again later") from exc
        return True, self._ttl_s

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
        self._lock = threading.Lock()
        self._granted = None
        self._given_up = threading.Event()
