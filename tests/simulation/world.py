"""The world around a replica: an authority with history, compaction and backups, and a network that fails.

Time is a number that the test moves. Every state that the authority ever had is remembered, by incarnation and
revision, so that what a replica serves can be judged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from veltrix_mw.errors import AuthFailed, Compacted, StoreUnavailable
from veltrix_mw.keyspace import Keyspace
from veltrix_mw.protocols import Batch, Confirmation, Listing, Position, RawChange, Restored
from veltrix_mw.replica import (
    Begun,
    Confirm,
    Confirmed,
    Decision,
    Event,
    Failed,
    HistoryRead,
    List,
    Listed,
    Next,
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
from veltrix_mw.validation import Schemas
from veltrix_mw.values import MISSING, Missing

State = dict[str, tuple[bytes, int]]


@dataclass
class Revision:
    """One revision of the authority: what it changed, its mark, and the whole state after it."""

    number: int
    mark: str
    changes: tuple[RawChange, ...]
    state: State


@dataclass
class Authority:
    """A store that orders writes, as the protocol sees one."""

    clock_s: float = 0.0
    label: str = "label-0"
    labels: int = 0
    marks: int = 0
    compacted: int = 0
    log: list[Revision] = field(default_factory=lambda: [Revision(0, "", (), {})])
    # Every state there ever was, by (label, revision, mark); and until when it was the newest.
    known: dict[tuple[str, int], list[State]] = field(default_factory=dict)
    superseded_s: dict[tuple[str, int, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._remember()

    @property
    def revision(self) -> int:
        return self.log[-1].number

    @property
    def state(self) -> State:
        return self.log[-1].state

    @property
    def newest(self) -> tuple[str, int, str]:
        return self.label, self.revision, self.log[-1].mark

    def _remember(self) -> None:
        self.superseded_s.pop(self.newest, None)  # a restore can make an old revision the newest again
        self.known.setdefault((self.label, self.revision), []).append(dict(self.state))

    def write(self, changes: dict[str, bytes | Missing]) -> None:
        revision = self.revision + 1
        state = dict(self.state)
        for key, value in changes.items():
            if isinstance(value, Missing):
                state.pop(key, None)
            else:
                state[key] = (value, revision)
        self.marks += 1
        self.superseded_s[self.newest] = self.clock_s
        raw = tuple(RawChange(key, value) for key, value in sorted(changes.items()))
        self.log.append(Revision(revision, f"mark-{self.marks}", raw, state))
        self._remember()

    def compact(self) -> None:
        self.compacted = self.revision

    def backup(self) -> tuple[str, int, list[Revision]]:
        return self.label, self.compacted, list(self.log)

    def restore(self, backup: tuple[str, int, list[Revision]]) -> None:
        """Put a backup back: the old label with it."""
        self.superseded_s[self.newest] = self.clock_s
        label, compacted, log = backup
        self.label, self.compacted, self.log = label, compacted, list(log)
        self._remember()

    # What a store answers

    def at(self, revision: int) -> Revision | None:
        return next((kept for kept in self.log if kept.number == revision), None)

    def position(self) -> Position:
        return Position(self.label, self.revision, self.log[-1].mark)

    def check(self, position: Position) -> None:
        kept = self.at(position.revision)
        if position.incarnation != self.label or kept is None or kept.mark != position.fingerprint:
            raise Restored("another history")
        if position.revision < self.compacted:
            raise Compacted("compacted")

    def list(self) -> Listing:
        return Listing(self.position(), [(key, *self.state[key]) for key in sorted(self.state)])

    def confirm(self, position: Position) -> Confirmation:
        self.check(position)
        return Confirmation(self.label, self.revision, len(self.state))

    def renew(self, known: str) -> str:
        if self.label == known:
            self.labels += 1
            self.superseded_s[self.newest] = self.clock_s
            self.label = f"label-{self.labels}"
            self._remember()
        return self.label

    def after(self, position: Position) -> list[Batch]:
        self.check(position)
        return [
            Batch(Position(self.label, kept.number, kept.mark), kept.number - 1, kept.changes)
            for kept in self.log
            if kept.number > position.revision
        ]


class World:
    """One authority, one replica, and a network between them that the test breaks."""

    def __init__(self, *, seed: int = 0, may_write: bool = True, kind: type[Replica] = Replica) -> None:
        self.authority = Authority()
        self.make = lambda: kind(Keyspace(Schemas({})), origin="etcd", random=Random(seed))
        self.replica = self.make()
        self.may_write = may_write
        self.broken = False  # every call fails
        self.half_open = False  # the open watch delivers nothing more, and does not say so
        self.watch: Position | None = None
        self.undelivered: deque[Batch] = deque()
        self.repeat = False  # the watch delivers a batch from before once more
        self.meanwhile: Callable[[], None] | None = None  # happens once, while an answer is under way
        self.delivered: list[Batch] = []
        self.published: list[Publication] = []
        self.served_pairs: list[tuple[str, int]] = []
        self.step: Step = List()
        self.own_labels = 0
        self.decide(Begun(self.now_s))

    @property
    def now_s(self) -> float:
        return self.authority.clock_s

    def _anew(self) -> None:
        self.replica = self.make()
        self.watch = None

    def restart(self, *, saved: bool) -> None:
        """The process ends and another begins, on this machine (`saved`) or on a new one."""
        last = self.published[-1] if self.published else None
        self._anew()
        # What a process before it served binds only the process that loads its file.
        self.served_pairs = []
        entries = None
        if saved and last is not None and last.snapshot.origin != "disk":
            entries = last.position, list(last.snapshot._entries.items())
        self.decide(Begun(self.now_s, entries))

    def fork(self) -> None:
        """The follower's thread is gone; another takes up what was published."""
        if not self.published or self.published[-1].snapshot.origin == "disk":
            return
        last = self.published[-1]
        self._anew()
        self.decide(Resumed(self.now_s, last))

    def decide(self, event: Event) -> Decision:
        decision = self.replica.handle(event)
        self.step = decision.step
        if decision.publication is not None:
            self.published.append(decision.publication)
            snapshot = decision.publication.snapshot
            self.served_pairs.append((snapshot.incarnation, snapshot.revision))
        return decision

    def turn(self) -> None:
        """Take the step that the replica asked for."""
        try:
            event = self._taken(self.step)
        except (StoreUnavailable, Compacted, AuthFailed) as exc:
            self.own_labels += 1
            event = Failed(self.now_s, exc, own_label=f"own-{self.own_labels}")
        self.decide(event)

    def _taken(self, step: Step) -> Event:
        sent_s = self.now_s
        if self.broken and not isinstance(step, Sleep):
            self.watch = None
            self.authority.clock_s += 0.05
            raise StoreUnavailable("broken")
        match step:
            case List():
                listing = self.authority.list()
                self._travel()
                return Listed(self.now_s, sent_s, listing)
            case OpenWatch(position):
                self.authority.check(position)
                self.watch, self.half_open = position, False
                self.delivered = []  # what another connection delivered does not come again on this one
                return Watching(self.now_s)
            case Next(timeout_s):
                return self._next(timeout_s)
            case Confirm(position):
                confirmation = self.authority.confirm(position)
                self._travel()
                return Confirmed(self.now_s, sent_s, confirmation)
            case ReadHistory():
                return HistoryRead(self.now_s, {})
            case Renew(known):
                if not self.may_write:
                    raise AuthFailed("read only")
                return Renewed(self.now_s, self.authority.renew(known))
            case Sleep(delay_s):
                self.authority.clock_s += delay_s
                return Slept(self.now_s)

    def _travel(self) -> None:
        """An answer takes its time, and the authority goes on meanwhile."""
        happens, self.meanwhile = self.meanwhile, None
        self.authority.clock_s += 0.01
        if happens is not None:
            happens()
        self.authority.clock_s += 0.01

    def _next(self, timeout_s: float) -> Received:
        assert timeout_s >= 0
        if self.watch is None:
            raise StoreUnavailable("the connection is gone")
        if self.half_open:
            self.authority.clock_s += timeout_s
            return Received(self.now_s, ())
        batches = self.authority.after(self.watch)
        if self.repeat and self.delivered:
            batches = [self.delivered[0], *batches]
        if not batches:
            self.authority.clock_s += timeout_s
            return Received(self.now_s, ())
        self.watch = batches[-1].position
        self.delivered = batches[-2:]
        return Received(self.now_s, batches)

    # Judging

    def check(self) -> None:
        """The invariants that hold at every step."""
        snapshot = self.replica.snapshot
        if snapshot.origin == "none":
            return
        served = {key: (value, revision) for key, value, revision in snapshot._entries.items()}
        label = snapshot.incarnation
        position = self.replica._position
        assert position is not None
        if label.endswith("?"):
            label = position.incarnation
        states = self.authority.known.get((label, snapshot.revision), [])
        assert any(served == _decoded(state) for state in states), (
            f"{served} at {label}@{snapshot.revision} is none of {states}"
        )
        seen: dict[str, int] = {}
        for incarnation, revision in self.served_pairs:
            assert revision >= seen.get(incarnation, 0), f"{incarnation} went back: {self.served_pairs}"
            seen[incarnation] = revision
        superseded_s = self.authority.superseded_s.get((label, snapshot.revision, position.fingerprint))
        if superseded_s is not None:
            assert snapshot._proof.at_s <= superseded_s, "its age is less than the true one"

    def settle(self, *, turns: int = 200) -> None:
        """Heal everything; within some turns the replica must serve what the authority has."""
        self.broken, self.repeat = False, False
        for _ in range(turns):
            self.turn()
            self.check()
            if isinstance(self.step, Next) and self.current and self.watch is not None:
                return
        raise AssertionError(
            f"at {self.replica.snapshot!r} {self.replica.state}, the authority at {self.authority.position()}"
        )

    @property
    def current(self) -> bool:
        snapshot, authority = self.replica.snapshot, self.authority
        served = {key: (value, revision) for key, value, revision in snapshot._entries.items()}
        return (
            snapshot.revision == authority.revision
            and served == _decoded(authority.state)
            and (snapshot.incarnation == authority.label or snapshot.incarnation.endswith("?"))
            and self.digest_matches(snapshot)
        )

    def digest_matches(self, snapshot: Snapshot) -> bool:
        from veltrix_mw.digest import digest_of

        wanted = sum(digest_of(key, revision) for key, (_, revision) in self.authority.state.items())
        return snapshot.digest == wanted % (1 << 64)


def _decoded(state: State) -> dict[str, tuple[object, int]]:
    return {key: (int(raw), revision) for key, (raw, revision) in state.items()}


__all__ = ["MISSING", "Authority", "World"]
