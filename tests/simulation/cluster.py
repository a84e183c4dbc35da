"""A cluster: workers, relays, one authority, one mirror, and a network that fails between any two of them.

The workers' replicas, tiers and mirrored stores are the real ones, and so are the relays; the servers are simulated.
Nothing runs at once and no clock is real: whoever waits lets the others act until its time has come, so an answer may
come late, and the world has changed meanwhile. Every state that the authority ever had is remembered, so that all that
is served, and all that the mirror holds, can be judged.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeVar

from tests.simulation.mirror import SimulatedMirror, digest_of_all
from tests.simulation.world import Authority, Revision, State, _decoded
from veltrix_mw.errors import AuthFailed, Compacted, StoreError, StoreUnavailable, VeltrixError
from veltrix_mw.keyspace import Keyspace
from veltrix_mw.protocols import (
    Batch,
    ChangeRecord,
    Confirmation,
    Lease,
    Limits,
    Listing,
    MirrorState,
    Position,
    RawOperation,
    RawVersion,
    Restored,
    StoreInfo,
    Watch,
)
from veltrix_mw.relay import (
    LEASE_S,
    Append,
    Elect,
    Elected,
    Fill,
    Follow,
    Followed,
    Inspect,
    Inspected,
    Keep,
    Kept,
    Prove,
    Refused,
    Relay,
    RelayEvent,
    RelayStep,
    Resign,
    Rest,
    Rested,
    Written,
)
from veltrix_mw.replica import (
    RELIST_WITHIN_S,
    Begun,
    Confirm,
    Confirmed,
    Event,
    Failed,
    HistoryRead,
    List,
    Listed,
    Next,
    Notice,
    OpenWatch,
    Publication,
    ReadHistory,
    Received,
    Renew,
    Renewed,
    Replica,
    Resumed,
    Sleep,
    Slept,
    Step,
    Watching,
)
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.stores.mirrored import MirroredStore
from veltrix_mw.validation import Schemas
from veltrix_mw.values import MISSING

T = TypeVar("T")

INFO = StoreInfo("etcd", "simulated", "shop", Limits(max_value_bytes=1 << 20))
MIRROR_INFO = StoreInfo("redis", "simulated", "shop", Limits(max_value_bytes=1 << 20))

CALL_TIMEOUT_S = 2.0
LIST_TIMEOUT_S = 4.0  # less than the real one: no list is long here, and what hangs is not more instructive for longer
LOOK_S = 2.0  # how often a quiet watch on the mirror looks whether that is still there

LISTS_MOST = 20
"""In a second: whoever lists more often does not back off."""

CONVERGED_WITHIN_S = 30.0
"""After healing, for every worker to serve what the authority has."""

SETTLED_WITHIN_S = 60.0
"""After healing, for everything to be back in its place: most of it is the 10 s that a stale mirror is given."""


class ClusterAuthority(Authority):
    """An authority whose listings may hide that something was deleted, as etcd's do when its own tools delete.

    Such a deletion is a revision like any other for a watch. A listing shows the keys without it, and names the newest
    revision that left a trace.
    """

    def __post_init__(self) -> None:
        # What was deleted without a trace and then compacted: nobody can be told any more, but by a whole listing.
        self.swept: set[tuple[str, int]] = set()
        self.restores = 0
        self.hidden: set[str] = set()  # the marks of revisions that leave no trace
        self.current: set[tuple[str, int, str, int]] = set()
        self.superseded_by_content_s: dict[tuple[str, int, str, int], float] = {}
        super().__post_init__()

    @property
    def visible(self) -> Revision:
        """The newest revision that left a trace."""
        return next(kept for kept in reversed(self.log) if kept.mark not in self.hidden)

    def compact(self) -> None:
        super().compact()
        for before, kept in itertools.pairwise(self.log):
            if kept.mark in self.hidden:
                self.swept |= {(key, revision) for key, (_, revision) in before.state.items() if key not in kept.state}

    def restore(self, backup: tuple[str, int, list[Revision]]) -> None:
        super().restore(backup)
        self.restores += 1
        for kept in self.log[:-1]:  # as if all of it had been written now: who stood before it follows it from there
            superseded = (self.label, kept.number, kept.mark, digest_of_all(kept.state))
            if superseded in self.superseded_by_content_s:
                self.superseded_by_content_s[superseded] = self.clock_s

    def renew(self, known: str) -> str:
        label = super().renew(known)
        # Whoever knows of a deletion that a listing does not show takes its absence for a restore.
        assert self.labels <= self.restores or self.hidden, f"{known} was renamed, and no backup was put back"
        return label

    def delete_without_trace(self, keys: Sequence[str]) -> None:
        self.hidden.add(f"mark-{self.marks + 1}")
        self.write(dict.fromkeys(keys, MISSING))

    def _remember(self) -> None:
        super()._remember()
        newest, first = self.log[-1], self.log.index(self.visible)
        # A listing may name any of these, by what whoever asks knows already: nothing shows that there are others.
        named = self.log[first:]
        for kept in named[:-1]:
            self.known.setdefault((self.label, kept.number), []).append(dict(newest.state))
        digest = digest_of_all(newest.state)
        current = {(self.label, kept.number, kept.mark, digest) for kept in named}
        for gone in self.current - current:
            self.superseded_by_content_s[gone] = self.clock_s
        for back in current:
            self.superseded_by_content_s.pop(back, None)
        self.current = current


@dataclass
class Wire:
    """What the network does between a process and a server, until it is healed."""

    mode: str = "up"  # or "refused", "hangs", "deaf" (the answer is lost), "late" (the question comes after all)
    slow_s: float = 0.0


class Process:
    """Something that acts when its time has come. While it waits in a call, it is `busy`."""

    def __init__(self, world: Cluster, name: str, *, may_write: bool) -> None:
        self.world = world
        self.name = name
        self.may_write = may_write
        self.clock_offset_s = world.random.uniform(0, 10_000)
        self.wake_at_s = world.now_s
        self.paused_from_s: float | None = None  # what `wake_at_s` was before
        self.busy = False
        self.is_dead = False

    def clock(self) -> float:
        return self.world.now_s + self.clock_offset_s

    def wake_in(self, seconds: float) -> None:
        self.wake_at_s = max(self.wake_at_s, self.world.now_s + max(seconds, 0.001))

    def pause(self, seconds: float) -> None:
        self.unpause()
        self.paused_from_s = self.wake_at_s
        self.wake_at_s = self.world.now_s + seconds

    def unpause(self) -> None:
        if self.paused_from_s is not None:
            self.wake_at_s, self.paused_from_s = max(self.paused_from_s, self.world.now_s), None

    def act(self) -> None:
        raise NotImplementedError


# The servers, as one process reaches them


class AuthorityStore:
    """The authority as one process sees it, with a memory of what no listing shows (see `etcd_witness`)."""

    info = INFO

    def __init__(self, process: Process) -> None:
        self._process = process
        self._world = process.world
        self._known: Position | None = None
        self._complete_to = 0
        self.watches: list[AuthorityWatch] = []

    def _call(self, timeout_s: float, ask: Callable[[], T]) -> T:
        return self._world.call(self._process, "authority", timeout_s, ask)

    def list(self, *, timeout_s: float) -> Listing:
        return self._call(timeout_s, self._listing)

    def _listing(self) -> Listing:
        authority = self._world.authority
        visible = authority.visible
        found, known = Position(authority.label, visible.number, visible.mark), self._known
        hides_what_is_known = (
            known is not None
            and known.incarnation == found.incarnation
            and found.revision < known.revision <= authority.revision
        )
        position = known if hides_what_is_known and known is not None else found
        self._remember(position, authority.revision)
        return replace(authority.list(), position=position)

    def _remember(self, position: Position, complete_to: int) -> None:
        self._known, self._complete_to = position, complete_to

    def check_history(self, position: Position) -> None:
        """Raise unless `position` is in the history: the overlap of one."""
        authority = self._world.authority
        kept = authority.at(position.revision)
        if position.incarnation != authority.label or kept is None or kept.mark != position.fingerprint:
            self._known = None
            raise Restored("another history")

    def verify(self, position: Position) -> int:
        """From which revision on a watch can follow `position`."""
        authority = self._world.authority
        self.check_history(position)
        start = position.revision
        if start < authority.compacted and position == self._known:
            start = self._complete_to
        if start < authority.compacted:
            raise Compacted("compacted")
        return start

    def watch(self, position: Position, *, timeout_s: float) -> Watch:
        start = self._call(timeout_s, lambda: self.verify(position))
        watch = AuthorityWatch(self, self._process, position, start)
        self.watches.append(watch)
        return watch

    def confirm(self, position: Position, *, timeout_s: float) -> Confirmation:
        return self._call(timeout_s, lambda: self._confirmation(position))

    def _confirmation(self, position: Position) -> Confirmation:
        authority = self._world.authority
        self.check_history(position)
        newest = max(position.revision, authority.visible.number)
        if newest == position.revision:
            self._remember(position, authority.revision)
        return Confirmation(authority.label, newest, len(authority.state))

    def commit(self, operations: Sequence[RawOperation], record: ChangeRecord, *, timeout_s: float) -> int:
        raise NotImplementedError

    def read(self, keys: Sequence[str], revision: int | None, *, timeout_s: float) -> dict[str, tuple[bytes, int]]:
        raise NotImplementedError

    def renew_incarnation(self, known: str, *, timeout_s: float) -> str:
        def renew() -> str:
            if not self._process.may_write:
                raise AuthFailed("read only")
            self._known = None
            return self._world.authority.renew(known)

        return self._call(timeout_s, renew)

    def history(self, key: str, *, limit: int, timeout_s: float) -> Sequence[RawVersion]:
        return []

    def list_at(self, revision: int, *, timeout_s: float) -> Listing:
        raise NotImplementedError

    def close(self) -> None:
        for watch in list(self.watches):
            watch.close()


class AuthorityWatch:
    """An open watch; waits for nothing: whoever asks comes again."""

    def __init__(self, store: AuthorityStore, process: Process, position: Position, start: int) -> None:
        self._store = store
        self._process = process
        self._world = process.world
        self._position = position
        self._start = start
        self._connection = self._world.authority_connections
        self._delivered: list[Batch] = []
        self.is_closed = False
        self.is_half_open = False

    def next(self, timeout_s: float) -> Sequence[Batch]:
        world, authority = self._world, self._world.authority
        mode = world.wire(self._process, "authority").mode
        if mode == "refused" or self._connection != world.authority_connections or self.is_closed:
            raise StoreUnavailable("the connection is gone")
        if self.is_half_open or mode in {"hangs", "deaf"}:
            return ()
        self._store.check_history(self._position)
        batches, previous = [], self._position.revision
        for each in authority.log:
            if each.number > max(self._start, self._position.revision):
                batches.append(Batch(Position(authority.label, each.number, each.mark), previous, each.changes))
                previous = each.number
        batches = batches[: 1 + world.random.randrange(4)]
        if not batches:
            return ()
        self._position = batches[-1].position
        self._store._remember(self._position, self._position.revision)
        repeated, self._delivered = self._delivered, batches[-2:]
        return [*repeated, *batches] if world.repeats else batches

    def close(self) -> None:
        self.is_closed = True
        if self in self._store.watches:
            self._store.watches.remove(self)


class MirrorStore:
    """The mirror as one process reaches it: a worker that reads it, or a relay that writes it."""

    info = MIRROR_INFO

    def __init__(self, process: Process) -> None:
        self._process = process
        self._world = process.world

    def call(self, timeout_s: float, ask: Callable[[], T]) -> T:
        return self._world.call(self._process, "mirror", timeout_s, ask)

    @property
    def server(self) -> SimulatedMirror:
        return self._world.mirror

    def state(self, *, timeout_s: float) -> MirrorState:
        return self.call(timeout_s, self.server.state)

    def list(self, *, timeout_s: float) -> Listing:
        return self.call(timeout_s, self.server.list)

    def watch(self, position: Position, *, timeout_s: float) -> Watch:
        self.call(timeout_s, lambda: self.server.check(position))
        return MirrorWatch(self, self._process, position)

    def close(self) -> None:
        pass

    def elect(self, holder: str, *, ttl_s: float, timeout_s: float) -> tuple[Lease | None, str, float]:
        return self.call(timeout_s, lambda: self.server.elect(holder, ttl_s))

    def keep(self, lease: Lease, *, ttl_s: float, timeout_s: float) -> MirrorState:
        return self.call(timeout_s, lambda: self.server.keep(lease, ttl_s))

    def resign(self, lease: Lease, *, timeout_s: float) -> None:
        self.call(timeout_s, lambda: self.server.resign(lease))

    def clock(self, *, timeout_s: float) -> int:
        return self.call(timeout_s, self.server.clock_us)

    def revisions(self, *, timeout_s: float) -> tuple[Position, dict[str, int]]:
        return self.call(timeout_s, self.server.revisions)

    def fill(self, lease: Lease, listing: Listing, *, digest: int, lazy: Sequence[str], timeout_s: float) -> None:
        self.call(timeout_s, lambda: self.server.fill(lease, listing, digest, lazy))

    def append(
        self, lease: Lease, batches: Sequence[Batch], *, counts: Sequence[tuple[int, int]], timeout_s: float
    ) -> None:
        self.call(timeout_s, lambda: self.server.append(lease, batches, counts))

    def prove(self, lease: Lease, position: Position, *, asked_at_us: int, timeout_s: float) -> None:
        self.call(timeout_s, lambda: self.server.prove(lease, position, asked_at_us))


class MirrorWatch:
    """A watch on the stream: each entry must follow the one before, and a quiet one looks at the meta."""

    def __init__(self, store: MirrorStore, process: Process, position: Position) -> None:
        self._store = store
        self._process = process
        self._position = position
        self._connection = store.server.connections
        self._looked_s = process.world.now_s
        self.is_half_open = False

    def next(self, timeout_s: float) -> Sequence[Batch]:
        world, server = self._process.world, self._store.server
        mode = world.wire(self._process, "mirror").mode
        if mode == "refused" or self._connection != server.connections:
            raise StoreUnavailable("the connection is gone")
        is_quiet = self.is_half_open or mode in {"hangs", "deaf"}
        batches = [] if is_quiet else server.after(self._position)[: 1 + world.random.randrange(4)]
        if batches:
            self._position = batches[-1].position
            return batches
        if world.now_s - self._looked_s >= LOOK_S:
            if self.is_half_open:
                world.pass_time(CALL_TIMEOUT_S)
                raise StoreUnavailable("no answer")
            self._store.call(CALL_TIMEOUT_S, lambda: self._look(server))
            self._looked_s = world.now_s
        return ()

    def _look(self, server: SimulatedMirror) -> None:
        if server.after(self._position):
            return
        server.judge_newest(self._position)
        if server.position.revision > self._position.revision:
            raise Compacted("the stream does not reach back; list again")

    def close(self) -> None:
        pass


# The processes


class Worker(Process):
    """A worker: a replica over a mirrored store, stepped as the follower steps it."""

    def __init__(self, world: Cluster, name: str, *, may_write: bool) -> None:
        super().__init__(world, name, may_write=may_write)
        self.published: list[Publication] = []
        self.notices: list[Notice] = []
        self._begin(None)

    def _begin(self, event: Event | None) -> None:
        world = self.world
        # What a process before served binds only the process that takes it up.
        self.newest_of: dict[str, int] = {}
        self._checked: tuple[Snapshot, float] | None = None
        self._listed_s: deque[float] = deque(maxlen=LISTS_MOST)
        self.authority = self.world.kinds.authority(self)
        kinds, seed = world.kinds, world.random.random()
        self.store = kinds.store(self.authority, MirrorStore(self), random=Random(seed), clock=self.clock)
        self.replica = kinds.replica(
            kinds.keyspace(Schemas({})),
            origin="etcd",
            random=Random(seed),
            relist_within_s=RELIST_WITHIN_S if seed < 0.5 else 0.0,  # some list while others have hardly heard of it
        )
        self.watch: Watch | None = None
        self.step: Step = List()
        self._next_by_s: float | None = None
        self.settle(Begun(self.clock()) if event is None else event)

    def restart(self, how: str) -> None:
        """Another process takes its place: on this machine with the last-known-good, on a new one, or by a fork."""
        assert not self.busy
        self._drop_watch()
        last = self.published[-1] if self.published else None
        event: Event | None = None
        if last is not None and last.snapshot.origin != "disk":
            if how == "saved":
                event = Begun(self.clock(), (last.position, list(last.snapshot._entries.items())))
            elif how == "forked":
                event = Resumed(self.clock(), last)
        self.published = []
        self._begin(event)
        self.wake_at_s = self.world.now_s

    def settle(self, event: Event) -> None:
        decision = self.replica.handle(event)
        self.step, self._next_by_s = decision.step, None
        self.notices += decision.notices
        if decision.publication is not None:
            self.published.append(decision.publication)
        self.world.check_worker(self)

    def act(self) -> None:
        step, world = self.step, self.world
        if isinstance(step, Sleep):
            self._drop_watch()
            if self._next_by_s is None:
                self._next_by_s = world.now_s + step.delay_s
                self.wake_in(step.delay_s)
                return
            self.settle(Slept(self.clock()))
            return
        if isinstance(step, Next):
            self._wait(step)
            return
        try:
            event = self._taken(step)
        except StoreError as exc:
            event = Failed(self.clock(), exc, own_label=world.own_label(step))
        self.settle(event)
        self.wake_in(0)

    def _wait(self, step: Next) -> None:
        world = self.world
        if self._next_by_s is None:
            self._next_by_s = world.now_s + step.timeout_s
        assert self.watch is not None
        try:
            batches = self.watch.next(0.0)
        except StoreError as exc:
            self.settle(Failed(self.clock(), exc, own_label=world.own_label(step)))
        else:
            if batches or world.now_s >= self._next_by_s:
                self.settle(Received(self.clock(), batches))
        left_s = 0.0 if self._next_by_s is None else self._next_by_s - world.now_s
        self.wake_in(min(left_s, world.random.uniform(0.02, 0.3)))

    def _taken(self, step: Step) -> Event:
        store, sent_at_s = self.store, self.clock()
        match step:
            case List():
                self._drop_watch()
                self._listed_s.append(self.world.now_s)
                is_busy = len(self._listed_s) == LISTS_MOST and self.world.now_s - self._listed_s[0] < 1
                assert not is_busy, f"{self.name} lists {LISTS_MOST} times a second"
                listing = store.list(timeout_s=LIST_TIMEOUT_S)
                return Listed(self.clock(), sent_at_s, listing)
            case OpenWatch(position):
                self._drop_watch()
                self.watch = store.watch(position, timeout_s=CALL_TIMEOUT_S)
                return Watching(self.clock())
            case Confirm(position):
                confirmation = store.confirm(position, timeout_s=CALL_TIMEOUT_S)
                return Confirmed(self.clock(), sent_at_s, confirmation)
            case ReadHistory():
                return HistoryRead(self.clock(), {})
            case Renew(known):
                return Renewed(self.clock(), store.renew_incarnation(known, timeout_s=CALL_TIMEOUT_S))
            case _:
                raise AssertionError(step)

    def _drop_watch(self) -> None:
        watch, self.watch = self.watch, None
        if watch is not None:
            watch.close()

    @property
    def on_mirror(self) -> bool:
        return isinstance(self.step, Next) and self.store.tiers.current == "mirror" and not self.store.tiers.is_leaving


class RelayProcess(Process):
    """A relay, stepped as its thread steps it."""

    def __init__(self, world: Cluster, name: str, *, may_write: bool) -> None:
        super().__init__(world, name, may_write=may_write)
        self.mirror = MirrorStore(self)
        self._begin()

    def _begin(self) -> None:
        self.relay = self.world.kinds.relay(random=Random(self.world.random.random()))
        self.authority = self.world.kinds.authority(self)
        self.watch: Watch | None = None
        self.step: RelayStep = Rest(0.0)
        self._until_s: float | None = None
        self.settle(Rested(self.clock()))

    def kill(self) -> None:
        """The process ends; its lease does not."""
        assert not self.busy
        self._drop_watch()
        self.is_dead = True

    def start(self) -> None:
        if self.is_dead:
            self.is_dead = False
            self.wake_at_s = self.world.now_s
            self._begin()

    def settle(self, event: RelayEvent) -> None:
        self.step, self._until_s = self.relay.handle(event).step, None
        self.wake_in(0)

    def act(self) -> None:
        step, world = self.step, self.world
        inner = step.step if isinstance(step, Follow) else step
        if isinstance(inner, (Rest, Sleep)):
            self._drop_watch()
            if self._until_s is None:
                self._until_s = world.now_s + inner.delay_s
                self.wake_in(inner.delay_s)
            else:
                rested = isinstance(inner, Rest)
                self.settle(Rested(self.clock()) if rested else Followed(Slept(self.clock())))
            return
        if isinstance(inner, Next):
            self._wait(inner)
            return
        try:
            event = self._followed(step) if isinstance(step, Follow) else self._written(step)
        except VeltrixError as exc:
            event = Refused(self.clock(), exc)
        self.settle(event)

    def _wait(self, step: Next) -> None:
        world = self.world
        if self._until_s is None:
            self._until_s = world.now_s + step.timeout_s
        assert self.watch is not None
        try:
            batches = self.watch.next(0.0)
        except StoreError as exc:
            self.settle(Followed(Failed(self.clock(), exc, own_label=world.own_label(step))))
            return
        if batches or world.now_s >= self._until_s:
            self.settle(Followed(Received(self.clock(), batches)))
            return
        self.wake_in(min(self._until_s - world.now_s, world.random.uniform(0.02, 0.3)))

    def _written(self, step: RelayStep) -> RelayEvent:
        mirror, clock = self.mirror, self.clock
        match step:
            case Elect():
                lease, holder, left_s = mirror.elect(self.name, ttl_s=LEASE_S, timeout_s=CALL_TIMEOUT_S)
                return Elected(clock(), lease, holder, left_s)
            case Inspect(lease):
                self._drop_watch()
                state = mirror.keep(lease, ttl_s=LEASE_S, timeout_s=CALL_TIMEOUT_S)
                position, revisions = mirror.revisions(timeout_s=LIST_TIMEOUT_S)
                return Inspected(clock(), state, position, revisions)
            case Keep(lease):
                return Kept(clock(), mirror.keep(lease, ttl_s=LEASE_S, timeout_s=CALL_TIMEOUT_S))
            case Fill(lease, listing, digest):
                mirror.fill(lease, listing, digest=digest, lazy=(), timeout_s=LIST_TIMEOUT_S)
            case Append(lease, batches, counts):
                mirror.append(lease, batches, counts=counts, timeout_s=CALL_TIMEOUT_S)
            case Prove(lease, position, asked_at_us):
                mirror.prove(lease, position, asked_at_us=asked_at_us, timeout_s=CALL_TIMEOUT_S)
            case Resign(lease):
                self._drop_watch()
                with contextlib.suppress(StoreError):
                    mirror.resign(lease, timeout_s=CALL_TIMEOUT_S)
            case _:
                raise AssertionError(step)
        return Written(clock())

    def _followed(self, follow: Follow) -> RelayEvent:
        step, asked_at_us = follow.step, 0
        is_question = isinstance(step, (List, Confirm))
        if is_question and not self.world.kinds.asks_the_clock_late:
            asked_at_us = self.mirror.clock(timeout_s=CALL_TIMEOUT_S)
        try:
            event = self._asked(step)
        except StoreError as exc:
            return Followed(Failed(self.clock(), exc, own_label=self.world.own_label(step)))
        if is_question and self.world.kinds.asks_the_clock_late:
            asked_at_us = self.mirror.clock(timeout_s=CALL_TIMEOUT_S)
        return Followed(event, asked_at_us)

    def _asked(self, step: Step) -> Event:
        authority, clock, sent_at_s = self.authority, self.clock, self.clock()
        match step:
            case List():
                self._drop_watch()
                listing = authority.list(timeout_s=LIST_TIMEOUT_S)
                return Listed(clock(), sent_at_s, listing)
            case OpenWatch(position):
                self._drop_watch()
                self.watch = authority.watch(position, timeout_s=CALL_TIMEOUT_S)
                return Watching(clock())
            case Confirm(position):
                confirmation = authority.confirm(position, timeout_s=CALL_TIMEOUT_S)
                return Confirmed(clock(), sent_at_s, confirmation)
            case Renew(known):
                return Renewed(clock(), authority.renew_incarnation(known, timeout_s=CALL_TIMEOUT_S))
            case _:
                raise AssertionError(step)

    def _drop_watch(self) -> None:
        watch, self.watch = self.watch, None
        if watch is not None:
            watch.close()


@dataclass
class Kinds:
    """What the cluster is made of: a mutant puts a class with one defect in a place of these."""

    replica: type[Replica] = Replica
    keyspace: type[Keyspace] = Keyspace
    authority: type[AuthorityStore] = AuthorityStore
    store: type[MirroredStore] = MirroredStore
    relay: type[Relay] = Relay
    mirror: type[SimulatedMirror] = SimulatedMirror
    asks_the_clock_late: bool = False


@dataclass(order=True)
class Arrival:
    """A question that arrives after whoever asked it gave up."""

    at_s: float
    number: int
    ask: Callable[[], object] = field(compare=False)


class Cluster:
    """The world: `run` lets time pass, the faults may be brought on in between, `settle` heals and judges."""

    def __init__(
        self,
        *,
        seed: int = 0,
        workers: int = 3,
        relays: int = 2,
        may_write: Sequence[bool] = (True, True),
        kinds: Kinds | None = None,
    ) -> None:
        """`may_write`: whether workers, and relays, may give the authority a new incarnation."""
        self.random = Random(seed)
        self.kinds = Kinds() if kinds is None else kinds
        self.authority = ClusterAuthority()
        self.authority_connections = 0  # grows where every connection is lost
        self.mirror = self.kinds.mirror(lambda: self.now_s, offset_s=1.7e9 + self.random.uniform(0, 1000))
        self.mirror.changed = self.check_mirror
        self.repeats = False
        self.meanwhile: Callable[[], object] | None = (
            None  # happens once, while an answer of the authority is under way
        )
        self.wires: dict[tuple[str, str], Wire] = {}
        self.arrivals: list[Arrival] = []
        self.dumps = [self.mirror.dump()]
        self.may_write = tuple(may_write)
        self.own_labels: dict[str, str] = {}
        self.steps = 0
        for key in ("a", "b"):
            self.authority.write({key: b"1"})
        self.backups = [self.authority.backup()]
        self.workers = [Worker(self, f"worker-{each}", may_write=may_write[0]) for each in range(workers)]
        self.relays = [RelayProcess(self, f"relay-{each}", may_write=may_write[1]) for each in range(relays)]

    # Time

    @property
    def now_s(self) -> float:
        return self.authority.clock_s

    @property
    def processes(self) -> list[Process]:
        return [*self.workers, *self.relays]

    def pass_time(self, seconds: float) -> None:
        """Let `seconds` pass, during which everybody who is not waiting acts."""
        end_s = self.now_s + seconds
        while True:
            idle = [each for each in self.processes if not each.busy and not each.is_dead]
            next_up = min(idle, key=lambda each: each.wake_at_s, default=None)
            arrival = min(self.arrivals, default=None)
            process_s = float("inf") if next_up is None else next_up.wake_at_s
            arrival_s = float("inf") if arrival is None else arrival.at_s
            if min(process_s, arrival_s) > end_s:
                break
            self.authority.clock_s = max(self.now_s, min(process_s, arrival_s))
            if arrival is not None and arrival_s <= process_s:
                self.arrivals.remove(arrival)
                with contextlib.suppress(VeltrixError):  # nobody waits for the answer
                    arrival.ask()
            else:
                assert next_up is not None
                self._let_act(next_up)
        self.authority.clock_s = max(self.now_s, end_s)

    def _let_act(self, process: Process) -> None:
        self.steps += 1
        process.busy, process.paused_from_s = True, None
        try:
            process.act()
        finally:
            process.busy = False

    run = pass_time

    def after(self, seconds: float, happens: Callable[[], object]) -> None:
        """Let something happen to a server in that time: in the middle of whatever goes on then."""
        self.arrivals.append(Arrival(self.now_s + seconds, self.steps, happens))

    # The network

    def wire(self, process: Process, server: str) -> Wire:
        return self.wires.setdefault((process.name, server), Wire())

    def call(self, process: Process, server: str, timeout_s: float, ask: Callable[[], T]) -> T:
        """Ask a server; the answer takes its time, and may not come."""
        assert timeout_s > 0
        wire = self.wire(process, server)
        if wire.mode == "refused":
            self.pass_time(0.005)
            raise StoreUnavailable("refused")
        if wire.mode in {"hangs", "late"}:
            if wire.mode == "late":
                at_s = self.now_s + timeout_s + self.random.uniform(0, 8)
                self.arrivals.append(Arrival(at_s, self.steps, ask))
            self.pass_time(timeout_s)
            raise StoreUnavailable("no answer")
        there_s, back_s = (self.random.uniform(0.0005, 0.005) + wire.slow_s * self.random.random() for _ in range(2))
        self.pass_time(there_s)
        try:
            answer = ask()
        except VeltrixError:
            self.pass_time(back_s)
            raise
        if server == "authority" and self.meanwhile is not None:
            self.after(0.0, self.meanwhile)
            self.meanwhile = None
        if wire.mode == "deaf":
            self.pass_time(timeout_s)
            raise StoreUnavailable("no answer")
        self.pass_time(back_s)
        return answer

    def own_label(self, step: Step) -> str:
        label = f"own-{len(self.own_labels)}"
        if isinstance(step, Renew) and not all(self.may_write):
            self.own_labels[f"{label}?"] = step.known
        return label

    def label_of(self, incarnation: str) -> str:
        """The authority's label, for one that a process gave a history which it may not rename."""
        while incarnation in self.own_labels:
            incarnation = self.own_labels[incarnation]
        return incarnation

    # Judging

    def check_worker(self, worker: Worker) -> None:
        """What a worker serves is what the authority had, never goes back, and is no older than it says."""
        snapshot = worker.replica.snapshot
        if snapshot.origin == "none":
            return
        proved_s = snapshot._proof.at_s
        before = worker._checked
        if before is not None and before[0] is snapshot and before[1] == proved_s:
            return
        worker._checked = snapshot, proved_s
        label = self.label_of(snapshot.incarnation)
        if before is None or before[0] is not snapshot:
            self._check_content(worker, snapshot, label)
        position = worker.replica._position
        assert position is not None
        served = (label, snapshot.revision, position.fingerprint, snapshot.digest)
        superseded_s = self.authority.superseded_by_content_s.get(served)
        if superseded_s is not None:
            by_own_clock_s = superseded_s + worker.clock_offset_s
            assert proved_s <= by_own_clock_s + 1e-5, (
                f"{worker.name} says {served} is {proved_s - by_own_clock_s:.3f} s younger than it is"
            )

    def _check_content(self, worker: Worker, snapshot: Snapshot, label: str) -> None:
        served = {key: (value, revision) for key, value, revision in snapshot._entries.items()}
        states = self.authority.known.get((label, snapshot.revision), [])
        assert any(self._is_of(served, _decoded(state)) for state in states), (
            f"{worker.name} serves {served} at {label}@{snapshot.revision}, which is none of {states}"
        )
        incarnation = snapshot.incarnation
        if incarnation not in worker.newest_of or not all(self.may_write):
            pass  # where a restored history cannot be renamed, a label that was left comes back with a backup
        else:
            assert incarnation == list(worker.newest_of)[-1], f"{worker.name} went back to {incarnation}, which it left"
        newest = worker.newest_of.get(snapshot.incarnation, 0)
        assert snapshot.revision >= newest, (
            f"{worker.name} went back from {newest} to {snapshot.revision} of {snapshot.incarnation}"
        )
        worker.newest_of[snapshot.incarnation] = snapshot.revision

    def _is_of(self, served: dict[str, tuple[object, int]], state: dict[str, tuple[object, int]]) -> bool:
        """Whether `state` is served, but for what could not be told and what the next confirmation finds by its digest.

        Who stands before such a deletion and resumes on a mirror that was filled after it cannot know of it.
        """
        extra = {(key, revision) for key, (_, revision) in served.items() if key not in state}
        return extra <= self.authority.swept and {key: served[key] for key in served if key in state} == state

    def check_mirror(self, lease: Lease, before: Position) -> None:
        """A relay changed the mirror: it held the lease, went forwards, and left what the authority had there."""
        assert self.mirror.holder == lease, f"the deposed relay {lease} changed the mirror"
        meta = self.mirror.kept.meta
        assert meta is not None
        position = meta.position
        if before.incarnation == position.incarnation:
            assert position.revision >= before.revision, f"the mirror went back from {before} to {position}"
        entries, label = self.mirror.kept.entries, self.label_of(position.incarnation)
        assert entries in self.authority.known.get((label, position.revision), []), (
            f"the mirror holds {entries} at {position}, which the authority never had there"
        )
        digest = digest_of_all(entries)
        assert (meta.count, meta.digest) == (len(entries), digest), f"the mirror's meta is wrong at {position}"
        superseded_s = self.authority.superseded_by_content_s.get(
            (label, position.revision, position.fingerprint, digest)
        )
        if superseded_s is not None and meta.proved_us is not None:
            proved_s = meta.proved_us / 1e6 - self.mirror.offset_s
            assert proved_s <= superseded_s + 1e-5, f"the mirror says of {position} that it is younger than it is"

    def heal(self) -> None:
        """All is reachable, and nobody is stopped; who was killed is still dead."""
        self.wires.clear()
        self.repeats, self.meanwhile = False, None
        for process in self.processes:
            process.unpause()

    def settle(self, *, without_relays: bool = False) -> None:
        """Heal everything; all must serve what the authority has, and be back in their places, within a bound.

        `without_relays`: that must hold also while nobody feeds the mirror.
        """
        self.heal()
        if without_relays:
            for relay in self.relays:
                relay.kill()
            self._wait_for(self.has_converged, self.now_s + CONVERGED_WITHIN_S)
        for relay in self.relays:
            relay.start()
        healed_s = self.now_s
        self._wait_for(self.has_converged, healed_s + CONVERGED_WITHIN_S)
        if self.authority.visible is not self.authority.log[-1]:
            # Who saw the deletion is ahead of who can only list, until something else is written.
            self.authority.write({"a": b"9"})
            healed_s = self.now_s
        self._wait_for(self.is_settled, healed_s + SETTLED_WITHIN_S)

    def _wait_for(self, condition: Callable[[], bool], by_s: float) -> None:
        while not condition():
            assert self.now_s < by_s, f"not within the bound: {condition.__name__}; {self.told()}"
            self.pass_time(0.25)

    def serves_the_newest(self, worker: Worker) -> bool:
        snapshot, authority = worker.replica.snapshot, self.authority
        return (
            self.label_of(snapshot.incarnation) == authority.label
            and snapshot.digest == digest_of_all(authority.state)
            and authority.visible.number <= snapshot.revision <= authority.revision
            and isinstance(worker.step, (Next, Confirm))
            and worker.clock() - snapshot._proof.at_s < 15
        )

    def has_converged(self) -> bool:
        return all(self.serves_the_newest(worker) for worker in self.workers)

    def is_settled(self) -> bool:
        """All workers follow the mirror, which is fed by the one relay that leads, the authority's one watcher."""
        leaders = [relay for relay in self.relays if relay.relay.leads]
        if self.own_labels and not self.may_write[1]:
            # A restored history that a relay may not rename has another name in the mirror than at the authority.
            # Asked each time: the restore may be found out only now.
            return self.has_converged() and len(leaders) == 1
        return (
            self.has_converged()
            and all(worker.on_mirror for worker in self.workers)
            and len(leaders) == 1
            and self.mirror.holder is not None
            and self.mirror.holder.holder == leaders[0].name
            and self.mirror.kept.entries == self.authority.state
            and self.mirror.state().age_s < 10
            and self.open_watches == 1
        )

    @property
    def open_watches(self) -> int:
        """How many watches the authority has."""
        return sum(len(each.authority.watches) for each in (*self.workers, *self.relays))

    def told(self) -> str:
        workers = [
            f"{worker.name} at {worker.replica._position} of {worker.store.tiers.current}"
            f" ({worker.store.tiers.fault or 'well'}), {worker.step}, age"
            f" {worker.clock() - worker.replica.snapshot._proof.at_s:.1f} s, {worker.replica.error!r}"
            for worker in self.workers
        ]
        relays = [f"{relay.name} {relay.relay.leads} {relay.relay.error!r} {relay.step}" for relay in self.relays]
        return "\n".join(
            [
                (
                    f"authority at {self.authority.position()} (seen {self.authority.visible.number}),"
                    f" mirror at {self.mirror.state()}, {self.open_watches} watches"
                ),
                *workers,
                *relays,
            ]
        )


__all__ = ["Cluster", "Kinds", "RelayProcess", "State", "Worker"]
