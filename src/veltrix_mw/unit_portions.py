"""Portions: how many lazy units one reading takes, so that its reply comes whole and in time.

Owns the guess, and what corrects it: the sizes of units that were read, and readings that failed. Pure: reads nothing.

A tenant may have a hundred bytes of settings or megabytes. Five hundred of the first are one reply of some
milliseconds. Of the second they are none, as no deadline is long enough, and the next try fails in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from veltrix_mw.protocols import RawUnit, Silent, TooMuch
from veltrix_mw.stores.units import MAX_UNIT_BYTES

__all__ = ["FIRST_UNITS", "PORTION_BYTES", "Portions", "may_fit_halved", "sizes_of"]

PORTION_BYTES: Final = 8 * 1024 * 1024
"""What a portion is to hold, by what is known: some 0.1 s of etcd's gateway, and of one interpreter that decodes it."""

FIRST_UNITS: Final = 8
"""While nothing is known: one call more, for a process that has just begun. The largest units make it 32 MiB."""

_LEAST_BYTES: Final = 64 * 1024  # less is no portion: what a store answers with at all is that long, too
_LARGE_BYTES: Final = 64 * 1024  # from there on a unit is known by its name, and not by what others hold
_MOST_LARGE: Final = 1_000
_GROWTH: Final = 9 / 8  # by reading: what failed at a size is met again after six that came


class Portions:
    """Divides units into readings, by what those that were read before held.

    Thread-safe in that what two threads learn at once may be lost: it is a guess.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._at_once = min(FIRST_UNITS, most)
        self._is_cautious = False  # since a reading failed
        self._budget: float = PORTION_BYTES
        self._proved = 0.0  # bytes that came in one reading
        self._typical = 0.0  # bytes of a unit that is there; 0 while none was read
        self._large: dict[str, int] = {}

    def first(self, names: Sequence[str]) -> Sequence[str]:
        """As many of `names`, from the first on, as go in one reading; one at least."""
        size = 0.0
        for at, name in enumerate(names[: self._at_once]):
            size += self._large.get(name, self._typical)
            if at and size > self._budget:
                return names[:at]
        return names[: self._at_once]

    def grant_s(self, names: Sequence[str], timeout_s: float) -> float:
        """How long a reading of these may take: half the time where it may prove to be too much, to try again."""
        is_sure = len(names) <= 1 or 0 < self._expected(names) <= self._proved
        return timeout_s if is_sure else timeout_s / 2

    def learn(self, sizes: Mapping[str, int]) -> None:
        """A reading brought units of these sizes, in bytes; 0 for one that is absent."""
        there = [size for size in sizes.values() if size]
        if there:
            came, mean = float(sum(there)), sum(there) / len(there)
            # At once larger, but smaller by and by: a few small ones say little of the next.
            self._typical = mean if mean > self._typical else (mean + self._typical) / 2
            self._proved = max(self._proved, came)
            self._budget = min(PORTION_BYTES, max(self._budget * _GROWTH, came))
        if self._is_cautious or not self._typical:
            self._at_once = min(self._most, 2 * self._at_once)
            self._is_cautious = self._is_cautious and self._at_once < self._most
        else:
            self._at_once = self._most
        for name, size in sizes.items():
            if size >= _LARGE_BYTES:
                if len(self._large) >= _MOST_LARGE:
                    self._large.clear()
                self._large[name] = size
            else:
                self._large.pop(name, None)

    def halve(self, names: Sequence[str]) -> bool:
        """A reading of these was too much; tells whether half as many can be tried."""
        half = self._expected(names) / 2
        if half:
            self._budget = max(_LEAST_BYTES, half)
            self._proved = min(self._proved, half)
        self._at_once, self._is_cautious = max(1, len(names) // 2), True
        return len(names) > 1

    def _expected(self, names: Sequence[str]) -> float:
        return sum(self._large.get(name, self._typical) for name in names)


def may_fit_halved(error: Exception) -> bool:
    """Whether a reading failed for what it asked, perhaps, and not for what the store is like."""
    return isinstance(error, (Silent, TooMuch))


def sizes_of(units: Mapping[str, RawUnit]) -> dict[str, int]:
    """What each of the units took of a reply, in bytes."""
    return {
        name: MAX_UNIT_BYTES if raw.refused else sum(len(key) + len(value) for key, value, _ in raw.entries)
        for name, raw in units.items()
    }
