"""A mirror of lazy units without a server, one call after the other, as the scripts in Redis change one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any

from veltrix_mw.errors import Compacted, LeaseLost
from veltrix_mw.keys import unit_of
from veltrix_mw.protocols import Batch, FoundUnits, Lease, MirroredUnit, MirrorState, Position, RawUnit
from veltrix_mw.values import Missing

__all__ = ["ScriptedMirror"]

TOKENS = iter(range(1, 1_000_000_000))


class ScriptedMirror:
    """Does what docs/redis-layout.md says of units. Any of them may be dropped, and all of it go back in time."""

    def __init__(self, lazy: Sequence[str], position: Position) -> None:
        self.lazy = tuple(lazy)
        self.position = position
        self.units: dict[str, tuple[dict[str, tuple[bytes, int]], int]] = {}  # entries, and since when unchanged
        self.lease = Lease("nobody", 0)
        self.wanted: list[str] = []
        self.announced: list[list[str]] = []
        self.looked: list[list[str]] = []  # for units that were filled

    def elect(self) -> Lease:
        token = next(TOKENS)
        self.lease = Lease(f"relay-{token}", token)
        return self.lease

    def append(self, lease: Lease, batch: Batch) -> None:
        if lease != self.lease:
            raise LeaseLost("another relay leads")
        if batch.previous != self.position.revision:
            raise Compacted("it stands elsewhere")
        self.position = batch.position
        for change in batch.lazy_changes:
            name = unit_of(change.key, self.lazy)
            if name in self.units:
                entries = dict(self.units[name][0])
                entries.pop(change.key, None)
                if not isinstance(change.value, Missing):
                    entries[change.key] = change.value, batch.position.revision
                self.units[name] = entries, batch.position.revision

    def refill(self, lease: Lease, position: Position) -> None:
        """Nobody knows what a unit missed that was filled before."""
        if lease != self.lease:
            raise LeaseLost("another relay leads")
        self.position, self.units = position, {}

    def copy(self) -> Any:
        """What a replica of the server has."""
        return deepcopy((self.position, self.units))

    def go_back(self, copy: Any) -> None:
        """A replica that was behind has become the server."""
        self.position, self.units = deepcopy(copy)

    # --- as workers and the filler call it

    def state(self, *, timeout_s: float) -> MirrorState:
        return MirrorState(self.position, lazy=self.lazy, age_s=0.0, relay=self.lease.holder)

    def find_units(self, names: Sequence[str], *, timeout_s: float) -> FoundUnits:
        found = {}
        for name in names:
            if name in self.units:
                entries, since = self.units[name]
                raw = RawUnit(tuple((key, *entry) for key, entry in sorted(entries.items())))
                found[name] = MirroredUnit(raw, self.position.revision, since)
        return FoundUnits(self.state(timeout_s=timeout_s), found)

    def want_units(self, names: Sequence[str], *, timeout_s: float) -> None:
        self.wanted += names

    def wanted_units(self, *, wait_s: float, timeout_s: float) -> Sequence[str]:
        wanted, self.wanted = self.wanted, []
        return list(dict.fromkeys(wanted))

    def current_units(self, names: Sequence[str], *, timeout_s: float) -> Collection[str]:
        self.looked.append(list(names))
        return [name for name in names if name in self.units]

    def fill_units(
        self,
        lease: Lease,
        position: Position,
        units: Mapping[str, MirroredUnit],
        names: Sequence[str],
        *,
        timeout_s: float,
    ) -> None:
        if lease != self.lease:
            raise LeaseLost("another relay leads")
        if position != self.position:
            raise Compacted("it stands elsewhere")
        for name, unit in units.items():
            self.units[name] = {key: (value, revision) for key, value, revision in unit.unit.entries}, unit.since
        self.announced.append(list(names))
