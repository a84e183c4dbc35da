"""Findings: what an examination says, and the order that it goes in.

Owns the shape of a finding, the rule that a check whose predecessor failed is told not to be made, and the deadline of
each check. Knows no store, and decides nothing about what is well.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from veltrix_mw.errors import StoreError

__all__ = ["Finding", "Said", "State", "Step", "examine", "fail", "not_made", "ok", "warn"]


class State(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    NOT_MADE = "not made"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    `part` is what was looked at: `authority`, `mirror` or `last-known-good`; `check` the check's name, once in a part.
    `text` says what was found and, unless all is well, what to do. It holds no value and no password.
    """

    part: str
    check: str
    state: State
    text: str


@dataclass(frozen=True, slots=True)
class Said:
    """A check's answer."""

    state: State
    text: str


@dataclass(frozen=True, slots=True)
class Step:
    """A check to make, unless one that it `needs` failed.

    `ask` is told by when to have asked its servers (monotonic), all of them and however often. What it raises as a
    `StoreError` is a failure.
    """

    check: str
    ask: Callable[[float], Said]
    needs: tuple[str, ...] = ()


def ok(text: str) -> Said:
    return Said(State.OK, text)


def warn(text: str) -> Said:
    return Said(State.WARN, text)


def fail(text: str) -> Said:
    return Said(State.FAIL, text)


def not_made(why: str) -> Said:
    """The check cannot be made, which is no fault."""
    return Said(State.NOT_MADE, why)


def examine(part: str, steps: Sequence[Step], *, timeout_s: float) -> Iterator[Finding]:
    """Make the checks in order, each within `timeout_s`, and say of each how it ended. Raises nothing."""
    failed: dict[str, str] = {}  # the checks that failed, or were not made for it, and the one that failed first
    for step in steps:
        first = next((failed[name] for name in step.needs if name in failed), None)
        if first is not None:
            failed[step.check] = first
            yield Finding(part, step.check, State.NOT_MADE, f"because of {first}")
            continue
        said = _asked(step, time.monotonic() + timeout_s)
        if said.state is State.FAIL:
            failed[step.check] = step.check
        yield Finding(part, step.check, said.state, said.text)


def _asked(step: Step, by_s: float) -> Said:
    try:
        return step.ask(by_s)
    except StoreError as exc:
        return fail(str(exc))
    except Exception as exc:  # noqa: BLE001  # the other checks are to be made all the same
        # Not its text: that may hold a value.
        frame = traceback.extract_tb(exc.__traceback__)[-1]
        where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        return fail(f"this check has a fault of its own ({type(exc).__name__} at {where}); please report it")
