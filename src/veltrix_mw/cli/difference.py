"""The difference between two states of a namespace, key by key.

Owns what differs; writing it and drawing it are others'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from veltrix_mw import MISSING
from veltrix_mw.cli import json_text

__all__ = ["Difference", "differences"]


@dataclass(frozen=True, slots=True)
class Difference:
    """What becomes of one key: `old` and `new` are values, `MISSING` where it is absent."""

    key: str
    old: Any
    new: Any

    def as_json(self) -> dict[str, Any]:
        """Its members; `old` or `new` is left out where the key is absent, as null is a value."""
        sides = {name: side for name, side in (("old", self.old), ("new", self.new)) if side is not MISSING}
        return {"key": self.key, **sides}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """What differs, ascending by key."""
    found = []
    for key in sorted({*old, *new}):
        before = old.get(key, MISSING)
        after = new.get(key, MISSING)
        if before is MISSING or after is MISSING or not json_text.same(before, after):
            found.append(Difference(key, before, after))
    return found
