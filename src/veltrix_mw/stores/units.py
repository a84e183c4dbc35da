"""The bounds of a lazy unit: what a store reads of one before it says no.

Owns the bounds and their words; knows no backend.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from veltrix_mw.protocols import RawUnit

__all__ = ["MAX_UNIT_BYTES", "MAX_UNIT_KEYS", "bounded", "too_many_keys"]

MAX_UNIT_KEYS: Final = 10_000
"""A unit is read, decoded and held whole: that many keys take some 50 ms of a worker's one interpreter."""

MAX_UNIT_BYTES: Final = 4 * 1024 * 1024
"""Of values, for the same reason: a sixteenth of what all units of a process may take by default."""


def bounded(name: str, entries: Iterable[tuple[str, bytes, int]]) -> RawUnit:
    """The unit of these entries, taken one by one: no further than the bounds."""
    taken: list[tuple[str, bytes, int]] = []
    size = 0
    for entry in entries:
        taken.append(entry)
        size += len(entry[1])
        if len(taken) > MAX_UNIT_KEYS:
            return too_many_keys(name)
        if size > MAX_UNIT_BYTES:
            return _refused(name, f"{MAX_UNIT_BYTES // 1024**2} MiB of values")
    return RawUnit(tuple(taken))


def too_many_keys(name: str) -> RawUnit:
    """The refusal of a unit that has more than `MAX_UNIT_KEYS`."""
    return _refused(name, f"{MAX_UNIT_KEYS} keys")


def _refused(name: str, bound: str) -> RawUnit:
    return RawUnit((), f"the lazy unit {name!r} has more than {bound}, which is the most that one may hold; divide it")
