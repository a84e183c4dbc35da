"""The cluster's worth: relays, tiers, mirrors and replicas with one defect each, and every one must be caught.

Where another defence would make up for a defect before anybody sees it, that defence is off.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random

import pytest

from tests.simulation import faults, test_mutants
from tests.simulation.cluster import AuthorityStore, Kinds
from tests.simulation.faults import FAULTS, Fault, drive, made
from tests.simulation.mirror import SimulatedMirror
from veltrix_mw.errors import Compacted
from veltrix_mw.keyspace import Keyspace
from veltrix_mw.protocols import Batch, Confirmation, Lease, Listing, MirrorState, Position, Watch
from veltrix_mw.relay import Append, Inspected, Kept, Refused, Relay, RelayStep
from veltrix_mw.replica import Received, Replica, Step
from veltrix_mw.stores.mirrored import MirroredStore
from veltrix_mw.stores.tiers import Tiers

STEPS = 20
SEEDS = range(120)
MUTANT_SEEDS = range(600)


# The mirror's rules


class NoFencing(SimulatedMirror):
    """Lets a deposed relay write."""

    def check_lease(self, lease: Lease) -> None:
        pass

    def check_token(self, lease: Lease) -> None:
        pass

    def keep(self, lease: Lease, ttl_s: float) -> MirrorState:
        super().check_lease(lease)
        return super().keep(lease, ttl_s)


class NoPrev(SimulatedMirror):
    """Appends wherever it stands."""

    def check_follows(self, batch: Batch) -> None:
        pass


class FillsBackwards(SimulatedMirror):
    """Takes a listing that is older than what it holds."""

    def check_forwards(self, position: Position) -> None:
        pass


# The authority's


class ResumesFromTheHeader(AuthorityStore):
    """Watches from the revision that the authority had when the watch was created."""

    def verify(self, position: Position) -> int:
        return max(super().verify(position), self._world.authority.revision)


class NoOverlap(AuthorityStore):
    """Resumes without comparing the revision that was applied last."""

    def check_history(self, position: Position) -> None:
        pass


class StartsOneAhead(AuthorityStore):
    """Resumes one revision further than asked."""

    def verify(self, position: Position) -> int:
        return super().verify(position) + 1


# The relay's


class NeverLooks(Relay):
    """Keeps its lease, and does not mind what the mirror holds."""

    def _take_kept(self, event: Kept) -> RelayStep:
        return super()._take_kept(Kept(event.now_s, replace(event.state, position=self._copy.position)))

    def _take_refusal(self, event: Refused) -> RelayStep:
        is_elsewhere = isinstance(event.error, Compacted) and self._lease is not None
        return self._go_on(event.now_s) if is_elsewhere else super()._take_refusal(event)


class AppendsAfterAGap(Relay):
    """Adds the last of what came, without what was before it."""

    def _append(self, lease: Lease, first: tuple[Batch, int, int]) -> Append:
        step = super()._append(lease, first)
        return Append(lease, step.batches[-1:], step.counts[-1:])


class IgnoresWhereTheMirrorStands(Relay):
    """Begins with a listing, whatever the mirror holds."""

    def _take_inspection(self, event: Inspected) -> RelayStep:
        return super()._take_inspection(replace(event, position=Position("", 0)))


class GoesOnDeposed(Relay):
    """Takes a lost lease for a passing trouble."""

    def _take_refusal(self, event: Refused) -> RelayStep:
        return super()._take_refusal(event) if self._lease is None else self._go_on(event.now_s)


# The tiers'


class NeverComesBack(Tiers):
    """Stays at the authority."""

    def _well(self, now_s: float) -> None:
        pass


class NeverLeavesAStaleMirror(Tiers):
    """Follows a mirror that nobody feeds."""

    def _judged(self, state: MirrorState, sent_at_s: float, *, alone: bool) -> tuple[str, str, float]:
        return super()._judged(replace(state, age_s=min(state.age_s, 1.0)), sent_at_s, alone=alone)


class BelievesAMirrorThatIsBehind(Tiers):
    """Takes whatever revision the mirror has."""

    def refuses(self, state: MirrorState, *, sent_at_s: float) -> str:
        why = super().refuses(state, sent_at_s=sent_at_s)
        return "" if "behind" in why else why


class BelievesALeftIncarnation(Tiers):
    """Takes whatever history the mirror has."""

    def refuses(self, state: MirrorState, *, sent_at_s: float) -> str:
        why = super().refuses(state, sent_at_s=sent_at_s)
        return "" if "left" in why else why


class KeepsItsFloor(Tiers):
    """Holds on to the highest revision it saw, after the authority itself showed a lower one."""

    def learned(self, position: Position, *, known_s: float) -> None:
        floor = self._floor
        if floor is None or floor.incarnation != position.incarnation or floor.revision <= position.revision:
            super().learned(position, known_s=known_s)


def with_tiers(kind: type[Tiers]) -> type[MirroredStore]:
    class Store(MirroredStore):
        def _new_tiers(self) -> Tiers:
            return kind(random=self._random)

    return Store


# The mirrored store's


def vouching_for_all(kind: type[Tiers]) -> type[MirroredStore]:
    """With the other defence off: the authority is not asked whose incarnation a mirror holds."""

    class Credulous(with_tiers(kind)):  # type: ignore[misc]
        def _is_vouched_for(self, position: Position, *, alone: bool) -> tuple[bool, str]:
            return True, ""

    return Credulous


class IgnoresTheRelaysAge(MirroredStore):
    """Counts the age from when the mirror was asked."""

    def confirm(self, position: Position, *, timeout_s: float) -> Confirmation:
        return replace(super().confirm(position, timeout_s=timeout_s), age_s=0.0)


class ListsAsIfItWereNew(MirroredStore):
    """Takes what the mirror holds for what the authority has now."""

    def list(self, *, timeout_s: float) -> Listing:
        return replace(super().list(timeout_s=timeout_s), age_s=0.0)


class ConfirmsByNumber(MirroredStore):
    """Takes the mirror's revision for its own, whatever the fingerprint."""

    def watch(self, position: Position, *, timeout_s: float) -> Watch:
        return super().watch(self._adopted(position), timeout_s=timeout_s)

    def confirm(self, position: Position, *, timeout_s: float) -> Confirmation:
        return super().confirm(self._adopted(position), timeout_s=timeout_s)

    def _adopted(self, position: Position) -> Position:
        held = self._tiers.mirror
        if held is None or (held.position.incarnation, held.position.revision) != (
            position.incarnation,
            position.revision,
        ):
            return position
        return held.position


# The replica's


class NoGapCheck(Replica):
    """Applies what comes, whatever it follows on."""

    def _take_batches(self, event: Received) -> Step:
        position, batches = self._position, []
        assert position is not None
        previous = position.revision
        for batch in event.batches:
            batches.append(replace(batch, previous=previous))
            previous = batch.position.revision
        return super()._take_batches(Received(event.now_s, batches))


class KnowsValuesByRevision(Keyspace):
    """Takes a value of a revision that it knows for the value it knows."""

    def restore(self, listing: Listing, *, incarnation: str, origin: str, proved_at_s: float) -> None:
        before = self.snapshot
        super().restore(listing, incarnation=incarnation, origin=origin, proved_at_s=proved_at_s)
        if before.incarnation != incarnation:
            return
        known: dict[str, tuple[object, int]] = {}
        for key, value, revision in before._entries.items():
            item = self.snapshot._entries.item(key)
            if item is not None and item[2] == revision:
                known[key] = value, revision
        self._serve(known)  # type: ignore[arg-type]


# What shows a defect that a schedule of all faults shows too seldom.
OF_RESTORES: list[Fault] = [
    faults.restore,
    faults.restore_twice,
    faults.restore_to_the_same_revision,
    faults.flush_the_mirror,
    faults.evict_the_hash,
    faults.dump_the_mirror,
    faults.put_back_a_dump,
    faults.kill_a_relay,
    faults.start_relays,
    faults.pause_a_worker,
    faults.half_open,
]
OF_DUMPS: list[Fault] = [
    faults.dump_the_mirror,
    faults.put_back_a_dump,
    faults.kill_a_relay,
    faults.start_relays,
    faults.lose_connections,
    faults.half_open,
]

MUTANTS: dict[str, Kinds] = {
    "a deposed relay may write": Kinds(mirror=NoFencing, relay=GoesOnDeposed),
    "the mirror appends wherever it stands": Kinds(mirror=NoPrev),
    "the mirror is filled backwards": Kinds(mirror=FillsBackwards, relay=IgnoresWhereTheMirrorStands),
    "a watch resumes from the created header": Kinds(authority=ResumesFromTheHeader, replica=NoGapCheck),
    "a watch resumes without an overlap": Kinds(authority=NoOverlap),
    "a watch on the other tier resumes one revision ahead": Kinds(authority=StartsOneAhead, replica=NoGapCheck),
    "the relay asks the mirror's clock after the authority": Kinds(asks_the_clock_late=True),
    "the relay does not notice an emptied mirror": Kinds(relay=NeverLooks),
    "the relay appends after a gap": Kinds(relay=AppendsAfterAGap, mirror=NoPrev),
    "a worker does not come back to the mirror": Kinds(store=with_tiers(NeverComesBack)),
    "a worker stays with a mirror that nobody feeds": Kinds(store=with_tiers(NeverLeavesAStaleMirror)),
    "a worker believes a mirror that is behind": Kinds(store=with_tiers(BelievesAMirrorThatIsBehind)),
    "a worker believes a mirror of a left incarnation": Kinds(store=vouching_for_all(BelievesALeftIncarnation)),
    "a worker holds on to a revision that was restored away": Kinds(store=with_tiers(KeepsItsFloor)),
    "a worker ages from asking the mirror": Kinds(store=IgnoresTheRelaysAge),
    "a worker takes the mirror's listing for new": Kinds(store=ListsAsIfItWereNew),
    "a worker ignores the mirror's fingerprint": Kinds(store=ConfirmsByNumber),
    "a worker knows values by their revision": Kinds(keyspace=KnowsValuesByRevision),
}


FOCUS: dict[str, list[Fault]] = {
    "a worker believes a mirror that is behind": OF_DUMPS,
    "a worker believes a mirror of a left incarnation": OF_RESTORES,
    "a worker holds on to a revision that was restored away": OF_RESTORES,
    "a worker knows values by their revision": OF_RESTORES,
    "a worker ignores the mirror's fingerprint": OF_RESTORES,
}


@cache
def seed_that_catches(mutant: str) -> int | None:
    """The first seed whose schedule shows the defect."""
    for seed in MUTANT_SEEDS:
        try:
            drive(made(seed, kinds=MUTANTS[mutant]), Random(seed), steps=STEPS, faults=FOCUS.get(mutant, FAULTS))
        except AssertionError:
            return seed
    return None


@pytest.mark.parametrize("focus", [OF_RESTORES, OF_DUMPS])
def test_the_cluster_itself_passes_what_is_focused_on(focus: list[Fault]) -> None:
    for seed in range(60):
        drive(made(seed), Random(seed), steps=STEPS, faults=focus)


def test_the_cluster_itself_passes_every_seed() -> None:
    for seed in SEEDS:
        drive(made(seed), Random(seed), steps=STEPS)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_cluster_with_a_defect_is_caught(mutant: str) -> None:
    assert seed_that_catches(mutant) is not None, f"{len(MUTANT_SEEDS)} seeds do not show that {mutant}"


def test_every_mutant_is_caught_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    of_the_cluster = [seed_that_catches(mutant) is not None for mutant in MUTANTS]
    of_the_replica = [test_mutants.is_caught(mutant) for mutant in test_mutants.MUTANTS]
    outcomes = of_the_cluster + of_the_replica
    with capsys.disabled():
        print(f"\n{len(outcomes)} mutants, {sum(outcomes)} caught")
    assert all(outcomes)
    assert len(outcomes) >= 20
