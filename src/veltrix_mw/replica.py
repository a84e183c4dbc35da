"""The replica: decides what a follower does next, from what happened.

Owns the protocol of list, watch and confirm: a pure state machine, events in and steps out. No thread, socket or
clock in here: every event brings the time it happened (`now_s`, monotonic seconds). The same code runs in
production (`follower`), in the simulation and in tests.

::

    Begun ──► Confirm (is the last-known-good's history still there?) ──► List
    Listed ──► [ReadHistory ──►] OpenWatch ──► Next ──► Next ... now and then Confirm
    a gap, Compacted ──► List            Restored, a revision that went back ──► Renew ──► List
    Failed ──► Sleep (exponential, full jitter, at most 5 s) ──► the step again
    a Confirm that Failed ──► Next ... Confirm, as far apart; each third time OpenWatch
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final

from veltrix_mw.errors import AuthFailed, Compacted, InvalidValue, StoreError, public_class
from veltrix_mw.keyspace import Keyspace
from veltrix_mw.protocols import (
    Batch,
    ChangeRecord,
    Confirmation,
    Listing,
    Moved,
    Position,
    RawChange,
    RawVersion,
    Restored,
)
from veltrix_mw.snapshot import Rejection, Snapshot
from veltrix_mw.sorted_map import Item

__all__ = [
    "Begun",
    "Confirm",
    "Confirmed",
    "Crashed",
    "Decision",
    "Distrusted",
    "Event",
    "Failed",
    "HistoryRead",
    "List",
    "Listed",
    "Next",
    "Notice",
    "OpenWatch",
    "Publication",
    "ReadHistory",
    "Received",
    "Renew",
    "Renewed",
    "Replica",
    "Resumed",
    "Sleep",
    "Slept",
    "Step",
    "Watching",
]

CONFIRM_INTERVAL_S: Final = 5.0
"""How often the authority is asked whether this is still the truth: three of them make `max_age_s`'s default."""

CONFIRM_COST_FACTOR: Final = 200
"""Confirming may take at most 1/200 of the time: the query costs the server a scan."""

GRACE_S: Final = 1.0
"""How long the watch may lag behind a confirmation before it counts as dead ..."""

GRACE_MOST_S: Final = 8.0
"""... twice as long after each time that opening it anew brought nothing: a huge revision may take its time."""

BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MOST_S: Final = 5.0

RELIST_WITHIN_S: Final = 1.0
"""What makes one worker list anew, such as a compaction or a restore, makes a fleet do so: spread over this time."""

CONFIRM_BACKOFF_FIRST_S: Final = 1.0
"""The watch goes on meanwhile: a confirmation that fails is less urgent than a list."""

UNCONFIRMED_MOST: Final = 3  # in a row; then the watch, which may be as dead, is opened anew

HISTORY_KEYS: Final = 100  # keys whose last good value is looked for in the history: more would delay the start


# Steps: what the follower is to do next. Each ends in an event.


@dataclass(frozen=True, slots=True)
class List:
    """List everything; ends in `Listed`."""


@dataclass(frozen=True, slots=True)
class OpenWatch:
    """Drop the watch there is, if any, and watch after `position`; ends in `Watching`."""

    position: Position


@dataclass(frozen=True, slots=True)
class Next:
    """Wait on the watch for at most `timeout_s`; ends in `Received`."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class Confirm:
    """Ask the authority for its newest revision; ends in `Confirmed`."""

    position: Position


@dataclass(frozen=True, slots=True)
class ReadHistory:
    """Read the kept versions of `keys`; ends in `HistoryRead`."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Renew:
    """Mint a new incarnation in place of `known`; ends in `Renewed`."""

    known: str


@dataclass(frozen=True, slots=True)
class Sleep:
    """Do nothing for `delay_s`; ends in `Slept`."""

    delay_s: float


Step = List | OpenWatch | Next | Confirm | ReadHistory | Renew | Sleep


# What the follower tells others, beside the step it takes.


@dataclass(frozen=True, slots=True)
class Publication:
    """A snapshot to serve from now on.

    `changed` names the keys whose served entry may differ from the snapshot before; None: compare the two.
    `records` are the change records of the revisions that it applied. `position` is where it stands; `left` are the
    labels that were followed before, which whoever resumes here must know.

    `lazy_changes` are, by revision, the changes below lazy prefixes since the snapshot before. Where `changed` is None
    it says nothing of them.
    """

    snapshot: Snapshot
    changed: frozenset[str] | None
    records: tuple[ChangeRecord, ...]
    position: Position
    left: tuple[str, ...] = ()
    lazy_changes: tuple[tuple[int, tuple[RawChange, ...]], ...] = ()


# Events: what happened.


@dataclass(frozen=True, slots=True)
class Begun:
    """The follower starts. `saved` is the last-known-good's position and entries, if there is one."""

    now_s: float
    saved: tuple[Position, Sequence[Item]] | None = None


@dataclass(frozen=True, slots=True)
class Resumed:
    """The follower starts where another left off: after a fork, or after `close`."""

    now_s: float
    publication: Publication


@dataclass(frozen=True, slots=True)
class Crashed:
    """The follower met an error that should not be; the watch, if there was one, is gone."""

    now_s: float
    error: StoreError


@dataclass(frozen=True, slots=True)
class Listed:
    """A listing came; `sent_at_s` is when it was asked for."""

    now_s: float
    sent_at_s: float
    listing: Listing


@dataclass(frozen=True, slots=True)
class Watching:
    """The watch is open."""

    now_s: float


@dataclass(frozen=True, slots=True)
class Received:
    """The watch brought `batches`, none if it was quiet."""

    now_s: float
    batches: Sequence[Batch]


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The authority told its newest revision; `sent_at_s` is when it was asked."""

    now_s: float
    sent_at_s: float
    confirmation: Confirmation


@dataclass(frozen=True, slots=True)
class HistoryRead:
    """The kept versions of keys that lack a good value, newest first."""

    now_s: float
    versions: Mapping[str, Sequence[RawVersion]]


@dataclass(frozen=True, slots=True)
class Renewed:
    """The incarnation that the authority has now."""

    now_s: float
    incarnation: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The last step failed. `own_label` is a fresh random label, in case the replica must name a history itself."""

    now_s: float
    error: StoreError
    own_label: str = ""


@dataclass(frozen=True, slots=True)
class Slept:
    """The delay is over."""

    now_s: float


@dataclass(frozen=True, slots=True)
class Distrusted:
    """What was handed on is no longer where it was put, says who took it: all of it is to be listed again."""

    now_s: float
    reason: str


Event = (
    Begun
    | Resumed
    | Crashed
    | Listed
    | Watching
    | Received
    | Confirmed
    | HistoryRead
    | Renewed
    | Failed
    | Slept
    | Distrusted
)


@dataclass(frozen=True, slots=True)
class Notice:
    """Something an operator may want to know: a stable event name, a level of `logging`, and fields without values."""

    event: str
    level: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """The next step, and what to tell before it is taken."""

    step: Step
    publication: Publication | None = None
    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True, slots=True)
class _Expected:
    """A confirmation of something newer than what is held: the watch is to bring it by `by_s`.

    Once it has, what is held was the newest at `known_s`.
    """

    said: Confirmation
    known_s: float
    by_s: float


class Replica:
    """Follows one authority: hand it each event, do what it decides.

    Its snapshot's revision never decreases within an incarnation, and every revision it passes is applied whole or
    held back whole. Single-threaded.
    """

    def __init__(
        self,
        keyspace: Keyspace,
        *,
        origin: str,
        random: Random | None = None,
        confirm_interval_s: float = CONFIRM_INTERVAL_S,
        confirm_at_most_s: float = math.inf,
        relist_within_s: float = RELIST_WITHIN_S,
        max_age_s: float = math.inf,
    ) -> None:
        """`max_age_s` is the age beyond which what is served is stale, which is told."""
        self._keyspace = keyspace
        self._origin = origin
        self._random = Random() if random is None else random
        self._confirm_interval_s = confirm_interval_s
        self._confirm_at_most_s = confirm_at_most_s
        self._relist_within_s = relist_within_s
        self._max_age_s = max_age_s
        self._is_stale = False  # and that was told
        self._is_failing = self._is_unconfirmed = False  # and those, too
        # Where we stand in the authority's history; None until something was taken.
        self._position: Position | None = None
        # The incarnation we serve under, where the authority's own label cannot be renewed: (its label, ours).
        self._alias: tuple[str, str] | None = None
        # A restore was seen, and the incarnation of this label is to be renewed before anything is listed.
        self._renewing: str | None = None
        # Labels that were followed and given up for another: if one comes back, a backup brought it.
        self._left: deque[str] = deque(maxlen=64)
        # A list was found to be needed, and none was taken since.
        self._must_list = False
        # The history is known to be another one: the next listing is taken whatever its revision.
        self._take_any = False
        self._step: Step = List()
        self._failures = 0
        self._relists = 0  # lists that were needed anew since what is held was last proved
        self._unconfirmed = 0  # confirmations that failed in a row
        self._confirm_at_s = 0.0
        self._confirm_costs: deque[float] = deque(maxlen=3)
        # The authority is known to have this revision; the watch must bring it by then.
        self._expected: _Expected | None = None
        self._grace_s = GRACE_S
        self._notices: list[Notice] = []
        self._served: Snapshot = keyspace.snapshot
        self._changed: set[str] | None = set()
        self._records: list[ChangeRecord] = []
        self._lazy_changes: list[tuple[int, tuple[RawChange, ...]]] = []
        self.reconnects = 0
        self.error: StoreError | None = None

    @property
    def snapshot(self) -> Snapshot:
        """What is served."""
        return self._keyspace.snapshot

    @property
    def lag(self) -> int:
        """How many revisions the authority is known to be ahead."""
        expected, position = self._expected, self._position
        return 0 if expected is None or position is None else max(0, expected.said.revision - position.revision)

    @property
    def state(self) -> str:
        """`following`, `listing`, or `waiting` (after a failure, also of a confirmation)."""
        match self._step:
            case Next() | Confirm() if self._unconfirmed:
                return "waiting"
            case Next() | Confirm() if self.snapshot.origin != "disk":
                return "following"
            case Sleep():
                return "waiting"
            case _:
                return "listing"

    @property
    def must_list(self) -> bool:
        """Whether everything is to be listed again before anything else is told."""
        return self._must_list

    def handle(self, event: Event) -> Decision:
        """What to do now that `event` has happened."""
        if isinstance(event, Received):
            self._failures = 0
        if isinstance(event, (Listed, Confirmed)):
            self._unconfirmed = 0
        answered = isinstance(event, (Listed, Watching, Confirmed)) or (isinstance(event, Received) and event.batches)
        if answered and not self._unconfirmed:
            self.error = None
        self._step = self._decide(event)
        self._note_answers(event)
        self._note_age(event.now_s)
        publication = self._publication()
        notices = tuple(self._notices)
        self._notices.clear()
        return Decision(self._step, publication, notices)

    def _decide(self, event: Event) -> Step:
        match event:
            case Begun():
                return self._begin(event)
            case Resumed():
                return self._begin_again(event)
            case Crashed():
                return self._back_off(event.error)
            case Listed():
                return self._take_listing(event)
            case HistoryRead():
                self._keyspace.recover(event.versions)
                self._changed = None
                return self._open_watch()
            case Watching():
                return self._follow(event.now_s)
            case Received():
                return self._take_batches(event)
            case Confirmed():
                return self._take_confirmation(event)
            case Renewed():
                self._renewing = None
                if self._position is not None and event.incarnation == self._position.incarnation:
                    return self._list_soon()  # the authority stands where we do: a stale tier looked like a restore
                self._take_any = True
                self._notice("veltrix.restored", "warning", incarnation=event.incarnation)
                return self._list_soon()
            case Failed():
                return self._after_failure(event)
            case Slept():
                return self._resume()
            case Distrusted():
                return self._list_anew(event.reason)

    def _begin(self, event: Begun) -> Step:
        if event.saved is None:
            return List()
        position, entries = event.saved
        self._keyspace.load(entries, revision=position.revision, incarnation=position.incarnation)
        self._position = position
        self._changed = None
        self._notice("veltrix.last_known_good", "info", revision=position.revision)
        # Whether the history it was taken from still exists cannot be told from a listing alone.
        return Confirm(position)

    def _begin_again(self, event: Resumed) -> Step:
        last = event.publication
        self._keyspace.resume(last.snapshot)
        self._served = last.snapshot
        self._position = last.position
        self._left.extend(last.left)
        if last.snapshot.incarnation != last.position.incarnation:
            self._alias = (last.position.incarnation, last.snapshot.incarnation)
        # What was held back can only be judged again with what the authority has now.
        return List() if last.snapshot.rejected else self._resume()

    def _take_listing(self, event: Listed) -> Step:
        listing, position = event.listing, self._position
        found = listing.position
        if position is not None and self._is_restore(found, position):
            return self._renew(found.incarnation)
        before = self.snapshot.rejected
        try:
            self._keyspace.restore(
                listing,
                incarnation=self._label(found.incarnation),
                origin=listing.origin or self._origin,
                proved_at_s=event.sent_at_s - listing.age_s,
            )
        except InvalidValue as exc:
            return self._back_off(StoreError(str(exc)))
        if position is not None and position.incarnation != found.incarnation:
            self._left.append(position.incarnation)
            if position.incarnation and not position.incarnation.endswith("?") and not self._take_any:
                # Nobody minted it while we looked: a start from a file, and the store is another one.
                self._notice("veltrix.restored", "warning", incarnation=found.incarnation, revision=found.revision)
        if position is None or found != position:
            self._relists = min(self._relists, 1)  # it brought something new: no damage that nobody mends
        self._failures = 0
        self._take_any = self._must_list = False
        self._position = found
        self._changed = None
        self._expected = None
        self._confirm_next(event.now_s)
        if listing.passed_over:
            # An empty mirror is what a first deploy finds: its relay is as new as this process.
            level = "info" if listing.unfilled else "warning"
            self._notice("veltrix.failover", level, reason=listing.passed_over, after_s=0.0, tier=listing.origin)
        self._note_rejections({})
        self._note_accepted(before)
        wanting = self._keyspace.wanting[:HISTORY_KEYS]
        return ReadHistory(wanting) if wanting else self._open_watch()

    def _is_restore(self, found: Position, position: Position) -> bool:
        """Whether a listing shows another history under a label that was followed before."""
        if self._alias is not None and self._alias[0] == found.incarnation and self._take_any:
            return False  # known, and it cannot be renamed from here
        if found.incarnation in self._left:
            return True  # a backup brought it back
        if found.incarnation != position.incarnation:
            return False
        other = found.revision == position.revision and found.fingerprint != position.fingerprint
        return self._take_any or other or found.revision < position.revision

    def _take_batches(self, event: Received) -> Step:
        begun_at = self._position
        for batch in event.batches:
            position = self._position
            assert position is not None
            if batch.position.incarnation != position.incarnation:
                return self._list_anew("another incarnation")
            if batch.position.revision <= position.revision:
                continue  # a message that came twice
            if batch.previous != position.revision:
                return self._list_anew("a gap in the watch")
            before = self.snapshot.rejected
            changed = self._keyspace.apply(batch)
            self._position = batch.position
            self._records.append(batch.record)
            if batch.lazy_changes:
                self._lazy_changes.append((batch.position.revision, batch.lazy_changes))
            if self._changed is not None:
                self._changed |= changed
            if self.snapshot.rejected is not before:
                self._note_rejections(before)
                self._note_accepted(before)
            expected = self._expected
            if expected is not None and expected.said.revision == batch.position.revision:
                # While writes go on, each confirmation knows of something newer: this is when it is proved.
                if differs := self._differs(expected.said):
                    return self._list_anew(differs)
                self._prove(expected.known_s)
        return self._follow(event.now_s, moved=self._position is not begun_at)

    def _take_confirmation(self, event: Confirmed) -> Step:
        position, now = self._position, event.confirmation
        assert position is not None
        if not now.age_s:  # what a mirror says costs the authority nothing
            took_s = event.now_s - event.sent_at_s
            self._confirm_costs.append(took_s if now.cost_s is None else now.cost_s)
        self._confirm_next(event.now_s)
        if self.snapshot.origin == "disk":
            return List()
        if now.incarnation != position.incarnation:
            self._take_any = True
            return self._list_anew("another incarnation")
        if now.revision < position.revision:
            return self._renew(position.incarnation)
        if now.revision > position.revision:
            # It may be on its way: the watch gets a moment to bring it.
            # Asked again meanwhile, it gets no more of it: else no watch would ever be late.
            by_s = event.now_s + self._grace_s if self._expected is None else self._expected.by_s
            self._expected = _Expected(now, event.sent_at_s - now.age_s, by_s)
        elif differs := self._differs(now):
            return self._list_anew(differs)
        else:
            self._prove(event.sent_at_s - now.age_s)
        return self._follow(event.now_s)

    def _differs(self, said: Confirmation) -> str:
        """How what is held differs from what was said of this revision; empty if it does not."""
        if said.count is not None and said.count != self._keyspace.entry_count:
            return "the number of entries differs"
        if said.digest is not None and said.digest != self.snapshot.digest:
            return "the digest differs"
        return ""

    def _prove(self, known_s: float) -> None:
        """What is held was the newest at `known_s`."""
        proof = self.snapshot._proof
        # A mirror may know of an older proof than the authority gave us before, or than the last list was.
        if known_s > proof.at_s:
            proof.at_s = known_s
            self._relists = 0

    def _after_failure(self, event: Failed) -> Step:
        error, step = event.error, self._step
        if isinstance(error, Moved):
            return self._move(error)
        self.error = error
        position = self._position
        if isinstance(error, Restored) and position is not None and not isinstance(step, (List, Renew)):
            return self._renew(position.incarnation)
        match step:
            case Renew(known) if isinstance(error, AuthFailed):
                # Only who may write can rename the history; until someone does, it goes by a name of our own.
                self._alias = (known, f"{event.own_label}?")
                self._renewing = None
                self._take_any = True
                self._notice("veltrix.restored", "warning", incarnation=self._alias[1])
                return self._list_soon()
            case ReadHistory():
                self._notice("veltrix.history_unread", "warning", reason=str(error))
                return self._open_watch()
            case Confirm() if isinstance(error, Compacted) or self.snapshot.origin == "disk":
                return List() if self.snapshot.origin == "disk" else self._list_anew(str(error))
            case Confirm():
                return self._go_on_unconfirmed(event)
            case OpenWatch() | Next() if isinstance(error, Compacted):
                return self._list_anew(str(error))
            case _:
                return self._back_off(error)

    def _move(self, moved: Moved) -> Step:
        """Watch on elsewhere: nothing has failed that is followed from here on."""
        self._unconfirmed = 0
        level = "info" if moved.mended else "warning"
        self._notice("veltrix.failover", level, reason=str(moved), after_s=round(moved.after_s, 3), tier=moved.tier)
        return Sleep(moved.after_s)

    def _go_on_unconfirmed(self, event: Failed) -> Step:
        """Watch on and ask again later; what is served ages meanwhile."""
        if self._unconfirmed == 0:
            self._is_unconfirmed = True
            self._notice(
                "veltrix.confirm_failed", "warning", reason=str(event.error), error=public_class(event.error).__name__
            )
        self._confirm_at_s = event.now_s + self._delay_s(CONFIRM_BACKOFF_FIRST_S, self._unconfirmed)
        self._unconfirmed += 1
        if self._unconfirmed % UNCONFIRMED_MOST == 0:
            self.reconnects += 1
            return self._open_watch()
        return self._follow(event.now_s)

    def _follow(self, now_s: float, *, moved: bool = False) -> Step:
        """Wait on the watch until something is due; `moved`: it has just brought something new."""
        position = self._position
        assert position is not None
        due_s = self._confirm_at_s
        if self._expected is not None:
            revision, by_s = self._expected.said.revision, self._expected.by_s
            if moved:
                by_s = now_s + GRACE_S  # a burst is on its way: slow is not dead
                self._expected = replace(self._expected, by_s=by_s)
            if position.revision >= revision:
                self._expected, self._grace_s = None, GRACE_S
            elif now_s >= by_s:
                self._expected, self._grace_s = None, min(GRACE_MOST_S, 2 * self._grace_s)
                self.reconnects += 1
                self._notice("veltrix.watch_dead", "warning", revision=position.revision, behind=revision)
                return self._open_watch()
            else:
                due_s = min(due_s, by_s)
        if now_s >= self._confirm_at_s:
            return Confirm(position)
        return Next(due_s - now_s)

    def _resume(self) -> Step:
        """After a pause: watch on where we stood, or list if nothing was taken from the authority yet."""
        if self._renewing is not None:
            return Renew(self._renewing)
        if self._position is None or self._take_any or self._must_list or self.snapshot.origin in {"disk", "none"}:
            return List()
        return OpenWatch(self._position)

    def _renew(self, incarnation: str) -> Step:
        self._renewing = incarnation
        return Renew(incarnation)

    def _open_watch(self) -> Step:
        assert self._position is not None
        return OpenWatch(self._position)

    def _list_anew(self, reason: str) -> Step:
        first_write = self._position is not None and not self._position.incarnation
        self._notice("veltrix.relist", "info" if first_write else "warning", reason=reason)
        # What was only just begun is small, and somebody waits for the first value.
        return List() if first_write else self._list_soon()

    def _list_soon(self) -> Step:
        """List anew, at a moment of this process's own; rarer and rarer until a confirmation proves what is held.

        The first time at once where nothing of the authority is served: a start does not wait.
        """
        self._must_list = True
        if self.snapshot.origin in {"disk", "none"} and not self._relists:
            self._relists = 1
            return List()
        delay_s = self._delay_s(self._relist_within_s, self._relists)
        self._relists += 1
        return Sleep(delay_s)

    def _back_off(self, error: StoreError) -> Step:
        self.error = error
        if self._failures == 0:
            self._is_failing = True
            self._notice("veltrix.store_failed", "warning", reason=str(error), error=public_class(error).__name__)
            self.reconnects += 1
        delay_s = self._delay_s(BACKOFF_FIRST_S, self._failures)
        self._failures += 1
        return Sleep(delay_s)

    def _delay_s(self, first_s: float, failures: int) -> float:
        """Exponential backoff with full jitter: up to `first_s`, doubled for each failure before, in seconds."""
        return self._random.uniform(0, min(BACKOFF_MOST_S, first_s * 2.0 ** min(failures, 16)))

    def _confirm_next(self, now_s: float) -> None:
        """Jittered by a fifth, so that a fleet does not ask in step.

        The cheapest of the last three counts as the cost: a pause of this process, or a slow moment of the server at
        the start, is no load on the server.
        """
        costs = self._confirm_costs
        cost_s = min(costs) if len(costs) == costs.maxlen else 0.0
        interval_s = max(self._confirm_interval_s, min(CONFIRM_COST_FACTOR * cost_s, self._confirm_at_most_s))
        self._confirm_at_s = now_s + interval_s * self._random.uniform(0.8, 1.0)

    def _label(self, incarnation: str) -> str:
        if self._alias is not None and self._alias[0] == incarnation:
            return self._alias[1]
        self._alias = None
        return incarnation

    def _note_rejections(self, before: Mapping[str, Rejection]) -> None:
        held = [
            (key, why)
            for key, why in self.snapshot.rejected.items()
            if (known := before.get(key)) is not why and known != why
        ]
        for key, why in held[:20]:
            self._notice("veltrix.rejected", "warning", key=key, revision=why.revision, reason=why.reason)
        if len(held) > 20:
            self._notice("veltrix.rejected", "warning", more=len(held) - 20)

    def _note_accepted(self, before: Mapping[str, Rejection]) -> None:
        """Tell which keys are held back no more: a good change came, or they are gone."""
        held = self.snapshot.rejected
        accepted = [key for key in before if key not in held]
        for key in accepted[:20]:
            self._notice("veltrix.accepted", "info", key=key)
        if len(accepted) > 20:
            self._notice("veltrix.accepted", "info", more=len(accepted) - 20)

    def _note_answers(self, event: Event) -> None:
        """Tell once that what failed works again: where it would be told anew that it fails."""
        if self._is_failing and not self._failures:
            self._is_failing = False
            self._notice("veltrix.store_answers", "info")
        if self._is_unconfirmed and isinstance(event, (Listed, Confirmed)):
            self._is_unconfirmed = False
            self._notice("veltrix.confirmed", "info")

    def _note_age(self, now_s: float) -> None:
        """Tell once that what is served became stale, and once that it is current again."""
        proved_s = self.snapshot._proof.at_s
        if proved_s == -math.inf:
            return  # from the last-known-good file, which was told, or there is nothing
        is_stale = now_s - proved_s > self._max_age_s
        if is_stale and not self._is_stale:
            self._notice("veltrix.stale", "warning", age_s=round(now_s - proved_s, 1), revision=self.snapshot.revision)
        if self._is_stale and not is_stale:
            self._notice("veltrix.current", "info", revision=self.snapshot.revision)
        self._is_stale = is_stale

    def _notice(self, event: str, level: str, **fields: Any) -> None:
        self._notices.append(Notice(event, level, fields))

    def _publication(self) -> Publication | None:
        """What changed since the last publication, if anything; not while history is still to be read."""
        snapshot, position = self.snapshot, self._position
        if snapshot is self._served or position is None or isinstance(self._step, ReadHistory):
            return None
        changed = None if self._changed is None else frozenset(self._changed)
        publication = Publication(
            snapshot,
            changed,
            tuple(self._records),
            position,
            tuple(self._left),
            tuple(self._lazy_changes),
        )
        self._served, self._changed, self._records = snapshot, set(), []
        self._lazy_changes = []
        return publication
