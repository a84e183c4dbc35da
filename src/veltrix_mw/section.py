"""A section: the keys below a prefix, as one view sees them.

Owns the mapping alone; the view makes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from veltrix_mw.errors import HeldBack, KeyMissing, NotReady
from veltrix_mw.values import MISSING

__all__ = ["Section"]


class Section(Mapping[str, Any]):
    """The keys below a prefix, the prefix cut off; frozen.

    As of one view: reading a key that is held back with no good value raises `HeldBack`. Where nothing was listed yet,
    it has what the defaults and overrides have, and reading another key raises `NotReady`.
    """

    __slots__ = ("_held", "_unready", "_values", "prefix")

    def __init__(self, prefix: str, values: Mapping[str, Any], held: Mapping[str, HeldBack], unready: str = "") -> None:
        self.prefix: str = prefix
        self._values = values
        self._held = held
        self._unready = unready  # why nothing was listed yet; empty once something was

    def __getitem__(self, key: str) -> Any:
        value = self._values.get(key, MISSING)
        if value is not MISSING:
            return value
        self._check_known(key)
        raise KeyMissing(f"there is no key {self.prefix + str(key)!r}")

    def get(self, key: str, /, default: Any = None) -> Any:
        """The value, or `default` when the key is absent. Raises `HeldBack` and `NotReady` like `[]`."""
        value = self._values.get(key, MISSING)
        if value is MISSING:
            self._check_known(key)
            return default
        return value

    def __contains__(self, key: object) -> bool:
        if key in self._values:
            return True
        self._check_known(key)
        return False

    def _check_known(self, key: object) -> None:
        """Raise what a key without a value raises when that does not mean that it is absent."""
        held = self._held.get(key)  # type: ignore[call-overload]
        if held is not None:
            raise HeldBack(str(held))
        if self._unready and isinstance(key, str):
            raise NotReady(self._unready)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<Section {self.prefix!r} of {len(self._values)} keys>"
