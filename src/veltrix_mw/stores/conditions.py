"""The conditions of a commit: what each operation asks of its key, and what is said when it does not hold.

Owns the rule and its words, the same for every store that can look at a key before it writes. Knows no backend.
"""

from __future__ import annotations

from collections.abc import Callable

from veltrix_mw.errors import Conflict, InvalidValue, KeyMissing
from veltrix_mw.protocols import RawOperation
from veltrix_mw.snapshot import Entry
from veltrix_mw.values import MISSING, decode

__all__ = ["check"]


def check(operation: RawOperation, mod_revision: int, load: Callable[[], bytes]) -> None:
    """Return if `operation` may be applied to its key, which is at `mod_revision` (0: absent).

    `load` fetches the stored value, and is called only for a `Conflict` over a key that is present. Raises
    `Conflict` (read again, then write) when `expected` does not hold, `KeyMissing` when there is nothing to delete.
    """
    key, expected = operation.key, operation.expected
    if expected is not None and expected != mod_revision:
        raise Conflict(
            f"{key!r} {_state(mod_revision)}, but the write expected that it {_state(expected)}; "
            f"read it again, then write expecting {mod_revision}",
            key=key,
            current=_entry(mod_revision, load),
        )
    if operation.value is MISSING and mod_revision == 0:
        raise KeyMissing(f"{key!r} does not exist, so there is nothing to delete")


def _state(mod_revision: int) -> str:
    return f"is at revision {mod_revision}" if mod_revision else "is absent"


def _entry(mod_revision: int, load: Callable[[], bytes]) -> Entry:
    if not mod_revision:
        return Entry(MISSING, 0)
    try:
        return Entry(decode(load()), mod_revision)
    except InvalidValue:
        # Stored by someone else. Its revision is what the next try needs; a value that cannot be read is none.
        return Entry(MISSING, mod_revision)
