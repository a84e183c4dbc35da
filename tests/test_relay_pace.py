"""The relay's pace: how it takes a mirror that was damaged while it waits to list."""

from __future__ import annotations

from random import Random

from veltrix_mw.protocols import Lease, MirrorState, Position
from veltrix_mw.relay import Elected, Follow, Followed, Inspected, Keep, Kept, Relay, Resign, Rested
from veltrix_mw.replica import List, Sleep, Slept

AT = Position("label", 1, "mark")
EMPTIED = MirrorState(Position("", 0))


def _leading(seed: int) -> Relay:
    """A relay that was elected, and whose mirror is whole."""
    relay = Relay(random=Random(seed))
    relay.handle(Rested(0.0))
    relay.handle(Elected(0.0, Lease("relay", 1), "relay", 5.0))
    relay.handle(Inspected(0.0, MirrorState(AT, 1, age_s=1.0, relay="relay"), AT, {"a": 1}))
    return relay


def test_a_relay_that_waits_to_list_does_not_resign_over_the_mirror_that_the_list_will_fill() -> None:
    for seed in range(100):
        relay = _leading(seed)
        replica = relay._replica
        assert replica is not None
        replica._relists = 6  # it listed often of late, and waits the longest
        now_s, step = 0.0, relay.handle(Kept(0.0, EMPTIED)).step
        waits = 0
        while not (isinstance(step, Follow) and isinstance(step.step, List)):
            assert not isinstance(step, Resign)
            waits += 1
            assert waits < 20
            if isinstance(step, Keep):
                step = relay.handle(Kept(now_s, EMPTIED)).step
                continue
            assert isinstance(step, Follow)
            assert isinstance(step.step, Sleep)
            now_s += step.step.delay_s
            step = relay.handle(Followed(Slept(now_s))).step


def test_a_relay_lists_anew_within_a_fifth_of_a_second_the_first_time() -> None:
    for seed in range(100):
        relay = _leading(seed)
        step = relay.handle(Kept(0.0, EMPTIED)).step
        assert isinstance(step, Follow)
        assert isinstance(step.step, Sleep)
        assert step.step.delay_s <= 0.2
