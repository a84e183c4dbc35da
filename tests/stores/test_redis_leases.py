"""Leases in Redis: what is their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from tests.support.proxy import Proxy
from tests.support.redis_servers import RedisServer, SentinelSet, redis_server, sentinel_set
from veltrix_mw.errors import StoreError, StoreUnavailable
from veltrix_mw.protocols import Lease, LeaseStore
from veltrix_mw.settings import parse_url
from veltrix_mw.stores.opening import open_leases

WITHIN_S: Final = 10.0
LONG_S: Final = 300.0
LEASE: Final = "veltrix:{shop}:lease:report"
TOKEN: Final = "veltrix:{shop}:token:report"


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def leases(proxy: Proxy) -> Iterator[LeaseStore]:
    leases = open_leases(parse_url(f"redis://127.0.0.1:{proxy.port}/0?namespace=shop"))
    yield leases
    leases.close()


def acquire(leases: LeaseStore, attempt: str = "one", *, within_s: float = WITHIN_S) -> Lease | None:
    return leases.acquire("report", attempt, ttl_s=LONG_S, timeout_s=within_s)[0]


def test_it_lies_where_the_docs_say(server: RedisServer, leases: LeaseStore) -> None:
    lease = acquire(leases)
    assert lease is not None
    assert server.run("GET", LEASE) == f"{lease.token} one".encode()
    assert server.run("GET", TOKEN) == f"{lease.token}".encode()
    leases.release("report", lease, timeout_s=WITHIN_S)
    assert server.run("EXISTS", LEASE) == 0
    assert server.run("GET", TOKEN) == f"{lease.token}".encode()


def test_an_attempt_whose_answer_was_lost_finds_its_own(server: RedisServer, proxy: Proxy, leases: LeaseStore) -> None:
    leases.acquire("another", "one", ttl_s=LONG_S, timeout_s=WITHIN_S)  # a connection, and the script
    proxy.blackhole(up=False)
    with pytest.raises(StoreUnavailable, match="did not answer"):
        acquire(leases, within_s=0.5)
    proxy.heal()
    given = int(server.run("GET", TOKEN))
    assert acquire(leases, "two") is None
    server.run("PEXPIRE", LEASE, 100_000)
    assert acquire(leases) == Lease("one", given)
    assert server.run("PTTL", LEASE) > 200_000  # it begins anew


def test_what_is_none_of_ours_is_told_and_left(server: RedisServer, leases: LeaseStore) -> None:
    server.run("SET", LEASE, "nonsense")
    assert acquire(leases) is None
    server.run("DEL", LEASE)
    server.run("HSET", LEASE, "a", "b")
    with pytest.raises(StoreError, match="is none of ours; nothing was touched"):
        acquire(leases)
    assert server.run("HGET", LEASE, "a") == b"b"


@pytest.fixture
def sentinels() -> Iterator[SentinelSet]:
    with sentinel_set() as made:
        yield made


def test_a_lease_waits_for_its_replicas(sentinels: SentinelSet) -> None:
    url = f"{sentinels.url}?namespace=shop&wait_replicas=1&wait_timeout_s=0.2"
    leases = open_leases(parse_url(url))
    lease = acquire(leases)
    assert lease is not None
    leases.renew("report", lease, ttl_s=LONG_S, timeout_s=WITHIN_S)
    sentinels.other(sentinels.primary()).stop()
    with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas know of the lease 'report'"):
        leases.renew("report", lease, ttl_s=LONG_S, timeout_s=WITHIN_S)
    with pytest.raises(StoreUnavailable, match="a failover may lose it; try again"):
        leases.acquire("another", "one", ttl_s=LONG_S, timeout_s=WITHIN_S)
    sentinels.heal()
    lease, _, _ = leases.acquire("another", "one", ttl_s=LONG_S, timeout_s=WITHIN_S)
    assert lease is not None
    leases.close()


def test_a_failover_leaves_a_lease_that_a_replica_knew_of_with_its_holder(sentinels: SentinelSet) -> None:
    leases = open_leases(parse_url(f"{sentinels.url}?namespace=shop&wait_replicas=1"))
    lease = acquire(leases)
    assert lease is not None
    old = sentinels.primary()
    old.kill()
    sentinels.wait_replaced(old)
    plain = open_leases(parse_url(f"{sentinels.url}?namespace=shop"))
    plain.renew("report", lease, ttl_s=LONG_S, timeout_s=WITHIN_S)
    assert acquire(plain, "two") is None
    plain.close()
    leases.close()
