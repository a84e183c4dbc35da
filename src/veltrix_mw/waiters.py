"""Waiters: who waits until a client has come far enough.

Owns the futures and their order of waking; knows nothing of how the client gets there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Final

__all__ = ["BEGUN", "READY", "Waiters"]

READY: Final = -1
"""Waits for the first list, or a last-known-good."""

BEGUN: Final = -2
"""Waits for that, or until waiting is known not to help."""


class Waiters:
    """Wakes each waiter once `reached` holds for what it waits for: a revision, `READY` or `BEGUN`.

    No wake-up is lost: a waiter looks once itself after it was added. What waits no more is forgotten at once.
    """

    def __init__(self, reached: Callable[[int], bool]) -> None:
        self._reached = reached
        self._lock = threading.Lock()  # protects _waiting; held for dictionary operations only
        self._waiting: dict[Future[None], int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @contextmanager
    def waiting(self, what: int) -> Iterator[Future[None]]:
        """A future that is done once `what` is reached, for as long as the block lasts."""
        future: Future[None] = Future()
        with self._lock:
            self._waiting[future] = what
        try:
            if self._reached(what):
                self._finish(future)
            yield future
        finally:
            with self._lock:
                self._waiting.pop(future, None)
            future.cancel()

    def wake(self) -> None:
        """Wake those whose time has come."""
        with self._lock:
            waiting = list(self._waiting.items())
        for future, what in waiting:
            if self._reached(what):
                self._finish(future)

    def _finish(self, future: Future[None]) -> None:
        with self._lock:
            if self._waiting.pop(future, None) is None:
                return  # it was woken, or gave up
        if future.set_running_or_notify_cancel():
            future.set_result(None)

    def after_fork(self) -> None:
        """Forget the parent's waiters in a forked child, and the lock that one of them may have held."""
        self._lock = threading.Lock()
        self._waiting = {}
