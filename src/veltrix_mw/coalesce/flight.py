"""A flight: one call that is under way elsewhere, and all who wait for what it brings.

Owns the waiting, of threads and of tasks on any event loop, and each one's own exception. Knows nothing of what is
called, by whom, nor under which key.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, TypeVar

from veltrix_mw.awaiting import running_trio
from veltrix_mw.background import Signal
from veltrix_mw.errors import StoreUnavailable

__all__ = ["Flight"]

T = TypeVar("T")

_Wake = Callable[[], None]

_UNSET: Final = object()  # no call brings this


class Flight(Generic[T]):
    """A call that is under way: it lands once, and brings each who waits its result, or an exception of its own.

    Nobody who waits can end it: who is cancelled, or runs out of time, leaves by itself. Waiting is a notification,
    never a poll. At its deadline waiting for it ends; it may land later, for nobody.
    """

    __slots__ = (
        "_clock",
        "_error",
        "_is_over",
        "_landed",
        "_lock",
        "_on_landing",
        "_result",
        "_waiting",
        "began_s",
        "deadline_s",
        "leader",
    )

    def __init__(
        self,
        *,
        timeout_s: float = math.inf,
        on_landing: Callable[[Flight[T]], None] | None = None,
        leader: object = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_landing` is called each time that it is told to land, before anybody who waits hears of it.

        `leader` is whatever names who asked first, for those who ask later; nothing here looks into it.
        """
        self._clock = clock
        self.leader: object = leader
        self.began_s: float = clock()
        self.deadline_s: float = self.began_s + timeout_s
        self._on_landing = on_landing
        self._landed = Signal()
        self._lock = threading.Lock()  # protects what follows until it has landed; held for a few assignments
        self._result: Any = _UNSET
        self._error: BaseException | None = None
        self._is_over = False
        # What calls a function on a loop, from any thread -> what wakes each task that waits there.
        self._waiting: dict[Callable[..., object], set[_Wake]] = {}

    # --- whoever flies it

    def land(self, result: T) -> None:
        """Bring `result`. Who lands first counts: a later landing changes nothing."""
        self._land(result, None)

    def fail(self, error: BaseException) -> None:
        """Bring `error`: each who waits raises an exception of its own that has this one as its cause."""
        self._land(_UNSET, error)

    def end(self) -> None:
        """Bring nothing any more, as its deadline has passed: who waits learns what the clock would tell."""
        self._land(_UNSET, None)

    def _land(self, result: Any, error: BaseException | None) -> None:
        if self._on_landing is not None:
            self._on_landing(self)
        with self._lock:
            if self._landed.is_set():
                return
            self._result, self._error = result, error
            self._is_over = result is _UNSET and error is None
            waiting, self._waiting = self._waiting, {}
            self._landed.set()
        for call_on_loop, wakes in waiting.items():
            with contextlib.suppress(RuntimeError):  # that loop was closed: nobody is left to wake there
                call_on_loop(_wake_all, wakes)

    # --- who waits

    @property
    def landed(self) -> bool:
        """Whether it brought a result or an error."""
        return self._landed.is_set() and not self._is_over

    def result(self, timeout_s: float | None = None) -> T:
        """What it brings, waiting for at most `timeout_s`, and never beyond the flight's own deadline.

        Raises what the call raised, as a copy of this caller's own, and `StoreUnavailable` (try again) when it is too
        late, or when the call was ended by what only its own thread may raise (`SystemExit`, a cancellation).
        """
        until_s = self._until(timeout_s)
        if not self.wait_until(until_s):
            raise self.too_late(until_s)
        return self.outcome()

    async def aresult(self, timeout_s: float | None = None) -> T:
        """As `result`, for a task of asyncio's or trio's."""
        until_s = self._until(timeout_s)
        if not await self.await_until(until_s):
            raise self.too_late(until_s)
        return self.outcome()

    def wait_until(self, until_s: float) -> bool:
        """Whether it lands until then, by the clock, or until its own deadline."""
        left_s = self._left_s(until_s)
        self._landed.wait(None if left_s is None else min(left_s, threading.TIMEOUT_MAX))
        return self.landed

    async def await_until(self, until_s: float) -> bool:
        """As `wait_until`, for a task of asyncio's or trio's."""
        if self._landed.is_set():
            return self.landed
        left_s = self._left_s(until_s)
        trio = running_trio()
        if trio is None:
            await self._await_on_asyncio(left_s)
        else:
            await self._await_on_trio(trio, left_s)
        return self.landed

    def outcome(self) -> T:
        """What it brought; to be asked once it has landed."""
        if self._error is not None:
            raise _own(self._error) from self._error
        assert self._result is not _UNSET, "this flight has not landed"
        result: T = self._result
        return result

    def too_late(self, until_s: float) -> StoreUnavailable:
        """What is raised by who waited until then, or until the flight's deadline, in vain."""
        waited_s = min(until_s, self.deadline_s) - self.began_s
        return StoreUnavailable(f"the call that was waited for gave no answer in {waited_s:.3g} s; try again")

    def _until(self, timeout_s: float | None) -> float:
        return math.inf if timeout_s is None else self._clock() + timeout_s

    def _left_s(self, until_s: float) -> float | None:
        until_s = min(until_s, self.deadline_s)
        return None if until_s == math.inf else max(0.0, until_s - self._clock())

    async def _await_on_asyncio(self, left_s: float | None) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        woken = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        timer = None if left_s is None else loop.call_later(left_s, wake)
        try:
            with self._woken_by(loop.call_soon_threadsafe, wake):
                await woken
        finally:
            if timer is not None:
                timer.cancel()

    async def _await_on_trio(self, trio: Any, left_s: float | None) -> None:
        woken = trio.Event()
        with (
            trio.move_on_after(math.inf if left_s is None else left_s),
            self._woken_by(trio.lowlevel.current_trio_token().run_sync_soon, woken.set),
        ):
            await woken.wait()

    @contextlib.contextmanager
    def _woken_by(self, call_on_loop: Callable[..., object], wake: _Wake) -> Iterator[None]:
        """Let the landing call `wake` on the loop, while the block lasts. All tasks of a loop cost one such call."""
        with self._lock:
            if self._landed.is_set():
                wake()
            else:
                self._waiting.setdefault(call_on_loop, set()).add(wake)
        try:
            yield
        finally:
            with self._lock:
                wakes = self._waiting.get(call_on_loop)
                if wakes is not None:  # else it has landed
                    wakes.discard(wake)
                    if not wakes:
                        del self._waiting[call_on_loop]


def _wake_all(wakes: set[_Wake]) -> None:
    for wake in wakes:
        wake()


def _own(error: BaseException) -> BaseException:
    """An exception that says what `error` says, for one caller to raise: tracebacks and notes are added to it alone."""
    if not isinstance(error, Exception):
        # SystemExit, a cancellation, a killed greenlet: raised by a follower it would end what nobody meant to end.
        return StoreUnavailable(f"the call was ended by {type(error).__name__}; try again")
    own = _copied(error)
    if own is None:
        return StoreUnavailable(f"the call failed with {type(error).__name__}; its cause says why")
    own.args = error.args
    if hasattr(error, "__notes__"):
        own.__notes__ = [*error.__notes__]
    return own


def _copied(error: Exception) -> Exception | None:
    # A constructor may take other arguments than it keeps: then what it made is made once more, without it.
    with contextlib.suppress(Exception):
        copied = copy.copy(error)
        if type(copied) is type(error) and copied is not error:
            return copied.with_traceback(None)
    with contextlib.suppress(Exception):
        kind = type(error)
        copied = kind.__new__(kind, *error.args)
        copied.__dict__.update(error.__dict__)
        return copied
    return None
