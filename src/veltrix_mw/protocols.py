"""What the core asks of a store, and the values that travel between them.

Owns the seam between the core and its backends: raw bytes, revisions and positions. Knows no backend, and
decodes nothing. A store implements `Followed`, `Written` and `Remembered`; each call ends by its `timeout_s`
and raises only `StoreError`s (and `Conflict`, from `commit`).

A namespace's writes are ordered by revision, an integer that only grows within one incarnation. Each
acknowledged write is one revision, whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from veltrix_mw.errors import Compacted
from veltrix_mw.values import Missing

__all__ = [
    "Batch",
    "ChangeRecord",
    "Confirmation",
    "Followed",
    "Limits",
    "Listing",
    "Position",
    "RawChange",
    "RawOperation",
    "RawVersion",
    "Remembered",
    "Restored",
    "Store",
    "StoreInfo",
    "Watch",
    "Written",
]


@dataclass(frozen=True, slots=True)
class RawOperation:
    """One operation as a store takes it: `value` is JSON text in UTF-8, or `MISSING` to delete."""

    key: str
    value: bytes | Missing
    expected: int | None = None


@dataclass(frozen=True, slots=True)
class ChangeRecord:
    """Who made a revision, why and when; never what.

    `time_s` is Unix time in seconds by the writer's clock; `traceparent` is the W3C header of the writer's
    span, or empty.
    """

    author: str = ""
    reason: str = ""
    time_s: float = 0.0
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class RawChange:
    """One key as a revision left it: `value` is the stored bytes, `MISSING` when it was deleted."""

    key: str
    value: bytes | Missing


@dataclass(frozen=True, slots=True)
class Position:
    """Where a follower stands: everything up to `revision` of `incarnation` is applied.

    `fingerprint` is the store's own mark of that revision (opaque to the core). A store that is asked to
    watch from a position checks it against its history: another mark means another history (`Restored`).
    """

    incarnation: str
    revision: int
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """Every entry of the namespace at one revision.

    `entries` are (key, value, mod_revision), ascending by key, each key once; `position.revision` is the
    namespace's newest revision, 0 when nothing was ever written.
    """

    position: Position
    entries: Sequence[tuple[str, bytes, int]]


@dataclass(frozen=True, slots=True)
class Batch:
    """One revision, whole: its changes (each key once) and its record.

    `position` is the position once it is applied; `previous` the namespace's revision before it.
    """

    position: Position
    previous: int
    changes: tuple[RawChange, ...]
    record: ChangeRecord = field(default_factory=ChangeRecord)


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What the authority's newest revision is, by a linearizable query: `incarnation`, `revision`.

    `count` is the number of entries in the namespace.
    """

    incarnation: str
    revision: int
    count: int


@dataclass(frozen=True, slots=True)
class RawVersion:
    """One version of a key: the bytes it was given at `revision`, `MISSING` when it was deleted there."""

    key: str
    value: bytes | Missing
    revision: int
    record: ChangeRecord


@dataclass(frozen=True, slots=True)
class Limits:
    """What one transaction may hold; `max_operations` None for no limit."""

    max_value_bytes: int
    max_operations: int | None = None
    max_transaction_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What a store is: `origin` (`etcd`, `redis`, `sqlite`, `memory`), its URL without secrets, namespace, limits."""

    origin: str
    url: str
    namespace: str
    limits: Limits


class Restored(Compacted):
    """The store's history is not the one that was followed: a backup was restored, or the file replaced.

    Who may write mints a new incarnation (`renew_incarnation`), then all list again.
    """


class Watch(Protocol):
    """An open watch. Used by one thread, but for `close`, which may come from another and ends `next` at once."""

    def next(self, timeout_s: float) -> Sequence[Batch]:
        """The next revisions in order, waiting up to `timeout_s` for the first; empty when none came.

        Raises `Compacted` (list again), `Restored`, or another `StoreError` (watch again).
        """
        ...

    def close(self) -> None:
        """End the watch; `next` in another thread returns or raises at once. Idempotent."""
        ...


class Followed(Protocol):
    """A store that can be followed: list, then watch, and now and then confirm."""

    def list(self, *, timeout_s: float) -> Listing:
        """Everything, at one revision."""
        ...

    def watch(self, position: Position, *, timeout_s: float) -> Watch:
        """What comes after `position`. Raises `Compacted` or `Restored` when that cannot be had."""
        ...

    def confirm(self, position: Position, *, timeout_s: float) -> Confirmation:
        """The newest revision there is now; raises `Restored` when `position` is not in the history, `Compacted`
        when that can no longer be told."""
        ...


class Written(Protocol):
    """A store that orders writes."""

    def commit(self, operations: Sequence[RawOperation], record: ChangeRecord, *, timeout_s: float) -> int:
        """Apply all operations as one revision, or none; returns the revision.

        The keys are distinct. Raises `Conflict` when an `expected` does not hold, `KeyMissing` when a delete
        without `expected` finds its key absent, `AuthFailed` when this process may not write.
        """
        ...

    def read(self, keys: Sequence[str], revision: int | None, *, timeout_s: float) -> dict[str, tuple[bytes, int]]:
        """The present ones of `keys` as (value, mod_revision), now (linearizable) or as of a past revision.

        Raises `Compacted` when that revision is no longer kept, `ValueError` when it does not exist yet.
        """
        ...

    def renew_incarnation(self, known: str, *, timeout_s: float) -> str:
        """Replace the incarnation if it still is `known` (compare-and-set); returns the one now stored."""
        ...


class Remembered(Protocol):
    """A store that keeps history."""

    def history(self, key: str, *, limit: int, timeout_s: float) -> Sequence[RawVersion]:
        """The kept versions of one key, newest first."""
        ...

    def list_at(self, revision: int, *, timeout_s: float) -> Listing:
        """Everything as of a past revision; raises `Compacted` when it is no longer kept."""
        ...


@runtime_checkable
class Store(Followed, Written, Remembered, Protocol):
    """One backend. Constructing it opens nothing; it may be used from several threads, and after a fork."""

    @property
    def info(self) -> StoreInfo: ...

    def close(self) -> None:
        """Close every connection. Idempotent; a later call opens anew."""
        ...
