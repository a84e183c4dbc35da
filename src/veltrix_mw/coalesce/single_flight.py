"""Single-flight: callers who ask for the same thing at once share one call, and none of them can harm it.

Owns which flights are in the air, and the threads of `run` and `arun`. Knows nothing of what is called; caches nothing.
For what is computed in its caller's own thread there is `inline_flight`.
"""

from __future__ import annotations

import contextvars
import math
import threading
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Final, TypeVar

from veltrix_mw.background import BackgroundThread
from veltrix_mw.coalesce.flight import Flight
from veltrix_mw.errors import Overloaded
from veltrix_mw.forking import anew_after_fork

__all__ = ["Launch", "SingleFlight"]

T = TypeVar("T")

Launch = Callable[[Flight[T]], None]
"""Sends a new flight off, and sees to it that it lands, or raises. Called in the thread that asked first; must not
block."""

TIMEOUT_S: Final = 2.0  # as any call to a store: what takes milliseconds and is not there by then has failed
MAX_CALLS: Final = 64  # each is a thread: enough for keys that are asked for at once, and an end when a store hangs

# The calls of which the running code is a part, outermost first: whose, and under which key.
_within: contextvars.ContextVar[tuple[tuple[SingleFlight, Hashable], ...]] = contextvars.ContextVar(
    "veltrix_flights", default=()
)


class SingleFlight:
    """At most one flight per key is in the air; those who ask meanwhile, threads and tasks alike, wait for it.

    Nobody who asks leads it: the call runs in a thread of its own, so a caller who is cancelled or runs out of time
    harms no other. A flight that fails gives each caller an exception of its own, and is not kept: who asks next begins
    another, as does who asks when one is past its deadline. Thread-safe; a forked child begins with none.
    """

    def __init__(
        self, *, timeout_s: float = TIMEOUT_S, max_calls: int = MAX_CALLS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`timeout_s` is each flight's deadline; `max_calls` how many calls of `run` and `arun` may be under way."""
        self._timeout_s = timeout_s
        self._max_calls = max_calls
        self._clock = clock
        self._flights: dict[Hashable, Flight[Any]] = {}
        self._calls = 0
        self._lock = threading.Lock()  # protects the two above; held for a few dictionary operations
        anew_after_fork(self)

    def __len__(self) -> int:
        """How many flights are in the air."""
        return len(self._flights)

    def run(self, key: Hashable, call: Callable[[], T], *, timeout_s: float | None = None) -> T:
        """The result of `call()`, or of the same call that is in the air under `key`; waits for at most `timeout_s`.

        `call` runs in a thread of its own, in an empty context. Without `timeout_s` a caller waits for as long as one
        whole flight, which is at most twice their deadline. What it gets may have been read shortly before it asked.

        Raises what `call` raises; `StoreUnavailable` (try again) when there was no answer in time; `Overloaded` (try
        again later) beyond `max_calls`, or where no thread can be started; `RuntimeError` when a call asks for its own
        key, be it by way of others that it makes.
        """
        self._check_within(key)
        return self.fly(key, lambda flight: self._launch(key, call, flight), timeout_s=timeout_s)

    async def arun(self, key: Hashable, call: Callable[[], T], *, timeout_s: float | None = None) -> T:
        """As `run`, for a task of asyncio's or trio's. `call` is a plain function here too: no loop can end it."""
        self._check_within(key)
        return await self.afly(key, lambda flight: self._launch(key, call, flight), timeout_s=timeout_s)

    def fly(self, key: Hashable, launch: Launch[T], *, timeout_s: float | None = None) -> T:
        """As `run`, for what is called elsewhere: see `join`."""
        asked_s = self._clock()
        until_s = math.inf if timeout_s is None else asked_s + timeout_s
        while True:
            flight = self.join(key, launch)
            if flight.wait_until(until_s):
                return flight.outcome()
            self._check_again(flight, asked_s, until_s)

    async def afly(self, key: Hashable, launch: Launch[T], *, timeout_s: float | None = None) -> T:
        """As `fly`, for a task of asyncio's or trio's."""
        asked_s = self._clock()
        until_s = math.inf if timeout_s is None else asked_s + timeout_s
        while True:
            flight = self.join(key, launch)
            if await flight.await_until(until_s):
                return flight.outcome()
            self._check_again(flight, asked_s, until_s)

    def join(self, key: Hashable, launch: Launch[T], *, leader: object = None) -> Flight[T]:
        """The flight of `key` that is in the air, or else a new one, which `launch` sends off and `leader` leads.

        Raises what `launch` raises; whoever joined meanwhile gets that too.
        """
        with self._lock:
            found = self._flights.get(key)
            if found is not None and self._clock() < found.deadline_s:
                return found
            flight: Flight[T] = Flight(
                timeout_s=self._timeout_s, on_landing=partial(self._forget, key), leader=leader, clock=self._clock
            )
            self._flights[key] = flight
        try:
            launch(flight)
        except Exception as exc:
            flight.fail(exc)
            raise
        # Anything else ends this caller (a greenlet that is killed as its thread starts), not the flight that it sent
        # off; one that it did not get to send off is late at its deadline, and who joined it joins another.
        return flight

    def leader_of(self, key: Hashable) -> object:
        """Who leads the flight of `key` that is in the air; None where there is none, or nobody was named."""
        found = self._flights.get(key)
        return None if found is None else found.leader

    def abandon(self, error: BaseException) -> None:
        """Let every flight that is in the air fail with `error`, whatever its call brings later."""
        with self._lock:
            flights = list(self._flights.values())
        for flight in flights:
            flight.fail(error)

    def _check_again(self, flight: Flight[Any], asked_s: float, until_s: float) -> None:
        """Raise, unless a flight that began before this caller asked is late and there is time to join another.

        So each caller is given a whole flight: one who joins a call that hangs already does not fail with it.
        """
        if flight.began_s >= asked_s or self._clock() >= until_s:
            raise flight.too_late(until_s)

    def _forget(self, key: Hashable, flight: Flight[Any]) -> None:
        with self._lock:
            if self._flights.get(key) is flight:
                del self._flights[key]

    def _check_within(self, key: Hashable) -> None:
        if any(flights is self and other == key for flights, other in _within.get()):
            raise RuntimeError("a call asks for its own result; break the cycle")

    def _launch(self, key: Hashable, call: Callable[[], T], flight: Flight[T]) -> None:
        with self._lock:
            if self._calls >= self._max_calls:
                raise Overloaded(f"{self._max_calls} calls are under way, which is the most; try again later")
            self._calls += 1
        # An empty context: what flies for many is no child of the request that happened to ask first.
        context = contextvars.Context()
        context.run(_within.set, (*_within.get(), (self, key)))
        thread = BackgroundThread(target=context.run, args=(self._fly, call, flight), name="veltrix-flight")
        try:
            thread.start()
        except RuntimeError as exc:
            self._returned()
            raise Overloaded("no thread can be started for a call; try again later") from exc

    def _fly(self, call: Callable[[], T], flight: Flight[T]) -> None:
        try:
            result = call()
        except BaseException as exc:  # noqa: BLE001  # whatever it is, it is told to who waits, and ends this thread
            self._returned()
            flight.fail(exc)
        else:
            self._returned()
            flight.land(result)
        finally:
            # An exception holds this frame by its traceback, and this frame the flight that holds the exception.
            del call, flight

    def _returned(self) -> None:
        # Before its landing: who is woken by that may have the next call at once.
        with self._lock:
            self._calls -= 1

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._flights = {}
        self._calls = 0
