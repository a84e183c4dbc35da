"""The replica against everything that an authority and a network do to it, in any order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.simulation.world import MISSING, World
from veltrix_mw.errors import StoreUnavailable
from veltrix_mw.replica import Confirm, Confirmed, Failed, Next, Notice, OpenWatch

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


# Confirmations that fail, while the watch goes on


def to_confirm(world: World) -> None:
    while not isinstance(world.step, Confirm):
        world.turn()


def unconfirmed(world: World) -> tuple[Notice, ...]:
    """The next confirmation fails; what is told then."""
    to_confirm(world)
    decision = world.decide(Failed(world.now_s, StoreUnavailable("no answer")))
    return decision.notices


def test_confirmations_that_fail_are_told_once_until_one_succeeds() -> None:
    world = World()
    for _ in range(2):
        notices = [notice for _ in range(10) for notice in unconfirmed(world)]
        assert [(notice.event, notice.level) for notice in notices] == [("veltrix.confirm_failed", "warning")]
        assert notices[0].fields == {"reason": "no answer", "error": "StoreUnavailable"}
        to_confirm(world)
        world.turn()
        assert world.replica.error is None
        assert world.replica.state == "following"


def test_the_error_stays_visible_until_a_confirmation_succeeds() -> None:
    world = World()
    unconfirmed(world)
    for number in range(5):
        world.authority.write({"a": b"%d" % number})
        while not isinstance(world.step, Confirm):
            assert str(world.replica.error) == "no answer"
            assert world.replica.state in {"waiting", "listing"}
            if isinstance(world.step, Next):
                assert world.replica.state == "waiting"
            world.turn()
        assert world.replica.state == "waiting"
        unconfirmed(world)
    assert world.replica.snapshot["a"] == 4


def test_each_third_failing_confirmation_in_a_row_opens_the_watch_anew() -> None:
    world = World()
    to_confirm(world)
    before = world.replica.reconnects
    opened = []
    for _ in range(6):
        unconfirmed(world)
        opened.append(isinstance(world.step, OpenWatch))
    assert opened == [False, False, True, False, False, True]
    assert world.replica.reconnects == before + 2
    to_confirm(world)
    world.turn()
    unconfirmed(world)
    unconfirmed(world)
    assert not isinstance(world.step, OpenWatch)


def test_failing_confirmations_are_asked_for_at_growing_random_distances_of_at_most_5_seconds() -> None:
    delays: list[list[float]] = [[] for _ in range(12)]
    for seed in range(200):
        world = World(seed=seed)
        for drawn in delays:
            unconfirmed(world)
            drawn.append(world.replica._confirm_at_s - world.now_s)
    for number, drawn in enumerate(delays):
        most_s = min(5.0, 2.0**number)
        assert 0.9 * most_s < max(drawn) <= most_s
        assert 0 <= min(drawn) < 0.1 * most_s


# How often it is asked, by what an answer costs


def interval_s(world: World, *, cost_s: float, **told: Any) -> float:
    """Confirm, the answer taking `cost_s`; in how long it is to be asked again."""
    to_confirm(world)
    sent_s = world.now_s
    world.authority.clock_s += cost_s
    confirmation = replace(world.authority.confirm(world.authority.position()), **told)
    world.decide(Confirmed(world.now_s, sent_s, confirmation))
    return world.replica._confirm_at_s - world.now_s


def test_a_dear_confirmation_is_asked_for_seldom_once_three_were_dear() -> None:
    world = World()
    assert [interval_s(world, cost_s=1) <= 5 for _ in range(2)] == [True, True]
    assert 160 <= interval_s(world, cost_s=1) <= 200
    assert interval_s(world, cost_s=0.001) <= 5


def test_what_a_mirror_takes_to_answer_is_no_cost() -> None:
    world = World()
    assert all(interval_s(world, cost_s=1, age_s=2.0) <= 5 for _ in range(5))
