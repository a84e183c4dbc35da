"""When lazy units changed last, of as many as are worth remembering.

Owns the bound, and what is said of a unit that is beyond it. Not thread-safe.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

__all__ = ["LastChanges"]

_MOST: Final = 10_000


class LastChanges:
    """The revision since which each unit is unchanged, as far as all changes since a first revision were noted."""

    def __init__(self, since: int = 0) -> None:
        """`since`: what changed up to there is not known."""
        self._revisions: OrderedDict[str, int] = OrderedDict()
        self._floor = since  # units that are not in there did not change after it

    def note(self, name: str, revision: int) -> None:
        """The unit changed; revisions come in ascending order."""
        self._revisions[name] = revision
        self._revisions.move_to_end(name)
        if len(self._revisions) > _MOST:
            _, gone = self._revisions.popitem(last=False)
            self._floor = max(self._floor, gone)

    def of(self, name: str) -> int:
        """The unit did not change after this revision; it may have changed earlier than that."""
        return self._revisions.get(name, self._floor)
