"""Single-flight: one call for all who ask at once, threads and tasks alike, and none of them can harm it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import random
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import trio

from tests.support.forking import forked
from tests.support.waiting import wait_until
from veltrix_mw.coalesce import SingleFlight
from veltrix_mw.coalesce.flight import Flight
from veltrix_mw.errors import Overloaded, StoreUnavailable

WITHIN_S = 10.0

multithreaded_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Call:
    """A call that tells when it runs, and goes on when it may."""

    def __init__(self, *results: Any) -> None:
        self.results = list(results) or ["result"]
        self.count = 0
        self.entered = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)

    def __call__(self) -> Any:
        result = self.results[min(self.count, len(self.results) - 1)]
        self.count += 1
        self.entered.release()
        assert self.may_end.acquire(timeout=WITHIN_S)
        if isinstance(result, BaseException):
            raise result
        return result

    def wait_entered(self) -> None:
        assert self.entered.acquire(timeout=WITHIN_S)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def waiting(flights: SingleFlight) -> int:
    """How many tasks wait."""
    return sum(len(wakes) for flight in list(flights._flights.values()) for wakes in list(flight._waiting.values()))


async def until(predicate: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not predicate():
            await asyncio.sleep(0)


def at_rest(flights: SingleFlight) -> bool:
    return len(flights) == 0 and flights._calls == 0


def test_threads_and_tasks_who_ask_at_once_cost_one_call() -> None:
    flights, call = SingleFlight(timeout_s=WITHIN_S), Call()

    async def tasks() -> list[Any]:
        return await asyncio.gather(*(flights.arun("k", call) for _ in range(20)))

    async def trio_task() -> Any:
        return await flights.arun("k", call)

    with ThreadPoolExecutor(8) as threads:
        plain = [threads.submit(flights.run, "k", call) for _ in range(5)]
        loops = [threads.submit(asyncio.run, tasks()) for _ in range(2)]
        trios = threads.submit(trio.run, trio_task)
        call.wait_entered()
        wait_until(lambda: waiting(flights) == 41, WITHIN_S, reason="all tasks wait")
        assert len(flights) == 1
        call.may_end.release()
        assert [each.result(WITHIN_S) for each in (*plain, trios)] == ["result"] * 6
        assert [each.result(WITHIN_S) for each in loops] == [["result"] * 20] * 2
    assert call.count == 1
    assert at_rest(flights)


def test_what_landed_is_not_kept() -> None:
    flights = SingleFlight()
    counted = iter(range(9))
    assert [flights.run("k", lambda: next(counted)) for _ in range(3)] == [0, 1, 2]
    assert asyncio.run(flights.arun("k", lambda: next(counted))) == 3
    assert at_rest(flights)


def test_a_failed_flight_fails_all_who_wait_each_with_its_own_exception_and_is_not_kept() -> None:
    flights, call = SingleFlight(timeout_s=WITHIN_S), Call(LookupError("once"), "then")

    async def main() -> None:
        tasks = [asyncio.create_task(flights.arun("k", call)) for _ in range(5)]
        await until(lambda: waiting(flights) == 5)
        call.may_end.release(2)
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(error) for error in errors} == {LookupError}
        assert len({id(error) for error in errors}) == 5
        assert len({id(error.__cause__) for error in errors if isinstance(error, LookupError)}) == 1
        assert await flights.arun("k", call) == "then"

    asyncio.run(main())
    assert call.count == 2
    assert at_rest(flights)


@pytest.mark.parametrize("who", ["who asked first", "who came later"])
def test_a_cancelled_caller_harms_no_other(who: str) -> None:
    flights, call = SingleFlight(timeout_s=WITHIN_S), Call()

    async def main() -> None:
        first = asyncio.create_task(flights.arun("k", call))
        await until(lambda: len(flights) == 1)
        others = [asyncio.create_task(flights.arun("k", call)) for _ in range(5)]
        await until(lambda: waiting(flights) == 6)
        cancelled, left = (first, others) if who == "who asked first" else (others[0], [first, *others[1:]])
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        call.may_end.release()
        assert await asyncio.gather(*left) == ["result"] * len(left)

    asyncio.run(main())
    assert call.count == 1


def test_a_loop_that_ends_takes_no_flight_with_it() -> None:
    flights, call = SingleFlight(timeout_s=WITHIN_S), Call()

    async def leave() -> None:
        task = asyncio.create_task(flights.arun("k", call))
        await until(lambda: waiting(flights) == 1)
        task.cancel()

    asyncio.run(leave())
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(flights.run, "k", call)
        call.wait_entered()
        call.may_end.release()
        assert other.result(WITHIN_S) == "result"
    assert call.count == 1


def test_a_caller_out_of_time_harms_no_other() -> None:
    flights, call = SingleFlight(timeout_s=WITHIN_S), Call()
    with pytest.raises(StoreUnavailable, match="try again"):
        flights.run("k", call, timeout_s=0.001)
    with pytest.raises(StoreUnavailable, match="try again"):
        asyncio.run(flights.arun("k", call, timeout_s=0.001))
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(flights.run, "k", call)
        call.may_end.release()
        assert other.result(WITHIN_S) == "result"
    assert call.count == 1


def test_a_call_that_hangs_fails_its_callers_at_the_flight_s_deadline_and_the_next_begins_another() -> None:
    clock, hangs = Clock(), Call("late")
    flights = SingleFlight(timeout_s=WITHIN_S, clock=clock)
    hung = flights.join("k", lambda flight: flights._launch("k", hangs, flight))
    clock.now_s += WITHIN_S
    for wait in (hung.result, lambda: asyncio.run(hung.aresult())):
        with pytest.raises(StoreUnavailable, match="in 10 s; try again"):
            wait()
    assert flights.run("k", lambda: "fresh") == "fresh"
    hangs.may_end.release()  # what hung brings its result too late, for nobody
    wait_until(lambda: at_rest(flights), WITHIN_S, reason="the late call is over")


def test_a_late_landing_does_not_end_the_flight_that_took_its_place() -> None:
    clock, hangs, call = Clock(), Call("late"), Call("fresh")
    flights = SingleFlight(timeout_s=WITHIN_S, clock=clock)
    hung = flights.join("k", lambda flight: flights._launch("k", hangs, flight))
    clock.now_s += WITHIN_S
    other = flights.join("k", lambda flight: flights._launch("k", call, flight))
    hangs.may_end.release()
    wait_until(lambda: hung.landed, WITHIN_S, reason="the late call is over")
    assert flights.join("k", lambda _: pytest.fail("another was begun")) is other
    call.may_end.release()
    assert other.result(WITHIN_S) == "fresh"


@pytest.mark.parametrize("waits", ["thread", "asyncio"])
def test_who_joins_a_call_that_hangs_already_is_given_a_whole_flight(waits: str) -> None:
    clock, call = Clock(), Call("late", "fresh")
    flights = SingleFlight(timeout_s=0.05, clock=clock)
    flights.join("k", lambda flight: flights._launch("k", call, flight))
    call.wait_entered()
    clock.now_s += 0.04
    with ThreadPoolExecutor(1) as threads:
        if waits == "thread":
            other: Future[Any] = threads.submit(flights.run, "k", call)
        else:
            other = threads.submit(asyncio.run, flights.arun("k", call))
        asked = call.count
        clock.now_s += 0.02  # the hung flight passes its deadline, perhaps while it is waited for
        call.wait_entered()  # another has begun
        assert call.count == asked + 1
        flights._timeout_s = WITHIN_S
        with flights._lock:
            flights._flights["k"].deadline_s += WITHIN_S
        call.may_end.release(2)
        assert other.result(WITHIN_S) == "fresh"
    wait_until(lambda: at_rest(flights), WITHIN_S, reason="both calls are over")


def test_more_calls_than_may_be_under_way_are_refused_and_a_place_is_free_again_at_once() -> None:
    flights, call = SingleFlight(timeout_s=WITHIN_S, max_calls=2), Call()
    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(flights.run, key, call) for key in "ab"]
        call.wait_entered()
        call.wait_entered()
        for _ in range(3):
            with pytest.raises(Overloaded, match="2 calls are under way"):
                flights.run("c", call)
        assert len(flights) == 2
        call.may_end.release(2)
        for other in others:
            other.result(WITHIN_S)
    one = SingleFlight(max_calls=1)
    assert [one.run("k", lambda number=number: number) for number in range(50)] == [*range(50)]


def test_a_call_is_over_before_anybody_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that who is woken by it finds a place free for the next."""
    flights = SingleFlight(max_calls=1)
    under_way: list[int] = []
    land = Flight._land

    def landing(flight: Flight[Any], *brought: Any) -> None:
        under_way.append(flights._calls)
        land(flight, *brought)

    monkeypatch.setattr(Flight, "_land", landing)
    assert flights.run("k", lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        flights.run("k", lambda: 1 // 0)
    assert under_way == [0, 0]


def test_a_failure_is_freed_with_its_callers_without_waiting_for_the_collector() -> None:
    class Failure(Exception):
        pass

    flights, failures = SingleFlight(), []

    def fail() -> None:
        failure = Failure()
        failures.append(weakref.ref(failure))
        try:
            raise failure
        finally:
            del failure

    gc.disable()
    try:
        with contextlib.suppress(Failure):
            flights.run("k", fail)
        wait_until(lambda: failures[0]() is None, WITHIN_S, reason="nothing holds it")
    finally:
        gc.enable()


def test_a_caller_who_is_killed_as_it_starts_the_call_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a greenlet is: it waits there until the thread runs."""

    class Killed(BaseException):
        pass

    really_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        really_start(thread)
        raise Killed

    flights, call = SingleFlight(timeout_s=WITHIN_S), Call()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(Killed):
            flights.run("k", call)
    flight = flights.join("k", lambda _: pytest.fail("it is in the air already"))
    call.may_end.release()
    assert flight.result(WITHIN_S) == "result"
    assert at_rest(flights)


def test_where_no_thread_can_be_started_a_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flights = SingleFlight()

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(Overloaded, match="no thread can be started"):
            flights.run("k", lambda: 1)
    assert at_rest(flights)
    assert flights.run("k", lambda: 2) == 2


def test_the_call_runs_in_an_empty_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    variable.set("of the first who asked")
    assert SingleFlight().run("k", variable.get) == "none"


def test_what_cannot_be_sent_off_fails_who_joined_too() -> None:
    flights = SingleFlight(timeout_s=WITHIN_S)
    joined = threading.Event()

    def launch(_: Flight[int]) -> None:
        assert joined.wait(WITHIN_S)
        raise Overloaded("full")

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(flights.join, "k", launch)
        wait_until(lambda: len(flights) == 1, WITHIN_S, reason="it is being sent off")
        other = flights.join("k", launch)
        joined.set()
        with pytest.raises(Overloaded) as raised:
            other.result(WITHIN_S)
        assert first.exception(WITHIN_S) is raised.value.__cause__
    assert at_rest(flights)


def test_keys_do_not_wait_for_each_other() -> None:
    flights, slow = SingleFlight(timeout_s=WITHIN_S), Call()
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(flights.run, "slow", slow)
        slow.wait_entered()
        assert flights.run("fast", lambda: 1) == 1
        assert not other.done()
        slow.may_end.release()
        assert other.result(WITHIN_S) == "result"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_call_that_asks_for_its_own_key_raises_instead_of_waiting_for_itself(length: int) -> None:
    flights = SingleFlight(timeout_s=WITHIN_S)

    def ask(number: int) -> int:
        if number % 2:
            return flights.run(number % length, lambda: ask(number + 1))
        return asyncio.run(flights.arun(number % length, lambda: ask(number + 1)))

    with pytest.raises(RuntimeError, match="break the cycle"):
        ask(0)
    assert flights.run(0, lambda: flights.run(1, lambda: SingleFlight().run(0, lambda: 7))) == 7
    assert at_rest(flights)


def test_abandoned_flights_fail_at_once() -> None:
    flights, call = SingleFlight(timeout_s=WITHIN_S), Call()
    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(flights.run, key, call) for key in "ab"]
        call.wait_entered()
        call.wait_entered()
        flights.abandon(StoreUnavailable("closed"))
        for other in others:
            with pytest.raises(StoreUnavailable, match="closed"):
                other.result(WITHIN_S)
    assert len(flights) == 0
    call.may_end.release(2)
    wait_until(lambda: flights._calls == 0, WITHIN_S, reason="the calls are over")


@multithreaded_fork
def test_a_forked_child_begins_with_no_flights_and_a_free_lock() -> None:
    flights, call = SingleFlight(timeout_s=WITHIN_S, max_calls=1), Call()
    leader = threading.Thread(target=lambda: flights.run("k", call))
    leader.start()
    call.wait_entered()
    with flights._lock:
        assert forked(lambda: at_rest(flights) and flights.run("k", lambda: "child") == "child")
    call.may_end.release()
    leader.join(WITHIN_S)
    assert call.count == 1


# --- the storm: callers are cancelled at random over a store that hangs, resets, then answers


class Store:
    """Hangs until it is let go (or until the flight's deadline and beyond), then resets, then answers."""

    def __init__(self, rng: random.Random) -> None:
        self.left = ["hang"] * rng.randrange(2) + ["reset"] * rng.randrange(3)
        self.go = threading.Event()
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if not self.left:
            return "answer"
        how = self.left.pop(0)
        if how == "hang":
            assert self.go.wait(WITHIN_S)
        raise ConnectionResetError(104, how)


def _again(exc: Exception, hurried: bool) -> None:
    if hurried and isinstance(exc, StoreUnavailable):
        raise exc


def _ask(flights: SingleFlight, key: int, store: Store, hurried: bool) -> str:
    while True:
        try:
            return flights.run(key, store, timeout_s=0.0 if hurried else WITHIN_S)
        except (ConnectionResetError, StoreUnavailable) as exc:
            _again(exc, hurried)


async def _aask(flights: SingleFlight, key: int, store: Store) -> str:
    while True:
        try:
            return await flights.arun(key, store, timeout_s=WITHIN_S)
        except (ConnectionResetError, StoreUnavailable) as exc:
            _again(exc, hurried=False)


async def _round(number: int, flights: SingleFlight, threads: ThreadPoolExecutor) -> None:
    rng = random.Random(number)
    store = Store(rng)
    key = number % 7
    tasks: list[asyncio.Task[str]] = []
    plain: list[tuple[Future[str], bool]] = []  # a thread cannot be cancelled; one in a hurry gives up
    for _ in range(rng.randint(1, 5)):
        if rng.random() < 0.3:
            hurried = rng.random() < 0.5
            plain.append((threads.submit(_ask, flights, key, store, hurried), hurried))
        else:
            tasks.append(asyncio.create_task(_aask(flights, key, store)))
        if rng.random() < 0.5:
            await asyncio.sleep(0)
    cancelled = {task for task in tasks if rng.random() < 0.4}
    let_go_first = rng.random() < 0.5
    if let_go_first:
        store.go.set()
    for task in cancelled:
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        task.cancel()
    store.go.set()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    for task, outcome in zip(tasks, ended, strict=True):
        if isinstance(outcome, asyncio.CancelledError):
            assert task in cancelled, f"round {number}: a task was cancelled that nobody cancelled"
        else:
            assert outcome == "answer", f"round {number}: {outcome!r}"
    for future, hurried in plain:
        wrapped = asyncio.wrap_future(future)
        try:
            assert await wrapped == "answer"
        except StoreUnavailable:
            assert hurried, f"round {number}: a thread failed that was in no hurry"
    # What was begun for callers who all left is flown to its end.
    await until(lambda: at_rest(flights))


def _alive() -> list[Any]:
    gc.collect()
    # By its type: `isinstance` asks a lazy object for its `__class__`, which sets it up.
    return [each for each in gc.get_objects() if issubclass(type(each), (Flight, asyncio.Future))]


@pytest.mark.parametrize(("first", "deadline_s"), [(0, WITHIN_S), (5_000, 0.001)])
def test_in_ten_thousand_storms_exactly_the_cancelled_fail_and_nothing_leaks(first: int, deadline_s: float) -> None:
    """With a deadline of a millisecond flights are also replaced while their calls hang, and land late."""
    others = _alive()
    flights = SingleFlight(timeout_s=deadline_s)

    async def main() -> None:
        with ThreadPoolExecutor(4) as threads:
            for number in range(first, first + 5_000):
                await _round(number, flights, threads)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert at_rest(flights)
    wait_until(
        lambda: not [each for each in threading.enumerate() if each.name == "veltrix-flight"],
        WITHIN_S,
        reason="the flights' threads end",
    )
    known = {id(each) for each in others}
    assert [each for each in _alive() if id(each) not in known] == []
