"""The simulation's worth: replicas with one defect each, and every one must be caught."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest

from tests.simulation.world import MISSING, World
from veltrix_mw.protocols import Position
from veltrix_mw.replica import Confirmed, Failed, Listed, Next, OpenWatch, Received, Replica, Step

KEYS = ["a", "b", "c/d", "c/e"]


def drive(world: World, random: Random, *, steps: int) -> None:
    """A random schedule of the same faults as the stateful test; the seed repeats it."""
    authority = world.authority
    backups = [authority.backup()]
    for _ in range(steps):
        match random.choice(
            ["write"] * 4
            + ["turn"] * 8
            + ["compact", "backup", "restore", "pass", "lose", "half", "break", "heal", "repeat", "fork", "meanwhile"]
        ):
            case "write":
                keys = random.sample(KEYS, random.randint(1, 3))
                authority.write({key: random.choice([MISSING, b"%d" % random.randint(0, 9)]) for key in keys})
            case "meanwhile":
                world.meanwhile = lambda: authority.write({"a": b"%d" % random.randint(0, 9)})
            case "compact":
                authority.compact()
            case "backup":
                backups.append(authority.backup())
            case "restore" if random.random() < 0.3:
                authority.restore(random.choice(backups))
                for _ in range(random.randint(0, 3)):
                    authority.write({random.choice(KEYS): b"%d" % random.randint(0, 9)})
            case "pass":
                authority.clock_s += random.uniform(0, 30)
            case "lose":
                world.watch = None
            case "half":
                world.half_open = True
            case "break":
                world.broken = True
            case "heal":
                world.broken = False
            case "repeat":
                world.repeat = not world.repeat
            case "fork":
                world.fork()
            case _:
                world.turn()
        world.check()
    world.settle()


class ResumesAnywhere(Replica):
    """Watches on from one revision further than it applied."""

    def _open_watch(self) -> Step:
        step = super()._open_watch()
        assert isinstance(step, OpenWatch)
        position = step.position
        return OpenWatch(Position(position.incarnation, position.revision + 1, position.fingerprint))


class IgnoresCompaction(Replica):
    """Watches on after a compaction, without a list."""

    def _list_anew(self, reason: str) -> Step:
        return Next(1.0)


class AppliesTwice(Replica):
    """Takes a message that came twice for news: goes back to its revision."""

    def _take_batches(self, event: Received) -> Step:
        for batch in event.batches:
            assert self._position is not None
            if batch.position.revision <= self._position.revision:
                self._keyspace.apply(batch)
        return super()._take_batches(event)


class IgnoresRestores(Replica):
    """Takes a listing of a lower revision under the same label."""

    def _is_restore(self, found: Position, position: Position) -> bool:
        return False


class ForgetsLabels(Replica):
    """Does not know a label that a backup brought back."""

    def _is_restore(self, found: Position, position: Position) -> bool:
        self._left.clear()
        return super()._is_restore(found, position)


class AgesFromArrival(Replica):
    """Counts the age from when the answer came, not from when the question went."""

    def _take_listing(self, event: Listed) -> Step:
        return super()._take_listing(Listed(event.now_s, event.now_s, event.listing))

    def _take_confirmation(self, event: Confirmed) -> Step:
        return super()._take_confirmation(Confirmed(event.now_s, event.now_s, event.confirmation))


class BelievesAnyConfirmation(Replica):
    """Takes every answer of the authority for a proof of what it serves."""

    def _take_confirmation(self, event: Confirmed) -> Step:
        self.snapshot._proof.at_s = event.sent_at_s
        return super()._take_confirmation(event)


class BelievesTheWatch(Replica):
    """Takes a quiet watch for a proof."""

    def _take_batches(self, event: Received) -> Step:
        step = super()._take_batches(event)
        self.snapshot._proof.at_s = event.now_s
        return step


class TrustsADeadWatch(Replica):
    """Never opens a watch anew that does not bring what the authority has."""

    def _take_confirmation(self, event: Confirmed) -> Step:
        step = super()._take_confirmation(event)
        self._expected = None
        return step


class NeverConfirms(Replica):
    """Relies on the watch alone."""

    def _confirm_next(self, now_s: float) -> None:
        self._confirm_at_s = float("inf")

    def _follow(self, now_s: float, *, moved: bool = False) -> Step:
        self._confirm_at_s = now_s + 60
        return super()._follow(now_s, moved=moved)


class SkipsTheGap(Replica):
    """Applies only the last of the revisions that came at once."""

    def _take_batches(self, event: Received) -> Step:
        if len(event.batches) > 1:
            last = event.batches[-1]
            assert self._position is not None
            self._position = Position(self._position.incarnation, last.previous, "")
            return super()._take_batches(Received(event.now_s, [last]))
        return super()._take_batches(event)


class TakesRestoredForCompacted(Replica):
    """Lists after a restore without a new incarnation."""

    def _after_failure(self, event: Failed) -> Step:
        if not isinstance(self._step, (Next, OpenWatch)):
            return super()._after_failure(event)
        self._take_any = True
        return self._list_anew("restored")

    def _is_restore(self, found: Position, position: Position) -> bool:
        return False


MUTANTS = [
    ResumesAnywhere,
    IgnoresCompaction,
    AppliesTwice,
    IgnoresRestores,
    ForgetsLabels,
    AgesFromArrival,
    BelievesAnyConfirmation,
    BelievesTheWatch,
    TrustsADeadWatch,
    NeverConfirms,
    SkipsTheGap,
    TakesRestoredForCompacted,
]
SEEDS = range(60)


def test_the_replica_itself_passes_every_seed() -> None:
    for seed in SEEDS:
        drive(World(seed=seed, may_write=seed % 4 != 0), Random(seed), steps=150)


@cache
def is_caught(mutant: type[Replica]) -> bool:
    for seed in SEEDS:
        try:
            drive(World(seed=seed, may_write=seed % 4 != 0, kind=mutant), Random(seed), steps=150)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_replica_with_a_defect_is_caught(mutant: type[Replica]) -> None:
    assert is_caught(mutant), f"{mutant.__name__} passed {len(SEEDS)} seeds: the simulation does not see this defect"
