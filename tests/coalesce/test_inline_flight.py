"""Single-flight inline: one call for all who ask at once, and no harm from a leader that fails."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.forking import forked
from tests.support.waiting import wait_until
from veltrix_mw.coalesce.inline_flight import InlineFlight
from veltrix_mw.values import MISSING

WITHIN_S = 10.0


class Call:
    """A call that tells when it runs, and goes on when it may."""

    def __init__(self, result: Any = "result") -> None:
        self.result = result
        self.count = 0
        self.entered = threading.Event()
        self.may_end = threading.Event()

    def __call__(self) -> Any:
        self.count += 1
        self.entered.set()
        assert self.may_end.wait(WITHIN_S)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def followers(flights: InlineFlight) -> int:
    return len(flights._followed)


def all_at_once(flights: InlineFlight, call: Call, count: int) -> list[Future[Any]]:
    """One leader and `count` - 1 that wait for it, before the call may end."""
    threads = ThreadPoolExecutor(count)
    futures = [threads.submit(flights.run, "k", call) for _ in range(count)]
    threads.shutdown(wait=False)
    assert call.entered.wait(WITHIN_S)
    wait_until(lambda: followers(flights) == count - 1, WITHIN_S, reason="all others wait for the leader")
    call.may_end.set()
    return futures


@pytest.mark.parametrize("result", ["result", None, MISSING, False])
def test_many_who_ask_at_once_cost_one_call_whatever_it_finds(result: Any) -> None:
    flights, call = InlineFlight(), Call(result)
    assert [future.result(WITHIN_S) for future in all_at_once(flights, call, 16)] == [result] * 16
    assert call.count == 1


def test_nothing_is_kept_of_a_flight_that_landed() -> None:
    flights = InlineFlight()
    counted = iter(range(9))
    assert [flights.run("k", lambda: next(counted)) for _ in range(3)] == [0, 1, 2]
    for future in all_at_once(flights, Call(), 4):
        future.result(WITHIN_S)
    assert not flights._flights
    assert not flights._followed


def test_a_leader_that_fails_harms_no_follower() -> None:
    """Each tries by itself and gets its own exception, or its result."""
    flights, call = InlineFlight(), Call(LookupError("leader"))
    threads = ThreadPoolExecutor(8)
    leader = threads.submit(flights.run, "k", call)
    assert call.entered.wait(WITHIN_S)
    tries: list[str] = []
    together = threading.Lock()

    def own(name: str) -> str:
        assert together.acquire(blocking=False)  # one at a time
        try:
            tries.append(name)
            if len(tries) < 3:
                raise ValueError(name)
            return name
        finally:
            together.release()

    others = [threads.submit(flights.run, "k", lambda name=name: own(name)) for name in "abcdef"]  # type: ignore[misc]
    wait_until(lambda: followers(flights) == 6, WITHIN_S, reason="all others wait for the leader")
    call.may_end.set()
    with pytest.raises(LookupError, match="leader"):
        leader.result(WITHIN_S)
    outcomes = [other.exception(WITHIN_S) or other.result() for other in others]
    threads.shutdown()
    failed = [str(outcome) for outcome in outcomes if isinstance(outcome, ValueError)]
    assert sorted(failed) == sorted(tries[:2])
    assert all(isinstance(outcome, ValueError) or outcome in tries[2:] for outcome in outcomes)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
def test_a_leader_that_is_killed_harms_no_follower(error: BaseException) -> None:
    flights, call = InlineFlight(), Call(error)
    outcome: list[BaseException] = []

    def lead() -> None:
        try:
            flights.run("k", call)
        except BaseException as exc:
            outcome.append(exc)

    leader = threading.Thread(target=lead)
    leader.start()
    assert call.entered.wait(WITHIN_S)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(flights.run, "k", lambda: "mine")
        wait_until(lambda: followers(flights) == 1, WITHIN_S, reason="the other waits for the leader")
        call.may_end.set()
        assert other.result(WITHIN_S) == "mine"
    leader.join(WITHIN_S)
    assert outcome == [error]


def test_keys_do_not_wait_for_each_other() -> None:
    flights, slow = InlineFlight(), Call()
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(flights.run, "slow", slow)
        assert slow.entered.wait(WITHIN_S)
        assert flights.run("fast", lambda: 1) == 1
        assert not future.done()
        slow.may_end.set()
        assert future.result(WITHIN_S) == "result"


def test_a_call_may_ask_for_other_keys() -> None:
    flights = InlineFlight()
    assert flights.run("a", lambda: flights.run("b", lambda: flights.run("c", lambda: 1)) + 1) == 2


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_call_that_asks_for_its_own_key_raises_instead_of_waiting_for_ever(length: int) -> None:
    flights = InlineFlight()

    def ask(number: int) -> Any:
        return flights.run(number % length, lambda: ask(number + 1))

    with pytest.raises(RuntimeError, match="asks for its own result; break the cycle"):
        ask(0)
    assert flights.run(0, lambda: "free again") == "free again"


@pytest.mark.parametrize("length", [2, 3, 5])
def test_calls_of_several_threads_that_wait_for_each_other_in_a_ring_raise(length: int) -> None:
    flights = InlineFlight()
    all_lead = threading.Barrier(length)
    first = threading.local()

    def call(number: int) -> Any:
        if not hasattr(first, "done"):
            first.done = True
            all_lead.wait(WITHIN_S)
        return flights.run((number + 1) % length, lambda: call((number + 1) % length))

    with ThreadPoolExecutor(length) as threads:
        futures = [threads.submit(flights.run, n, lambda n=n: call(n)) for n in range(length)]  # type: ignore[misc]
        for future in futures:
            with pytest.raises(RuntimeError, match="break the cycle"):
                future.result(WITHIN_S)
    assert not flights._flights
    assert not flights._followed


def test_a_chain_of_waiting_threads_that_is_no_ring_is_left_alone() -> None:
    flights, last = InlineFlight(), Call("end")
    with ThreadPoolExecutor(3) as threads:
        end = threads.submit(flights.run, "c", last)
        assert last.entered.wait(WITHIN_S)
        middle = threads.submit(flights.run, "b", lambda: flights.run("c", last))
        wait_until(lambda: followers(flights) == 1, WITHIN_S, reason="b waits for c")
        start = threads.submit(flights.run, "a", lambda: flights.run("b", last))
        wait_until(lambda: followers(flights) == 2, WITHIN_S, reason="a waits for b")
        last.may_end.set()
        assert [future.result(WITHIN_S) for future in (start, middle, end)] == ["end"] * 3
    assert last.count == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_flies_again_what_the_fork_cut_off() -> None:
    flights, call = InlineFlight(), Call()
    leader = threading.Thread(target=lambda: flights.run("k", call))
    leader.start()
    assert call.entered.wait(WITHIN_S)
    assert forked(lambda: flights.run("k", lambda: "child") == "child" and flights.run("k", lambda: 2) == 2)
    call.may_end.set()
    leader.join(WITHIN_S)
    assert call.count == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_out_of_a_call_leaves_parent_and_child_with_a_flight_each() -> None:
    flights = InlineFlight()
    assert flights.run("k", lambda: forked(lambda: flights.run("k", lambda: "child") == "child"))
    assert flights.run("k", lambda: "parent") == "parent"
