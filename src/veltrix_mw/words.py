"""Words: numbers in sentences.

Owns how a count, an age, a time and a list of names read; knows nothing of what they are of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

__all__ = ["ago", "counted", "milliseconds", "named_there", "seconds"]

_MOST_NAMED: Final = 10

_UNITS: Final = ((86400, "days"), (3600, "hours"), (60, "minutes"))


def counted(number: int, noun: str) -> str:
    """`1 key`, `2 keys`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def ago(age_s: float) -> str:
    """How long ago, in the largest unit of which there are two; `never` for infinity."""
    if math.isinf(age_s):
        return "never"
    age_s = max(0.0, age_s)
    for unit_s, name in _UNITS:
        if age_s >= 2 * unit_s:
            return f"{age_s / unit_s:.0f} {name} ago"
    return f"{age_s:.0f} s ago" if age_s >= 10 else f"{age_s:.1f} s ago"


def named_there(names: Iterable[str]) -> str:
    """What else of the kind is there, to be added to a sentence: ` (there: blog, shop)`; empty for nothing."""
    shown = sorted(names)
    more = ", ..." if len(shown) > _MOST_NAMED else ""
    return f" (there: {', '.join(shown[:_MOST_NAMED])}{more})" if shown else ""


def seconds(time_s: float) -> str:
    """`10 s`, `2.5 s`, `0.13 s`: what was left of a deadline is told by two digits, and is never `0 s`."""
    return f"{time_s:.0f} s" if time_s >= 10 else f"{max(time_s, 0.001):.2g} s"


def milliseconds(took_s: float) -> str:
    """`12 ms`, `1.2 ms`, `0.04 ms`: two digits, which are what two measurements of one thing share at most."""
    took_ms = took_s * 1000
    return f"{took_ms:.0f} ms" if took_ms >= 10 else f"{took_ms:.1f} ms" if took_ms >= 1 else f"{took_ms:.1g} ms"
