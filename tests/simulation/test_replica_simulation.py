"""The replica against everything that an authority and a network do to it, in any order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.simulation.world import MISSING, World

KEYS = st.sampled_from(["a", "b", "c/d", "c/e"])
CHANGES = st.dictionaries(
    KEYS, st.one_of(st.just(MISSING), st.integers(0, 9).map(lambda number: b"%d" % number)), min_size=1, max_size=3
)


class Faults(RuleBasedStateMachine):
    """Writes, compaction, backups and restores, lost and half-open connections, repeated messages."""

    @initialize(seed=st.integers(0, 1000), may_write=st.booleans())
    def begin(self, seed: int, may_write: bool) -> None:
        self.world = World(seed=seed, may_write=may_write)
        self.backups = [self.world.authority.backup()]

    @rule(changes=CHANGES)
    def write(self, changes: dict) -> None:
        self.world.authority.write(changes)

    @rule(changes=CHANGES)
    def write_while_the_next_answer_is_under_way(self, changes: dict) -> None:
        self.world.meanwhile = lambda: self.world.authority.write(changes)

    @rule()
    def compact(self) -> None:
        self.world.authority.compact()

    @rule()
    def take_backup(self) -> None:
        self.backups.append(self.world.authority.backup())

    @rule(data=st.data(), changes=st.lists(CHANGES, max_size=4))
    def restore(self, data: st.DataObject, changes: list) -> None:
        """A backup is put back, and written on before anybody looks; perhaps beyond the revision it had before."""
        self.world.authority.restore(data.draw(st.sampled_from(self.backups)))
        for change in changes:
            self.world.authority.write(change)

    @rule(seconds=st.floats(0, 30))
    def pass_time(self, seconds: float) -> None:
        self.world.authority.clock_s += seconds

    @rule()
    def lose_connection(self) -> None:
        self.world.watch = None

    @precondition(lambda self: self.world.watch is not None)
    @rule()
    def half_open(self) -> None:
        self.world.half_open = True

    @rule(broken=st.booleans())
    def break_or_heal(self, broken: bool) -> None:
        self.world.broken = broken

    @rule(repeat=st.booleans())
    def repeat_messages(self, repeat: bool) -> None:
        self.world.repeat = repeat

    @rule(saved=st.booleans())
    def restart_the_process(self, saved: bool) -> None:
        """A new process begins, with the last-known-good of the one before or with nothing."""
        self.world.restart(saved=saved)

    @rule()
    def fork(self) -> None:
        self.world.fork()

    @rule(turns=st.integers(1, 12))
    def follow(self, turns: int) -> None:
        for _ in range(turns):
            self.world.turn()
            self.world.check()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


Faults.TestCase.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
TestFaults = Faults.TestCase
