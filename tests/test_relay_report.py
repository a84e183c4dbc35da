"""What a relay reports: each turn once, and nothing that it does not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from veltrix_mw.errors import AuthFailed, Compacted, LeaseLost, StoreUnavailable, VeltrixError
from veltrix_mw.protocols import CertificateFault, Lease, Listing, MirrorState, Position
from veltrix_mw.relay import (
    Elected,
    Fill,
    Followed,
    Inspected,
    Keep,
    Kept,
    Look,
    Looked,
    Refused,
    Relay,
    RelayDecision,
    RelayEvent,
    Rest,
    Rested,
    Written,
)
from veltrix_mw.relay_report import ReportingRelay
from veltrix_mw.replica import Failed, Listed, Renewed

LEASE = Lease("me", 1)
EMPTY = Position("", 0)
HERE = Position("life", 3, "mark")


class Observed:
    """A relay under way, and what it has reported."""

    def __init__(self, *, lazy: tuple[str, ...] = ()) -> None:
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self.relay = ReportingRelay(lambda event, fields: self.told.append((event, fields)), lazy=lazy)
        self.now_s = 0.0

    def hear(self, *events: RelayEvent) -> RelayDecision:
        for event in events:
            decision = self.relay.handle(event)
        return decision

    @property
    def names(self) -> list[str]:
        return [event for event, _ in self.told]

    def elect(self, mirror: Position = EMPTY, *, lazy: tuple[str, ...] = (), stands: Position | None = None) -> None:
        """Elected, over a mirror that stands there, and adds up to `stands`."""
        state = MirrorState(mirror, lazy=lazy)
        self.hear(
            Rested(0.0), Elected(0.0, LEASE, "me", 5.0), Inspected(0.0, state, mirror if stands is None else stands, {})
        )

    def fill(self) -> None:
        """List the authority, and write all of it."""
        decision = self.hear(Followed(Listed(0.1, 0.1, Listing(HERE, [("a", b"1", 2), ("b", b"2", 3)]))))
        assert isinstance(decision.step, Fill)
        self.hear(Written(0.2))


def away(now_s: float = 0.1, error: VeltrixError | None = None) -> Followed:
    return Followed(Failed(now_s, error or StoreUnavailable("nobody there"), own_label="x"))


def test_a_refill_is_told_when_it_is_written_with_its_reason() -> None:
    observed = Observed()
    observed.elect()
    assert observed.names == ["elected"]
    observed.fill()
    assert observed.told[1:] == [("refilled", {"revision": 3, "entries": 2, "reason": "it was empty"})]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"mirror": HERE, "lazy": ("t/",)}, "it left out t/: other prefixes than this relay's"),
        ({"mirror": HERE, "stands": EMPTY}, "it did not add up"),
    ],
)
def test_why_a_mirror_that_holds_something_is_refilled(found: dict[str, Any], reason: str) -> None:
    observed = Observed()
    observed.elect(**found)
    observed.fill()
    assert observed.told[-1][1]["reason"] == reason


def test_a_refill_that_the_mirror_did_not_take_is_not_told() -> None:
    observed = Observed()
    observed.elect()
    observed.hear(Followed(Listed(0.1, 0.1, Listing(HERE, []))), Refused(0.2, StoreUnavailable("gone")))
    observed.hear(Rested(1.0), Elected(1.0, None, "other", 5.0))
    assert observed.names == ["elected", "mirror_failed", "mirror_answers", "standing_by"]
    observed.elect(HERE)
    observed.hear(Written(1.1))  # of something else
    assert observed.names[4:] == ["elected", "resumed"]


def test_a_mirror_that_stands_elsewhere_has_not_failed_and_is_refilled() -> None:
    observed = Observed()
    observed.elect()
    observed.fill()
    observed.hear(Refused(0.3, Compacted("the mirror stands elsewhere")))
    assert observed.names == ["elected", "refilled"]
    observed.fill()
    assert observed.told[2:] == [
        ("refilled", {"revision": 3, "entries": 2, "reason": "the mirror stands elsewhere"}),
    ]


def test_a_mirror_that_lost_what_was_written_is_refilled_for_that_reason() -> None:
    observed = Observed()
    observed.elect()
    observed.fill()
    decision = observed.hear(Kept(2.0, MirrorState(EMPTY)))
    assert not isinstance(decision.step, Keep)
    observed.fill()
    assert observed.names == ["elected", "refilled", "refilled"]
    assert observed.told[-1][1]["reason"] == "the mirror does not hold what was written to it"


def test_going_on_from_what_the_mirror_holds_is_told() -> None:
    observed = Observed()
    observed.elect(HERE)
    assert observed.told == [("elected", {}), ("resumed", {"revision": 3})]


def test_standing_by_is_told_once_for_each_holder() -> None:
    observed = Observed()
    for holder in ("a", "a", "b", "b", "a"):
        observed.hear(Rested(0.0), Elected(0.0, None, holder, 5.0))
    assert [fields["holder"] for _, fields in observed.told] == ["a", "b", "a"]
    observed.elect()
    observed.hear(Refused(0.1, LeaseLost("taken")), Rested(1.0), Elected(1.0, None, "a", 5.0))
    assert observed.names[-3:] == ["elected", "deposed", "standing_by"]


def test_an_authority_that_fails_is_told_once_and_when_it_answers() -> None:
    observed = Observed()
    observed.elect()
    observed.hear(away(), away(0.2), away(0.3, Compacted("list again")))
    assert observed.told[1:] == [("authority_failed", {"reason": "nobody there"})]
    observed.fill()
    assert observed.names[2:] == ["authority_answers", "refilled"]
    observed.hear(away(3.0))
    assert observed.names[4:] == ["authority_failed"]


def test_a_history_that_is_compacted_is_no_failure() -> None:
    observed = Observed()
    observed.elect(HERE)
    observed.hear(away(0.1, Compacted("list again")))
    assert observed.names == ["elected", "resumed"]


def test_resigning_is_told_with_its_reason() -> None:
    observed = Observed()
    observed.elect()
    observed.hear(away(0.1), away(9.0))
    event, fields = observed.told[-1]
    assert event == "resigned"
    assert "nobody there" in fields["reason"]


def test_a_restored_authority_is_told() -> None:
    observed = Observed()
    observed.elect()
    observed.hear(Followed(Renewed(0.1, "new")))
    assert observed.told[-1] == ("restored", {"incarnation": "new"})


def test_credentials_that_were_never_taken_are_refused_and_later_ones_barred() -> None:
    observed = Observed()
    observed.hear(Rested(0.0), Refused(0.0, AuthFailed("NOPERM")))
    assert observed.told == [("refused", {"tier": "mirror", "reason": "NOPERM"})]
    observed = Observed()
    observed.elect()
    observed.hear(Refused(0.1, LeaseLost("taken")), Rested(1.0), Refused(1.0, AuthFailed("NOPERM")))
    assert observed.names == ["elected", "deposed", "barred"]
    observed.hear(Rested(60.0), Refused(60.0, AuthFailed("NOPERM")))
    assert observed.names == ["elected", "deposed", "barred"]


def test_a_certificate_that_is_refused_bars_nobody_as_it_may_be_replaced_at_any_time() -> None:
    observed = Observed()
    observed.elect()
    observed.hear(Refused(0.1, LeaseLost("taken")))
    for tries in range(10):
        step = observed.hear(Rested(60.0 * tries), Refused(60.0 * tries, CertificateFault("expired"))).step
        assert isinstance(step, Rest)
        assert step.delay_s <= 5.0
    assert observed.names == ["elected", "deposed", "mirror_failed"]


def test_so_are_those_of_the_authority() -> None:
    observed = Observed()
    observed.elect()
    observed.hear(away(0.1, AuthFailed("denied")))
    assert observed.told[-1] == ("refused", {"tier": "authority", "reason": "denied"})
    observed = Observed()
    observed.elect()
    observed.fill()
    observed.hear(away(0.3, AuthFailed("denied")))
    assert observed.told[-1] == ("authority_failed", {"reason": "denied"})


def test_who_stands_by_tells_once_that_its_authority_is_away_and_once_that_it_is_back() -> None:
    observed = Observed()
    waiting = Elected(0.0, None, "another", 5.0)
    lost = Looked(0.1, StoreUnavailable("no route"))
    assert isinstance(observed.hear(Rested(0.0), waiting).step, Look)
    assert isinstance(observed.hear(lost).step, Rest)
    assert isinstance(observed.hear(Rested(1.0), Elected(1.0, None, "another", 5.0)).step, Rest)
    assert isinstance(observed.hear(Rested(9.0), Elected(9.0, None, "another", 5.0)).step, Look)
    observed.hear(lost, Looked(9.1), Looked(20.0))
    assert observed.told == [
        ("standing_by", {"holder": "another"}),
        ("authority_failed", {"reason": "no route"}),
        ("authority_answers", {}),
    ]


def test_looking_takes_nothing_off_the_time_to_the_next_election() -> None:
    observed = Observed()
    observed.hear(Rested(0.0), Elected(0.0, None, "another", 5.0))
    assert observed.hear(Looked(3.0)).step == Rest(0.0)


def test_a_worker_that_stands_by_asks_the_authority_nothing() -> None:
    relay = Relay()
    for second in range(100):
        assert isinstance(relay.handle(Elected(second, None, "another", 5.0)).step, Rest)
