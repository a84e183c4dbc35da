"""Operations: what a caller asks to be written.

Owns their shape alone; the writer checks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Delete", "Operation", "Put"]


@dataclass(frozen=True, slots=True)
class Put:
    """Set `key` to `value` (anything JSON can carry).

    `expected` makes it a compare-and-set: the `mod_revision` that the key must have, 0 for "must be absent",
    None to write in any case.
    """

    key: str
    value: Any
    expected: int | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove `key`; `expected` as in `Put`."""

    key: str
    expected: int | None = None


Operation = Put | Delete
