"""Lazy units in a mirror in Redis: what one looks like there.

Owns the encoding of a unit, and the bounds of what is kept for units. Pure: knows no connection, and decodes no value.

A unit is a hash that the scripts keep current with the mirror, for as long as it is there. It may run out or be evicted
at any time, and is filled again when it is wanted. Its stamp names the fill of the mirror since which that is so: after
another one nobody knows what it missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from veltrix_mw.protocols import MirroredUnit, RawUnit
from veltrix_mw.stores.redis_layout import Meta, NotOurs, pairs_of
from veltrix_mw.stores.units import bounded

__all__ = [
    "MAX_ANNOUNCED",
    "MAX_ANNOUNCED_BYTES",
    "MAX_WANTED",
    "UNIT_TTL_S",
    "WANTED_TTL_S",
    "is_current",
    "size_of",
    "unit_in",
    "words_of",
]

UNIT_TTL_S: Final = 3_600.0
"""How long a unit stays that was filled: workers hold those that they read themselves, so that it is for new ones."""

MAX_WANTED: Final = 10_000
"""Names that may wait in the queue, which are seconds of a relay's work; the oldest go first, unread."""

WANTED_TTL_S: Final = 5.0
"""How long the queue stays where nobody reads it: who waits has read the authority long since."""

MAX_ANNOUNCED: Final = 1_000
"""Announcements that are kept, of many units each: for who reads the stream a moment late."""

MAX_ANNOUNCED_BYTES: Final = 1024 * 1024
"""Of their names: tens of thousands of units. A name may have 512 bytes, and an announcement thousands of names."""

_UNIT_BYTES: Final = 100  # a unit's keys and stamp, beside its name and what it holds


def unit_in(name: str, reply: Sequence[bytes], meta: Meta) -> MirroredUnit | None:
    """The unit in the reply to HGETALL that was asked for after `meta`; None where there is none, or no current one."""
    said = {reply[at]: reply[at + 1] for at in range(0, len(reply), 2) if reply[at].startswith(b"#")}
    unit_said = said.get(b"#unit")
    if not is_current(unit_said, meta.units):
        return None
    since = (unit_said or b"").partition(b" ")[2]
    if not since.isdigit():
        raise NotOurs("a lazy unit whose '#unit' does not name a revision")
    entries = sorted(pairs_of(reply))
    refused = said.get(b"#refused", b"").decode(errors="replace")
    unit = RawUnit((), refused) if refused else bounded(name, entries)
    # It has all changes up to where the mirror stood before it was read, and those up to its own last one.
    return MirroredUnit(unit, max(meta.revision, int(since)), int(since))


def is_current(said: bytes | None, units: bytes) -> bool:
    """Whether a unit whose `#unit` says this is kept current, in a mirror whose `#units` is `units`."""
    return bool(units) and (said or b"").partition(b" ")[0] == units


def size_of(name: str, unit: MirroredUnit) -> int:
    """Roughly the bytes that a unit takes on the way and in the mirror."""
    return _UNIT_BYTES + len(name) + sum(len(key) + len(value) for key, value, _ in unit.unit.entries)


def words_of(unit: MirroredUnit) -> list[str | bytes]:
    """The fields and values of a unit's hash, in turn, but for its stamp."""
    if unit.unit.refused:
        return ["#refused", unit.unit.refused]
    return [word for key, value, revision in unit.unit.entries for word in (key, b"%d %b" % (revision, value))]
