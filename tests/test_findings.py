"""Findings: the order of checks, and the deadline of each."""

from __future__ import annotations

import time

from veltrix_mw.errors import StoreUnavailable
from veltrix_mw.findings import Said, State, Step, examine, ok


def test_each_check_has_a_deadline_of_its_own() -> None:
    told: list[float] = []

    def ask(by_s: float) -> Said:
        told.append(by_s)
        return ok("")

    before_s = time.monotonic()
    findings = examine("part", [Step("a", ask), Step("b", ask)], timeout_s=60)
    next(findings)
    between_s = time.monotonic()
    next(findings)
    assert before_s + 60 <= told[0] <= between_s + 60 <= told[1]


def test_what_needs_a_check_that_failed_names_the_first_one() -> None:
    def refuse(_by_s: float) -> Said:
        raise StoreUnavailable("away")

    steps = [
        Step("a", refuse),
        Step("b", lambda _: ok(""), needs=("a",)),
        Step("c", lambda _: ok(""), needs=("b",)),
        Step("d", lambda _: ok("")),
    ]
    found = [(each.check, each.state, each.text) for each in examine("part", steps, timeout_s=1)]
    assert found == [
        ("a", State.FAIL, "away"),
        ("b", State.NOT_MADE, "because of a"),
        ("c", State.NOT_MADE, "because of a"),
        ("d", State.OK, ""),
    ]


def test_a_fault_of_a_check_s_own_quotes_nothing() -> None:
    def broken(_by_s: float) -> Said:
        raise ValueError("s3cret")

    (finding,) = examine("part", [Step("a", broken)], timeout_s=1)
    assert finding.state is State.FAIL
    assert "ValueError at test_findings.py" in finding.text
    assert "s3cret" not in finding.text
