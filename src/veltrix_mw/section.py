"""A section: the keys below a prefix, as one view sees them.

Owns the mapping alone; the view makes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from veltrix_mw.errors import HeldBack, KeyMissing
from veltrix_mw.values import MISSING

__all__ = ["Section"]


class Section(Mapping[str, Any]):
    """The keys below a prefix, the prefix cut off; frozen.

    As of one view: reading a key that is held back with no good value raises `HeldBack`.
    """

    __slots__ = ("_held", "_values", "prefix")

    def __init__(self, prefix: str, values: Mapping[str, Any], held: Mapping[str, HeldBack]) -> None:
        self.prefix: str = prefix
        self._values = values
        self._held = held

    def __getitem__(self, key: str) -> Any:
        value = self._values.get(key, MISSING)
        if value is not MISSING:
            return value
        if key in self._held:
            raise HeldBack(str(self._held[key]))
        raise KeyMissing(f"there is no key {self.prefix + str(key)!r}")

    def get(self, key: str, /, default: Any = None) -> Any:
        """The value, or `default` when the key is absent; raises `HeldBack` when only a rejected value is known."""
        value = self._values.get(key, MISSING)
        if value is MISSING:
            if key in self._held:
                raise HeldBack(str(self._held[key]))
            return default
        return value

    def __contains__(self, key: object) -> bool:
        if key in self._held:
            raise HeldBack(str(self._held[key]))  # type: ignore[index]
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<Section {self.prefix!r} of {len(self._values)} keys>"
