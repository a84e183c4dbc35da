"""Derived values: what was computed from a view, with everything it read.

Owns when such a value still holds in another view, and the cache of them; computes nothing itself.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, Protocol

from veltrix_mw.errors import HeldBack, NotLoaded, NotReady, StaleRead
from veltrix_mw.section import Section

__all__ = ["MOST_DERIVED", "Derived", "DerivedCache"]

MOST_DERIVED: Final = 256
"""Derived values kept: one a model or function, in layered apps one a combination."""


class _Readable(Protocol):
    """What is asked of a view: the same reads again."""

    def _resolve(self, key: object) -> Any: ...
    def _section(self, prefix: str) -> Section: ...


class Derived:
    """A value computed from a view, with everything it read: still right where a view reads the same.

    One that is `alone` holds in the view that it was computed from and in no other: it read what only that one has
    (its revision, say), or more than is worth keeping for a comparison.
    """

    __slots__ = ("alone", "keys", "limit_s", "model", "result", "sections")

    def __init__(
        self,
        result: Any,
        keys: dict[str, Any],
        sections: Mapping[str, Section],
        model: Any,
        alone: bool = False,
        limit_s: float = math.inf,
    ) -> None:
        self.result = result
        self.keys = keys
        self.sections = sections
        self.model = model  # keeps what an id() in the cache's key refers to alive
        self.alone = alone
        self.limit_s = limit_s  # the age up to which what it read may be remembered

    @property
    def size(self) -> int:
        """How many entries it holds on to, beside its result."""
        return len(self.keys) + sum(len(section) for section in self.sections.values())

    def holds_in(self, view: _Readable) -> bool:
        if self.alone:
            return False
        try:
            return all(same(view._resolve(key), value) for key, value in self.keys.items()) and all(
                same_section(view._section(prefix), section) for prefix, section in self.sections.items()
            )
        except (HeldBack, NotLoaded, NotReady, StaleRead):
            return False


def same(one: Any, other: Any) -> bool:
    # 1, 1.0 and True are equal, but not the same setting.
    return one is other or (type(one) is type(other) and bool(one == other))


def same_section(one: Section, other: Section) -> bool:
    if one is other:
        return True
    if one._values.keys() != other._values.keys() or one._held.keys() != other._held.keys():
        return False
    if bool(one._unready) != bool(other._unready):
        return False
    return all(same(value, other._values[key]) for key, value in one._values.items())


class DerivedCache:
    """The last derived value of each name, for views of later snapshots to check and take over. Bounded, LRU."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects _kept's order; held for a few dictionary operations
        self._kept: OrderedDict[Any, Derived] = OrderedDict()

    def get(self, name: Any) -> Derived | None:
        with self._lock:
            derived = self._kept.get(name)
            if derived is not None:
                self._kept.move_to_end(name)
            return derived

    def put(self, name: Any, derived: Derived) -> None:
        with self._lock:
            self._kept[name] = derived
            self._kept.move_to_end(name)
            if len(self._kept) > MOST_DERIVED:
                self._kept.popitem(last=False)
