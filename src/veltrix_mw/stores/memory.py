"""The store in this process's memory: for tests, for single-process apps, and the measure for every other store.

Owns keyspaces that live as long as a store that uses them. Knows no file and no network; what it holds ends with
the process, and after a fork parent and child each go on with a copy of their own.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakSet, WeakValueDictionary

from veltrix_mw.errors import Compacted, StoreUnavailable
from veltrix_mw.forking import STORES, around_forks
from veltrix_mw.keys import outermost, unit_of
from veltrix_mw.protocols import (
    Batch,
    ChangeRecord,
    Confirmation,
    Limits,
    Listing,
    Position,
    RawChange,
    RawOperation,
    RawUnit,
    RawVersion,
    Restored,
    StoreInfo,
)
from veltrix_mw.stores.conditions import check
from veltrix_mw.stores.units import bounded
from veltrix_mw.values import MAX_VALUE_BYTES, MISSING, Missing

__all__ = ["MemoryStore"]

_MAX_BATCHES: Final = 256  # revisions one `next` returns at most: a follower publishes between two calls
_FORK_WAIT_S: Final = 1.0  # a keyspace is held for microseconds; only a fork out of its own lock would wait longer


@dataclass(frozen=True, slots=True)
class _Revision:
    """What one commit did."""

    mark: str
    changes: tuple[RawChange, ...]
    record: ChangeRecord
    size: int


class _Keyspace:
    """One namespace's entries and history.

    Every attribute is read and changed only while `changed` is held.
    """

    def __init__(self) -> None:
        # Protects the whole keyspace; notified on every commit, renewal and close of a watch.
        self.changed = threading.Condition(threading.Lock())
        self.incarnation = ""
        self.revision = 0
        self.oldest = 1
        self.kept_bytes = 0
        self.revisions: dict[int, _Revision] = {}
        self.entries: dict[str, tuple[bytes, int]] = {}
        self.versions: dict[str, list[RawVersion]] = {}
        with _registry_lock:
            _keyspaces.add(self)

    def position(self, revision: int) -> Position:
        mark = self.revisions[revision].mark if revision else ""
        return Position(self.incarnation, revision, mark)

    def check(self, position: Position) -> None:
        """Raise `Restored` or `Compacted` unless what follows `position` is known."""
        if position.incarnation and position.incarnation != self.incarnation:
            raise Restored("the store has another incarnation than the one that was followed; list again")
        if position.revision > self.revision:
            raise Restored(f"revision {position.revision} was never written to this store; list again")
        kept = self.revisions.get(position.revision)
        if kept is not None and position.fingerprint and kept.mark != position.fingerprint:
            raise Restored(f"revision {position.revision} is not the one that was followed; list again")
        if position.revision < self.oldest - (self.oldest == 1):
            raise Compacted(f"the history after revision {position.revision} is no longer kept; list again")
        if kept is not None and not position.fingerprint:
            raise Compacted(
                f"nothing proves that revision {position.revision} is the one that was followed; list again"
            )

    def check_kept(self, position: Position) -> None:
        """Raise `Restored` or `Compacted` unless the keyspace as of `position` is known."""
        kept = self.revisions.get(position.revision)
        is_other = kept is not None and position.fingerprint not in {"", kept.mark}
        # A position of no incarnation is of before the first write: any label may follow it.
        if position.incarnation not in {"", self.incarnation} or position.revision > self.revision or is_other:
            raise Restored(f"revision {position.revision} that was followed is not in the store any more; list again")
        self.check_past(position.revision)

    def check_past(self, revision: int) -> None:
        """Raise unless the keyspace as of `revision` is known."""
        if not 0 <= revision <= self.revision:
            raise ValueError(f"there is no revision {revision}; the newest is {self.revision}")
        if revision < self.oldest - (self.oldest == 1):
            raise Compacted(f"revision {revision} is no longer kept; the oldest that is kept is {self.oldest}")

    def at(self, key: str, revision: int) -> tuple[bytes, int] | None:
        for version in reversed(self.versions.get(key, ())):
            if version.revision <= revision:
                return None if isinstance(version.value, Missing) else (version.value, version.revision)
        return None

    def apply(self, operations: Sequence[RawOperation], record: ChangeRecord) -> int:
        for operation in operations:
            entry = self.entries.get(operation.key)
            check(operation, entry[1] if entry else 0, lambda entry=entry: entry[0])  # type: ignore[misc]
        self.incarnation = self.incarnation or secrets.token_hex(8)
        self.revision += 1
        revision = self.revision
        size = 0
        for operation in operations:
            key, value = operation.key, operation.value
            self.versions.setdefault(key, []).append(RawVersion(key, value, revision, record))
            if isinstance(value, Missing):
                del self.entries[key]
            else:
                self.entries[key] = (value, revision)
                size += len(value)
        changes = tuple(sorted((RawChange(op.key, op.value) for op in operations), key=lambda change: change.key))
        self.revisions[revision] = _Revision(secrets.token_hex(8), changes, record, size)
        self.kept_bytes += size
        return revision

    def trim(self, keep_revisions: int, keep_bytes: int) -> None:
        """Forget the oldest revisions until what is kept is within bounds; never the newest one."""
        while self.oldest < self.revision and (
            self.revision - self.oldest >= keep_revisions or self.kept_bytes > keep_bytes
        ):
            gone = self.revisions.pop(self.oldest)
            self.kept_bytes -= gone.size
            self.oldest += 1
            for change in gone.changes:
                if change.value is MISSING:
                    self._forget(change.key, self.oldest)
            for change in self.revisions[self.oldest].changes:
                self._forget(change.key, self.oldest)

    def _forget(self, key: str, oldest: int) -> None:
        """Drop the versions of `key` that no revision from `oldest` on can show."""
        kept = self.versions.get(key, [])
        while kept and kept[0].revision < oldest:
            replaced = len(kept) > 1 and kept[1].revision <= oldest
            if not replaced and kept[0].value is not MISSING:
                return
            kept.pop(0)
        if not kept:
            self.versions.pop(key, None)


# Protects the two registries below.
_registry_lock = threading.Lock()
_named: WeakValueDictionary[tuple[str, str], _Keyspace] = WeakValueDictionary()
_keyspaces: WeakSet[_Keyspace] = WeakSet()


class MemoryStore:
    """A namespace in this process's memory.

    Stores of the same non-empty `name` and `namespace` share one keyspace for as long as one of them lives; a
    store without a name has one of its own. Thread-safe. After a fork each process goes on with its own copy:
    what one writes the other never sees.
    """

    def __init__(
        self,
        *,
        name: str = "",
        namespace: str = "default",
        keep_revisions: int = 10_000,
        keep_bytes: int = 64 * 1024 * 1024,
        lazy: Sequence[str] = (),
    ) -> None:
        """`keep_revisions` and `keep_bytes` (of values) bound the history; the newest revision is always kept.

        `lazy` are the prefixes that are left out wherever the namespace is listed, watched or counted.
        """
        self._keyspace = _shared(name, namespace) if name else _Keyspace()
        self._watches: WeakSet[_MemoryWatch] = WeakSet()
        self._keep_revisions = keep_revisions
        self._keep_bytes = keep_bytes
        self._lazy = outermost(lazy)
        limits = Limits(max_value_bytes=MAX_VALUE_BYTES)
        self._info = StoreInfo("memory", f"memory://{name}", namespace, limits, self._lazy)

    @property
    def info(self) -> StoreInfo:
        return self._info

    def list(self, *, timeout_s: float) -> Listing:
        with self._held(timeout_s) as keyspace:
            position = keyspace.position(keyspace.revision)
            entries = [
                (key, value, revision)
                for key, (value, revision) in keyspace.entries.items()
                if not key.startswith(self._lazy)
            ]
        entries.sort()
        return Listing(position, entries)

    def watch(self, position: Position, *, timeout_s: float) -> _MemoryWatch:
        with self._held(timeout_s) as keyspace:
            keyspace.check(position)
            watch = _MemoryWatch(keyspace, position, self._lazy)
            self._watches.add(watch)
        return watch

    def confirm(self, position: Position, *, timeout_s: float) -> Confirmation:
        with self._held(timeout_s) as keyspace:
            keyspace.check(position)
            count = len(keyspace.entries)
            if self._lazy:
                count -= sum(key.startswith(self._lazy) for key in keyspace.entries)
            return Confirmation(keyspace.incarnation, keyspace.revision, count)

    def commit(self, operations: Sequence[RawOperation], record: ChangeRecord, *, timeout_s: float) -> int:
        if not operations:
            raise ValueError("a transaction needs at least one operation")
        with self._held(timeout_s) as keyspace:
            revision = keyspace.apply(operations, record)
            keyspace.trim(self._keep_revisions, self._keep_bytes)
            keyspace.changed.notify_all()
            return revision

    def read(self, keys: Sequence[str], revision: int | None, *, timeout_s: float) -> dict[str, tuple[bytes, int]]:
        with self._held(timeout_s) as keyspace:
            if revision is None:
                return {key: keyspace.entries[key] for key in keys if key in keyspace.entries}
            keyspace.check_past(revision)
            found = {key: keyspace.at(key, revision) for key in keys}
            return {key: entry for key, entry in found.items() if entry is not None}

    def renew_incarnation(self, known: str, *, timeout_s: float) -> str:
        with self._held(timeout_s) as keyspace:
            if keyspace.incarnation == known:
                keyspace.incarnation = secrets.token_hex(8)
                keyspace.changed.notify_all()
            return keyspace.incarnation

    def history(self, key: str, *, limit: int, timeout_s: float) -> Sequence[RawVersion]:
        with self._held(timeout_s) as keyspace:
            return keyspace.versions.get(key, [])[::-1][:limit]

    def list_at(self, revision: int, *, timeout_s: float) -> Listing:
        with self._held(timeout_s) as keyspace:
            keyspace.check_past(revision)
            keys = sorted(key for key in keyspace.versions if not key.startswith(self._lazy))
            found = [(key, keyspace.at(key, revision)) for key in keys]
            return Listing(
                keyspace.position(revision), [(key, entry[0], entry[1]) for key, entry in found if entry is not None]
            )

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> dict[str, RawUnit]:
        revision = position.revision
        with self._held(timeout_s) as keyspace:
            keyspace.check_kept(position)
            keys: dict[str, list[str]] = {name: [] for name in names}
            for key in keyspace.versions:
                if (unit := keys.get(unit_of(key, self._lazy))) is not None:
                    unit.append(key)
            found = {
                name: [(key, *entry) for key in sorted(unit) if (entry := keyspace.at(key, revision)) is not None]
                for name, unit in keys.items()
            }
        return {name: bounded(name, entries) for name, entries in found.items()}

    def close(self) -> None:
        with self._keyspace.changed:
            watches = tuple(self._watches)
        for watch in watches:
            watch.close()

    @contextlib.contextmanager
    def _held(self, timeout_s: float) -> Iterator[_Keyspace]:
        keyspace = self._keyspace
        changed = keyspace.changed
        if not changed.acquire(timeout=max(0.0, timeout_s)):
            raise StoreUnavailable(f"the in-memory store was busy for {timeout_s} s; try again")
        try:
            yield keyspace
        finally:
            changed.release()


class _MemoryWatch:
    """A watch on a keyspace; woken by its condition, so a change is seen at once."""

    def __init__(self, keyspace: _Keyspace, position: Position, lazy: tuple[str, ...]) -> None:
        self._keyspace = keyspace
        self._position = position
        self._lazy = lazy
        self._closed = False

    def next(self, timeout_s: float) -> Sequence[Batch]:
        deadline_s = time.monotonic() + timeout_s
        changed = self._keyspace.changed
        with changed:
            while True:
                if self._closed:
                    raise StoreUnavailable("the watch was closed; watch again")
                self._keyspace.check(self._position)
                batches = self._waiting()
                left_s = deadline_s - time.monotonic()
                if batches or left_s <= 0:
                    return batches
                changed.wait(left_s)

    def close(self) -> None:
        changed = self._keyspace.changed
        with changed:
            self._closed = True
            changed.notify_all()

    def _waiting(self) -> Sequence[Batch]:
        keyspace, applied = self._keyspace, self._position.revision
        last = min(keyspace.revision, applied + _MAX_BATCHES)
        batches = [self._batch(revision) for revision in range(applied + 1, last + 1)]
        if batches:
            self._position = batches[-1].position
        return batches

    def _batch(self, revision: int) -> Batch:
        made = self._keyspace.revisions[revision]
        changes = tuple(change for change in made.changes if not change.key.startswith(self._lazy))
        lazy = tuple(change for change in made.changes if change.key.startswith(self._lazy))
        return Batch(self._keyspace.position(revision), revision - 1, changes, made.record, lazy_changes=lazy)


def _shared(name: str, namespace: str) -> _Keyspace:
    made = _Keyspace()
    with _registry_lock:
        return _named.setdefault((name, namespace), made)


# What a fork must find at rest: a child has none of the threads that could finish what they began.
_held_for_fork: list[threading.Lock | threading.Condition] = []


def _before_fork() -> None:
    if _registry_lock.acquire(timeout=_FORK_WAIT_S):
        _held_for_fork.append(_registry_lock)
        locks = [keyspace.changed for keyspace in tuple(_keyspaces)]
        _held_for_fork.extend(lock for lock in locks if lock.acquire(timeout=_FORK_WAIT_S))


def _after_fork_in_parent() -> None:
    while _held_for_fork:
        _held_for_fork.pop().release()


def _after_fork_in_child() -> None:
    global _registry_lock
    _held_for_fork.clear()
    _registry_lock = threading.Lock()
    for keyspace in tuple(_keyspaces):
        keyspace.changed = threading.Condition(threading.Lock())


around_forks(STORES, before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
