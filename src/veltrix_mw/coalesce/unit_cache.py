"""The unit cache: the lazy units that a process holds, within bytes and entries, whatever names are asked for.

Owns what is held and what has to go. Knows nothing of where a unit comes from, nor whether it is still right: whoever
follows the changes replaces what they touch.

What goes is decided by S3-FIFO (Yang, Zhang, Qiu, Yue, Vinayak: FIFO queues are all you need for cache eviction, SOSP
2023): a small queue for what is new, a main one for what was read again while it was there, and a memory of names that
left the small one and are let into the main one when they come back. A scan of names that nobody reads twice passes
through the small queue and flushes nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final, Generic, TypeVar

from veltrix_mw.forking import anew_after_fork

__all__ = ["ENTRY_BYTES", "MAX_BYTES", "MAX_ENTRIES", "UnitCache"]

V = TypeVar("V")
D = TypeVar("D")

MAX_BYTES: Final = 64 * 1024 * 1024  # what a worker can spare beside its eager snapshot
MAX_ENTRIES: Final = 100_000  # absent units have no bytes of their own, and going through all costs their number

ENTRY_BYTES: Final = 768
"""What holding an entry costs at most, beside its value and its name: its places in dicts that have just grown, and its
share of the names that left. The tests measure it."""

_SMALL_SHARE: Final = 10  # the paper's: a tenth is for what is new
_MOST_USES: Final = 3  # the paper's: two bits of reads are remembered
_USES_TO_STAY: Final = 2  # the paper's: reads, after the one that it was brought for, that let it into the main queue
_CHANCES: Final = 32  # moves before one must go, used or not: no put stalls on a cache that is hot all through
_FEWEST_GONE: Final = 64


class _Held(Generic[V]):
    __slots__ = ("cost_bytes", "in_main", "uses", "value")

    def __init__(self, value: V, cost_bytes: int, in_main: bool) -> None:
        self.value = value
        self.cost_bytes = cost_bytes
        self.in_main = in_main
        self.uses = 0  # written by readers without the lock: one that is lost now and then does no harm


class UnitCache(Generic[V]):
    """Units by name, within `max_bytes` and `max_entries`; holds what is read again, not what comes last.

    What is held under a name is what was put there last; anything may be gone. Thread-safe: a hit takes no lock.
    """

    def __init__(self, *, max_bytes: int = MAX_BYTES, max_entries: int = MAX_ENTRIES) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._lock = threading.Lock()  # protects all that follows, but for reads of _held
        self._reset()
        anew_after_fork(self)

    def _reset(self) -> None:
        self._held: dict[str, _Held[V]] = {}
        # The same entries in the order that they came in, the oldest first. Ordered dicts, as a dict that is emptied
        # from its front searches longer each time.
        self._small: OrderedDict[str, _Held[V]] = OrderedDict()
        self._main: OrderedDict[str, _Held[V]] = OrderedDict()
        self._bytes = 0
        self._small_bytes = 0
        # Hashes of names that left the small queue, in two generations: the older is forgotten whole.
        self._gone: set[int] = set()
        self._gone_before: set[int] = set()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: str) -> bool:
        """Whether it is held; that is no use of it."""
        return name in self._held

    @property
    def bytes(self) -> int:
        """What is held, with what holding it costs."""
        return self._bytes

    def names(self) -> list[str]:
        """The names that are held now."""
        return list(self._held)

    def get(self, name: str, default: D) -> V | D:
        """What is held under `name`, or `default`."""
        held = self._held.get(name)
        if held is None:
            return default
        if held.uses < _MOST_USES:
            held.uses += 1
        return held.value

    def put(self, name: str, value: V, size_bytes: int) -> None:
        """Hold `value`, of that size, in place of what was held under `name`.

        Something else may have to go; what is larger than all that may be held is not held.
        """
        with self._lock:
            held = self._held.get(name)
            if held is None:
                self._add(name, value, self._cost(name, size_bytes))
            else:
                self._change(name, held, value, self._cost(name, size_bytes))

    def replace(self, name: str, value: V, size_bytes: int) -> bool:
        """As `put`, but only where `name` is held, and tells whether it was: a change alone brings no unit in."""
        with self._lock:
            held = self._held.get(name)
            if held is None:
                return False
            self._change(name, held, value, self._cost(name, size_bytes))
            return True

    def discard(self, name: str) -> None:
        """Hold nothing under `name`."""
        with self._lock:
            held = self._held.get(name)
            if held is not None:
                self._drop(name, held)

    def clear(self) -> None:
        """Hold nothing."""
        with self._lock:
            self._reset()

    # --- all below needs the lock

    def _cost(self, name: str, size_bytes: int) -> int:
        return ENTRY_BYTES + len(name) + size_bytes

    def _add(self, name: str, value: V, cost_bytes: int) -> None:
        if cost_bytes > self._max_bytes:
            return
        self._make_room(cost_bytes, 1)
        known = hash(name)
        # What is larger than the small queue would be gone at once, each time.
        in_main = known in self._gone or known in self._gone_before or cost_bytes > self._max_bytes // _SMALL_SHARE
        held = self._held[name] = _Held(value, cost_bytes, in_main)
        (self._main if in_main else self._small)[name] = held
        self._count(held, cost_bytes)

    def _change(self, name: str, held: _Held[V], value: V, cost_bytes: int) -> None:
        if cost_bytes > self._max_bytes:
            self._drop(name, held)
            return
        held.value = value
        self._count(held, cost_bytes - held.cost_bytes)
        held.cost_bytes = cost_bytes
        self._make_room(0, 0)

    def _drop(self, name: str, held: _Held[V]) -> None:
        del self._held[name]
        (self._main if held.in_main else self._small).pop(name, None)  # gone from there already when it makes room
        self._count(held, -held.cost_bytes)

    def _count(self, held: _Held[V], more_bytes: int) -> None:
        self._bytes += more_bytes
        if not held.in_main:
            self._small_bytes += more_bytes

    def _make_room(self, more_bytes: int, more_entries: int) -> None:
        chances = _CHANCES
        while self._bytes + more_bytes > self._max_bytes or len(self._held) + more_entries > self._max_entries:
            if self._main and not self._small_is_full():
                name, held = self._main.popitem(last=False)
                if held.uses and chances:
                    held.uses -= 1
                    self._main[name] = held
                    chances -= 1
                    continue
            else:
                name, held = self._small.popitem(last=False)
                if held.uses >= _USES_TO_STAY and chances:
                    self._count(held, -held.cost_bytes)
                    held.in_main, held.uses = True, 0
                    self._count(held, held.cost_bytes)
                    self._main[name] = held
                    chances -= 1
                    continue
                self._remember(name)
            self._drop(name, held)
            chances = _CHANCES

    def _small_is_full(self) -> bool:
        return (
            self._small_bytes > self._max_bytes // _SMALL_SHARE or len(self._small) > self._max_entries // _SMALL_SHARE
        )

    def _remember(self, name: str) -> None:
        # As many as are held, in all: their cost is in ENTRY_BYTES.
        if len(self._gone) >= max(_FEWEST_GONE, len(self._held) // 2):
            self._gone, self._gone_before = set(), self._gone
        self._gone.add(hash(name))

    def _after_fork(self) -> None:
        # A thread of the parent may have been in the middle of a change.
        if self._lock.locked():
            self._lock = threading.Lock()
            self._reset()
