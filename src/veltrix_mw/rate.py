"""A rate: so many a second, and a number at once after a pause, as a bucket of tokens has it.

Owns the count and its lock; knows nothing of what is let through.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Rate"]


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
