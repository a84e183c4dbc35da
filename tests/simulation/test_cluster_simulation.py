"""Workers, relays, an authority and a mirror, against everything that befalls them, in any order."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.simulation.cluster import Cluster
from tests.simulation.faults import FAULTS, WRITES, Fault, evict_the_hash, flush_the_mirror, made, put_back_a_dump

SEED = st.integers(0, 10_000)


class Faults(RuleBasedStateMachine):
    """Whatever happens, each thing served and mirrored is true; and once all is healed, all is as it was before.

    The invariants are judged at every step of every process: by the cluster itself, while time passes.
    """

    @initialize(seed=SEED, seconds=st.floats(0, 10))
    def begin(self, seed: int, seconds: float) -> None:
        self.cluster = made(seed)
        self.cluster.run(seconds)

    @rule(write=st.sampled_from(WRITES), seed=SEED)
    def write(self, write: Fault, seed: int) -> None:
        write(self.cluster, Random(seed))

    @rule(fault=st.sampled_from(FAULTS), seed=SEED)
    def befall(self, fault: Fault, seed: int) -> None:
        fault(self.cluster, Random(seed))

    @rule(seconds=st.one_of(st.floats(0, 0.1), st.floats(0, 15)))
    def run_on(self, seconds: float) -> None:
        self.cluster.run(seconds)

    @rule(without_relays=st.booleans())
    def settle(self, without_relays: bool) -> None:
        self.cluster.settle(without_relays=without_relays)

    def teardown(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.settle()


Faults.TestCase.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
TestFaults = Faults.TestCase


# What the machine above should go through, by name


def settled(seed: int = 0) -> Cluster:
    cluster = Cluster(seed=seed)
    cluster.settle()
    return cluster


def leader_of(cluster: Cluster) -> str:
    return next(relay.name for relay in cluster.relays if relay.relay.leads)


def moves_of(cluster: Cluster) -> list[int]:
    return [worker.store.tiers.moves for worker in cluster.workers]


def test_a_killed_relay_is_succeeded_within_7_seconds() -> None:
    for seed in range(20):
        cluster = settled(seed)
        first = leader_of(cluster)
        next(relay for relay in cluster.relays if relay.name == first).kill()
        cluster.run(7)
        assert leader_of(cluster) != first
        assert all(worker.on_mirror for worker in cluster.workers)


def test_a_relay_that_was_stopped_comes_back_deposed_and_writes_nothing() -> None:
    for seed in range(20):
        cluster = settled(seed)
        first = next(relay for relay in cluster.relays if relay.relay.leads)
        first.pause(12)
        cluster.run(8)
        assert first.relay.leads  # so it believes
        assert cluster.mirror.holder is not None
        assert cluster.mirror.holder.holder != first.name
        cluster.authority.write({"a": b"7"})
        cluster.run(10)
        assert not first.relay.leads
        cluster.settle()


@pytest.mark.parametrize("fault", [flush_the_mirror, evict_the_hash, put_back_a_dump])
def test_a_mirror_that_lost_what_it_held_is_filled_again_before_the_workers_leave_it(fault: Fault) -> None:
    for seed in range(20):
        cluster = settled(seed)
        moves = moves_of(cluster)
        cluster.dumps = [cluster.mirror.dump()]
        cluster.authority.write({"a": b"7"})
        cluster.run(1)
        fault(cluster, Random(seed))
        cluster.run(15)
        assert cluster.mirror.kept.entries == cluster.authority.state
        assert cluster.is_settled()
        assert moves_of(cluster) == moves


def test_workers_leave_a_mirror_that_nobody_feeds_and_come_back() -> None:
    cluster = settled()
    moves = moves_of(cluster)
    for relay in cluster.relays:
        relay.kill()
    cluster.run(25)
    assert [worker.store.tiers.current for worker in cluster.workers] == ["authority"] * 3
    assert cluster.has_converged()
    cluster.settle()
    assert moves_of(cluster) == [each + 2 for each in moves]
