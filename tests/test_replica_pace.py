"""The replica's pace: how far apart it confirms, and how long it gives a watch that lags."""

from __future__ import annotations

import math
from random import Random

import pytest

from veltrix_mw.errors import AuthFailed, Compacted
from veltrix_mw.keyspace import Keyspace
from veltrix_mw.protocols import Batch, Confirmation, Listing, NotPermitted, Position, RawChange, Restored
from veltrix_mw.replica import (
    BACKOFF_MOST_S,
    GRACE_MOST_S,
    GRACE_S,
    RELIST_WITHIN_S,
    Begun,
    Confirm,
    Confirmed,
    Failed,
    List,
    Listed,
    Next,
    OpenWatch,
    Received,
    Renew,
    Renewed,
    Replica,
    Sleep,
    Slept,
    Watching,
)
from veltrix_mw.validation import Schemas

AT = Position("label", 1, "mark")


def _following(seed: int = 1) -> Replica:
    replica = Replica(Keyspace(Schemas({}, layers=(), defaults={})), origin="etcd", random=Random(seed))
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


def _changed(revision: int, *keys: str) -> Batch:
    changes = tuple(RawChange(key, b"2") for key in keys)
    return Batch(Position("label", revision, "mark"), revision - 1, changes)


def test_a_namespace_that_is_written_all_the_time_is_confirmed_all_the_same() -> None:
    """Each confirmation finds something newer; once that is applied, the moment of the question is proved."""
    replica = _following()
    replica.handle(Confirmed(20.0, 19.0, Confirmation("label", 3, 1)))
    assert replica.snapshot._proof.at_s == 0.0
    replica.handle(Received(20.1, [_changed(2, "a")]))
    assert replica.snapshot._proof.at_s == 0.0, "the third revision is not here yet"
    replica.handle(Received(20.2, [_changed(3, "a"), _changed(4, "b")]))
    assert replica.snapshot._proof.at_s == 19.0, "from the sending of the question"


def test_what_a_confirmation_found_must_add_up_when_it_comes() -> None:
    replica = _following()
    replica.handle(Confirmed(20.0, 19.0, Confirmation("label", 2, 7)))
    assert isinstance(replica.handle(Received(20.1, [_changed(2, "b")])).step, Sleep)
    assert isinstance(replica.handle(Slept(20.6)).step, List)


def test_a_fleet_that_must_list_anew_does_so_spread_and_less_and_less_often_until_a_list_is_proved() -> None:
    def patience_s(replica: Replica) -> float:
        step = replica.handle(Failed(20.0, Compacted("compacted"))).step
        assert isinstance(step, Sleep)
        assert isinstance(replica.handle(Slept(20.0)).step, List)
        replica.handle(Listed(20.0, 20.0, Listing(AT, [("a", b"1", 1)])))
        replica.handle(Watching(20.0))
        return step.delay_s

    fleet = [_following(seed) for seed in range(200)]
    for most_s in (RELIST_WITHIN_S, 2 * RELIST_WITHIN_S, 4 * RELIST_WITHIN_S, BACKOFF_MOST_S, BACKOFF_MOST_S):
        spread = [patience_s(replica) for replica in fleet]
        assert min(spread) < 0.1 * most_s
        assert 0.9 * most_s < max(spread) <= most_s
    for replica in fleet:
        replica.handle(Confirmed(30.0, 30.0, Confirmation("label", 1, 1)))
    assert max(patience_s(replica) for replica in fleet) <= RELIST_WITHIN_S


def test_what_lists_for_the_first_time_lists_at_once() -> None:
    replica = Replica(Keyspace(Schemas({}, layers=(), defaults={})), origin="etcd", random=Random(1))
    assert isinstance(replica.handle(Begun(0.0)).step, List)
    replica.handle(Listed(0.0, 0.0, Listing(Position("", 0), [])))
    replica.handle(Watching(0.0))
    assert isinstance(replica.handle(Failed(1.0, Compacted("the first write"))).step, List)


def test_a_start_lists_at_once_also_where_what_was_saved_is_of_a_history_that_is_gone() -> None:
    replica = Replica(Keyspace(Schemas({}, layers=(), defaults={})), origin="etcd", random=Random(1))
    replica.handle(Begun(0.0, (AT, [("a", b"1", 1)])))
    assert isinstance(replica.handle(Failed(0.0, Restored("a backup"))).step, Renew)
    assert isinstance(replica.handle(Renewed(0.0, "another")).step, List)


@pytest.mark.parametrize("error", [None, AuthFailed("may not write")])
def test_a_fleet_whose_authority_was_restored_lists_anew_spread(error: AuthFailed | None) -> None:
    delays = []
    for seed in range(200):
        replica = _following(seed)
        assert isinstance(replica.handle(Failed(20.0, Restored("a backup"))).step, Renew)
        event = Renewed(20.0, "another") if error is None else Failed(20.0, error, own_label="own")
        step = replica.handle(event).step
        assert isinstance(step, Sleep)
        delays.append(step.delay_s)
    assert min(delays) < 0.1 * RELIST_WITHIN_S
    assert 0.9 * RELIST_WITHIN_S < max(delays) <= RELIST_WITHIN_S


def test_lists_that_bring_something_new_each_time_stay_within_two_seconds() -> None:
    """So a revision that can only be listed does not make `wait_for` miss its time."""
    for seed in range(50):
        replica = _following(seed)
        for revision in range(2, 12):
            step = replica.handle(Failed(20.0, Compacted("it can only be listed"))).step
            assert isinstance(step, Sleep)
            assert step.delay_s <= 2 * RELIST_WITHIN_S
            replica.handle(Slept(20.0))
            replica.handle(Listed(20.0, 20.0, Listing(Position("label", revision, "mark"), [("a", b"1", revision)])))
            replica.handle(Watching(20.0))


def test_what_an_old_proof_says_makes_no_list_any_more_welcome() -> None:
    replica = _following()
    for number in range(10):
        now_s = 20.0 + number
        step = replica.handle(Failed(now_s, Compacted("damaged"))).step
        assert isinstance(step, Sleep)
        replica.handle(Slept(now_s))
        replica.handle(Listed(now_s, now_s, Listing(AT, [("a", b"1", 1)])))
        replica.handle(Watching(now_s))
        replica.handle(Confirmed(now_s, now_s, Confirmation("label", 1, 1, age_s=math.inf)))
    assert replica._relists == 10


def test_a_listing_that_cannot_be_taken_is_asked_for_less_and_less_often_and_told_once() -> None:
    replica = Replica(Keyspace(Schemas({}, layers=(), defaults={})), origin="etcd", random=Random(1))
    replica._keyspace._max_entries = 1
    replica.handle(Begun(0.0))
    too_many = Listing(AT, [("a", b"1", 1), ("b", b"1", 1)])
    delays, told = [], 0
    for number in range(40):
        decision = replica.handle(Listed(float(number), float(number), too_many))
        assert isinstance(decision.step, Sleep)
        delays.append(decision.step.delay_s)
        told += sum(notice.event == "veltrix.store_failed" for notice in decision.notices)
        assert isinstance(replica.handle(Slept(float(number))).step, List)
    assert max(delays) > BACKOFF_MOST_S / 2
    assert told == 1
    replica.handle(Listed(50.0, 50.0, Listing(AT, [("a", b"1", 1)])))
    assert isinstance(replica.handle(Watching(50.0)).step, Next)


def test_what_is_told_of_a_failure_names_the_public_error() -> None:
    replica = _following()
    notices = replica.handle(Failed(20.0, NotPermitted("not for this user"))).notices
    assert [notice.fields["error"] for notice in notices] == ["AuthFailed"]
