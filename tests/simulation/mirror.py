"""A simulated mirror: what Redis does with a namespace's keys, and what befalls them.

Owns the rules that docs/redis-layout.md gives the scripts, over plain Python objects: a hash of entries with its meta,
a stream, a lease and a token. Time is a number that the test moves; each call is one step, as a script is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from veltrix_mw.digest import digest_of
from veltrix_mw.errors import Compacted, LeaseLost, StoreUnavailable
from veltrix_mw.protocols import Batch, Lease, Listing, MirrorState, Position, RawChange
from veltrix_mw.values import Missing

NOWHERE = Position("", 0)
DIGEST_MOD = 1 << 64


def digest_of_all(entries: dict[str, tuple[bytes, int]]) -> int:
    return sum(digest_of(key, revision) for key, (_, revision) in entries.items()) % DIGEST_MOD


@dataclass
class Meta:
    """What the hash says of itself."""

    position: Position
    count: int
    digest: int
    token: int
    lazy: tuple[str, ...] = ()
    proved_us: int | None = None


@dataclass
class Added:
    """One entry of the stream; `relist`: a fill, which has no changes in it."""

    position: Position
    previous: int
    previous_mark: str
    changes: tuple[RawChange, ...] = ()
    relist: bool = False


@dataclass
class Held:
    """A lease as it stands, until `until_us`."""

    lease: Lease
    until_us: int


@dataclass
class Kept:
    """All that the server keeps; `meta` and `entries` are one hash, and go together."""

    meta: Meta | None = None
    entries: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    stream: list[Added] = field(default_factory=list)
    held: Held | None = None
    token: int = 0


class SimulatedMirror:
    """The server. `changed(lease, before)` is told of each change that a relay makes, right after it."""

    def __init__(self, clock: Callable[[], float], *, offset_s: float) -> None:
        self._clock = clock
        self.offset_s = offset_s
        self.kept = Kept()
        self.connections = 0  # grows where every connection is lost
        self.changed: Callable[[Lease, Position], None] = lambda lease, before: None

    # What befalls it

    def flush(self) -> None:
        self.kept = Kept()

    def evict_entries(self) -> None:
        self.kept.meta, self.kept.entries = None, {}

    def evict_stream(self) -> None:
        self.kept.stream = []

    def evict_lease(self) -> None:
        self.kept.held = None

    def trim(self, keep: int) -> None:
        self.kept.stream = self.kept.stream[len(self.kept.stream) - min(keep, len(self.kept.stream)) :]

    def dump(self) -> Kept:
        return deepcopy(self.kept)

    def put_back(self, dump: Kept) -> None:
        self.kept = deepcopy(dump)

    # The reader's calls

    def clock_us(self) -> int:
        return int((self._clock() + self.offset_s) * 1_000_000)

    @property
    def position(self) -> Position:
        return NOWHERE if self.kept.meta is None else self.kept.meta.position

    @property
    def holder(self) -> Lease | None:
        held = self.kept.held
        return None if held is None or held.until_us <= self.clock_us() else held.lease

    def state(self) -> MirrorState:
        meta, holder = self.kept.meta, self.holder
        relay = "" if holder is None else holder.holder
        if meta is None:
            return MirrorState(NOWHERE, relay=relay)
        return MirrorState(meta.position, meta.count, meta.digest, meta.lazy, self._age_s(meta), relay)

    def _age_s(self, meta: Meta) -> float:
        return float("inf") if meta.proved_us is None else max(0.0, (self.clock_us() - meta.proved_us) / 1e6)

    def list(self) -> Listing:
        meta = self.kept.meta
        if meta is None:
            raise StoreUnavailable("the mirror is empty")
        entries = [(key, *self.kept.entries[key]) for key in sorted(self.kept.entries)]
        return Listing(meta.position, entries, origin="redis", age_s=self._age_s(meta))

    def check(self, position: Position) -> None:
        """Raise unless a watch can resume at `position`."""
        self.judge_newest(position)
        at = next((added for added in self.kept.stream if added.position.revision == position.revision), None)
        if position.revision == self.position.revision:
            return
        first = self.kept.stream[0] if self.kept.stream else None
        if position.revision == 0:
            known = first is not None and first.previous == 0 and not first.relist
        else:
            known = at is not None
            if at is not None and at.position.fingerprint != position.fingerprint:
                raise Compacted("the mirror cannot resume: another history; list again")
        if not known:
            raise Compacted("the history is no longer kept; list again")

    def judge_newest(self, position: Position) -> None:
        newest = self.position
        if not newest.incarnation:
            raise StoreUnavailable("the mirror is empty")
        if newest.incarnation != position.incarnation:
            raise Compacted("the mirror cannot resume: another incarnation; list again")
        if position.revision > newest.revision:
            raise StoreUnavailable("the mirror is behind")
        if position.revision == newest.revision and position.fingerprint != newest.fingerprint:
            raise Compacted("the mirror cannot resume: another history; list again")

    def after(self, position: Position) -> list[Batch]:
        """What the stream holds after `position`, without a gap."""
        batches = []
        for added in self.kept.stream:
            if added.position.revision <= position.revision:
                continue
            if added.position.incarnation != position.incarnation or added.relist:
                raise Compacted("it can only be listed; list again")
            if (added.previous, added.previous_mark) != (position.revision, position.fingerprint):
                raise Compacted("the stream does not reach back; list again")
            position = added.position
            batches.append(Batch(position, added.previous, added.changes, origin="redis"))
        return batches

    # The relay's calls

    def elect(self, holder: str, ttl_s: float) -> tuple[Lease | None, str, float]:
        standing = self.holder
        if standing is not None:
            assert self.kept.held is not None
            return None, standing.holder, (self.kept.held.until_us - self.clock_us()) / 1e6
        meta = self.kept.meta
        self.kept.token = max(self.kept.token, 0 if meta is None else meta.token) + 1
        lease = Lease(holder, self.kept.token)
        self.kept.held = Held(lease, self.clock_us() + int(ttl_s * 1e6))
        return lease, holder, ttl_s

    def keep(self, lease: Lease, ttl_s: float) -> MirrorState:
        self.check_lease(lease)
        assert self.kept.held is not None
        self.kept.held.until_us = self.clock_us() + int(ttl_s * 1e6)
        return self.state()

    def resign(self, lease: Lease) -> None:
        if self.holder == lease:
            self.kept.held = None

    def check_lease(self, lease: Lease) -> None:
        if self.holder != lease:
            raise LeaseLost("the lease is another's, or ran out")

    def check_token(self, lease: Lease) -> None:
        if self.kept.meta is not None and self.kept.meta.token > lease.token:
            raise LeaseLost("a later relay wrote")

    def check_forwards(self, position: Position) -> None:
        now = self.position
        if now.incarnation == position.incarnation and now.revision > position.revision:
            raise Compacted("the mirror is newer than the listing; list again")

    def check_follows(self, batch: Batch) -> None:
        if (self.position.incarnation, self.position.revision) != (batch.position.incarnation, batch.previous):
            raise Compacted("the mirror does not stand there; fill it")
        if self.kept.stream and self.kept.stream[-1].position.revision >= batch.position.revision:
            raise Compacted("the stream is ahead; fill it")

    def revisions(self) -> tuple[Position, dict[str, int]]:
        return self.position, {key: revision for key, (_, revision) in self.kept.entries.items()}

    def fill(self, lease: Lease, listing: Listing, digest: int, lazy: Sequence[str]) -> None:
        self.check_lease(lease)
        self.check_token(lease)
        position, before = listing.position, self.position
        self.check_forwards(position)
        entries = {key: (value, revision) for key, value, revision in listing.entries}
        self.kept.meta = Meta(position, len(entries), digest, lease.token, tuple(lazy))
        self.kept.entries = entries
        self.kept.stream = []
        if position.revision:
            self.kept.stream = [Added(position, position.revision, position.fingerprint, relist=True)]
        self.changed(lease, before)

    def append(self, lease: Lease, batches: Sequence[Batch], counts: Sequence[tuple[int, int]]) -> None:
        for batch, (count, digest) in zip(batches, counts, strict=True):
            self.check_lease(lease)
            self.check_follows(batch)
            self.check_token(lease)
            before = self.position
            self.kept.stream.append(Added(batch.position, batch.previous, before.fingerprint, batch.changes))
            for change in batch.changes:
                if isinstance(change.value, Missing):
                    self.kept.entries.pop(change.key, None)
                else:
                    self.kept.entries[change.key] = (change.value, batch.position.revision)
            meta = self.kept.meta
            proved_us, lazy = (None, ()) if meta is None else (meta.proved_us, meta.lazy)
            self.kept.meta = Meta(batch.position, count, digest, lease.token, lazy, proved_us)
            self.changed(lease, before)

    def prove(self, lease: Lease, position: Position, asked_at_us: int) -> None:
        self.check_lease(lease)
        if self.position != position:
            raise Compacted("the mirror does not stand there")
        meta, before = self.kept.meta, self.position
        assert meta is not None
        meta.proved_us = max(asked_at_us, meta.proved_us or 0)
        self.changed(lease, before)
