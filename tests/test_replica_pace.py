"""The replica's pace: how far apart it confirms, and how long it gives a watch that lags."""

from __future__ import annotations

from random import Random

from veltrix_mw.keyspace import Keyspace
from veltrix_mw.protocols import Confirmation, Listing, Position
from veltrix_mw.replica import (
    GRACE_MOST_S,
    GRACE_S,
    Begun,
    Confirm,
    Confirmed,
    Listed,
    Next,
    OpenWatch,
    Received,
    Replica,
    Watching,
)
from veltrix_mw.validation import Schemas

AT = Position("label", 1, "mark")


def _following() -> Replica:
    replica = Replica(Keyspace(Schemas({}, layers=(), defaults={})), origin="etcd", random=Random(1))
    replica.handle(Begun(0.0))
    replica.handle(Listed(0.0, 0.0, Listing(AT, [("a", b"1", 1)])))
    replica.handle(Watching(0.0))
    return replica


def test_members_that_were_tried_in_vain_put_no_confirmation_off() -> None:
    replica = _following()
    for number in range(1, 5):
        now_s = 10.0 * number
        confirmation = Confirmation("label", 1, 1, cost_s=0.003)
        step = replica.handle(Confirmed(now_s, now_s - 1.0, confirmation)).step
        assert isinstance(step, Next)
        assert step.timeout_s <= 5.0


def test_a_confirmation_that_is_dear_to_the_server_is_asked_for_less_often() -> None:
    replica = _following()
    for number in range(1, 4):
        now_s = 1_000.0 * number
        step = replica.handle(Confirmed(now_s, now_s - 0.1, Confirmation("label", 1, 1, cost_s=0.1))).step
    assert isinstance(step, Next)
    assert 16.0 <= step.timeout_s <= 20.0


def test_a_watch_that_is_opened_anew_in_vain_gets_twice_the_time() -> None:
    """What it is to bring may be huge: asked for anew each second it would never come."""
    replica = _following()
    now_s, graces = 10.0, []
    newer = Confirmation("label", 2, 1, cost_s=0.003)
    for _ in range(5):
        now_s = begun_s = now_s + 10.0
        step = replica.handle(Confirmed(now_s, now_s, newer)).step
        while not isinstance(step, OpenWatch):
            if isinstance(step, Confirm):
                step = replica.handle(Confirmed(now_s, now_s, newer)).step
            else:
                assert isinstance(step, Next)
                now_s += step.timeout_s
                step = replica.handle(Received(now_s, [])).step
        graces.append(round(now_s - begun_s, 6))
        replica.handle(Watching(now_s))
    assert graces == [GRACE_S, 2 * GRACE_S, 4 * GRACE_S, GRACE_MOST_S, GRACE_MOST_S]
