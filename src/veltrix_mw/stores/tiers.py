"""Tiers: decides which of authority and mirror is followed, from what each of them said.

Owns the rules of leaving the mirror, of coming back, and of what a mirror is not believed. Pure: no thread, socket or
clock in here; every call brings the time (`now_s`, monotonic seconds). Knows no store: `mirrored` asks the tiers and
tells what they answered.

A mirror is never ahead of its authority, so what it says is a statement about a past moment: of `age_s` ago. It is
believed where that moment is later than the last one at which this process knew better.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from random import Random
from typing import Final

from veltrix_mw.protocols import MirrorState, Position
from veltrix_mw.words import ago

__all__ = ["LEAVE_WITHIN_S", "RETURN_WITHIN_S", "STALE_AFTER_S", "Tier", "Tiers"]

LEAVE_WITHIN_S: Final = 2.0
"""A fleet that loses its mirror reaches the authority spread over this time."""

STALE_AFTER_S: Final = 10.0
"""A mirror that nobody feeds is left after this: longer than a relay's takeover (7 s)."""

RETURN_WITHIN_S: Final = 2.0
"""A fleet whose mirror is back returns spread over this time."""

LOOK_EVERY_S: Final = 2.0
"""How often a worker that follows the authority looks whether the mirror is well again ..."""

LOOK_MOST_S: Final = 5.0
"""... and while it does not answer: each look may keep changes waiting for as long as it takes to fail."""

SHUN_S: Final = 60.0
"""How long a mirror that cannot be followed is left alone: what is wrong with it takes somebody to mend."""

_OF_THE_PAST: Final = "it holds an incarnation that the authority has left"


class Tier(StrEnum):
    """Which of the two."""

    MIRROR = "mirror"
    AUTHORITY = "authority"


class Tiers:
    """Where this process follows, and why.

    `current` moves by itself, when `choose` is called after its time has come. Single-threaded.
    """

    def __init__(self, *, lazy: Sequence[str] = (), random: Random | None = None) -> None:
        self._lazy = tuple(lazy)
        self._random = Random() if random is None else random
        self.current = Tier.MIRROR
        self._shunned = "", -math.inf  # why the mirror is not followed whatever it says, and until when
        self.moves = 0
        # What the mirror last said, and what is wrong with it: '' while it is well.
        self.mirror: MirrorState | None = None
        self.fault = ""
        self.fault_kind = "standby"
        self._fault_since_s: float | None = None
        self._move_at_s: float | None = None
        self._look_at_s = 0.0
        self._looks_failed = 0
        # The newest that this process knows of the authority: where, and when that was known to be its newest.
        self._floor: Position | None = None
        self._floor_known_s = -math.inf
        self._left: deque[str] = deque(maxlen=64)
        self._doubted = "", -math.inf

    @property
    def known(self) -> Position | None:
        """The newest that this process knows of the authority, which may have moved on; None where it knows nothing."""
        return self._floor

    # What happened

    def learned(self, position: Position, *, known_s: float) -> None:
        """This process came to `position`, which was the authority's newest at `known_s` (-inf: nobody asked).

        Knowledge that is newer wins, also over a higher revision: of a history that was restored and that nobody may
        rename.
        """
        floor = self._floor
        if floor is not None and floor.incarnation != position.incarnation:
            self._left.append(floor.incarnation)
        elif floor is not None and floor.revision > position.revision and known_s <= self._floor_known_s:
            return
        self._floor = position
        self._floor_known_s = max(self._floor_known_s, known_s)

    def renamed(self, known: str) -> None:
        """The incarnation `known` was given up for another: what still holds it is of the past."""
        self._left.append(known)
        if self._floor is not None and self._floor.incarnation == known:
            self._floor = None
        self._stay_at_authority()

    def doubt(self, incarnation: str, *, now_s: float) -> None:
        """A restore was seen, and `incarnation` cannot be renamed from here: what was mirrored of it is of the past."""
        self._doubted = incarnation, now_s
        self._stay_at_authority()

    def _stay_at_authority(self) -> None:
        """What the mirror said before a restore was seen is no reason to go there."""
        if self.current is Tier.AUTHORITY:
            self._move_at_s = None

    def inherit(self, other: Tiers) -> None:
        """Know what `other` knows of the authority: a fork's child, of its parent."""
        self._floor, self._floor_known_s = other._floor, other._floor_known_s
        self._left.extend(other._left)
        self._doubted = other._doubted

    def answered(self, state: MirrorState, *, sent_at_s: float, now_s: float, alone: bool = False) -> None:
        """The mirror said where it stands; `alone`: and the authority does not answer."""
        self.mirror = state
        self._looks_failed = 0
        self._look_at_s = now_s + LOOK_EVERY_S * self._random.uniform(0.8, 1.2)
        kind, why, patience_s = self._judged(state, sent_at_s, alone=alone)
        if not why:
            self._well(now_s)
        else:
            self._faulty(kind, why, patience_s, now_s)

    def failed(self, reason: str, *, now_s: float) -> None:
        """The mirror could not be asked, or broke off."""
        self._looks_failed = min(self._looks_failed + 1, 8)
        most_s = min(LOOK_MOST_S, LOOK_EVERY_S * 2.0 ** (self._looks_failed - 1))
        self._look_at_s = now_s + most_s * self._random.uniform(0.8, 1.2)
        self._faulty("unreachable", reason, 0.0, now_s)

    def shun(self, reason: str, *, now_s: float, for_s: float = SHUN_S) -> None:
        """The mirror says that it is well, and is not: what it says counts for nothing for a while."""
        self._shunned = reason, now_s + for_s
        self._faulty("unreachable", reason, 0.0, now_s)

    def covers(self, left_out: Sequence[str]) -> bool:
        """Whether a mirror that leaves out these prefixes has all that this process reads eagerly."""
        return set(left_out) <= set(self._lazy)

    def is_new(self, position: Position) -> bool:
        """Whether it is of another incarnation than the one this process knows of the authority."""
        floor = self._floor
        return floor is not None and bool(floor.incarnation) and floor.incarnation != position.incarnation

    # What to do

    def choose(self, now_s: float) -> Tier:
        """The tier to address now."""
        if self._move_at_s is not None and now_s >= self._move_at_s:
            self._move_at_s = None
            self.moves += 1
            self.current = Tier.AUTHORITY if self.current is Tier.MIRROR else Tier.MIRROR
        return self.current

    def leave(self, now_s: float) -> float:
        """Leave a mirror that failed as it was followed: in how many seconds the authority is to be asked."""
        if self.current is Tier.AUTHORITY:
            return 0.0
        if self._move_at_s is None:
            self._move_at_s = now_s + self._random.uniform(0, LEAVE_WITHIN_S)
        return max(0.0, self._move_at_s - now_s)

    def leave_at_once(self, now_s: float) -> None:
        """Follow the authority from here on: nothing is served yet, so nothing can wait."""
        if self.current is Tier.MIRROR:
            self._move_at_s = now_s
            self.choose(now_s)

    @property
    def is_leaving(self) -> bool:
        """Whether the tier that is followed is to be left, now or soon."""
        return self._move_at_s is not None

    def is_due(self, now_s: float) -> bool:
        """Whether the tier that is followed is to be left now."""
        return self._move_at_s is not None and now_s >= self._move_at_s

    def look_in_s(self, now_s: float) -> float:
        """In how many seconds the mirror is to be asked, by a worker that follows the authority."""
        if self.current is Tier.MIRROR:
            return math.inf
        moves_s = math.inf if self._move_at_s is None else self._move_at_s - now_s
        return max(0.0, min(self._look_at_s - now_s, moves_s))

    def next_move_s(self, now_s: float) -> float:
        """In how many seconds the tier that is followed is to be left; inf where it is to be kept."""
        return math.inf if self._move_at_s is None else max(0.0, self._move_at_s - now_s)

    def is_looking_due(self, now_s: float) -> bool:
        """Whether it is time to ask the mirror."""
        return self.current is Tier.AUTHORITY and now_s >= self._look_at_s

    def refuses(self, state: MirrorState, *, sent_at_s: float) -> str:
        """Why what the mirror holds is not taken; empty where it may be."""
        position, floor = state.position, self._floor
        if not position.incarnation:
            return "it is empty"
        if not self.covers(state.lazy):
            missing = ", ".join(sorted(set(state.lazy) - set(self._lazy)))
            return f"it leaves out {missing}, which this process reads eagerly"
        doubted, doubted_s = self._doubted
        if position.incarnation == doubted and sent_at_s - state.age_s <= doubted_s:
            return _OF_THE_PAST
        if floor is None or not floor.incarnation:
            return _OF_THE_PAST if position.incarnation in self._left else ""
        if position.incarnation == floor.incarnation:
            if position.revision < floor.revision:
                return f"it is behind: at revision {position.revision}, and this process at {floor.revision}"
            return ""
        if position.incarnation in self._left or sent_at_s - state.age_s <= self._floor_known_s:
            return _OF_THE_PAST
        return ""

    # Rules

    def _judged(self, state: MirrorState, sent_at_s: float, *, alone: bool) -> tuple[str, str, float]:
        """What is wrong with the mirror: of which kind, in words, and for how long that is put up with (s)."""
        if sent_at_s < self._shunned[1]:
            return "unreachable", self._shunned[0], 0.0
        why = self.refuses(state, sent_at_s=sent_at_s)
        if why:
            covered = self.covers(state.lazy)
            kind = "uncovered" if not covered else "behind" if state.position.incarnation else "empty"
            return kind, why, STALE_AFTER_S if covered else 0.0
        if math.isinf(state.age_s):  # it has just been filled; what it holds is proved a moment later
            return "stale", f"its relay asked the authority {ago(state.age_s)}", STALE_AFTER_S
        if state.age_s > STALE_AFTER_S:
            return "stale", f"its relay asked the authority {ago(state.age_s)}", 0.0
        if self.current is Tier.AUTHORITY and not alone and self.is_new(state.position):
            return "behind", "it holds another incarnation than the authority", 0.0
        return "", "", 0.0

    def _well(self, now_s: float) -> None:
        self.fault, self.fault_kind, self._fault_since_s = "", "standby", None
        if self.current is Tier.MIRROR:
            self._move_at_s = None
        elif self._move_at_s is None:
            self._move_at_s = now_s + self._random.uniform(0, RETURN_WITHIN_S)

    def _faulty(self, kind: str, why: str, patience_s: float, now_s: float) -> None:
        self.fault, self.fault_kind = why, kind
        if self._fault_since_s is None:
            self._fault_since_s = now_s
        if self.current is Tier.AUTHORITY:
            self._move_at_s = None
        elif self._move_at_s is None and now_s >= self._fault_since_s + patience_s:
            self._move_at_s = now_s + self._random.uniform(0, LEAVE_WITHIN_S)
