"""The checker: what must hold of all that was recorded, whatever was broken meanwhile.

Knows no server and no client.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "Checker", "Publication", "Write"]


@dataclass(frozen=True)
class Answer:
    """One request's answer; sent and received by the machine's monotonic clock."""

    sent_s: float
    received_s: float
    told: dict[str, Any]


@dataclass(frozen=True)
class Publication:
    """What a worker published at `t`."""

    t: float
    incarnation: str
    revision: int
    digest: int
    origin: str
    count: int


@dataclass(frozen=True)
class Write:
    """An acknowledged write."""

    revision: int
    sent_s: float
    acknowledged_s: float


@dataclass
class Checker:
    """Records everything; `check` raises `AssertionError` for each rule that was broken, and names the culprits.

    `restores` is how many incarnations may have come after the first one.
    """

    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    publications: dict[int, list[Publication]] = field(default_factory=lambda: defaultdict(list))
    restores: int = 0

    def published(self, line: dict[str, Any]) -> None:
        if line.pop("taken"):
            self.publications[line.pop("pid")].append(Publication(**line))

    def check(self, log: str) -> None:
        """All rules that hold at any time."""
        assert not self.failures, f"{len(self.failures)} requests failed: {self.failures[:5]}\n{log[-4000:]}"
        self.check_one_revision_a_request()
        self.check_nothing_went_back()
        self.check_answers_are_what_was_published()
        self.check_incarnations()
        self.check_age()
        assert "crashed" not in log, log[-6000:]

    def check_one_revision_a_request(self) -> None:
        for each in self.answers:
            told = each.told
            assert told["revision"] == told["last_revision"] == told["current_revision"], told
            assert told["left"] == told["right"], f"half a transaction: {told}"

    def check_nothing_went_back(self) -> None:
        for pid, published in self.publications.items():
            newest: dict[str, int] = {}
            for each in published:
                assert each.revision >= newest.get(each.incarnation, 0), f"{pid} went back: {each}, after {newest}"
                newest[each.incarnation] = each.revision
        by_pid: dict[int, list[Answer]] = defaultdict(list)
        for answer in self.answers:
            by_pid[answer.told["pid"]].append(answer)
        for pid, answers in by_pid.items():
            # An answer's view was pinned before its `t`; one that was sent after that was pinned later.
            ended, newest_told = sorted(answers, key=lambda each: each.told["t"]), dict[str, int]()
            index = 0
            for answer in sorted(answers, key=lambda each: each.sent_s):
                while index < len(ended) and ended[index].told["t"] < answer.sent_s:
                    told = ended[index].told
                    known = newest_told.get(told["incarnation"], 0)
                    newest_told[told["incarnation"]] = max(known, told["revision"])
                    index += 1
                told = answer.told
                assert told["revision"] >= newest_told.get(told["incarnation"], 0), f"{pid} went back: {told}"

    def check_answers_are_what_was_published(self) -> None:
        known = {
            (pid, each.incarnation, each.revision, each.digest)
            for pid, published in self.publications.items()
            for each in published
        }
        for answer in self.answers:
            told = answer.told
            if told["origin"] != "none":
                assert (told["pid"], told["incarnation"], told["revision"], told["digest"]) in known, told

    def check_incarnations(self) -> None:
        for pid, published in self.publications.items():
            labels = list(dict.fromkeys(each.incarnation for each in published if each.incarnation))
            assert len(labels) <= 1 + self.restores, f"{pid} saw the incarnations {labels}"

    def check_age(self) -> None:
        """No answer says that it is younger than it is.

        With age `a` it claims that nothing newer than its revision was acknowledged before `t - a`. Histories that
        were restored count anew, so only the newest writes of a revision are looked at.
        """
        if self.restores:
            return
        writes = sorted(self.writes, key=lambda each: each.revision)
        revisions = [each.revision for each in writes]
        # The earliest acknowledgement among this write and all that follow it.
        earliest_s = [math.inf] * (len(writes) + 1)
        for index in range(len(writes) - 1, -1, -1):
            earliest_s[index] = min(earliest_s[index + 1], writes[index].acknowledged_s)
        for answer in self.answers:
            told = answer.told
            if told["age_s"] is None:
                continue
            claimed_s = answer.sent_s - told["age_s"]
            newer_s = earliest_s[bisect_right(revisions, told["revision"])]
            assert claimed_s <= newer_s, (
                f"{told} says that it was the newest until {claimed_s:.3f}, but a newer write was acknowledged at "
                f"{newer_s:.3f}"
            )
