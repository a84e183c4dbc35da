"""Lazy units in a mirror in Redis: what is kept of the queue and of the announcements, and what is current."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stores.test_redis_mirror import WITHIN_S, Authority, Relay
from tests.support.redis_servers import RedisServer, redis_server
from veltrix_mw.errors import LeaseLost
from veltrix_mw.protocols import Lease, MirroredUnit, RawUnit
from veltrix_mw.stores import redis_mirror
from veltrix_mw.stores.redis_mirror import RedisMirror
from veltrix_mw.stores.redis_units import MAX_ANNOUNCED, MAX_ANNOUNCED_BYTES, MAX_WANTED

WANTED = "veltrix:{default}:wanted"
FILLED = "veltrix:{default}:filled"


@pytest.fixture(scope="module")
def _server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def server(_server: RedisServer) -> RedisServer:
    _server.run("FLUSHALL")
    return _server


@pytest.fixture
def relay(server: RedisServer) -> Iterator[Relay]:
    mirror = RedisMirror("127.0.0.1", server.port)
    authority = Authority()
    authority.write({"a": b"1"})
    relay = Relay(mirror, authority)
    relay.fill(lazy=("tenants/",))
    yield relay
    mirror.close()


def fill(relay: Relay, *names: str, told: list[str] | None = None, value: bytes = b"1") -> None:
    position = relay.authority.position
    units = {name: MirroredUnit(RawUnit(((f"{name}/a", value, 1),)), position.revision, 1) for name in names}
    relay.mirror.fill_units(relay.lease, position, units, list(names) if told is None else told, timeout_s=WITHIN_S)


def announced(server: RedisServer) -> list[list[str]]:
    """The names of each announcement that is kept, the oldest first."""
    return [said[b"units"].decode().split() for _, said in server.client.xrange(FILLED)]


def long_name(number: int) -> str:
    return f"tenants/{number:08}".ljust(500, "x")


def test_the_queue_keeps_the_names_that_came_last(server: RedisServer, relay: Relay) -> None:
    names = [f"tenants/t{number}" for number in range(MAX_WANTED + 700)]
    for at in range(0, len(names), 500):
        relay.mirror.want_units(names[at : at + 500], timeout_s=WITHIN_S)
    assert server.run("LLEN", WANTED) == MAX_WANTED
    assert list(relay.mirror.wanted_units(wait_s=0, timeout_s=WITHIN_S)) == names[-MAX_WANTED:]
    assert list(relay.mirror.wanted_units(wait_s=0, timeout_s=WITHIN_S)) == []
    relay.mirror.want_units(names[:2], timeout_s=WITHIN_S)
    assert list(relay.mirror.wanted_units(wait_s=WITHIN_S, timeout_s=WITHIN_S)) == names[:2]


def test_announcements_are_kept_by_their_bytes_however_long_the_names_are(server: RedisServer, relay: Relay) -> None:
    told = [[long_name(turn * 100 + number) for number in range(100)] for turn in range(60)]
    for names in told:
        fill(relay, told=names)
    kept = announced(server)
    assert kept == told[-len(kept) :]
    size = len(" ".join(told[0]))
    assert len(kept) == MAX_ANNOUNCED_BYTES // size
    fill(relay, told=["tenants/short"])
    assert announced(server) == [*told[-len(kept) :], ["tenants/short"]][-len(announced(server)) :]
    assert sum(len(" ".join(names)) for names in announced(server)) <= MAX_ANNOUNCED_BYTES


def test_the_newest_announcement_is_kept_also_where_it_is_too_long(
    server: RedisServer, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_mirror, "MAX_ANNOUNCED_BYTES", 2_000)
    for number in range(3):
        fill(relay, told=[long_name(number)] * 10)
        assert announced(server) == [[long_name(number)] * 10]
    fill(relay, told=["tenants/short"])
    assert announced(server) == [["tenants/short"]]


def test_announcements_that_say_nothing_of_their_bytes_do_no_harm(
    server: RedisServer, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_mirror, "MAX_ANNOUNCED_BYTES", 2_000)
    for number in range(3):  # as an older version writes them
        server.run("XADD", FILLED, "*", "units", long_name(number))
    for number in range(3, 12):
        fill(relay, told=[long_name(number)])
    assert announced(server)[-1] == [long_name(11)]
    assert sum(len(" ".join(names)) for names in announced(server)) <= 2_000


def test_short_announcements_are_kept_by_their_number(server: RedisServer, relay: Relay) -> None:
    for number in range(MAX_ANNOUNCED + 250):
        fill(relay, told=[f"tenants/t{number}"])
    assert MAX_ANNOUNCED <= len(announced(server)) <= MAX_ANNOUNCED + 100  # whole nodes of the stream are dropped
    assert announced(server)[-1] == [f"tenants/t{MAX_ANNOUNCED + 249}"]


def test_many_large_units_are_filled_in_parts_and_each_is_announced_once(server: RedisServer, relay: Relay) -> None:
    names = [f"tenants/t{number}" for number in range(10)]
    fill(relay, *names, told=[*names, "tenants/there"], value=b"1" * 400_000)
    kept = announced(server)
    assert len(kept) == 4
    assert [name for each in kept for name in each] == [*names, "tenants/there"]


def test_a_unit_is_current_that_was_filled_since_the_mirror_was(server: RedisServer, relay: Relay) -> None:
    fill(relay, "tenants/a", "tenants/b")
    asked = ["tenants/a", "tenants/b", "tenants/c"]
    assert set(relay.mirror.current_units(asked, timeout_s=WITHIN_S)) == {"tenants/a", "tenants/b"}
    server.run("DEL", "veltrix:{default}:unit:tenants/a")
    assert set(relay.mirror.current_units(asked, timeout_s=WITHIN_S)) == {"tenants/b"}
    relay.write({"a": b"2"})
    relay.fill(lazy=("tenants/",))
    assert set(relay.mirror.current_units(asked, timeout_s=WITHIN_S)) == set()
    server.run("FLUSHALL")
    assert set(relay.mirror.current_units(asked, timeout_s=WITHIN_S)) == set()


def test_a_deposed_relay_announces_nothing(server: RedisServer, relay: Relay) -> None:
    relay.lease = Lease("another", relay.lease.token - 1)
    with pytest.raises(LeaseLost):
        fill(relay, "tenants/a")
    assert announced(server) == []
