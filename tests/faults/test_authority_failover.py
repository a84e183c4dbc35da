"""Redis as the authority: its primary is lost under load, of a Sentinel's or a Cluster's, and a slot moves.

What was acknowledged and not yet copied is lost with a primary. Then, and only where the new primary's newest revision
shows it, one more incarnation is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.checker import Write
from tests.faults.rig import NAMESPACE, Rig, rig
from tests.support.redis_servers import (
    ClusterSet,
    RedisServer,
    SentinelSet,
    cluster_set,
    cut_off,
    sentinel_set,
    wait_copied,
)
from tests.support.waiting import wait_until
from veltrix_mw.stores.redis_layout import Names
from veltrix_mw.stores.redis_routes import slot_of

pytestmark = pytest.mark.timeout(300)

CONVERGED_S = 7.0  # after the failover, or the slot's move
UNCOPIED = 5  # writes, that a primary is let acknowledge before it dies

ENTRIES = Names(NAMESPACE).entries


@pytest.fixture(scope="module", params=["sentinel", "cluster"])
def servers(request: pytest.FixtureRequest) -> Iterator[SentinelSet | ClusterSet]:
    with sentinel_set() if request.param == "sentinel" else cluster_set() as made:
        yield made


@pytest.fixture(scope="module")
def authority(servers: SentinelSet | ClusterSet) -> Iterator[Rig]:
    with rig(members=0, servers=servers) as made:
        yield made


def _newest(server: RedisServer) -> int:
    return int(server.run("HGET", ENTRIES, "#revision"))


def _lost(made: Rig, new: RedisServer) -> list[Write]:
    """What the new primary lacks of what was acknowledged: the only reason for another incarnation.

    Or lacks of what a worker has seen: a primary may die right before it acknowledges.
    """
    newest = _newest(new)
    lost: list[Write] = []
    for write in reversed(made.writer.writes):
        if write.revision <= newest or (lost and write.revision >= lost[0].revision):
            break  # before it: what was lost earlier, whose revisions were given out again
        lost.insert(0, write)
    seen = max(published[-1].revision for published in made.publications().values())
    print(f"the new primary is at revision {newest}, and lacks {len(lost)} acknowledged writes; {seen} was seen")
    made.checker.restores += bool(lost) or seen > newest
    return lost


@pytest.mark.parametrize("kind", ["killed", "stopped"])
def test_a_primary_of_the_authority_is_lost(authority: Rig, servers: SentinelSet | ClusterSet, kind: str) -> None:
    old, writer = servers.owner_of(ENTRIES), authority.writer

    def fault() -> None:
        old.kill() if kind == "killed" else old.stop()
        with writer.paused():
            _lost(authority, servers.wait_replaced(old, ENTRIES))
        if kind == "stopped":
            old.cont()  # with whoever is connected to it still

    authority.recovers_within(CONVERGED_S, fault)
    with writer.paused():
        assert writer.writes[-1].revision == _newest(servers.owner_of(ENTRIES))


def test_what_was_not_copied_is_lost_with_the_primary_and_nothing_else(
    authority: Rig, servers: SentinelSet | ClusterSet
) -> None:
    old, writer = servers.owner_of(ENTRIES), authority.writer
    replica = servers.replica_of(old)

    def fault() -> None:
        with writer.paused():
            begun = len(writer.writes)
            wait_copied(old, replica)
            cut_off(old, replica)
        wait_until(lambda: len(writer.writes) >= begun + UNCOPIED, 10, reason="writes that are not copied")
        authority.caught_up_s(writer.writes[begun].revision, 10, after_s=writer.writes[begun].sent_s)
        old.kill()
        replica.cont()
        with writer.paused():
            assert servers.wait_replaced(old, ENTRIES) is replica
            lost = _lost(authority, replica)
            assert lost == writer.writes[begun:]
            assert len(lost) >= UNCOPIED

    before = {pid: published[-1].incarnation for pid, published in authority.publications().items()}
    authority.recovers_within(CONVERGED_S, fault)
    after = {pid: published[-1].incarnation for pid, published in authority.publications().items()}
    # Each worker had seen what was lost, so each took it for another history, and all for the same one.
    assert len(set(before.values())) == len(set(after.values())) == 1
    assert set(before.values()) != set(after.values())


@pytest.mark.parametrize("servers", ["cluster"], indirect=True)
def test_the_slot_of_the_authority_moves(authority: Rig, servers: ClusterSet) -> None:
    source = servers.owner_of(ENTRIES)
    authority.recovers_within(CONVERGED_S, lambda: servers.move(slot_of(ENTRIES), source, servers.another(source)))
