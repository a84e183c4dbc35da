"""Single-flight inline: the first who asks computes in its own thread, and those who come meanwhile wait for it.

Owns who computes and who waits; knows nothing of what is computed. Caches nothing. What may hang or be cancelled, a
call to a store above all, is for `single_flight`, which none of its callers leads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from typing import Any, Final, TypeVar

from veltrix_mw.background import Signal

__all__ = ["InlineFlight"]

T = TypeVar("T")

_NOTHING: Final = object()  # no call gives this back; `MISSING` may be what one found


class _Flight:
    __slots__ = ("done", "leader", "pid", "result")

    def __init__(self) -> None:
        self.done = Signal()
        self.pid = os.getpid()
        self.leader = threading.get_ident()
        self.result: Any = _NOTHING


class InlineFlight:
    """Runs at most one call per key at a time; those who come meanwhile get its result.

    A leader that fails harms no follower: each of them tries by itself, one at a time, and gets its own exception.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects what follows; held for a few dictionary operations
        self._flights: dict[Hashable, _Flight] = {}
        self._followed: dict[int, _Flight] = {}  # thread -> the flight it waits for

    def run(self, key: Hashable, call: Callable[[], T]) -> T:
        """The result of `call`, or of the same call that is in the air under `key`.

        Raises what `call` raises, and `RuntimeError` when a call asks for its own key, be it by way of calls that
        other threads make: all of them would wait for ever.
        """
        thread = threading.get_ident()
        while True:
            with self._lock:
                flight = self._flights.get(key)
                # A flight that a fork cut off has no leader in this process: it is flown again.
                leading = flight is None or flight.pid != os.getpid()
                if leading:
                    flight = self._flights[key] = _Flight()
                else:
                    assert flight is not None
                    if self._leads_to(flight, thread):
                        raise RuntimeError("a computation asks for its own result; break the cycle")
                    self._followed[thread] = flight
            assert flight is not None
            if leading:
                return self._lead(key, flight, call)
            try:
                flight.done.wait()
            finally:
                with self._lock:
                    self._followed.pop(thread, None)
            if flight.result is not _NOTHING:
                result: T = flight.result
                return result

    def _leads_to(self, flight: _Flight, thread: int) -> bool:
        """Whether the flight's leader is `thread`, or waits for a flight of which that is true. Needs the lock."""
        waited_for: _Flight | None = flight
        while waited_for is not None and waited_for.leader != thread:
            # One that is done only has to wake its followers; one of the parent process has none here.
            over = waited_for.done.is_set() or waited_for.pid != os.getpid()
            waited_for = None if over else self._followed.get(waited_for.leader)
        return waited_for is not None

    def _lead(self, key: Hashable, flight: _Flight, call: Callable[[], T]) -> T:
        try:
            result = call()
            flight.result = result
            return result
        finally:
            with self._lock:
                if self._flights.get(key) is flight:
                    del self._flights[key]
            flight.done.set()
