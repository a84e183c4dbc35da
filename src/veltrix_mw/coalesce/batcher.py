"""The batcher: what waits while a call is under way goes together in the next, as databases commit in groups.

Owns the queue and the thread that empties it. Knows nothing of what is loaded; caches nothing.
"""

from __future__ import annotations

import contextvars
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from veltrix_mw.background import BackgroundThread
from veltrix_mw.coalesce.flight import Flight
from veltrix_mw.coalesce.single_flight import TIMEOUT_S, SingleFlight
from veltrix_mw.errors import Overloaded, StoreError, StoreUnavailable
from veltrix_mw.forking import anew_after_fork

__all__ = ["Batcher", "Elsewhere"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MAX_ITEMS: Final = 128  # what etcd takes in one transaction
MAX_WAITING: Final = 10_000  # seconds of work at any pace that a server answers such batches in; a few MB
MAX_HUNG: Final = 4  # threads whose call hangs and that others took the place of: a store may recover while they hang
CLOSE_S: Final = 2.0  # a process that ends is not held up for longer

_NOTHING: Final = object()

Around = Callable[[Sequence[Any]], AbstractContextManager[None]]


def _alone(_: Sequence[Any]) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Answers for a key that somebody else is to bring: it goes with another batch once it is woken.

    If nobody does that until `until_s`, by the batcher's clock, it goes with the next one then.
    """

    until_s: float


class Batcher(Generic[K, V]):
    """Loads keys in batches: whatever waits when the last call has returned goes in one call.

    No timer, but for who asks for a pause: a key that comes while nothing is under way is loaded at once, alone. A key
    that is asked for again before its call has returned shares it. Each caller waits for a flight of its key, so none
    can harm another, and a key that fails fails its own callers alone. What waits is bounded. Thread-safe; a forked
    child begins with an empty queue and a thread of its own.
    """

    def __init__(
        self,
        load_many: Callable[[Sequence[K]], Mapping[K, V | Exception | Elsewhere]],
        *,
        max_items: int = MAX_ITEMS,
        max_waiting: int = MAX_WAITING,
        timeout_s: float = TIMEOUT_S,
        around: Around = _alone,
        pause_s: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`load_many` is given up to `max_items` distinct keys and answers for each: its value, or an exception, which
        is its own callers' alone. What it raises is all callers' of that batch. It runs in the batcher's thread, in an
        empty context, and should end by itself within `timeout_s`, which each key has from when it is asked for. It is
        called within `around(leaders)`, of those who asked for the keys and named themselves to `submit`.

        `pause_s()` is the least time from the beginning of a call to that of the next, unless a full batch waits: what
        comes meanwhile goes together (databases call it a commit delay). It is asked while the queue is locked.

        Nothing is started before the first key.
        """
        self._load_many = load_many
        self._max_items = max_items
        self._max_waiting = max_waiting
        self._around = around
        self._pause_s = pause_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._flights = SingleFlight(timeout_s=timeout_s, clock=clock)
        self._condition = threading.Condition()  # protects what follows; held for a few operations on the queue
        self._waiting: deque[tuple[K, Flight[V]]] = deque()
        self._thread: threading.Thread | None = None  # the one that takes from the queue
        self._parked: dict[K, tuple[Flight[V], float]] = {}  # what is brought elsewhere, and until when that is awaited
        self._calling: dict[K, Flight[V]] = {}  # what the calls that are under way were given, of each key the last
        self._woken: set[K] = set()  # what of that was woken meanwhile
        self._calling_since_s: float | None = None  # when the thread's call began
        self._began_s = -math.inf  # when the last call did
        self._is_hurried = False  # the next one comes without a pause
        self._hung = 0  # threads that another took the place of, and whose call has not returned
        self._closed = False
        anew_after_fork(self)

    def __enter__(self) -> Batcher[K, V]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, key: K, *, timeout_s: float | None = None) -> V:
        """The value of `key`; waits for at most `timeout_s`, and without it until the key's deadline.

        Raises a copy of the exception that `load_many` answered with, or raised; `StoreUnavailable` (try again) when
        there was no answer in time, or the batcher is closed; `Overloaded` (try again later) when too many keys wait.
        """
        return self._flights.fly(key, lambda flight: self._enqueue(key, flight), timeout_s=timeout_s)

    async def aload(self, key: K, *, timeout_s: float | None = None) -> V:
        """As `load`, for a task of asyncio's or trio's."""
        return await self._flights.afly(key, lambda flight: self._enqueue(key, flight), timeout_s=timeout_s)

    def submit(self, key: K, *, leader: object = None) -> Flight[V]:
        """Ask for `key` without waiting: `result()` or `await aresult()` of what is returned do.

        `leader` is whatever names who asks; who asks for the key meanwhile finds it as the flight's `leader`.

        Submit several keys before waiting for the first, and they go together. Raises `Overloaded`, or
        `StoreUnavailable` when the batcher is closed.
        """
        return self._flights.join(key, lambda flight: self._enqueue(key, flight), leader=leader)

    def leader_of(self, key: K) -> object:
        """Who asked for `key`, as they named themselves to `submit`, while it is under way; None otherwise."""
        return self._flights.leader_of(key)

    def close(self, *, timeout_s: float = CLOSE_S) -> None:
        """End the thread; whoever still waits after `timeout_s` fails with `StoreUnavailable`. Final, and idempotent.

        A call that is under way is given that long to return; what was not taken from the queue fails at once.
        """
        with self._condition:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            self._parked.clear()
            thread = self._thread
            self._condition.notify_all()
        _fail([flight for _, flight in waiting], _closed())
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)
        self._flights.abandon(_closed())

    def wake(self, keys: Iterable[K], *, at_once: bool = False) -> None:
        """Let those of `keys` that are awaited from elsewhere go with the next batch; no other is touched.

        `at_once`: without the pause before it, where there is one; no call will be made for them.
        """
        with self._condition:
            self._is_hurried = self._is_hurried or at_once
            for key in keys:
                if (parked := self._parked.pop(key, None)) is not None:
                    self._waiting.appendleft((key, parked[0]))
                    self._condition.notify()
                elif key in self._calling:
                    self._woken.add(key)  # it came before it was known to be awaited

    # --- the queue

    def _enqueue(self, key: K, flight: Flight[V]) -> None:
        late: list[Flight[V]] = []
        try:
            with self._condition:
                if self._closed:
                    raise _closed()
                late = self._without_late()
                if len(self._waiting) + len(self._parked) >= self._max_waiting:
                    raise Overloaded(f"{self._max_waiting} keys wait to be loaded, which is the most; try again later")
                self._waiting.append((key, flight))
                self._condition.notify()
                try:
                    self._have_thread()
                except Overloaded:
                    self._waiting.pop()
                    raise
        finally:
            _end(late)

    def _without_late(self) -> list[Flight[V]]:
        """Take those from the queue's head whom nobody waits for any more. Needs the lock."""
        late: list[Flight[V]] = []
        while self._waiting and self._waiting[0][1].deadline_s <= self._clock():
            late.append(self._waiting.popleft()[1])
        return late

    def _have_thread(self) -> None:
        """See to it that a thread takes from the queue, where one can be had. Needs the lock."""
        thread, since_s = self._thread, self._calling_since_s
        hangs = thread is not None and thread.is_alive()
        if hangs and (since_s is None or self._clock() < since_s + self._timeout_s or self._hung >= MAX_HUNG):
            return
        # An empty context: what is loaded for many is no child of the request that happened to ask first.
        other = BackgroundThread(target=contextvars.Context().run, args=(self._run,), name="veltrix-batcher")
        self._thread, self._calling_since_s = other, None
        self._hung += hangs  # whoever waits for its call has given up; it ends when that returns
        try:
            other.start()
        except RuntimeError as exc:
            self._thread, self._calling_since_s = thread, since_s
            self._hung -= hangs
            raise Overloaded("no thread can be started to load keys; try again later") from exc

    def _run(self) -> None:
        while True:
            with self._condition:
                if self._thread is not threading.current_thread():
                    self._hung -= 1
                    return
                self._calling_since_s = None
                while not self._closed and (pauses_s := self._pauses_for_s()) > 0:
                    self._condition.wait(None if pauses_s == math.inf else pauses_s)
                if self._closed:
                    return
                late = self._without_late()
                batch = [self._waiting.popleft() for _ in range(min(self._max_items, len(self._waiting)))]
                self._calling.update(batch)
                self._calling_since_s = self._began_s = self._clock()
                self._is_hurried = False
            _end(late)
            if batch:
                self._load(batch)
            del batch, late  # nothing is held on to while it waits for more

    def _has_waiting(self) -> bool:
        """Whether there is something to load, be it that was awaited for long enough. Needs the lock."""
        if self._parked:
            now_s = self._clock()
            due = [key for key, (_, until_s) in self._parked.items() if until_s <= now_s]
            for key in reversed(due):  # each goes before the others: they keep their order
                self._waiting.appendleft((key, self._parked.pop(key)[0]))
        return bool(self._waiting)

    def _pauses_for_s(self) -> float:
        """How long to wait for the next call, unless more comes. Needs the lock."""
        if self._has_waiting():
            if self._pause_s is None or self._is_hurried or len(self._waiting) >= self._max_items:
                return 0.0
            return self._began_s + self._pause_s() - self._clock()
        return min((until_s for _, until_s in self._parked.values()), default=math.inf) - self._clock()

    def _load(self, batch: Sequence[tuple[K, Flight[V]]]) -> None:
        try:
            leaders = [flight.leader for _, flight in batch if flight.leader is not None]
            with self._around(leaders):
                found = self._load_many([key for key, _ in batch])
            del leaders
            answers = [found.get(key, _NOTHING) for key, _ in batch]
        except BaseException as exc:  # noqa: BLE001  # whatever it is, it is told to who waits; the thread goes on
            answers = [exc] * len(batch)
        self._park(batch, answers)
        _answer_all(batch, answers)
        del batch, answers  # an exception holds this frame by its traceback, and this frame who holds the exception

    def _park(self, batch: Sequence[tuple[K, Flight[V]]], answers: Sequence[Any]) -> None:
        """The call has ended: keep what it left to others, unless that was woken already."""
        late: list[Flight[V]] = []
        with self._condition:
            for (key, flight), answer in zip(batch, answers, strict=True):
                # Else another call took the place of this one, and what was woken since then is that one's.
                is_last = self._calling.get(key) is flight
                is_woken = is_last and key in self._woken
                if is_last:
                    del self._calling[key]
                    self._woken.discard(key)
                if not isinstance(answer, Elsewhere) or self._closed:
                    continue
                if flight.deadline_s <= self._clock():
                    late.append(flight)  # who asked since then waits for another flight, which may be kept already
                elif is_woken:
                    self._waiting.appendleft((key, flight))
                else:
                    self._parked[key] = flight, answer.until_s
            self._condition.notify_all()  # who waits may be another thread, and has to wait less long
        _end(late)

    def _after_fork(self) -> None:
        self._condition = threading.Condition()
        self._waiting = deque()
        self._parked = {}
        self._calling = {}
        self._woken = set()
        self._thread = None
        self._calling_since_s = None
        self._hung = 0


def _answer_all(batch: Sequence[tuple[K, Flight[V]]], answers: Sequence[Any]) -> None:
    for (_, flight), answer in zip(batch, answers, strict=True):
        if not isinstance(answer, Elsewhere):
            _answer(flight, answer)


def _answer(flight: Flight[V], answer: Any) -> None:
    if answer is _NOTHING:
        flight.fail(StoreError("load_many gave no answer for a key that it was asked for; let it answer for each"))
    elif isinstance(answer, BaseException):
        flight.fail(answer)
    else:
        flight.land(answer)


def _fail(flights: Sequence[Flight[V]], error: BaseException) -> None:
    for flight in flights:
        flight.fail(error)


def _end(late: Sequence[Flight[V]]) -> None:
    for flight in late:
        flight.end()


def _closed() -> StoreUnavailable:
    return StoreUnavailable("the batcher is closed; make another")
