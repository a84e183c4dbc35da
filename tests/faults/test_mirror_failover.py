"""The mirror's primary is lost under load, of a Sentinel's or a Cluster's, and a slot moves: nothing may be lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.rig import NAMESPACE, Rig, rig
from tests.support.redis_servers import ClusterSet, SentinelSet, cluster_set, sentinel_set
from veltrix_mw.stores.redis_layout import Names
from veltrix_mw.stores.redis_routes import slot_of

pytestmark = pytest.mark.timeout(300)

CONVERGED_S = 7.0  # after the failover, or the slot's move

ENTRIES = Names(NAMESPACE).entries


@pytest.fixture(scope="module", params=["sentinel", "cluster"])
def servers(request: pytest.FixtureRequest) -> Iterator[SentinelSet | ClusterSet]:
    with sentinel_set() if request.param == "sentinel" else cluster_set() as made:
        yield made


@pytest.fixture(scope="module")
def mirrored(servers: SentinelSet | ClusterSet) -> Iterator[Rig]:
    with rig(members=1, servers=servers) as made:
        yield made


@pytest.mark.parametrize("kind", ["killed", "stopped"])
def test_a_primary_of_the_mirror_is_lost(mirrored: Rig, servers: SentinelSet | ClusterSet, kind: str) -> None:
    old = servers.owner_of(ENTRIES)

    def fault() -> None:
        old.kill() if kind == "killed" else old.stop()
        servers.wait_replaced(old, ENTRIES)
        if kind == "stopped":
            old.cont()  # with whoever is connected to it still

    mirrored.recovers_within(CONVERGED_S, fault)


@pytest.mark.parametrize("servers", ["cluster"], indirect=True)
def test_the_slot_of_the_mirror_moves(mirrored: Rig, servers: ClusterSet) -> None:
    source = servers.owner_of(ENTRIES)
    mirrored.recovers_within(CONVERGED_S, lambda: servers.move(slot_of(ENTRIES), source, servers.another(source)))
