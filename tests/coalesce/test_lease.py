"""The lease: one holder, kept up, lost in time, and fenced; over a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.forking import forked
from tests.support.redis_servers import RedisServer, redis_server
from tests.support.waiting import wait_until
from veltrix_mw.coalesce.lease import Lease
from veltrix_mw.errors import LeaseLost, Overloaded, StoreUnavailable
from veltrix_mw.stores.redis_leases import RedisLeases
from veltrix_mw.stores.redis_link import RedisLink
from veltrix_mw.stores.redis_routes import Server

WITHIN_S = 10.0
KEY = "veltrix:{shop}:lease:report"

multithreaded_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def leases(server: RedisServer) -> Iterator[RedisLeases]:
    link = RedisLink(
        Server("127.0.0.1", server.port),
        db=0,
        namespace="shop",
        tls=False,
        user=None,
        password=None,
        ca=None,
        cert=None,
        key=None,
    )
    yield RedisLeases(link, "shop")
    link.close()


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def keepers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "veltrix-lease"]


def test_one_holds_it_until_it_gives_it_up_and_the_next_has_a_larger_token(leases: RedisLeases) -> None:
    one, other = (Lease(leases, "report", holder=name, ttl_s=300) for name in ("one", "other"))
    with pytest.raises(LeaseLost, match="'report' is not held"):
        _ = one.token
    with one:
        first = one.token
        assert one.held
        assert one.try_hold()
        assert one.token == first
        assert not other.try_hold()
        assert not other.held
        with Lease(leases, "another", holder="other"):
            assert one.held
        with pytest.raises(LeaseLost, match=r"'report' is held by one:.*; try again later"):
            other.hold(timeout_s=0.0)
    assert not one.held
    with other:
        assert other.token > first
    wait_until(lambda: keepers() == [], WITHIN_S, reason="the threads of what was given up end")


def test_who_waits_has_it_once_it_is_given_up(leases: RedisLeases) -> None:
    one, other = (Lease(leases, "report", holder=name, ttl_s=1) for name in ("one", "other"))
    one.hold()
    waits = threading.Thread(target=other.hold)
    waits.start()
    one.release()
    waits.join(WITHIN_S)
    assert other.held
    other.release()


def test_it_is_kept_up_beyond_its_time(leases: RedisLeases, server: RedisServer) -> None:
    with Lease(leases, "report", holder="one", ttl_s=0.6) as lease:
        token = lease.token
        renewals = int(server.client.info("commandstats").get("cmdstat_pexpire", {"calls": 0})["calls"])
        wait_until(
            lambda: server.client.info("commandstats").get("cmdstat_pexpire", {"calls": 0})["calls"] >= renewals + 5,
            WITHIN_S,
            reason="five renewals, which is longer than it lasts by itself",
        )
        assert lease.token == token
        assert not Lease(leases, "report", holder="other").try_hold()


def test_what_is_another_s_is_lost_and_its_old_holder_takes_nothing_back(
    leases: RedisLeases, server: RedisServer
) -> None:
    one, other = (Lease(leases, "report", holder=name, ttl_s=0.6) for name in ("one", "other"))
    one.hold()
    server.run("DEL", KEY)
    other.hold()
    wait_until(lambda: not one.held, WITHIN_S, reason="it hears that it lost it")
    with pytest.raises(LeaseLost):
        _ = one.token
    one.release()
    assert other.held
    assert server.run("EXISTS", KEY) == 1
    other.release()


def test_what_the_store_no_longer_has_is_lost_at_the_next_renewal(leases: RedisLeases, server: RedisServer) -> None:
    lease = Lease(leases, "report", holder="one", ttl_s=0.6, clock=Clock())  # by that clock it would last for ever
    lease.hold()
    server.run("DEL", KEY)
    wait_until(lambda: not lease.held, WITHIN_S, reason="it hears that it lost it")
    wait_until(lambda: keepers() == [], WITHIN_S, reason="nobody keeps it up")


def test_it_is_not_held_beyond_its_time_by_the_holder_s_own_clock(leases: RedisLeases) -> None:
    clock = Clock()
    lease = Lease(leases, "report", holder="one", ttl_s=30, clock=clock)
    lease.hold()
    clock.now_s += 29
    assert lease.held
    clock.now_s += 1
    assert not lease.held
    with pytest.raises(LeaseLost):
        _ = lease.token
    lease.release()


def test_what_ran_out_here_is_not_taken_up_again_under_its_old_token(leases: RedisLeases, server: RedisServer) -> None:
    clock = Clock()
    lease = Lease(leases, "report", holder="one", ttl_s=30, clock=clock)
    lease.hold()
    token = lease.token
    clock.now_s += 30
    assert not lease.try_hold()  # the store has it yet: whoever found it lost must be told from who holds it next
    server.run("DEL", KEY)
    assert lease.try_hold()
    assert lease.token > token
    lease.release()


def test_a_store_that_goes_away_loses_it_in_time_and_says_so(leases: RedisLeases, server: RedisServer) -> None:
    lease = Lease(leases, "report", holder="one", ttl_s=0.6)
    lease.hold()
    server.kill()
    wait_until(lambda: not lease.held, WITHIN_S, reason="its time passes")
    with pytest.raises(StoreUnavailable):
        lease.try_hold()
    wait_until(lambda: keepers() == [], WITHIN_S, reason="nobody keeps it up")


def test_a_redis_that_lost_its_counter_gives_out_no_smaller_token(leases: RedisLeases, server: RedisServer) -> None:
    tokens: list[int] = []
    for _ in range(3):
        with Lease(leases, "report", holder="one") as lease:
            tokens.append(lease.token)
        server.run("FLUSHALL")
    assert tokens == sorted(set(tokens))


def test_where_no_thread_can_be_started_it_is_given_up_again(
    leases: RedisLeases, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    lease = Lease(leases, "report", holder="one")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(Overloaded, match="no thread can be started"):
            lease.hold()
    assert not lease.held
    assert server.run("EXISTS", KEY) == 0


@multithreaded_fork
def test_a_forked_child_does_not_hold_it(leases: RedisLeases) -> None:
    with Lease(leases, "report", holder="one", ttl_s=30) as lease:
        assert forked(lambda: not lease.held)
        assert lease.held


def test_of_many_who_want_it_one_has_it_at_a_time(leases: RedisLeases) -> None:
    inside: list[Any] = []
    overlaps: list[int] = []
    tokens: list[int] = []

    def work(number: int) -> None:
        for _ in range(3):
            with Lease(leases, "report", holder=f"{number}", ttl_s=3) as lease:
                inside.append(number)
                overlaps.append(len(inside))
                tokens.append(lease.token)
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * WITHIN_S)
    assert overlaps == [1] * 12
    assert tokens == sorted(set(tokens))
