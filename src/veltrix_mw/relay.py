"""The relay: decides what the one writer of a mirror does next, from what happened.

Owns the election, and the order of reading the authority and writing the mirror: a pure state machine, events in and
steps out. No thread, socket or clock in here. The authority is followed by a `Replica` of its own, over a copy that
keeps revisions and no values: so a relay lists, resumes, confirms and backs off by the same rules as any worker.

::

    Elect ──(another holds the lease)──► [Look ──►] Rest ──► Elect
      └─(won)─► Inspect ─(the mirror adds up)──► watch the authority from where the mirror stands
                        └─(empty, or it does not)► List the authority ──► Fill
    Follow(step of the replica) ──► Append what came, Prove what was confirmed, Keep the lease ──► Follow ...
    the mirror stands elsewhere ──► List ──► Fill       the lease is lost, the mirror away ──► Rest ──► Elect
    the authority away for 5 s ──► Resign: another process may reach it
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from veltrix_mw.digest import digest_of
from veltrix_mw.errors import AuthFailed, Compacted, LeaseLost, StoreError, VeltrixError
from veltrix_mw.protocols import (
    Batch,
    CertificateFault,
    ChangeRecord,
    Lease,
    Listing,
    MirrorState,
    Position,
    RawVersion,
)
from veltrix_mw.replica import (
    Begun,
    Confirmed,
    Decision,
    Distrusted,
    Event,
    Failed,
    Listed,
    Next,
    Notice,
    Publication,
    Received,
    Replica,
    Resumed,
    Sleep,
    Step,
    Watching,
)
from veltrix_mw.snapshot import Proof, Snapshot
from veltrix_mw.sorted_map import Item
from veltrix_mw.values import Missing

__all__ = [
    "Append",
    "Elect",
    "Elected",
    "Fill",
    "Follow",
    "Followed",
    "Inspect",
    "Inspected",
    "Keep",
    "Kept",
    "Look",
    "Looked",
    "Prove",
    "Refused",
    "Relay",
    "RelayDecision",
    "RelayEvent",
    "RelayStep",
    "Resign",
    "Rest",
    "Rested",
    "Written",
]

LEASE_S: Final = 5.0
"""How long a lease holds without being kept: a successor is there within 7 s."""

KEEP_S: Final = LEASE_S / 3
"""How often it is kept, and the mirror looked at: two attempts may fail."""

STAND_S: Final = 2.0
"""The longest between two attempts to be elected: what is resigned is taken up within it."""

RESIGN_AFTER_S: Final = 5.0
"""How long the authority may fail this relay, before another process gets its chance."""

BARRED_S: Final = 60.0
"""How often a process tries whose credentials do not allow it: they may be granted while it runs."""

STAND_ASIDE_S: Final = 10.0
"""The most that a relay which resigned waits before it stands again: others stand sooner."""

CONFIRM_AT_MOST_S: Final = 7.0
"""The longest between two confirmations, however dear they are: workers leave a mirror whose last one is 10 s old."""

LOOK_S: Final = 5.0
"""How often a relay that stands by and is to say so looks whether it reaches the authority: one read of a key."""

REFILLS_MOST: Final = 3  # in a row that the mirror refuses; then something is wrong that listing does not mend

_BACKOFF_FIRST_S: Final = 0.2
_BACKOFF_MOST_S: Final = 5.0
_DIGEST_MOD: Final = 1 << 64


# Steps: what is to be done next. Each ends in an event, or in `Refused`.


@dataclass(frozen=True, slots=True)
class Elect:
    """Stand for election; ends in `Elected`."""


@dataclass(frozen=True, slots=True)
class Look:
    """Look whether the authority answers, while another process leads; ends in `Looked`."""


@dataclass(frozen=True, slots=True)
class Inspect:
    """Read where the mirror stands, and the revision of each of its keys; ends in `Inspected`."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Keep:
    """Hold the lease on; ends in `Kept`."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Fill:
    """Replace what the mirror holds; ends in `Written`."""

    lease: Lease
    listing: Listing
    digest: int


@dataclass(frozen=True, slots=True)
class Append:
    """Add revisions to the mirror, `counts` being (count, digest) after each; ends in `Written`."""

    lease: Lease
    batches: tuple[Batch, ...]
    counts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Prove:
    """Say when the authority was asked and had nothing newer than `position`; ends in `Written`."""

    lease: Lease
    position: Position
    asked_at_us: int


@dataclass(frozen=True, slots=True)
class Follow:
    """Take the replica's step at the authority; ends in `Followed`.

    Before a `List` or a `Confirm` the mirror's clock is read.
    """

    lease: Lease
    step: Step


@dataclass(frozen=True, slots=True)
class Resign:
    """Give the lease up, for another process to take; ends in `Written`."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Rest:
    """Do nothing for `delay_s`; ends in `Rested`."""

    delay_s: float


RelayStep = Elect | Look | Inspect | Keep | Fill | Append | Prove | Follow | Resign | Rest


# Events: what happened.


@dataclass(frozen=True, slots=True)
class Elected:
    """How the election went: the lease, or None; who holds it, and in how many seconds that ends."""

    now_s: float
    lease: Lease | None
    holder: str
    left_s: float


@dataclass(frozen=True, slots=True)
class Looked:
    """The authority answered, or failed with `error`."""

    now_s: float
    error: StoreError | None = None


@dataclass(frozen=True, slots=True)
class Inspected:
    """Where the mirror stands, and what revision each of its keys is at."""

    now_s: float
    state: MirrorState
    position: Position
    revisions: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Kept:
    """The lease holds on; `state` is where the mirror stands."""

    now_s: float
    state: MirrorState


@dataclass(frozen=True, slots=True)
class Written:
    """The mirror took it."""

    now_s: float


@dataclass(frozen=True, slots=True)
class Followed:
    """What came of the replica's step; `asked_at_us` is the mirror's clock before the authority was asked."""

    event: Event
    asked_at_us: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """The mirror refused the last step, or did not answer."""

    now_s: float
    error: VeltrixError


@dataclass(frozen=True, slots=True)
class Rested:
    """The delay is over; the relay begins with this event."""

    now_s: float


RelayEvent = Elected | Looked | Inspected | Kept | Written | Followed | Refused | Rested


@dataclass(frozen=True, slots=True)
class RelayDecision:
    """The next step, and what to tell before it is taken."""

    step: RelayStep
    notices: tuple[Notice, ...] = ()


class Copy:
    """What the mirror is to hold, as the relay's replica keeps it: revisions and no values.

    Stands in for a `Keyspace`: takes everything, decodes nothing, and queues what is to be written.
    """

    def __init__(self, lazy: tuple[str, ...] = ()) -> None:
        self._lazy = lazy
        self.snapshot = Snapshot()
        self.position = Position("", 0)
        self.revisions: dict[str, int] = {}
        self.digest = 0
        self.queue: deque[Listing | tuple[Batch, int, int]] = deque()

    @property
    def entry_count(self) -> int:
        return len(self.revisions)

    @property
    def wanting(self) -> tuple[str, ...]:
        return ()

    def begin(self, position: Position, revisions: Mapping[str, int]) -> None:
        """Go on from what the mirror holds."""
        self.revisions = dict(revisions)
        self.digest = sum(digest_of(key, revision) for key, revision in revisions.items()) % _DIGEST_MOD
        self._moved_to(position, Proof())

    def restore(self, listing: Listing, *, incarnation: str, origin: str, proved_at_s: float) -> None:
        self.revisions = {key: revision for key, _, revision in listing.entries}
        self.digest = sum(digest_of(key, revision) for key, revision in self.revisions.items()) % _DIGEST_MOD
        position = replace(listing.position, incarnation=incarnation)
        self._moved_to(position, Proof(proved_at_s), origin=origin)
        self.queue.clear()
        if incarnation:  # an authority that nobody wrote has nothing to be mirrored
            self.queue.append(replace(listing, position=position))

    def apply(self, batch: Batch) -> frozenset[str]:
        revision = batch.position.revision
        for change in batch.changes:
            known = self.revisions.pop(change.key, None)
            if known is not None:
                self.digest -= digest_of(change.key, known)
            if not isinstance(change.value, Missing):
                self.revisions[change.key] = revision
                self.digest += digest_of(change.key, revision)
        self.digest %= _DIGEST_MOD
        # An authority that cannot be renamed from here goes by a name of our own, in the mirror too.
        position = replace(batch.position, incarnation=self.position.incarnation)
        self._moved_to(position, Proof(self.snapshot._proof.at_s))
        mirrored = replace(batch, position=position, lazy=self._lazy)
        self.queue.append((mirrored, len(self.revisions), self.digest))
        return frozenset()

    def _moved_to(self, position: Position, proof: Proof, *, origin: str = "relay") -> None:
        self.position = position
        self.snapshot = Snapshot(
            revision=position.revision, incarnation=position.incarnation, origin=origin, proof=proof, digest=self.digest
        )

    def resume(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def load(self, entries: Sequence[Item], *, revision: int, incarnation: str) -> None:
        raise NotImplementedError("a relay starts from its mirror, not from a file")

    def recover(self, versions: Mapping[str, Sequence[RawVersion]]) -> None:
        raise NotImplementedError("a relay holds nothing back")


class Relay:
    """Stands for election; once elected, feeds the mirror: hand it each event, do what it decides.

    Writes only under its lease, and only what follows on what the mirror holds. With `looks` it asks the authority also
    while it stands by, which a fleet of workers that all stand by must not. Single-threaded.
    """

    def __init__(
        self,
        *,
        lazy: Sequence[str] = (),
        random: Random | None = None,
        confirm_interval_s: float = 5.0,
        looks: bool = False,
    ) -> None:
        self._lazy = tuple(lazy)
        self._looks = looks
        self._look_at_s = -math.inf
        self._rest_until_s = 0.0  # while it looks
        self._random = Random() if random is None else random
        self._confirm_interval_s = confirm_interval_s
        self._lease: Lease | None = None
        self._copy = Copy(self._lazy)
        self._replica: Replica | None = None
        self._pending: Step | None = None  # the replica's next step, once all is written
        self._proof_us: int | None = None  # what is to be proved, once all is written
        self._keep_at_s = 0.0
        self._failures = 0
        self._trouble_since_s: float | None = None  # since when the authority fails
        self._aside_s = 0.0  # how long to stand aside, once resigned
        self._refills = 0  # since the mirror last took something
        self._notices: list[Notice] = []
        self._asked_at_us = 0
        # What others are told
        self.holder = ""
        self.barred = ""  # why this process may not stand for election
        self.error = ""

    @property
    def leads(self) -> bool:
        """Whether this process holds the lease, as far as it knows."""
        return self._lease is not None

    def handle(self, event: RelayEvent) -> RelayDecision:
        """What to do now that `event` has happened."""
        step = self._decide(event)
        notices = tuple(self._notices)
        self._notices.clear()
        return RelayDecision(step, notices)

    def _decide(self, event: RelayEvent) -> RelayStep:
        match event:
            case Rested():
                return Elect()
            case Elected():
                return self._take_election(event)
            case Looked():
                return Rest(max(0.0, self._rest_until_s - event.now_s))
            case Inspected():
                return self._take_inspection(event)
            case Kept():
                return self._take_kept(event)
            case Written() if self._lease is None:
                return Rest(self._aside_s)  # it has resigned
            case Written():
                return self._go_on(event.now_s)
            case Followed():
                return self._take_followed(event)
            case Refused():
                return self._take_refusal(event)

    # Election

    def _take_election(self, event: Elected) -> RelayStep:
        self.holder, self.barred, self.error = event.holder, "", ""
        if event.lease is None:
            soonest_s = event.left_s + self._random.uniform(0, 0.3)
            rest_s = min(soonest_s, self._random.uniform(STAND_S / 2, STAND_S))
            if not self._looks or event.now_s < self._look_at_s:
                return Rest(rest_s)
            self._look_at_s, self._rest_until_s = event.now_s + LOOK_S, event.now_s + rest_s
            return Look()
        self._lease = event.lease
        self._keep_at_s = event.now_s + KEEP_S
        self._trouble_since_s = None
        self._notice("veltrix.relay_elected", "info", token=event.lease.token)
        return Inspect(event.lease)

    def _take_inspection(self, event: Inspected) -> RelayStep:
        self._copy = Copy(self._lazy)
        # The replica asks its keyspace for no more than `Copy` has.
        self._replica = Replica(
            self._copy,  # type: ignore[arg-type]
            origin="relay",
            random=self._random,
            confirm_interval_s=self._confirm_interval_s,
            confirm_at_most_s=CONFIRM_AT_MOST_S,
            relist_within_s=_BACKOFF_FIRST_S,  # it lists alone, and a fleet waits for it
        )
        if event.position.incarnation and set(event.state.lazy) == set(self._lazy):
            self._copy.begin(event.position, event.revisions)
            held = Publication(self._copy.snapshot, None, (ChangeRecord(),), event.position)
            return self._ask(Resumed(event.now_s, held), event.now_s)
        return self._ask(Begun(event.now_s), event.now_s)

    # Following the authority

    def _take_followed(self, event: Followed) -> RelayStep:
        inner = event.event
        if event.asked_at_us:
            self._asked_at_us = event.asked_at_us  # of the question whose answer is proved by this event or a later one
        if isinstance(inner, Failed):
            if self._trouble_since_s is None:
                self._trouble_since_s = inner.now_s
            elif inner.now_s - self._trouble_since_s > RESIGN_AFTER_S:
                return self._step_down(f"the authority fails this relay: {inner.error}")
        elif isinstance(inner, (Listed, Confirmed, Watching)) or (isinstance(inner, Received) and inner.batches):
            self._trouble_since_s = None  # a quiet watch is no sign of life
        return self._ask(inner, inner.now_s)

    def _ask(self, event: Event, now_s: float) -> RelayStep:
        """Let the replica decide; note what is to be written, and what was proved."""
        replica = self._replica
        assert replica is not None
        proved_s = replica.snapshot._proof.at_s
        decision: Decision = replica.handle(event)
        self._notices.extend(decision.notices)
        self._pending = decision.step
        self.error = "" if replica.error is None else str(replica.error)
        if replica.snapshot._proof.at_s > proved_s:
            self._proof_us = self._asked_at_us
        return self._go_on(now_s)

    def _go_on(self, now_s: float) -> RelayStep:
        """The next thing to do: write what is queued, prove, keep the lease, then follow on."""
        lease, step = self._lease, self._pending
        assert lease is not None
        assert step is not None
        queue = self._copy.queue
        if now_s >= self._keep_at_s:
            return Keep(lease)
        if queue:
            first = queue.popleft()
            if isinstance(first, Listing):
                return Fill(lease, first, self._copy.digest)
            return self._append(lease, first)
        if self._proof_us is not None and self._copy.position.incarnation:
            asked_at_us, self._proof_us = self._proof_us, None
            return Prove(lease, self._copy.position, asked_at_us)
        if isinstance(step, Next):
            return Follow(lease, Next(min(step.timeout_s, max(0.0, self._keep_at_s - now_s))))
        if isinstance(step, Sleep):
            return Follow(lease, Sleep(min(step.delay_s, max(0.0, self._keep_at_s - now_s))))
        return Follow(lease, step)

    def _append(self, lease: Lease, first: tuple[Batch, int, int]) -> Append:
        queue, batches = self._copy.queue, [first]
        while queue and isinstance(queue[0], tuple) and len(batches) < 256:
            batches.append(queue.popleft())  # type: ignore[arg-type]
        return Append(lease, tuple(item[0] for item in batches), tuple((item[1], item[2]) for item in batches))

    # The mirror's answers

    def _take_kept(self, event: Kept) -> RelayStep:
        self._keep_at_s = event.now_s + KEEP_S
        if event.state.position == self._copy.position:
            self._refills = self._failures = 0
        stands, copy = event.state.position, self._copy
        if self._replica is not None and self._replica.must_list:
            return self._go_on(event.now_s)  # the list that it waits for fills the mirror
        if not copy.queue and copy.position.incarnation and stands != copy.position:
            return self._fill_anew(event.now_s, "the mirror does not hold what was written to it")
        return self._go_on(event.now_s)

    def _take_refusal(self, event: Refused) -> RelayStep:
        error = event.error
        if isinstance(error, Compacted) and self._lease is not None and self._replica is not None:
            return self._fill_anew(event.now_s, str(error))
        lease = self._lease
        if lease is not None:
            self._notice("veltrix.relay_deposed", "warning", reason=str(error))
        self._stop_leading()
        self.error = str(error)
        if isinstance(error, LeaseLost):
            return Rest(self._random.uniform(0, STAND_S))
        # A certificate is replaced while the process runs, as a matter of course; what an ACL allows hardly ever is.
        if isinstance(error, AuthFailed) and not isinstance(error, CertificateFault):
            self.barred = str(error)
            aside_s = BARRED_S * self._random.uniform(0.8, 1.2)
        else:
            most_s = min(_BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2.0**self._failures)
            self._failures = min(self._failures + 1, 16)
            aside_s = self._random.uniform(0, most_s)
        if lease is None:
            return Rest(aside_s)
        # What is given up can be taken at once, by us too; what is forgotten only once it has run out.
        self._aside_s = aside_s
        return Resign(lease)

    def _fill_anew(self, now_s: float, reason: str) -> RelayStep:
        self._copy.queue.clear()
        self._proof_us = None
        self._refills += 1
        if self._refills > REFILLS_MOST:
            return self._step_down(f"the mirror does not take what the authority has: {reason}")
        self._notice("veltrix.mirror_refilled", "warning", reason=reason)
        return self._ask(Distrusted(now_s, reason), now_s)

    def _step_down(self, reason: str) -> RelayStep:
        lease = self._lease
        assert lease is not None
        self._notice("veltrix.relay_resigned", "warning", reason=reason)
        self.error = reason
        self._stop_leading()
        self._aside_s = STAND_ASIDE_S * self._random.uniform(0.5, 1.0)
        return Resign(lease)

    def _stop_leading(self) -> None:
        self._refills = 0
        self._lease, self._replica, self._pending, self._proof_us = None, None, None, None
        self._copy = Copy(self._lazy)
        self.holder = ""

    def _notice(self, event: str, level: str, **fields: object) -> None:
        self._notices.append(Notice(event, level, fields))
