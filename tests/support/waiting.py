"""Waiting in tests: for what is expected, with a deadline and a reason; never for a time alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event
from typing import Final, TypeVar

__all__ = ["wait_until"]

T = TypeVar("T")

_INTERVAL_S: Final = 0.01
"""Short against any deadline in the tests, long against a turn of the loop: 100 looks a second are no load."""


def wait_until(predicate: Callable[[], T], timeout_s: float, *, reason: str, interval_s: float = _INTERVAL_S) -> T:
    """Return the first true value of `predicate()`, looked at every `interval_s` seconds.

    Raises `AssertionError` after `timeout_s` seconds, saying what was waited for (`reason`) and the last value
    seen. An error of `predicate` is raised at once. For what another process does; within one process a
    condition or an event tells sooner.
    """
    deadline_s = time.monotonic() + timeout_s
    never = Event()
    while True:
        # Read before the look, so that the last look comes after the deadline, not before it.
        late = time.monotonic() >= deadline_s
        value = predicate()
        if value:
            return value
        if late:
            raise AssertionError(f"waited {timeout_s} s for: {reason}; last seen: {value!r}")
        never.wait(interval_s)
