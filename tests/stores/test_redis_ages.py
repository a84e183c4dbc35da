"""The age of a mirror's proof: never younger than the time that passed here, whatever the clocks of servers say."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from tests.support.redis_servers import RedisServer, redis_server
from veltrix_mw.protocols import Lease, Listing, Position
from veltrix_mw.stores.redis_ages import Ages
from veltrix_mw.stores.redis_mirror import RedisMirror

ONE, TWO = ("h1", 1), ("h2", 2)


def test_with_clocks_that_agree_it_is_what_redis_says() -> None:
    ages = Ages()
    assert ages.age(ONE, 100, 0.5, 50.0) == 0.5
    assert ages.age(ONE, 100, 2.5, 52.0) == 2.5
    assert ages.age(ONE, 101, 0.1, 53.0) == pytest.approx(0.1)
    assert ages.age(ONE, None, math.inf, 53.0) == math.inf


def test_a_clock_that_is_set_back_makes_no_proof_younger() -> None:
    ages = Ages()
    assert ages.age(ONE, 100, 0.5, 50.0) == 0.5
    assert ages.age(ONE, 100, 0.1, 58.0) == 8.5
    assert ages.age(ONE, 100, 9.0, 58.0) == 9.0  # of two, the older
    assert ages.age(ONE, 100, 0.1, 59.0) == 10.0
    assert ages.age(ONE, 107, 0.2, 60.0) == pytest.approx(0.2)


def test_a_proof_that_another_machine_noted_does_not_count_until_a_newer_one_comes() -> None:
    """After a failover the new primary has the old one's proof, and a clock of its own, which is behind."""
    ages = Ages()
    assert ages.age(ONE, 100, 0.5, 50.0) == 0.5
    assert ages.age(TWO, 107, 0.0, 58.0) == 8.5
    assert ages.age(TWO, 107, 1.0, 59.0) == 9.5
    assert ages.age(TWO, 111, 0.2, 60.0) == pytest.approx(0.2)
    assert ages.age(TWO, 111, 1.2, 61.0) == pytest.approx(1.2)


def test_an_older_proof_at_another_server_is_as_old_as_that_says() -> None:
    ages = Ages()
    assert ages.age(ONE, 100, 0.5, 50.0) == 0.5
    assert ages.age(TWO, 90, 12.0, 51.0) == 12.0


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[RedisServer, RedisServer]]:
    with redis_server() as first, redis_server() as second:
        yield first, second


def prove(server: RedisServer, ago_s: float) -> None:
    now_s, us = server.raw("TIME")
    at_us = int(now_s) * 1_000_000 + int(us) - round(ago_s * 1e6)
    server.run("HSET", "veltrix:{default}:entries", "#proved", at_us)


def test_a_mirror_goes_by_it_wherever_it_tells_an_age(servers: tuple[RedisServer, RedisServer]) -> None:
    """Two servers that stand for a primary and the one that took over, whose clock is 100 s behind."""
    for server in servers:
        relay = RedisMirror("127.0.0.1", server.port)
        lease, _, _ = relay.elect("relay", ttl_s=600, timeout_s=5)
        assert isinstance(lease, Lease)
        relay.fill(lease, Listing(Position("one", 1, "m"), []), digest=0, lazy=["t/"], timeout_s=5)
        relay.close()
    mirror = RedisMirror("127.0.0.1", servers[0].port)

    def ages() -> list[float]:
        found = mirror.find_units(["t/a"], timeout_s=5).state
        return [mirror.state(timeout_s=5).age_s, mirror.list(timeout_s=5).age_s, found.age_s]

    prove(servers[0], 100.0)
    assert min(ages()) >= 100.0
    prove(servers[1], 0.0)
    mirror._link._route.at = ("127.0.0.1", servers[1].port)  # type: ignore[misc]
    assert min(ages()) >= 100.0
    prove(servers[1], 0.0)
    assert max(ages()) < 100.0
    mirror.close()
