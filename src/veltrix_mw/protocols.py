"""What the core asks of a store, and the values that travel between them.

Owns the seam between the core and its backends: raw bytes, revisions and positions. Knows no backend, and
decodes nothing. A store implements `Followed`, `Written`, `Remembered` and `Unitary`; each call ends by its `timeout_s`
and raises only `StoreError`s (and `Conflict`, from `commit`).

A namespace's writes are ordered by revision, an integer that only grows within one incarnation. Each
acknowledged write is one revision, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from veltrix_mw.errors import AuthFailed, Compacted, StoreUnavailable
from veltrix_mw.values import Missing

__all__ = [
    "Batch",
    "CertificateFault",
    "ChangeRecord",
    "Confirmation",
    "FailsOver",
    "Filled",
    "Followed",
    "FoundUnits",
    "Leaderless",
    "Lease",
    "LeaseStore",
    "Limits",
    "Listing",
    "Mirror",
    "MirrorState",
    "MirrorWriter",
    "MirroredUnit",
    "Moved",
    "NotLetIn",
    "NotPermitted",
    "Position",
    "RawChange",
    "RawOperation",
    "RawUnit",
    "RawVersion",
    "Recognizing",
    "Remembered",
    "Restored",
    "Silent",
    "Store",
    "StoreInfo",
    "TooMuch",
    "UnitFeed",
    "UnitMirror",
    "Unitary",
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
    """Every eager entry of the namespace at one revision.

    `entries` are (key, value, mod_revision), ascending by key, each key once; `position.revision` is the
    namespace's newest revision, 0 when nothing was ever written. `origin` is the tier that it came from, empty for
    the store's own; `ignored` how many keys were passed over because they are none of ours, by their shape. `age_s` is
    how old this was when it was asked for: 0 from the authority itself, the relay's own age from a mirror.
    `passed_over` says why the other tier was not asked for it by a process that had nothing yet, empty otherwise;
    `unfilled` that it is a mirror that is empty, as before its first relay. `lazy` are the prefixes that a mirror left
    out.
    """

    position: Position
    entries: Sequence[tuple[str, bytes, int]]
    origin: str = ""
    ignored: int = 0
    age_s: float = 0.0
    passed_over: str = ""
    unfilled: bool = False
    lazy: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """One revision, whole: its changes to eager keys (each key once, perhaps none) and its record.

    `position` is the position once it is applied; `previous` the namespace's revision before it. `origin` is the tier
    that it came from, empty for the store's own; `lazy` are the prefixes that a mirror leaves out of what it lists.
    `lazy_changes` are the changes below lazy prefixes.
    """

    position: Position
    previous: int
    changes: tuple[RawChange, ...]
    record: ChangeRecord = field(default_factory=ChangeRecord)
    origin: str = ""
    lazy: tuple[str, ...] = ()
    lazy_changes: tuple[RawChange, ...] = ()


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What the authority's newest revision is, by a linearizable query: `incarnation`, `revision`.

    `count` is the number of eager entries in the namespace, None where that is not known. `age_s` is how old that
    knowledge was when the question was sent: 0 from the authority itself, the relay's own age from a mirror. `digest`
    is the keyspace's (see `Snapshot.digest`), where it is known. `cost_s` is how long the server that answered took,
    without those that were tried in vain before it; None where that is as long as the call.
    """

    incarnation: str
    revision: int
    count: int | None
    age_s: float = 0.0
    digest: int | None = None
    cost_s: float | None = None


@dataclass(frozen=True, slots=True)
class RawVersion:
    """One version of a key: the bytes it was given at `revision`, `MISSING` when it was deleted there."""

    key: str
    value: bytes | Missing
    revision: int
    record: ChangeRecord


@dataclass(frozen=True, slots=True)
class RawUnit:
    """One lazy unit: (key, value, mod_revision) of each of its keys, ascending; none where it is absent.

    `refused` says why it cannot be read where it is beyond the bounds of a unit, and is empty otherwise.
    """

    entries: tuple[tuple[str, bytes, int], ...]
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one transaction may hold; `max_operations` None for no limit."""

    max_value_bytes: int
    max_operations: int | None = None
    max_transaction_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What a store is: `origin` (`etcd`, `redis`, `sqlite`, `memory`), its URL without secrets, namespace, limits.

    `lazy` are the prefixes that it neither lists, counts nor brings changes of: they are read on demand.
    """

    origin: str
    url: str
    namespace: str
    limits: Limits
    lazy: tuple[str, ...] = ()


class Moved(StoreUnavailable):
    """Another tier is followed from here on. Watch again, in `after_s` seconds: a fleet does not move in step.

    `mended`: it is the one that is to be followed, and nothing is wrong. `tier`: which it is, as its `origin`.
    """

    def __init__(self, message: str, *, after_s: float = 0.0, mended: bool = False, tier: str = "") -> None:
        super().__init__(message)
        self.after_s = after_s
        self.mended = mended
        self.tier = tier


class CertificateFault(AuthFailed):
    """The store wants our certificate or refuses it, or a file of it cannot be used. Who replaces the file mends it."""


class NotLetIn(AuthFailed):
    """The store refused user or password, or wants some where none are given."""


class NotPermitted(AuthFailed):
    """The store took the credentials, and they do not allow this: `lacking`, where the store names it."""

    def __init__(self, message: str, *, lacking: str = "") -> None:
        super().__init__(message)
        self.lacking = lacking


class Silent(StoreUnavailable):
    """The store did not answer by the deadline."""


class TooMuch(StoreUnavailable):
    """The answer is longer than it may be. Ask for less at a time."""


class Leaderless(StoreUnavailable):
    """The store answers, and serves nothing: its members have elected no leader."""


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


class Unitary(Protocol):
    """A store that can be read a lazy unit at a time."""

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> dict[str, RawUnit]:
        """Each of `names`, all as of one past position; of `keys.unit_of` their names.

        Where the position's fingerprint is empty its revision alone is gone by. Raises `Compacted` when that is no
        longer kept, `Restored` when it is not in the history.
        """
        ...


@runtime_checkable
class Recognizing(Protocol):
    """A store that tells cheaper than by `confirm` whether it has a position in its history."""

    def recognize(self, position: Position, *, timeout_s: float) -> None:
        """Raises `Restored` where it has not, `Compacted` where that can no longer be told by its history."""
        ...


@runtime_checkable
class Store(Followed, Written, Remembered, Unitary, Protocol):
    """One backend. Constructing it opens nothing; it may be used from several threads, and after a fork."""

    @property
    def info(self) -> StoreInfo: ...

    def close(self) -> None:
        """Close every connection. Idempotent; a later call opens anew."""
        ...


# Mirrors


@dataclass(frozen=True, slots=True)
class MirrorState:
    """Where a mirror stands, as its meta says: all of it read in one round trip.

    `position` is the empty position where there is no meta (empty, flushed, evicted). `age_s` is how long ago, by the
    mirror's own clock, the relay asked the authority and found this to be its newest; inf where it never did. `relay`
    is the lease's holder, empty if none. `lazy` are the prefixes that the mirror leaves out.
    """

    position: Position
    count: int = 0
    digest: int = 0
    lazy: tuple[str, ...] = ()
    age_s: float = float("inf")
    relay: str = ""


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease that was won: `holder` is an instance's name, `token` the fencing token, larger than any before it."""

    holder: str
    token: int


class LeaseStore(Protocol):
    """A store that keeps leases by name, each with one holder in the fleet."""

    def acquire(self, name: str, holder: str, *, ttl_s: float, timeout_s: float) -> tuple[Lease | None, str, float]:
        """Take the lease if nobody has it. Returns it, or None; who holds it; and within how many seconds it ends.

        `holder` stands for one attempt to take it, repeated until an answer comes: what it was given already, where
        the answer was lost, is its own, under the same token. Raises `AuthFailed` where these credentials may not.
        """
        ...

    def renew(self, name: str, lease: Lease, *, ttl_s: float, timeout_s: float) -> None:
        """Hold it for another `ttl_s`, as long as it was taken for. Raises `LeaseLost` where it ran out, or is
        another's."""
        ...

    def release(self, name: str, lease: Lease, *, timeout_s: float) -> None:
        """Give it up, if it is held."""
        ...

    def close(self) -> None:
        """As a store's."""
        ...


@runtime_checkable
class Mirror(Protocol):
    """A store fed from the authority, as a worker reads it. The same rules as for `Followed`."""

    @property
    def info(self) -> StoreInfo: ...

    def state(self, *, timeout_s: float) -> MirrorState:
        """Where it stands now."""
        ...

    def list(self, *, timeout_s: float) -> Listing:
        """Everything, at one revision. Raises `StoreUnavailable` where there is nothing, or it does not add up."""
        ...

    def watch(self, position: Position, *, timeout_s: float) -> Watch:
        """What comes after `position`. Raises `Compacted` when it cannot resume there: list instead."""
        ...

    def close(self) -> None:
        """As a store's."""
        ...


@dataclass(frozen=True, slots=True)
class MirroredUnit:
    """A lazy unit as of `revision`; it is unchanged since `since`, at the latest."""

    unit: RawUnit
    revision: int
    since: int


@dataclass(frozen=True, slots=True)
class FoundUnits:
    """Where a mirror stands, and the units that it holds of those that were asked for."""

    state: MirrorState
    units: Mapping[str, MirroredUnit]


Filled = Callable[[Sequence[str]], None]
"""Is told the names of units that a mirror was filled with, in the thread that watches it."""


class UnitMirror(Mirror, Protocol):
    """A mirror that holds lazy units, too, for as long as it likes."""

    def watch(self, position: Position, *, timeout_s: float, filled: Filled | None = None) -> Watch:
        """As `Mirror.watch`; `filled` is told of fills, as `Watch.next` meets them."""
        ...

    def find_units(self, names: Sequence[str], *, timeout_s: float) -> FoundUnits:
        """Those of `names` that it holds: each is current to where the mirror stands, or later."""
        ...

    def want_units(self, names: Sequence[str], *, timeout_s: float) -> None:
        """Ask whoever feeds it for units. Raises `AuthFailed` where these credentials may not."""
        ...


class MirrorWriter(Protocol):
    """A mirror as its relay writes it.

    Each call that takes a lease raises `LeaseLost`, changing nothing, unless that lease is held at that moment.
    """

    def elect(self, holder: str, *, ttl_s: float, timeout_s: float) -> tuple[Lease | None, str, float]:
        """Take the lease if nobody has it. Returns it, or None; who holds it; and in how many seconds it ends.

        Raises `AuthFailed` where these credentials may not.
        """
        ...

    def keep(self, lease: Lease, *, ttl_s: float, timeout_s: float) -> MirrorState:
        """Hold the lease for another `ttl_s`; returns where the mirror stands."""
        ...

    def resign(self, lease: Lease, *, timeout_s: float) -> None:
        """Give the lease up, if it is held."""
        ...

    def clock(self, *, timeout_s: float) -> int:
        """The mirror's own clock, in microseconds; never goes back while the server lives."""
        ...

    def revisions(self, *, timeout_s: float) -> tuple[Position, dict[str, int]]:
        """The mirror's position, and each key's `mod_revision` there; the empty position if it does not add up."""
        ...

    def fill(self, lease: Lease, listing: Listing, *, digest: int, lazy: Sequence[str], timeout_s: float) -> None:
        """Replace all that the mirror holds by `listing`, in one step as readers see it."""
        ...

    def append(
        self, lease: Lease, batches: Sequence[Batch], *, counts: Sequence[tuple[int, int]], timeout_s: float
    ) -> None:
        """Add revisions; `counts` are (count, digest) after each.

        Raises `Compacted` where the mirror does not stand at the incarnation and `previous` of one of them (those
        before it were added): fill it.
        """
        ...

    def prove(self, lease: Lease, position: Position, *, asked_at_us: int, timeout_s: float) -> None:
        """Say that the authority, asked at `asked_at_us` of `clock`, had nothing newer than `position`.

        Raises `Compacted` where the mirror does not stand at `position`.
        """
        ...


@runtime_checkable
class FailsOver(Protocol):
    """What calls one of several servers."""

    @property
    def failovers(self) -> int:
        """Times so far that calls went to another server than before; a plain integer that only grows."""
        ...


class UnitFeed(UnitMirror, Protocol):
    """A mirror that holds lazy units, as its relay fills them."""

    def wanted_units(self, *, wait_s: float, timeout_s: float) -> Sequence[str]:
        """The names that were asked for since, each once, waiting up to `wait_s` for the first. Anybody may ask."""
        ...

    def current_units(self, names: Sequence[str], *, timeout_s: float) -> Collection[str]:
        """Those of `names` that it holds, and keeps current."""
        ...

    def fill_units(
        self,
        lease: Lease,
        position: Position,
        units: Mapping[str, MirroredUnit],
        names: Sequence[str],
        *,
        timeout_s: float,
    ) -> None:
        """Add units that are as of `position`, and announce `names`, be it that some are there already.

        Raises `LeaseLost` as all that takes a lease, and `Compacted` where the mirror does not stand at `position`.
        """
        ...
