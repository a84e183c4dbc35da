"""What a probe says of a server's clock, and of how long it takes: the same for each store.

Owns the bounds, and their words.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final

from veltrix_mw.findings import Said, ok, warn
from veltrix_mw.words import milliseconds

__all__ = ["clock_said", "paced"]

CLOCKS_APART_S: Final = 2.0
"""Machines that keep time by NTP are milliseconds apart; more than this is none."""

SLOW_S: Final = 0.25
"""A round trip within a region takes a few milliseconds, one around the world 0.3 s."""

_CALLS: Final = 5  # the median of few is not the first one's connection


def clock_said(server: str, ahead_s: float, *, exact_to_s: float) -> Said:
    """Of a server whose clock is `ahead_s` of this machine's, as far as that can be told."""
    if abs(ahead_s) <= CLOCKS_APART_S:
        return ok(f"the clock of {server} is this machine's, to within {max(exact_to_s, abs(ahead_s)):.3g} s")
    return warn(
        f"the clock of {server} is {abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's: set "
        "both by NTP; histories and certificates go by them"
    )


def paced(ask: Callable[[], object], what: str) -> Said:
    """Of how long `ask`, which is `what`, takes: the median of some calls. Raises what it raises."""
    took_each_s = []
    for _ in range(_CALLS):
        begun_s = time.monotonic()
        ask()
        took_each_s.append(time.monotonic() - begun_s)
    took_s = statistics.median(took_each_s)
    told = f"{what} takes {milliseconds(took_s)}"
    if took_s <= SLOW_S:
        return ok(told)
    return warn(f"{told}: is the server in another region, or overloaded?")
