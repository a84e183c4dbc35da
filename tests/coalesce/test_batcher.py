"""The batcher: what waits goes in one call, and each key's callers get what is theirs."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import trio

from tests.support.forking import forked
from tests.support.waiting import wait_until
from veltrix_mw.coalesce import Batcher
from veltrix_mw.coalesce.batcher import MAX_HUNG, Elsewhere
from veltrix_mw.coalesce.flight import Flight
from veltrix_mw.errors import Overloaded, StoreError, StoreUnavailable

WITHIN_S = 10.0

multithreaded_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Backend:
    """Answers each key with itself in capitals; each call waits until it may go on, if it is held."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[str]] = []
        self.entered = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.held = held
        self.answers: dict[str, Any] = {}

    def __call__(self, keys: Sequence[str]) -> Mapping[str, Any]:
        self.batches.append([*keys])
        self.entered.release()
        if self.held:
            assert self.may_end.acquire(timeout=WITHIN_S)
        return {key: self.answers.get(key, key.upper()) for key in keys}

    def wait_entered(self) -> None:
        assert self.entered.acquire(timeout=WITHIN_S)

    def let_go(self, calls: int = 1_000) -> None:
        self.may_end.release(calls)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def until(predicate: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not predicate():
            await asyncio.sleep(0)


def at_rest(batcher: Batcher[Any, Any]) -> bool:
    return len(batcher._flights) == 0 and not batcher._waiting


def threads_of_batchers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "veltrix-batcher"]


def test_a_key_that_comes_while_nothing_is_under_way_is_loaded_at_once_alone() -> None:
    backend = Backend()
    with Batcher(backend) as batcher:
        assert [batcher.load(key) for key in "abc"] == ["A", "B", "C"]
        assert asyncio.run(batcher.aload("d")) == "D"
        assert trio.run(batcher.aload, "e") == "E"
        assert at_rest(batcher)
    assert backend.batches == [["a"], ["b"], ["c"], ["d"], ["e"]]


def test_nothing_is_started_before_the_first_key() -> None:
    with Batcher(Backend()) as batcher:
        assert batcher._thread is None
        assert threads_of_batchers() == []
        batcher.load("a")
        assert len(threads_of_batchers()) == 1
    assert threads_of_batchers() == []


def test_what_waits_while_a_call_is_under_way_goes_in_the_next_each_key_once_in_order() -> None:
    backend = Backend(held=True)
    with Batcher(backend, timeout_s=WITHIN_S) as batcher, ThreadPoolExecutor(2) as threads:
        first = batcher.submit("first")
        backend.wait_entered()

        async def tasks() -> list[str]:
            return await asyncio.gather(*(batcher.aload(key) for key in ("b", "c", "b", "d")))

        others = [batcher.submit("a"), batcher.submit("b")]
        loop = threads.submit(asyncio.run, tasks())
        wait_until(lambda: len(batcher._waiting) == 4, WITHIN_S, reason="four keys wait")
        joined = batcher.submit("first")
        assert joined is first
        backend.let_go()
        assert [each.result(WITHIN_S) for each in (first, *others)] == ["FIRST", "A", "B"]
        assert loop.result(WITHIN_S) == ["B", "C", "B", "D"]
        assert at_rest(batcher)
    assert backend.batches == [["first"], ["a", "b", "c", "d"]]


def test_a_batch_has_no_more_than_its_items() -> None:
    backend = Backend(held=True)
    with Batcher(backend, max_items=3, timeout_s=WITHIN_S) as batcher:
        first = batcher.submit("x")
        backend.wait_entered()
        others = [batcher.submit(key) for key in "abcdefgh"]
        backend.let_go()
        assert [each.result(WITHIN_S) for each in (first, *others)] == [*"XABCDEFGH"]
    assert backend.batches == [["x"], ["a", "b", "c"], ["d", "e", "f"], ["g", "h"]]


def test_between_two_calls_is_a_pause_where_one_is_asked_for_unless_a_full_batch_waits() -> None:
    backend, clock, pauses = Backend(), Clock(), [0.0]
    with Batcher(backend, max_items=3, pause_s=lambda: pauses[0], clock=clock, timeout_s=WITHIN_S) as batcher:
        assert [batcher.load(key) for key in "ab"] == ["A", "B"]
        pauses[0] = 5.0  # from the beginning of the last call
        flights = [batcher.submit(key) for key in "cde"]
        assert [flight.result(WITHIN_S) for flight in flights] == ["C", "D", "E"]
        first = batcher.submit("f")
        clock.now_s += 5.0
        assert batcher.load("g") == "G"
        assert first.result(WITHIN_S) == "F"
        clock.now_s += 5.0
        assert batcher.load("h") == "H"
    assert backend.batches == [["a"], ["b"], ["c", "d", "e"], ["f", "g"], ["h"]]


def test_a_pause_ends_by_itself() -> None:
    backend = Backend()
    with Batcher(backend, pause_s=lambda: 0.05) as batcher:
        assert [batcher.load(key) for key in "ab"] == ["A", "B"]


def test_two_thousand_keys_at_once_cost_a_fiftieth_as_many_calls() -> None:
    backend = Backend(held=True)

    async def main() -> list[str]:
        tasks = [asyncio.create_task(batcher.aload(f"k{number}")) for number in range(2_000)]
        await until(lambda: len(batcher._flights) == 2_000)
        backend.let_go()
        return await asyncio.gather(*tasks)

    with Batcher(backend, timeout_s=WITHIN_S) as batcher:
        assert asyncio.run(main()) == [f"K{number}" for number in range(2_000)]
    assert len(backend.batches) <= 2_000 / 50


def test_a_key_that_fails_fails_its_own_callers_alone() -> None:
    backend = Backend(held=True)
    bad = LookupError("b is bad")
    backend.answers = {"b": bad}
    with Batcher(backend, timeout_s=WITHIN_S) as batcher, ThreadPoolExecutor(4) as threads:
        first = batcher.submit("x")
        backend.wait_entered()
        a, b, c = (batcher.submit(key) for key in "abc")
        callers = [threads.submit(batcher.load, "b") for _ in range(4)]
        backend.let_go()
        assert [each.result(WITHIN_S) for each in (first, a, c)] == ["X", "A", "C"]
        errors = [caller.exception(WITHIN_S) for caller in callers]
        with pytest.raises(LookupError, match="b is bad"):
            b.result(WITHIN_S)
        assert {type(error) for error in errors} == {LookupError}
        assert len({id(error) for error in (*errors, bad)}) == 5
        assert all(error is not None and error.__cause__ is bad for error in errors)
        backend.answers = {}
        assert batcher.load("b") == "B"  # a failure is not kept


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), SystemExit(1)])
def test_a_batch_that_fails_fails_each_with_its_own_exception_and_the_next_goes_on(error: BaseException) -> None:
    fails = [True]

    def load_many(keys: Sequence[str]) -> Mapping[str, str]:
        if fails.pop() if fails else False:
            raise error
        return {key: key.upper() for key in keys}

    with Batcher(load_many) as batcher:
        with pytest.raises(type(error) if isinstance(error, Exception) else StoreUnavailable) as raised:
            batcher.load("a")
        assert raised.value.__cause__ is error
        assert batcher.load("a") == "A"
        assert at_rest(batcher)


@pytest.mark.parametrize("answer", [{}, None, ["a"]])
def test_a_key_that_is_not_answered_for_fails_and_says_why(answer: Any) -> None:
    with Batcher[str, str](lambda _: answer) as batcher:
        with pytest.raises((StoreError, AttributeError)) as raised:
            batcher.load("a")
        assert answer != {} or "let it answer for each" in str(raised.value)


@pytest.mark.parametrize("value", [None, False, StopIteration])
def test_any_value_is_a_value(value: Any) -> None:
    with Batcher[str, Any](lambda keys: dict.fromkeys(keys, value)) as batcher:
        assert batcher.load("a") is value


def test_more_than_may_wait_are_refused_but_keys_that_wait_already() -> None:
    backend = Backend(held=True)
    with Batcher(backend, max_waiting=2, timeout_s=WITHIN_S) as batcher:
        first = batcher.submit("x")
        backend.wait_entered()
        a, b = batcher.submit("a"), batcher.submit("b")
        with pytest.raises(Overloaded, match="2 keys wait"):
            batcher.load("c")
        with pytest.raises(Overloaded):
            asyncio.run(batcher.aload("c"))
        assert batcher.submit("a") is a
        assert len(batcher._flights) == 3
        backend.let_go()
        assert [each.result(WITHIN_S) for each in (first, a, b)] == ["X", "A", "B"]
        assert batcher.load("c") == "C"


def test_a_cancelled_caller_harms_no_other() -> None:
    backend = Backend(held=True)

    async def main() -> None:
        tasks = [asyncio.create_task(batcher.aload("a")) for _ in range(4)]
        await until(lambda: len(batcher._flights) == 1 and len(backend.batches) == 1)
        for task in tasks[:2]:
            task.cancel()
        for task in tasks[:2]:
            with pytest.raises(asyncio.CancelledError):
                await task
        backend.let_go()
        assert await asyncio.gather(*tasks[2:]) == ["A", "A"]

    with Batcher(backend, timeout_s=WITHIN_S) as batcher:
        asyncio.run(main())
        assert at_rest(batcher)
    assert backend.batches == [["a"]]


def test_what_nobody_waits_for_any_more_is_not_loaded() -> None:
    clock, backend = Clock(), Backend(held=True)
    with Batcher(backend, timeout_s=WITHIN_S, max_waiting=1, clock=clock) as batcher:
        batcher.submit("x")
        backend.wait_entered()
        clock.now_s += 1
        late = batcher.submit("a")
        clock.now_s += WITHIN_S - 0.1
        with pytest.raises(Overloaded):
            batcher.submit("b")
        clock.now_s += 0.1
        fresh = batcher.submit("b")  # the late one gave its place up
        with pytest.raises(StoreUnavailable, match="try again"):
            late.result(WITHIN_S)
        assert late not in batcher._flights._flights.values()
        backend.let_go()
        assert fresh.result(WITHIN_S) == "B"
    assert backend.batches == [["x"], ["b"]]


def test_what_became_late_while_a_call_was_under_way_is_not_loaded_after_it() -> None:
    clock, backend = Clock(), Backend(held=True)
    with Batcher(backend, timeout_s=WITHIN_S, clock=clock) as batcher:
        first = batcher.submit("x")
        backend.wait_entered()
        late = batcher.submit("a")
        clock.now_s += WITHIN_S
        backend.let_go()
        wait_until(lambda: late not in batcher._flights._flights.values(), WITHIN_S, reason="the late one ends")
        assert not late.landed
        assert first.landed
        assert batcher.load("b") == "B"
    assert backend.batches == [["x"], ["b"]]


def test_who_has_more_time_than_what_became_late_in_the_queue_is_given_another_flight() -> None:
    backend, clock = Backend(held=True), Clock()

    async def main(batcher: Batcher[str, str]) -> str:
        batcher.submit("a")
        backend.wait_entered()
        flight = batcher.submit("b")
        clock.now_s += 1
        asked = asyncio.ensure_future(batcher.aload("b", timeout_s=600))
        await until(lambda: bool(flight._waiting))
        clock.now_s += 60
        backend.let_go()
        with pytest.raises(StoreUnavailable, match="60 s"):
            await flight.aresult()
        return await asked

    with Batcher(backend, clock=clock, timeout_s=60) as batcher:
        assert asyncio.run(main(batcher)) == "B"


def test_a_call_that_hangs_holds_up_nobody_beyond_its_time_and_its_thread_ends_with_it() -> None:
    clock, backend = Clock(), Backend(held=True)
    with Batcher(backend, timeout_s=WITHIN_S, clock=clock) as batcher:
        hung: list[Flight[str]] = []
        for number in range(MAX_HUNG):
            hung.append(batcher.submit(f"hung{number}"))
            backend.wait_entered()
            clock.now_s += WITHIN_S
            with pytest.raises(StoreUnavailable):
                hung[-1].result()
        last = batcher.submit("last")
        backend.wait_entered()
        assert len(threads_of_batchers()) == MAX_HUNG + 1
        clock.now_s += WITHIN_S
        waits = batcher.submit("waits")  # no further thread takes over
        assert len(threads_of_batchers()) == MAX_HUNG + 1
        backend.let_go()
        assert waits.result(WITHIN_S) == "WAITS"
        wait_until(lambda: len(threads_of_batchers()) == 1, WITHIN_S, reason="the threads that hung end")
        wait_until(lambda: batcher._hung == 0, WITHIN_S, reason="and are not counted")
        assert last.landed
        assert batcher.load("again") == "AGAIN"
        assert at_rest(batcher)


def test_a_caller_who_is_killed_as_it_starts_the_thread_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    really_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        really_start(thread)
        raise Killed

    backend = Backend(held=True)
    with Batcher(backend, timeout_s=WITHIN_S) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(Killed):
                batcher.load("a")
        flights = [batcher.submit("a"), batcher.submit("b")]
        backend.let_go()
        assert [flight.result(WITHIN_S) for flight in flights] == ["A", "B"]
        assert len(threads_of_batchers()) == 1


def test_where_no_thread_can_take_over_from_one_that_hangs_that_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    clock, backend = Clock(), Backend(held=True)
    with Batcher(backend, timeout_s=WITHIN_S, clock=clock) as batcher:
        batcher.submit("hung")
        backend.wait_entered()
        waits = batcher.submit("waits")
        waits.deadline_s += WITHIN_S
        clock.now_s += WITHIN_S
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(Overloaded, match="no thread can be started"):
                batcher.load("a")
        backend.let_go()
        assert waits.result(WITHIN_S) == "WAITS"
        assert batcher.load("a") == "A"
        assert (len(threads_of_batchers()), batcher._hung) == (1, 0)


def test_where_no_thread_can_be_started_a_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Batcher(Backend()) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(Overloaded, match="no thread can be started"):
                batcher.load("a")
        assert at_rest(batcher)
        assert batcher.load("a") == "A"


def test_closing_waits_for_the_call_that_is_under_way_and_fails_what_waits() -> None:
    backend = Backend(held=True)
    batcher = Batcher(backend, timeout_s=WITHIN_S)
    first = batcher.submit("x")
    backend.wait_entered()
    waits = batcher.submit("a")
    with ThreadPoolExecutor(1) as threads:
        closing = threads.submit(batcher.close, timeout_s=WITHIN_S)
        with pytest.raises(StoreUnavailable, match="closed"):
            waits.result(WITHIN_S)
        assert not closing.done()
        backend.let_go()
        closing.result(WITHIN_S)
    assert first.result(0) == "X"
    assert backend.batches == [["x"]]
    for ask in (batcher.load, batcher.submit, lambda key: asyncio.run(batcher.aload(key))):
        with pytest.raises(StoreUnavailable, match="closed"):
            ask("a")
    assert at_rest(batcher)
    batcher.close()


def test_closing_ends_in_its_time_when_a_call_hangs() -> None:
    backend = Backend(held=True)
    batcher = Batcher(backend, timeout_s=WITHIN_S)
    hung = batcher.submit("x")
    backend.wait_entered()
    batcher.close(timeout_s=0.01)
    with pytest.raises(StoreUnavailable, match="closed"):
        hung.result(0)
    assert at_rest(batcher)
    backend.let_go()
    wait_until(lambda: threads_of_batchers() == [], WITHIN_S, reason="the thread ends with its call")


def test_a_call_may_close_its_batcher() -> None:
    def load_many(_: Sequence[str]) -> Mapping[str, str]:
        batcher.close()
        return {"a": "A"}

    batcher = Batcher[str, str](load_many)
    with pytest.raises(StoreUnavailable, match="closed"):
        batcher.load("a")
    wait_until(lambda: threads_of_batchers() == [], WITHIN_S, reason="its thread ends")


# Brought elsewhere


def _parked(batcher: Batcher[str, str], backend: Backend, *, until_s: float = 1e9) -> Flight[str]:
    """A flight of `a`, which the last call has left to others."""
    backend.answers["a"] = Elsewhere(until_s)
    flight = batcher.submit("a")
    wait_until(lambda: "a" in batcher._parked, WITHIN_S, reason="the key is awaited from elsewhere")
    return flight


def test_a_key_that_is_woken_goes_with_the_next_batch_and_no_other_does() -> None:
    backend = Backend()
    with Batcher(backend) as batcher:
        flight = _parked(batcher, backend)
        assert batcher.submit("a") is flight
        assert batcher.load("b") == "B"
        del backend.answers["a"]
        batcher.wake(["x", "a", "y"])
        assert flight.result(WITHIN_S) == "A"
    assert backend.batches == [["a"], ["b"], ["a"]]


def test_who_is_woken_at_once_waits_for_no_pause() -> None:
    backend, clock, pauses = Backend(), Clock(), [0.0]
    with Batcher(backend, pause_s=lambda: pauses[0], clock=clock, timeout_s=WITHIN_S) as batcher:
        flight = _parked(batcher, backend)
        del backend.answers["a"]
        pauses[0] = 5.0  # and the clock stands
        batcher.wake(["a"], at_once=True)
        assert flight.result(WITHIN_S) == "A"
        other = batcher.submit("b")
        wait_until(lambda: batcher._waiting, WITHIN_S, reason="the next one waits again")
        assert not other.landed
        clock.now_s += 5.0
        assert batcher.load("c") == "C"


def test_what_is_woken_before_the_call_has_left_it_to_others_is_not_lost() -> None:
    backend = Backend(held=True)
    backend.answers["a"] = Elsewhere(1e9)
    with Batcher(backend) as batcher:
        flight = batcher.submit("a")
        backend.wait_entered()
        batcher.wake(["a"])
        backend.let_go(1)
        backend.wait_entered()
        del backend.answers["a"]
        backend.let_go(1)
        assert flight.result(WITHIN_S) == "A"


def test_what_nobody_brings_goes_with_a_batch_again_when_its_time_is_over() -> None:
    backend, clock = Backend(), Clock()
    with Batcher(backend, clock=clock, timeout_s=60) as batcher:
        flight = _parked(batcher, backend, until_s=clock.now_s + 1)
        batcher.load("b")
        assert not flight.landed
        clock.now_s += 1
        del backend.answers["a"]
        batcher.load("c")
        assert flight.result(WITHIN_S) == "A"
    real = Batcher(backend)
    backend.answers["d"] = Elsewhere(time.monotonic() + 0.05)
    waiting = real.submit("d")
    wait_until(lambda: len([batch for batch in backend.batches if "d" in batch]) > 1, WITHIN_S, reason="asked again")
    real.close()
    assert not real._parked
    with pytest.raises(StoreUnavailable, match="closed"):
        waiting.result(WITHIN_S)


def test_a_call_that_another_took_the_place_of_takes_no_flight_from_it() -> None:
    clock, calls, ends = Clock(), list[int](), [threading.Event(), threading.Event()]

    def load_many(keys: Sequence[str]) -> Mapping[str, Any]:
        calls.append(number := len(calls))
        if number < 2:
            assert ends[number].wait(WITHIN_S)
            return dict.fromkeys(keys, Elsewhere(1e9))
        return {key: key.upper() for key in keys}

    with Batcher(load_many, clock=clock, timeout_s=60) as batcher:
        first = batcher.submit("a")
        wait_until(lambda: calls == [0], WITHIN_S, reason="the first call is under way")
        clock.now_s += 60
        second = batcher.submit("a")
        wait_until(lambda: calls == [0, 1], WITHIN_S, reason="another one took its place")
        batcher.wake(["a"])  # before the second has left it to others
        ends[0].set()
        wait_until(lambda: batcher._hung == 0, WITHIN_S, reason="the first call has returned")
        ends[1].set()
        assert second.result(WITHIN_S) == "A"
        assert not first.landed
        assert not batcher._parked


def test_what_is_awaited_counts_among_what_waits() -> None:
    backend = Backend()
    with Batcher(backend, max_waiting=1) as batcher:
        _parked(batcher, backend)
        with pytest.raises(Overloaded):
            batcher.submit("b")


def test_calls_run_in_an_empty_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    variable.set("of the first who asked")
    with Batcher[str, str](lambda keys: dict.fromkeys(keys, variable.get())) as batcher:
        assert batcher.load("a") == "none"


@pytest.mark.parametrize("fails", [True, False])
def test_what_was_answered_is_freed_with_its_callers_without_waiting_for_the_collector(fails: bool) -> None:
    class Answer(Exception):
        pass

    answers: list[weakref.ref[Answer]] = []

    def load_many(keys: Sequence[str]) -> Mapping[str, Any]:
        answer = Answer()
        answers.append(weakref.ref(answer))
        try:
            if fails:
                raise answer
            return {key: [answer] for key in keys}
        finally:
            del answer

    gc.disable()
    try:
        with Batcher[str, Any](load_many) as batcher:
            with contextlib.suppress(Answer):
                batcher.load("a")
            wait_until(lambda: answers[0]() is None, WITHIN_S, reason="nothing holds it")
    finally:
        gc.enable()


@multithreaded_fork
def test_a_forked_child_begins_with_an_empty_queue_and_a_thread_of_its_own() -> None:
    backend = Backend(held=True)
    with Batcher(backend, timeout_s=WITHIN_S, max_waiting=1) as batcher:
        first = batcher.submit("x")
        backend.wait_entered()
        waits = batcher.submit("a")

        def child() -> bool:
            backend.held = False
            return at_rest(batcher) and batcher.load("a") == "A" and backend.batches[-1] == ["a"]

        with batcher._condition:
            assert forked(child)
        backend.let_go()
        assert [first.result(WITHIN_S), waits.result(WITHIN_S)] == ["X", "A"]


def test_in_a_storm_exactly_the_cancelled_and_the_bad_keys_callers_fail_and_nothing_leaks() -> None:
    """Tasks and threads ask for a few keys over a store that resets now and then and has a bad key."""
    rng = random.Random(7)
    turn = threading.Lock()

    def load_many(keys: Sequence[str]) -> Mapping[str, Any]:
        with turn:
            resets = rng.random() < 0.3
        if resets:
            raise ConnectionResetError(104, "reset")
        return {key: LookupError(key) if key == "bad" else key.upper() for key in keys}

    async def ask(key: str) -> str:
        while True:
            with contextlib.suppress(ConnectionResetError):
                return await batcher.aload(key)

    def ask_in_thread(key: str) -> str:
        while True:
            with contextlib.suppress(ConnectionResetError):
                return batcher.load(key)

    async def storm(seed: int, threads: ThreadPoolExecutor) -> None:
        own = random.Random(seed)
        keys = own.choices(["a", "b", "c", "bad"], k=own.randint(1, 6))
        tasks = [asyncio.create_task(ask(key)) for key in keys]
        other_key = own.choice("abc")
        other = threads.submit(ask_in_thread, other_key)
        cancelled = {task for task in tasks if own.random() < 0.3}
        for task in cancelled:
            for _ in range(own.randrange(3)):
                await asyncio.sleep(0)
            task.cancel()
        for key, task, outcome in zip(keys, tasks, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            if isinstance(outcome, asyncio.CancelledError):
                assert task in cancelled
            elif key == "bad":
                assert isinstance(outcome, LookupError)
            else:
                assert outcome == key.upper()
        assert await asyncio.wrap_future(other) == other_key.upper()

    async def main() -> None:
        with ThreadPoolExecutor(2) as threads:
            for seed in range(2_000):
                await storm(seed, threads)
        await until(lambda: at_rest(batcher))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with Batcher(load_many, max_items=2, timeout_s=WITHIN_S) as batcher:
        asyncio.run(main())
        assert len(threads_of_batchers()) == 1
    assert threads_of_batchers() == []
