"""A flight: who waits for it, on what, until when, and what each gets."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import pytest
import trio
import trio.testing

from tests.support.waiting import wait_until
from veltrix_mw import Conflict, Entry
from veltrix_mw.coalesce.flight import Flight
from veltrix_mw.errors import StoreUnavailable
from veltrix_mw.values import MISSING

WITHIN_S = 10.0


def tasks_waiting(flight: Flight[Any]) -> int:
    return sum(len(wakes) for wakes in flight._waiting.values())


async def until(predicate: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not predicate():
            await asyncio.sleep(0)


@pytest.mark.parametrize("result", ["result", None, MISSING, ValueError("a result, not raised")])
def test_threads_and_tasks_of_several_loops_get_one_result(result: Any) -> None:
    flight: Flight[Any] = Flight()

    async def tasks() -> list[Any]:
        return await asyncio.gather(*(flight.aresult(WITHIN_S) for _ in range(5)))

    async def trio_tasks() -> list[Any]:
        got: list[Any] = []

        async def one() -> None:
            got.append(await flight.aresult(WITHIN_S))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
        return got

    with ThreadPoolExecutor(5) as threads:
        plain = [threads.submit(flight.result, WITHIN_S) for _ in range(2)]
        loops = [threads.submit(asyncio.run, tasks()) for _ in range(2)]
        trios = threads.submit(trio.run, trio_tasks)
        wait_until(lambda: tasks_waiting(flight) == 15, WITHIN_S, reason="all tasks wait")
        assert len(flight._waiting) == 3  # one call wakes all of a loop
        flight.land(result)
        assert [each.result(WITHIN_S) for each in plain] == [result] * 2
        assert [each.result(WITHIN_S) for each in loops] == [[result] * 5] * 2
        assert trios.result(WITHIN_S) == [result] * 5
    assert flight.landed
    assert not flight._waiting
    assert flight.result(0) is result
    assert asyncio.run(flight.aresult(0)) is result


def test_only_the_first_landing_counts() -> None:
    told: list[Flight[int]] = []
    flight: Flight[int] = Flight(on_landing=told.append)
    flight.land(1)
    flight.fail(ValueError())
    flight.land(2)
    assert flight.result() == 1
    assert told == [flight] * 3


def test_who_is_cancelled_leaves_nothing_behind_and_harms_nobody() -> None:
    async def main() -> None:
        flight: Flight[int] = Flight()
        tasks = [asyncio.create_task(flight.aresult(WITHIN_S)) for _ in range(10)]
        await until(lambda: tasks_waiting(flight) == 10)
        for task in tasks[::2]:
            task.cancel()
        await until(lambda: tasks_waiting(flight) == 5)
        flight.land(7)
        assert await asyncio.gather(*tasks[1::2]) == [7] * 5
        for task in tasks[::2]:
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not flight._waiting

    asyncio.run(main())


def test_a_task_that_is_cancelled_as_the_flight_lands_is_cancelled() -> None:
    async def main() -> None:
        flight: Flight[int] = Flight()
        task, other = (asyncio.create_task(flight.aresult()) for _ in range(2))
        await until(lambda: tasks_waiting(flight) == 2)
        flight.land(7)
        task.cancel()
        assert await other == 7
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_a_landing_while_a_task_begins_to_wait_wakes_it() -> None:
    flight: Flight[int] = Flight()
    woken = threading.Event()
    flight.land(1)
    with flight._woken_by(lambda *_: pytest.fail("it has landed"), woken.set):
        assert woken.is_set()


def test_a_task_of_trio_that_is_cancelled_leaves_nothing_behind() -> None:
    flight: Flight[int] = Flight()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flight.aresult)
            await trio.testing.wait_all_tasks_blocked()
            assert tasks_waiting(flight) == 1
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert not flight._waiting
    flight.land(1)


def test_a_loop_that_was_closed_while_its_tasks_waited_keeps_nobody_else_from_hearing() -> None:
    flight: Flight[int] = Flight()
    loop = asyncio.new_event_loop()
    task = loop.create_task(flight.aresult())
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert tasks_waiting(flight) == 1
    loop.close()
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(flight.result, WITHIN_S)
        flight.land(3)
        assert other.result(WITHIN_S) == 3
    assert not task.done()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    task.get_coro().close()  # type: ignore[union-attr]


def test_each_caller_waits_until_its_own_deadline() -> None:
    flight: Flight[int] = Flight()
    with pytest.raises(StoreUnavailable, match=r"gave no answer in .* s; try again"):
        flight.result(0.001)

    async def hurried() -> None:
        with pytest.raises(StoreUnavailable, match="try again"):
            await flight.aresult(0.001)

    asyncio.run(hurried())
    trio.run(hurried)
    assert not flight._waiting
    flight.land(1)
    assert flight.result() == 1


def test_waiting_ends_at_the_flight_s_deadline_and_who_has_time_still_sees_it_land() -> None:
    flight: Flight[int] = Flight(timeout_s=0.001)
    with pytest.raises(StoreUnavailable, match=r"in 0\.001 s"):
        flight.result()

    async def patient() -> None:
        with pytest.raises(StoreUnavailable, match=r"in 0\.001 s"):
            await flight.aresult(math.inf)

    asyncio.run(patient())
    flight.land(1)
    assert flight.result() == 1


def test_one_that_is_ended_brings_nothing_and_wakes_who_waits() -> None:
    flight: Flight[int] = Flight(timeout_s=60)

    async def main() -> None:
        waiting = asyncio.ensure_future(flight.await_until(math.inf))
        async with asyncio.timeout(WITHIN_S):
            while not flight._waiting:
                await asyncio.sleep(0)
            flight.end()
            assert not await waiting

    asyncio.run(main())
    flight.land(1)
    assert not flight.landed
    assert not flight.wait_until(math.inf)
    with pytest.raises(StoreUnavailable, match="60 s"):
        flight.result()


class Odd(Exception):
    """Keeps other arguments than it takes."""

    def __init__(self, code: int, *, hint: str) -> None:
        super().__init__(f"code {code}")
        self.hint = hint


class Told(Exception):
    def __init__(self, what: str) -> None:
        super().__init__(f"told: {what}")


class Stubborn(Exception):
    """Can neither be copied nor made anew."""

    def __new__(cls, *args: Any) -> Stubborn:
        if args:
            raise TypeError
        return super().__new__(cls)

    def __reduce__(self) -> NoReturn:
        raise TypeError


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "reset"),
        KeyError("k"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        ExceptionGroup("several", [ValueError("one")]),
        Odd(7, hint="look"),
        Told("it"),
        Conflict("somebody wrote", key="k", current=Entry(1, 2)),
    ],
)
def test_each_who_waits_gets_an_exception_of_its_own(error: Exception) -> None:
    error.add_note("seen at the source")
    flight: Flight[None] = Flight()
    flight.fail(error)

    async def awaited() -> None:
        await flight.aresult()

    caught: list[Exception] = []
    for _ in range(3):
        for wait in (flight.result, lambda: asyncio.run(awaited())):
            with pytest.raises(type(error)) as raised:
                wait()
            raised.value.add_note("seen by one caller")
            caught.append(raised.value)
    assert len({id(each) for each in [*caught, error]}) == 7
    for each in caught:
        assert str(each) == str(error)
        assert each.args == error.args
        assert each.__cause__ is error
        assert each.__notes__ == ["seen at the source", "seen by one caller"]
        assert {**vars(each), "__notes__": 0} == {**vars(error), "__notes__": 0}
    assert error.__traceback__ is None
    assert error.__notes__ == ["seen at the source"]


def test_an_exception_that_cannot_be_copied_is_told_by_its_type() -> None:
    flight: Flight[None] = Flight()
    error = Stubborn()
    error.args = ("what it says",)
    flight.fail(error)
    with pytest.raises(StoreUnavailable, match="failed with Stubborn") as raised:
        flight.result()
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
def test_what_ends_the_call_s_thread_ends_no_thread_that_waits(error: BaseException) -> None:
    flight: Flight[None] = Flight()
    flight.fail(error)
    for wait in (flight.result, lambda: asyncio.run(flight.aresult())):
        with pytest.raises(StoreUnavailable, match=f"ended by {type(error).__name__}; try again") as raised:
            wait()
        assert raised.value.__cause__ is error


def test_who_hears_of_the_landing_finds_it_forgotten() -> None:
    kept: set[Flight[int]] = set()
    flight: Flight[int] = Flight(on_landing=kept.discard)
    kept.add(flight)
    with ThreadPoolExecutor(4) as threads:
        ready = threading.Barrier(5)

        def wait() -> bool:
            ready.wait(WITHIN_S)
            flight.result(WITHIN_S)
            return not kept

        others = [threads.submit(wait) for _ in range(4)]
        ready.wait(WITHIN_S)
        flight.land(1)
        assert all(other.result(WITHIN_S) for other in others)
