"""The keyspace: folds listings and batches into snapshots, and holds back what fails.

Owns what is served and what is held back; pure (no thread, socket or clock). Knows nothing of when to list or
watch (`replica` does), nor of who reads.

A revision that fails decoding, a schema or a limit is held back whole. Of a listing only the failing key is, or
the failing section when the fault has no one path. What was held back is tried again with each later change
that could mend it, so that a worker that followed ends where one that lists afresh begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import veltrix_mw.digest  # noqa: F401  # snapshots ask for it where nothing is to be imported: in the follower
from veltrix_mw.errors import InvalidValue
from veltrix_mw.protocols import Batch, Listing, RawVersion
from veltrix_mw.snapshot import Proof, Rejection, Snapshot
from veltrix_mw.sorted_map import Item, SortedMap
from veltrix_mw.validation import Fault, Schema, Schemas
from veltrix_mw.values import MISSING, Missing, decode

__all__ = ["MAX_BYTES", "MAX_ENTRIES", "Keyspace"]

MAX_ENTRIES: Final = 1_000_000
"""The most eager entries a worker holds; a namespace that is larger wants lazy prefixes."""

MAX_BYTES: Final = 256 * 1024 * 1024
"""The most bytes of JSON a listing may bring, for the same reason."""

_SINGLE_FAULTS: Final = 50  # then the section goes whole: each fault costs a walk through its section
_HISTORY_TRIALS: Final = 50  # past revisions of a section that are tried for a good one

_Change = tuple[Any, int] | Missing


class Keyspace:
    """What this process serves of one namespace.

    Single-writer: one thread calls `restore`, `apply` and `recover`; `snapshot` may be read by any.
    """

    def __init__(self, schemas: Schemas, *, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self._schemas = schemas
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        # What was held back although it decodes, by key: the state that the authority has.
        self._pending: dict[str, _Change] = {}
        # Both are as of one mapping of rejections, and hold for as long as the snapshots share it.
        self._standing: _Standing | None = None
        self._held_count: tuple[Mapping[str, Rejection], int] | None = None
        self.snapshot = Snapshot()

    @property
    def entry_count(self) -> int:
        """How many entries the authority has at this revision, held back or not."""
        snapshot = self.snapshot
        held = snapshot.rejected
        if self._held_count is None or self._held_count[0] is not held:
            entries = snapshot._entries
            served_though_held = sum(1 for key in held if entries.item(key) is not None)
            self._held_count = held, sum(1 for why in held.values() if not why.deleted) - served_though_held
        return len(snapshot) + self._held_count[1]

    @property
    def wanting(self) -> tuple[str, ...]:
        """The keys that are held back and have no good value: history may know one."""
        snapshot = self.snapshot
        entries = snapshot._entries
        return tuple(key for key, why in snapshot.rejected.items() if not why.deleted and entries.item(key) is None)

    def load(self, entries: Sequence[Item], *, revision: int, incarnation: str) -> None:
        """Take the last-known-good: decoded entries, ascending by key, checked against the schemas of today."""
        served, rejected = self._settled(SortedMap.from_sorted(entries), {}, revision)
        self._forget_pending()
        self.snapshot = Snapshot(
            served, revision=revision, incarnation=incarnation, origin="disk", rejected=rejected, proof=Proof()
        )

    def resume(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot that another keyspace served."""
        self._forget_pending()
        self.snapshot = snapshot

    def restore(self, listing: Listing, *, incarnation: str, origin: str, proved_at_s: float) -> None:
        """Take a listing whole. Raises `InvalidValue`, changing nothing, when it is beyond the bounds."""
        self._check_bounds(listing)
        old = self.snapshot
        known = _Walk(old if old.incarnation == incarnation else Snapshot())
        items: list[Item] = []
        rejected: dict[str, Rejection] = {}
        for key, raw, revision in listing.entries:
            try:
                value = decode(raw)
            except InvalidValue as exc:
                rejected[key] = Rejection(revision, str(exc))
                good = old._entries.item(key)
                if good is not None:
                    items.append(good)
                continue
            item = known.at(key)
            # The revision alone does not say that the value is the one we know: where a backup was restored and written
            # on while we were away, the listing can be of another history under the same label.
            is_known = item is not None and item[2] == revision and _same(item[1], value)
            items.append(item if is_known and item is not None else (key, value, revision))
        self._forget_pending()
        served, rejected = self._settled(SortedMap.from_sorted(items), rejected, listing.position.revision)
        self.snapshot = Snapshot(
            served,
            revision=listing.position.revision,
            incarnation=incarnation,
            origin=origin,
            rejected=old.rejected if rejected == old.rejected else rejected,
            proof=Proof(proved_at_s),
        )

    def _forget_pending(self) -> None:
        self._pending = {}
        self._standing = None
        self._held_count = None

    def apply(self, batch: Batch) -> frozenset[str]:
        """Apply one revision, whole or not at all; returns the keys whose served entry changed."""
        revision = batch.position.revision
        changes: dict[str, _Change] = {}
        faults: dict[str, str] = {}
        for change in batch.changes:
            if isinstance(change.value, Missing):
                changes[change.key] = MISSING
                continue
            try:
                changes[change.key] = (decode(change.value), revision)
            except InvalidValue as exc:
                faults[change.key] = str(exc)
        groups = self._releasable([change.key for change in batch.changes]) if self._pending else {}
        if not faults:
            fault = None
            for released in _trials(groups):
                merged = {**released, **changes}
                served, fault = self._tried(merged)
                if fault is None:
                    return self._accept(merged, served, revision, origin=batch.origin)
            assert fault is not None
            faults = dict.fromkeys(changes if fault.key is None else [fault.key], fault.reason)
        self._hold_back(batch, changes, faults)
        return frozenset().union(*(self._release(group) for group in groups.values()))

    def _release(self, group: Mapping[str, _Change]) -> frozenset[str]:
        """Serve what was held back with a key that is now held back on its own account, if it is good."""
        served, fault = self._tried(group)
        return frozenset() if fault is not None else self._accept(group, served, self.snapshot.revision)

    def recover(self, versions: Mapping[str, Sequence[RawVersion]]) -> None:
        """Serve the last good values that history knows for keys in `wanting`; `versions` newest first."""
        decoded = {key: list(_decodable(kept)) for key, kept in versions.items()}
        wanted = [key for key in self.wanting if decoded.get(key)]
        for schema in self._schemas.touched(wanted):
            section = [key for key in wanted if schema in self._schemas.touched([key])]
            self._recover_section(schema, section, decoded)
        for key in self.wanting:
            if decoded.get(key) and not self._schemas.touched([key]):
                _, value, revision = decoded[key][0]
                self._serve({key: (value, revision)})

    def _recover_section(self, schema: Schema, keys: list[str], decoded: Mapping[str, list[Item]]) -> None:
        """Serve `keys` as of the newest past revision at which the section is good."""
        revisions = sorted({item[2] for key in keys for item in decoded[key]}, reverse=True)
        for revision in revisions[:_HISTORY_TRIALS]:
            candidate: dict[str, _Change] = {}
            for key in keys:
                item = next((item for item in decoded[key] if item[2] <= revision), None)
                if item is not None:
                    candidate[key] = (item[1], item[2])
            served = self.snapshot._entries.updated(candidate)
            if candidate and self._schemas.check(schema, served.below) is None:
                self._serve(candidate)
                return

    def _serve(self, changes: Mapping[str, _Change]) -> None:
        snapshot = self.snapshot
        self.snapshot = snapshot._succeeded(changes, revision=snapshot.revision, rejected=snapshot.rejected)
        self._held_count = None  # a key that is held back has a value now

    def _releasable(self, keys: Sequence[str]) -> dict[int, dict[str, _Change]]:
        """The held-back revisions that a change of `keys` could mend, each with the states it would still bring.

        A revision may be mended when one of its keys changes, or a key of a section that it belongs to; never
        while a key of it that does not decode stays as it is.
        """
        rejected, standing = self.snapshot.rejected, self._stood()
        changing = set(keys)
        near = {rejected[key].revision for key in keys if key in rejected}
        for schema in self._schemas.touched(keys):
            near |= standing.of_schema.get(schema, frozenset())
        groups: dict[int, dict[str, _Change]] = {}
        for revision in sorted(near):
            if standing.stuck.get(revision, frozenset()) <= changing:
                pending = standing.pending.get(revision, ())
                groups[revision] = {key: self._pending[key] for key in pending if key not in changing}
        return {revision: group for revision, group in groups.items() if group}

    def _stood(self) -> _Standing:
        """What is held back, by revision; made anew when that changed: with much of it, a pass takes long."""
        rejected = self.snapshot.rejected
        standing = self._standing
        if standing is None or standing.rejected is not rejected:
            standing = self._standing = _Standing(rejected, {}, {}, {})
            for key, why in rejected.items():
                if key in self._pending:
                    standing.pending.setdefault(why.revision, []).append(key)
                else:
                    standing.stuck.setdefault(why.revision, set()).add(key)
            for revision, keys in standing.pending.items():
                for schema in self._schemas.touched(keys):
                    standing.of_schema.setdefault(schema, set()).add(revision)
        return standing

    def _tried(self, changes: Mapping[str, _Change]) -> tuple[SortedMap, Fault | None]:
        served = self.snapshot._entries.updated(changes)
        if len(served) > max(self._max_entries, len(self.snapshot)):
            return served, Fault(None, f"the namespace would have more than {self._max_entries} entries")
        for schema in self._schemas.touched(changes):
            fault = self._schemas.check(schema, served.below)
            if fault is not None:
                return served, fault
        return served, None

    def _accept(
        self, changes: Mapping[str, _Change], served: SortedMap, revision: int, *, origin: str = ""
    ) -> frozenset[str]:
        rejected = self.snapshot.rejected
        if any(key in rejected for key in changes):
            rejected = {key: why for key, why in rejected.items() if key not in changes}
            for key in changes:
                self._pending.pop(key, None)
        self.snapshot = self.snapshot._succeeded(
            changes, revision=revision, rejected=rejected, served=served, origin=origin
        )
        return frozenset(changes)

    def _hold_back(self, batch: Batch, changes: Mapping[str, _Change], faults: Mapping[str, str]) -> None:
        revision = batch.position.revision
        first, why = next(iter(faults.items()))
        rejected = dict(self.snapshot.rejected)
        for change in batch.changes:
            key = change.key
            reason = faults.get(key) or f"it came in one revision with {first!r}, which was rejected: {why}"
            rejected[key] = Rejection(revision, reason, deleted=change.value is MISSING)
            if key in changes:
                self._pending[key] = changes[key]
            else:
                self._pending.pop(key, None)
        self.snapshot = self.snapshot._succeeded({}, revision=revision, rejected=rejected, origin=batch.origin)

    def _check_bounds(self, listing: Listing) -> None:
        if len(listing.entries) > self._max_entries:
            raise InvalidValue(
                f"the namespace has {len(listing.entries)} entries, more than the {self._max_entries} that a worker "
                "holds; make large prefixes lazy, or use another namespace"
            )
        size = sum(len(raw) for _, raw, _ in listing.entries)
        if size > self._max_bytes:
            raise InvalidValue(
                f"the namespace has {size} bytes of values, more than the {self._max_bytes} that a worker holds; "
                "make large prefixes lazy, or use another namespace"
            )

    def _settled(
        self, entries: SortedMap, rejected: Mapping[str, Rejection], revision: int
    ) -> tuple[SortedMap, dict[str, Rejection]]:
        """`entries` with each schema's failing keys, or failing section, put back to the last good state."""
        rejected = dict(rejected)
        for schema in self._schemas:
            entries = self._settle(schema, entries, rejected, revision)
        return entries, rejected

    def _settle(self, schema: Schema, entries: SortedMap, rejected: dict[str, Rejection], revision: int) -> SortedMap:
        good = self.snapshot._entries
        put_back: set[str] = set()
        for trial in range(_SINGLE_FAULTS + 3):
            fault = self._schemas.check(schema, entries.below)
            if fault is None:
                return entries
            single = fault.key if trial < _SINGLE_FAULTS else None
            failing = set(self._schemas.keys_of(schema, entries.below)) if single is None else {single}
            # Where the section goes back whole, so do the keys of it that the listing no longer has.
            candidates = failing | (set(self._schemas.keys_of(schema, good.below)) if single is None else set())
            changes: dict[str, _Change] = {}
            for key in candidates:
                item = entries.item(key)
                known = good.item(key)
                if known is None or key in put_back:
                    changes[key] = MISSING
                else:
                    changes[key] = (known[1], known[2])
                if key not in rejected:
                    changed_at = revision if item is None else item[2]
                    rejected[key] = Rejection(changed_at, fault.reason, deleted=item is None)
                    self._pending[key] = MISSING if item is None else (item[1], item[2])
            put_back |= candidates
            entries = entries.updated(changes)
        return entries.updated(dict.fromkeys(self._schemas.keys_of(schema, entries.below), MISSING))


def _trials(groups: Mapping[int, dict[str, _Change]]) -> Iterator[dict[str, _Change]]:
    """What may be released along with a change: the most first, nothing last."""
    if len(groups) > 1:
        yield {key: change for group in groups.values() for key, change in group.items()}
    yield from groups.values()
    yield {}


class _Standing(NamedTuple):
    """What is held back under one mapping of rejections, by the revision that wrote it."""

    rejected: Mapping[str, Rejection]
    pending: dict[int, list[str]]  # what decodes
    stuck: dict[int, set[str]]  # what does not
    of_schema: dict[Schema, set[int]]  # the revisions with a pending key that falls under it


def _same(one: Any, other: Any) -> bool:
    """Whether two decoded values are the same JSON: 1, 1.0 and true are not, though they are equal."""
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return bool(one == other)


class _Walk:
    """Looks keys up in a snapshot in ascending order, in one pass."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._items = snapshot._entries.items()
        self._item = next(self._items, None)

    def at(self, key: str) -> Item | None:
        while self._item is not None and self._item[0] < key:
            self._item = next(self._items, None)
        return self._item if self._item is not None and self._item[0] == key else None


def _decodable(versions: Iterable[RawVersion]) -> Iterator[Item]:
    for version in versions:
        if isinstance(version.value, Missing):
            continue
        try:
            yield version.key, decode(version.value), version.revision
        except InvalidValue:
            continue
