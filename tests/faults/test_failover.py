"""One of etcd's leader, a watched follower, Redis and the relay is killed, stopped or cut off, under load.

Each fault ends in a heal and in equal keyspaces, so that one rig serves them all; the checker judges the whole story
when it ends: no request failed, nothing went back, no transaction was split, no age was too young.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from tests.faults.rig import SLACK, Rig, rig

pytestmark = pytest.mark.timeout(300)

FAILOVER_S = 3.0
HALF_OPEN_S = 12.0
TAKEOVER_S = 7.0
HEALED_S = 5.0
WITHOUT_REDIS_S = 3.0  # two seconds of jitter until the authority is followed, and a moment to resume there


@pytest.fixture(scope="module")
def mirrored() -> Iterator[Rig]:
    with rig() as made:
        yield made


@pytest.fixture(scope="module")
def direct() -> Iterator[Rig]:
    with rig(mirror=False) as made:
        yield made


@pytest.fixture(scope="module")
def direct_over_grpc() -> Iterator[Rig]:
    with rig(mirror=False, transport="grpc") as made:
        yield made


def _check(made: Rig, fault: Callable[[], None], *, bound_s: float, after_failover: bool = False) -> None:
    """Do what `fault` does; each worker then serves what is written within the bound; heal, and they are equal again.

    The bound counts from the fault, or from the moment that etcd takes writes again where it had to elect.
    """
    begun_s = time.monotonic()
    try:
        fault()
        write = made.writer.first_after(begun_s)
        since_s = write.acknowledged_s if after_failover else begun_s
        took_s = made.caught_up_s(write.revision, since_s + bound_s * SLACK - time.monotonic() + 1) - since_s
        print(f"caught up {took_s:.2f} s after, writable {write.acknowledged_s - begun_s:.2f} s after")
        assert took_s <= bound_s * SLACK, f"{took_s:.2f} s\n{made.told()}"
    finally:
        made.heal()
    made.equal_within(HALF_OPEN_S if bound_s == HALF_OPEN_S else HEALED_S)
    made.steady()


def _lead_elsewhere(made: Rig, watched: str) -> str:
    """The watched member, which from here on does not lead."""
    leader = made.cluster.leader()
    if leader.name == watched:
        other = next(each for each in made.cluster.members if each.name != watched)
        said = made.cluster._run("endpoint", "status", "-w", "json", members=[other])
        number = json.loads(said.stdout)[0]["Status"]["header"]["member_id"]
        made.cluster._run("move-leader", f"{number:x}", members=[leader])
        assert made.cluster.leader().name != watched
    return watched


@pytest.mark.parametrize(
    ("tiers", "role", "kind"),
    [
        ("mirrored", "leader", "killed"),
        ("mirrored", "leader", "stopped"),
        ("mirrored", "leader", "cut off"),
        ("mirrored", "watched follower", "killed"),
        ("mirrored", "watched follower", "stopped"),
        ("mirrored", "watched follower", "cut off"),
        ("direct", "leader", "killed"),
        ("direct", "leader", "stopped"),
        ("direct", "watched follower", "stopped"),
        ("direct", "watched follower", "cut off"),
        ("direct_over_grpc", "leader", "killed"),
        ("direct_over_grpc", "watched follower", "stopped"),
        ("direct_over_grpc", "watched follower", "cut off"),
    ],
)
def test_a_member_of_etcd_is_lost(request: pytest.FixtureRequest, tiers: str, role: str, kind: str) -> None:
    made: Rig = request.getfixturevalue(tiers)
    watching = made.relay().links if tiers == "mirrored" else made.links
    name = made.cluster.leader().name if role == "leader" else _lead_elsewhere(made, watching.watched())
    member = made.member(name)

    def cut_off() -> None:
        for each in (made.links, *(relay.links for relay in made.relays)):
            each.etcd[name].blackhole()

    faults = {"killed": lambda: made.cluster.kill(member), "stopped": lambda: made.cluster.pause(member)}
    _check(
        made,
        faults.get(kind, cut_off),
        bound_s=FAILOVER_S if kind == "killed" else HALF_OPEN_S,
        after_failover=kind == "killed",
    )


@pytest.mark.parametrize("kind", ["killed", "stopped", "cut off", "answers do not arrive"])
def test_redis_is_lost(mirrored: Rig, kind: str) -> None:
    redis = mirrored.redis
    assert redis is not None

    def cut_off(*, up: bool) -> None:
        for each in (mirrored.links, *(relay.links for relay in mirrored.relays)):
            assert each.redis is not None
            each.redis.blackhole(up=up)

    faults: dict[str, Callable[[], None]] = {
        "killed": redis.kill,
        "stopped": redis.stop,
        "cut off": lambda: cut_off(up=True),
        "answers do not arrive": lambda: cut_off(up=False),
    }
    _check(mirrored, faults[kind], bound_s=WITHOUT_REDIS_S if kind == "killed" else HALF_OPEN_S)


@pytest.mark.parametrize("kind", ["killed", "stopped", "cut off from both", "cut off from etcd", "cut off from Redis"])
def test_the_relay_is_lost(mirrored: Rig, kind: str) -> None:
    relay = mirrored.relay()

    def cut_off() -> None:
        assert relay.links.redis is not None
        if kind != "cut off from Redis":
            for each in relay.links.etcd.values():
                each.blackhole()
        if kind != "cut off from etcd":
            relay.links.redis.blackhole()

    faults: dict[str, Callable[[], None]] = {"killed": relay.kill, "stopped": lambda: relay.signal(signal.SIGSTOP)}
    # Cut off from etcd it holds its lease, and must first notice that it is.
    _check(mirrored, faults.get(kind, cut_off), bound_s=HALF_OPEN_S if kind == "cut off from etcd" else TAKEOVER_S)
