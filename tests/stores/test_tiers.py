"""Which tier is followed: pure decisions, so time here is a number."""

from __future__ import annotations

import math
from random import Random

import pytest

from veltrix_mw.protocols import MirrorState, Position
from veltrix_mw.stores.tiers import LEAVE_WITHIN_S, LOOK_MOST_S, RETURN_WITHIN_S, STALE_AFTER_S, Tier, Tiers


def at(revision: int, incarnation: str = "one") -> Position:
    return Position(incarnation, revision, f"mark-{revision}")


def state(
    revision: int = 5, *, incarnation: str = "one", age_s: float = 1.0, lazy: tuple[str, ...] = ()
) -> MirrorState:
    return MirrorState(at(revision, incarnation), lazy=lazy, age_s=age_s)


EMPTY = MirrorState(Position("", 0))


def following(*, revision: int = 5, lazy: tuple[str, ...] = (), seed: int = 0) -> Tiers:
    """Tiers that follow a mirror which is well, at `revision`, at the time 100."""
    tiers = Tiers(lazy=lazy, random=Random(seed))
    tiers.answered(state(revision, lazy=lazy), sent_at_s=100, now_s=100)
    tiers.learned(at(revision), known_s=99)
    assert tiers.choose(100) is Tier.MIRROR
    return tiers


def at_authority(*, revision: int = 5, seed: int = 0) -> Tiers:
    tiers = following(revision=revision, seed=seed)
    tiers.failed("refused", now_s=100)
    assert tiers.choose(100 + LEAVE_WITHIN_S) is Tier.AUTHORITY
    return tiers


def moves_s(tiers: Tiers, now_s: float) -> float:
    return tiers.next_move_s(now_s)


# Leaving the mirror


def test_the_mirror_is_followed_first_and_for_as_long_as_it_is_well() -> None:
    tiers = following()
    for second in range(100, 200):
        tiers.answered(state(), sent_at_s=second, now_s=second)
        assert tiers.choose(second) is Tier.MIRROR
    assert tiers.moves == 0


def test_a_fleet_leaves_an_unreachable_mirror_spread_over_two_seconds() -> None:
    waits = []
    for seed in range(200):
        tiers = following(seed=seed)
        tiers.failed("refused", now_s=100)
        waits.append(moves_s(tiers, 100))
    assert 0 <= min(waits) < 0.1
    assert LEAVE_WITHIN_S - 0.1 < max(waits) <= LEAVE_WITHIN_S


def test_failing_again_does_not_put_off_leaving() -> None:
    tiers = following()
    tiers.failed("refused", now_s=100)
    due_s = 100 + moves_s(tiers, 100)
    for step in range(20):
        tiers.failed("refused", now_s=100 + step / 10)
    assert tiers.choose(due_s) is Tier.AUTHORITY


def test_a_mirror_that_nobody_feeds_is_left_after_ten_seconds_of_its_own_age() -> None:
    tiers = following()
    tiers.answered(state(age_s=STALE_AFTER_S), sent_at_s=100, now_s=100)
    assert not tiers.is_leaving
    tiers.answered(state(age_s=STALE_AFTER_S + 0.1), sent_at_s=101, now_s=101)
    assert tiers.choose(101 + LEAVE_WITHIN_S) is Tier.AUTHORITY
    assert (tiers.fault_kind, tiers.fault) == ("stale", "its relay asked the authority 10 s ago")


@pytest.mark.parametrize(
    ("bad", "kind"), [(EMPTY, "empty"), (state(4), "behind"), (state(4, age_s=math.inf), "behind")]
)
def test_an_emptied_mirror_or_one_that_went_back_gets_the_time_of_a_takeover(bad: MirrorState, kind: str) -> None:
    tiers = following()
    tiers.answered(bad, sent_at_s=100, now_s=100)
    assert tiers.fault_kind == kind
    tiers.answered(bad, sent_at_s=109, now_s=109)
    assert not tiers.is_leaving
    tiers.answered(bad, sent_at_s=110, now_s=110)
    assert tiers.choose(110 + LEAVE_WITHIN_S) is Tier.AUTHORITY


def test_a_mirror_that_is_refilled_in_time_is_not_left() -> None:
    tiers = following()
    tiers.answered(EMPTY, sent_at_s=100, now_s=100)
    tiers.answered(state(6), sent_at_s=103, now_s=103)
    tiers.answered(EMPTY, sent_at_s=111, now_s=111)
    assert not tiers.is_leaving
    assert tiers.choose(111) is Tier.MIRROR


def test_a_mirror_that_leaves_out_what_this_process_reads_is_left() -> None:
    tiers = following(lazy=("tenants/",))
    tiers.answered(state(lazy=("tenants/", "users/")), sent_at_s=100, now_s=100)
    assert tiers.choose(100 + LEAVE_WITHIN_S) is Tier.AUTHORITY
    assert tiers.fault_kind == "uncovered"
    assert "users/" in tiers.fault


def test_a_mirror_that_holds_more_than_this_process_reads_is_followed() -> None:
    tiers = following(lazy=("tenants/", "users/"))
    tiers.answered(state(lazy=("tenants/",)), sent_at_s=100, now_s=100)
    assert not tiers.is_leaving


def test_a_process_that_serves_nothing_yet_does_not_wait() -> None:
    tiers = Tiers(random=Random(0))
    tiers.failed("refused", now_s=0)
    tiers.leave_at_once(0)
    assert tiers.choose(0) is Tier.AUTHORITY


# Coming back


def test_a_fleet_comes_back_to_a_mirror_that_is_well_spread_over_two_seconds() -> None:
    waits = []
    for seed in range(200):
        tiers = at_authority(seed=seed)
        tiers.answered(state(), sent_at_s=110, now_s=110)
        waits.append(moves_s(tiers, 110))
        assert tiers.choose(110 + RETURN_WITHIN_S) is Tier.MIRROR
    assert 0 <= min(waits) < 0.1
    assert RETURN_WITHIN_S - 0.1 < max(waits) <= RETURN_WITHIN_S


@pytest.mark.parametrize(
    "unfit", [EMPTY, state(4), state(age_s=10.1), state(7, incarnation="other", age_s=0), state(lazy=("users/",))]
)
def test_it_does_not_come_back_to_a_mirror_that_is_not_well(unfit: MirrorState) -> None:
    tiers = at_authority()
    tiers.answered(unfit, sent_at_s=110, now_s=110)
    assert tiers.choose(120) is Tier.AUTHORITY


def test_a_mirror_that_fails_while_coming_back_is_not_come_back_to() -> None:
    tiers = at_authority()
    tiers.answered(state(), sent_at_s=110, now_s=110)
    tiers.failed("refused", now_s=110)
    assert tiers.choose(120) is Tier.AUTHORITY


def test_a_mirror_that_does_not_answer_is_looked_at_at_most_every_few_seconds() -> None:
    tiers = at_authority()
    now_s = 110.0
    for _ in range(10):
        tiers.failed("no answer", now_s=now_s)
        assert 1 < tiers.look_in_s(now_s) <= LOOK_MOST_S * 1.2
        now_s += tiers.look_in_s(now_s)
        assert tiers.is_looking_due(now_s)


# What a mirror is not believed


def test_a_mirror_of_an_incarnation_that_was_left_is_refused() -> None:
    tiers = following()
    tiers.learned(at(2, "two"), known_s=101)
    assert "left" in tiers.refuses(state(9, age_s=0), sent_at_s=200)


def test_a_new_incarnation_is_taken_if_the_mirror_heard_of_it_after_this_process_heard_of_the_old_one() -> None:
    tiers = following()
    tiers.learned(at(5), known_s=100)
    fresh = state(2, incarnation="two", age_s=1)
    assert tiers.refuses(fresh, sent_at_s=102) == ""
    assert "left" in tiers.refuses(fresh, sent_at_s=101)


def test_what_this_process_knows_does_not_go_back() -> None:
    tiers = following()
    tiers.learned(at(9), known_s=-math.inf)
    tiers.learned(at(7), known_s=-math.inf)
    assert "behind" in tiers.refuses(state(8), sent_at_s=200)


def test_a_process_that_knows_nothing_takes_what_there_is() -> None:
    tiers = Tiers(random=Random(0))
    assert tiers.refuses(state(1, age_s=math.inf), sent_at_s=0) == ""
    assert "empty" in tiers.refuses(EMPTY, sent_at_s=0)


# A history that was restored


def test_a_mirror_of_a_renamed_incarnation_is_refused_before_anything_of_the_new_one_is_known() -> None:
    tiers = at_authority()
    tiers.answered(state(), sent_at_s=110, now_s=110)
    tiers.renamed("one")
    assert tiers.choose(120) is Tier.AUTHORITY
    assert "left" in tiers.refuses(state(9, age_s=0), sent_at_s=120)
    assert tiers.refuses(state(2, incarnation="two", age_s=0), sent_at_s=120) == ""


def test_what_was_mirrored_before_a_restore_that_cannot_be_renamed_is_refused() -> None:
    tiers = at_authority()
    tiers.answered(state(), sent_at_s=110, now_s=110)
    tiers.doubt("one", now_s=111)
    assert tiers.choose(120) is Tier.AUTHORITY
    assert "left" in tiers.refuses(state(9, age_s=1), sent_at_s=112)
    assert tiers.refuses(state(9, age_s=1), sent_at_s=113) == ""


def test_a_lower_revision_counts_once_the_authority_itself_shows_it() -> None:
    tiers = following(revision=9)
    tiers.learned(at(7), known_s=98)
    assert "behind" in tiers.refuses(state(8), sent_at_s=200)
    tiers.learned(at(7), known_s=110)
    assert tiers.refuses(state(8), sent_at_s=200) == ""


def test_a_mirror_that_was_just_filled_gets_the_time_to_be_proved() -> None:
    tiers = following()
    tiers.answered(state(6, age_s=math.inf), sent_at_s=100, now_s=100)
    assert tiers.fault_kind == "stale"
    assert not tiers.is_leaving
    tiers.answered(state(6, age_s=math.inf), sent_at_s=110, now_s=110)
    assert tiers.choose(110 + LEAVE_WITHIN_S) is Tier.AUTHORITY


def test_a_mirror_that_cannot_be_followed_is_left_and_left_alone_for_a_while_whatever_it_says() -> None:
    tiers = following()
    tiers.shun("its stream is another's", now_s=100)
    assert tiers.choose(100 + LEAVE_WITHIN_S) is Tier.AUTHORITY
    for now_s in (103, 130, 159):
        tiers.answered(state(), sent_at_s=now_s, now_s=now_s)
        assert not tiers.is_leaving
    assert (tiers.fault_kind, tiers.fault) == ("unreachable", "its stream is another's")
    tiers.answered(state(), sent_at_s=161, now_s=161)
    assert tiers.choose(161 + RETURN_WITHIN_S) is Tier.MIRROR
