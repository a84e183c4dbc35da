"""The mirrored store: an authority that orders writes, and a mirror of it that most workers follow.

Owns the way of each call: writes, past and linearizable reads go to the authority; list, watch and confirm to the tier
that `tiers` names. Decides nothing itself about when a tier is left, and knows no backend.

A worker that leaves the mirror resumes on the authority at its own revision, and the other way round: both carry the
authority's incarnations, revisions and fingerprints.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Final, TypeGuard

from veltrix_mw.errors import AuthFailed, Compacted, StoreError, StoreUnavailable
from veltrix_mw.protocols import (
    Batch,
    ChangeRecord,
    Confirmation,
    FailsOver,
    Filled,
    FoundUnits,
    Listing,
    Mirror,
    MirrorState,
    Moved,
    Position,
    RawOperation,
    RawUnit,
    RawVersion,
    Recognizing,
    Restored,
    Store,
    StoreInfo,
    UnitMirror,
    Watch,
)
from veltrix_mw.stores.tiers import Tier, Tiers

__all__ = ["MirroredStore", "holds_units"]

LOOK_TIMEOUT_S: Final = 0.5
"""The most that a look at the mirror may keep the authority's changes waiting."""

UNFOLLOWED_MOST: Final = 4
"""Then a mirror that is well, by what it says, and cannot be followed all the same, is left."""

DISOWNED_S: Final = 5.0
"""How long a mirror is not listened to whose incarnation the authority does not have: until that is followed."""

FIRST_LOOK_TIMEOUT_S: Final = 1.0
"""What a start grants the mirror to say where it stands, before the authority is asked."""

FIRST_LIST_SHARE: Final = 0.5
"""How much of a start's time it is granted to tell all that it holds: the rest is the authority's."""


class MirroredStore:
    """A store that is followed through a mirror while that is well, and at its authority otherwise.

    What it lists and watches never goes back within an incarnation, whichever tier answers. Thread-safe; usable after
    a fork as its tiers are.
    """

    def __init__(
        self,
        authority: Store,
        mirror: Mirror,
        *,
        random: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.authority = authority
        self.mirror = mirror
        self._random = random
        self._clock = clock
        # Protects the tiers: the follower asks them, `status` and writers look.
        self._lock = threading.Lock()
        self._tiers = self._new_tiers()
        self._served = False  # whether anything was listed by this process
        self._passed_over = ""  # which tier failed before anything was listed, until that is told
        self._unfilled = False  # whether that was a mirror that is empty
        self._was_followed = False  # whether the mirror ever was
        self._unfollowed = 0  # how often in a row a mirror that is well could not be followed
        self._pid = os.getpid()
        self.on_filled: Filled | None = None  # whoever waits for units that the mirror was asked for

    def _new_tiers(self) -> Tiers:
        # Seeded by the process: the workers of a preloaded server fork from one state, and would move in step.
        return Tiers(lazy=self.info.lazy, random=self._random or Random(f"{os.getpid()} {time.time_ns()}"))

    @property
    def info(self) -> StoreInfo:
        return self.authority.info

    @property
    def failovers(self) -> int:
        return sum(each.failovers for each in (self.authority, self.mirror) if isinstance(each, FailsOver))

    @property
    def mirror_origin(self) -> str:
        """What kind of store the mirror is."""
        return self.mirror.info.origin

    @property
    def tiers(self) -> Tiers:
        """What was decided, to look at."""
        return self._tiers

    # --- followed

    def list(self, *, timeout_s: float) -> Listing:
        self._renew_after_fork()
        deadline_s = self._clock() + timeout_s
        if self._chosen() is Tier.MIRROR:
            granted_s = timeout_s if self._served else timeout_s * FIRST_LIST_SHARE
            listing = self._list_of_mirror(granted_s, needs_fresh=not self._served)
            if listing is not None:
                return listing
            if self._served:
                raise self._not_listed()
            with self._lock:
                self._tiers.leave_at_once(self._clock())
                why = self._tiers.fault or "it went back while it was listed"
                unfilled = self._tiers.fault_kind == "empty"
            self._unfilled = unfilled
            self._passed_over = f"the mirror is not followed, and the authority is: {why}"
        sent_at_s = self._clock()
        try:
            listing = self.authority.list(timeout_s=max(0.1, deadline_s - sent_at_s))
        except Compacted:
            raise
        except StoreError as exc:
            if self._served:
                raise self._moved_back(exc) from exc
            # Nothing is served yet: what a mirror knew some time ago, and says how old it is, is better.
            left_s = max(FIRST_LOOK_TIMEOUT_S, deadline_s - self._clock())
            listing = self._list_of_mirror(left_s, needs_fresh=False, alone=True)
            if listing is None:
                raise
            self._passed_over = ""
            return replace(listing, passed_over=_unanswered(exc))
        self._learned(listing.position, sent_at_s)
        self._served = True
        unfilled, passed_over = self._unfilled, self._told_passed_over()
        return replace(listing, origin=self.authority.info.origin, passed_over=passed_over, unfilled=unfilled)

    def watch(self, position: Position, *, timeout_s: float) -> Watch:
        self._renew_after_fork()
        if not position.incarnation:
            with self._lock:
                self._tiers.leave_at_once(self._clock())  # nothing was written yet, so no mirror has anything
        self._learned(position, -math.inf)
        if self._chosen() is Tier.AUTHORITY:
            try:
                return _AuthorityWatch(self, self.authority.watch(position, timeout_s=timeout_s))
            except Compacted:
                raise
            except StoreError as exc:
                raise self._moved_back(exc) from exc
        try:
            if self.info.lazy and holds_units(self.mirror):
                followed = self.mirror.watch(position, timeout_s=timeout_s, filled=self._filled)
            else:
                followed = self.mirror.watch(position, timeout_s=timeout_s)
            watch = _MirrorWatch(self, followed)
        except StoreError as exc:
            raise self._left_mirror(exc) from exc
        self._was_followed = True
        return watch

    def confirm(self, position: Position, *, timeout_s: float) -> Confirmation:
        self._renew_after_fork()
        self._learned(position, -math.inf)
        sent_at_s = self._clock()
        with self._lock:
            current = self._tiers.current  # of the watch there is; the next one moves
        if current is Tier.AUTHORITY:
            confirmation = self.authority.confirm(position, timeout_s=timeout_s)
            if (confirmation.incarnation, confirmation.revision) == (position.incarnation, position.revision):
                self._learned(position, sent_at_s)
            return confirmation
        state = self._ask_mirror(timeout_s)
        if state is None:
            raise StoreUnavailable(f"the mirror does not say where it stands: {self._tiers.fault}")
        with self._lock:
            refused = self._tiers.refuses(state, sent_at_s=sent_at_s)
        if not self._tiers.covers(state.lazy):
            # It may have been filled so at the revision that was followed, and told of later ones without them.
            raise Compacted(f"the mirror was filled anew: {refused}; list again")
        if refused:
            raise StoreUnavailable(f"the mirror is not believed: {refused}")
        if state.position.incarnation != position.incarnation:
            raise Compacted("the mirror holds a new incarnation of the authority; list again")
        if state.position == position:
            self._learned(position, sent_at_s - state.age_s)
        elif state.position.revision == position.revision:
            raise Compacted("the mirror holds another history under the same incarnation; list again")
        return Confirmation(
            state.position.incarnation,
            state.position.revision,
            # A mirror that leaves out less than this process counts what this process does not hold.
            state.count if self._is_alike(state.lazy) else None,
            age_s=state.age_s,
            digest=state.digest if self._is_alike(state.lazy) else None,
        )

    def _is_alike(self, left_out: Sequence[str]) -> bool:
        return set(left_out) == set(self.info.lazy)

    def _is_eager(self, key: str) -> bool:
        return not key.startswith(self.info.lazy)

    # --- written and remembered: the authority's alone

    def commit(self, operations: Sequence[RawOperation], record: ChangeRecord, *, timeout_s: float) -> int:
        return self.authority.commit(operations, record, timeout_s=timeout_s)

    def read(self, keys: Sequence[str], revision: int | None, *, timeout_s: float) -> dict[str, tuple[bytes, int]]:
        return self.authority.read(keys, revision, timeout_s=timeout_s)

    def renew_incarnation(self, known: str, *, timeout_s: float) -> str:
        try:
            incarnation = self.authority.renew_incarnation(known, timeout_s=timeout_s)
        except AuthFailed:
            with self._lock:
                self._tiers.doubt(known, now_s=self._clock())
            raise
        if incarnation != known:
            with self._lock:
                self._tiers.renamed(known)
        return incarnation

    def history(self, key: str, *, limit: int, timeout_s: float) -> Sequence[RawVersion]:
        return self.authority.history(key, limit=limit, timeout_s=timeout_s)

    def list_at(self, revision: int, *, timeout_s: float) -> Listing:
        return self.authority.list_at(revision, timeout_s=timeout_s)

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> dict[str, RawUnit]:
        return self.authority.read_units(names, position, timeout_s=timeout_s)

    # --- lazy units in the mirror

    def find_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> FoundUnits | None:
        """Those of `names` that the mirror holds, none of them older than `position`.

        None where it is not followed, or cannot tell: read the authority.
        """
        self._renew_after_fork()
        with self._lock:
            current = self._tiers.current
        if current is not Tier.MIRROR or not holds_units(self.mirror):
            return None
        try:
            found = self.mirror.find_units(names, timeout_s=timeout_s)
        except StoreError:
            return None  # that it is away its follower finds out
        stands = found.state.position
        if stands.incarnation != position.incarnation or stands.revision < position.revision:
            return None
        return found

    def want_units(self, names: Sequence[str], *, timeout_s: float) -> None:
        """Ask the mirror's relay for units; `on_filled` is told when they are there. Raises `StoreError`."""
        assert holds_units(self.mirror)
        self.mirror.want_units(names, timeout_s=timeout_s)

    def _filled(self, names: Sequence[str]) -> None:
        if self.on_filled is not None:
            self.on_filled(names)

    def close(self) -> None:
        """Close both tiers. Idempotent; a later call opens anew."""
        self.mirror.close()
        self.authority.close()

    # --- the mirror

    def _list_of_mirror(self, timeout_s: float, *, needs_fresh: bool, alone: bool = False) -> Listing | None:
        """What the mirror holds, if it is to be believed; `needs_fresh`: and if it is well.

        `alone`: the authority has just failed, and is not asked to vouch for it.
        """
        sent_at_s = self._clock()
        state = self._ask_mirror(min(timeout_s, FIRST_LOOK_TIMEOUT_S))
        if state is None:
            return None
        with self._lock:
            usable = not self._tiers.fault if needs_fresh else not self._tiers.refuses(state, sent_at_s=sent_at_s)
        if not usable:
            return None
        vouched, unasked = self._is_vouched_for(state.position, alone=alone)
        if not vouched:
            return None
        try:
            listing = self.mirror.list(timeout_s=timeout_s)
        except StoreError as exc:
            self._note_failure(exc)
            return None
        held = MirrorState(listing.position, lazy=listing.lazy, age_s=listing.age_s)
        with self._lock:
            if self._tiers.refuses(held, sent_at_s=sent_at_s):
                return None  # it went back, or was filled otherwise, while it was listed
        if listing.position.incarnation != state.position.incarnation:
            vouched, unasked = self._is_vouched_for(listing.position, alone=alone)
            if not vouched:
                return None
        passed_over = self._told_passed_over()
        listing = replace(listing, passed_over=passed_over if self._served else unasked or passed_over)
        self._learned(listing.position, sent_at_s - listing.age_s)
        self._served = True
        if self._is_alike(listing.lazy):
            return listing
        return replace(listing, entries=[entry for entry in listing.entries if self._is_eager(entry[0])])

    def _told_passed_over(self) -> str:
        passed_over, self._passed_over, self._unfilled = self._passed_over, "", False
        return passed_over

    def _is_vouched_for(self, position: Position, *, alone: bool) -> tuple[bool, str]:
        """Whether a mirror's incarnation is known here, or the authority does not say that it is none of its own.

        A mirror cannot tell whose it is: a relay of another authority may have won the lease. Where the authority does
        not answer, the mirror is believed: there may be workers that reach nothing else. What is to be told of that
        comes second. `alone`: the authority has just failed, and is not asked.
        """
        with self._lock:
            is_new = not self._served or self._tiers.is_new(position)
        if alone or not is_new:
            return True, ""
        try:
            if self._is_in_history(position):
                return True, ""
        except StoreError as exc:
            return True, _unanswered(exc)
        with self._lock:
            # Only until the authority is followed: there, a mirror of another incarnation is not gone back to.
            self._tiers.shun(
                "it holds an incarnation that the authority does not have", now_s=self._clock(), for_s=DISOWNED_S
            )
        return False, ""

    def _is_in_history(self, position: Position) -> bool:
        """Whether the authority has that incarnation; by the cheapest question, as whole fleets start at once."""
        recognizing = self.authority if isinstance(self.authority, Recognizing) else None
        if recognizing is not None:
            try:
                recognizing.recognize(position, timeout_s=FIRST_LOOK_TIMEOUT_S)
            except Restored:
                return False
            except Compacted:
                pass  # nobody can tell by the history any more
            else:
                return True
        try:
            confirmation = self.authority.confirm(position, timeout_s=FIRST_LOOK_TIMEOUT_S)
        except Compacted:  # or `Restored`: it does not know such a history, or no longer
            return False
        return confirmation.incarnation == position.incarnation

    def _ask_mirror(self, timeout_s: float, *, alone: bool = False) -> MirrorState | None:
        """Where the mirror stands, told to the tiers; None where it does not say. `alone`: the authority fails."""
        sent_at_s = self._clock()
        try:
            state = self.mirror.state(timeout_s=timeout_s)
        except StoreError as exc:
            self._note_failure(exc)
            return None
        with self._lock:
            self._tiers.answered(state, sent_at_s=sent_at_s, now_s=self._clock(), alone=alone)
        return state

    def _moved_back(self, error: StoreError) -> StoreError:
        """What to raise where the authority failed: no watch is open there that would look at the mirror."""
        with self._lock:
            looking = self._tiers.is_looking_due(self._clock())
        if looking:
            self._ask_mirror(LOOK_TIMEOUT_S, alone=True)
        with self._lock:
            leaving, after_s = self._tiers.is_leaving, self._tiers.next_move_s(self._clock())
        if not leaving or self._tiers.current is Tier.MIRROR:
            return error
        return Moved(
            f"the mirror is well, and followed while the authority is not: {error}",
            after_s=after_s,
            tier=self.mirror_origin,
        )

    def _left_mirror(self, error: StoreError) -> StoreError:
        """What to raise where the mirror failed as it was followed."""
        if isinstance(error, Compacted):
            return Compacted(str(error))  # list again, of whichever tier; never a verdict on the authority's history
        if self._ask_mirror(LOOK_TIMEOUT_S) is not None:
            with self._lock:
                if not self._tiers.fault:
                    self._unfollowed += 1
                    if isinstance(error, AuthFailed) or self._unfollowed >= UNFOLLOWED_MOST:
                        self._unfollowed = 0
                        self._tiers.shun(f"it cannot be followed: {error}", now_s=self._clock())
                if not self._tiers.is_leaving:
                    # It answers, so its relay may fill it within moments; the authority need not see everybody.
                    return StoreUnavailable(f"the mirror cannot be followed: {self._tiers.fault or error}")
        with self._lock:
            after_s = self._tiers.leave(self._clock())
        return Moved(f"the mirror is left for the authority: {error}", after_s=after_s, tier=self.info.origin)

    def _not_listed(self) -> StoreError:
        """What to raise where the mirror cannot be listed, and what is served can wait.

        A mirror that was damaged is filled within moments, and a fleet must not list the authority meanwhile.
        """
        with self._lock:
            tiers, now_s = self._tiers, self._clock()
            if tiers.is_leaving:
                return Moved(f"the mirror is left for the authority: {tiers.fault}", after_s=tiers.next_move_s(now_s))
            return StoreUnavailable(f"the mirror cannot be listed: {tiers.fault or 'it went back'}")

    def _note_failure(self, error: StoreError) -> None:
        with self._lock:
            self._tiers.failed(str(error), now_s=self._clock())

    # --- the tiers

    def _chosen(self) -> Tier:
        with self._lock:
            return self._tiers.choose(self._clock())

    def _learned(self, position: Position, known_s: float) -> None:
        with self._lock:
            self._tiers.learned(position, known_s=known_s)

    def _renew_after_fork(self) -> None:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._lock = threading.Lock()  # a thread of the parent may have held it
            parents, self._tiers = self._tiers, self._new_tiers()
            self._tiers.inherit(parents)


def holds_units(mirror: Mirror) -> TypeGuard[UnitMirror]:
    """Whether a mirror holds lazy units, too; one that was handed in need not."""
    return hasattr(mirror, "find_units") and hasattr(mirror, "want_units")


def _unanswered(error: StoreError) -> str:
    return f"the mirror is followed, and the authority does not answer: {error}"


class _MirrorWatch:
    """A watch on the mirror: ends with `Moved` when the mirror is to be left."""

    def __init__(self, store: MirroredStore, watch: Watch) -> None:
        self._store = store
        self._watch = watch

    def next(self, timeout_s: float) -> Sequence[Batch]:
        store = self._store
        now_s = store._clock()
        with store._lock:
            due, left_s = store._tiers.is_due(now_s), store._tiers.next_move_s(now_s)
            fault = store._tiers.fault
        if due:
            raise Moved(f"the mirror is left for the authority: {fault}")
        try:
            batches = self._watch.next(min(timeout_s, left_s))
        except StoreError as exc:
            raise store._left_mirror(exc) from exc
        store._unfollowed = 0
        if not batches:
            return batches
        if not all(store._tiers.covers(batch.lazy) for batch in batches):
            raise Compacted("the mirror leaves out what this process reads eagerly; list again")
        store._learned(batches[-1].position, -math.inf)
        if not store.info.lazy:
            return batches
        return [
            replace(
                batch,
                changes=tuple(change for change in batch.changes if store._is_eager(change.key)),
                lazy_changes=tuple(change for change in batch.changes if not store._is_eager(change.key)),
            )
            for batch in batches
        ]

    def close(self) -> None:
        self._watch.close()


class _AuthorityWatch:
    """A watch on the authority that looks at the mirror now and then, and ends with `Moved` when that is well."""

    def __init__(self, store: MirroredStore, watch: Watch) -> None:
        self._store = store
        self._watch = watch
        self._closed = False

    def next(self, timeout_s: float) -> Sequence[Batch]:
        store = self._store
        deadline_s = store._clock() + timeout_s
        while True:
            now_s = store._clock()
            with store._lock:
                tiers = store._tiers
                due, looking, look_s = tiers.is_due(now_s), tiers.is_looking_due(now_s), tiers.look_in_s(now_s)
            if due:
                again = " again" if store._was_followed else ""
                raise Moved(
                    f"the mirror is well{again}, and followed from here on", mended=True, tier=store.mirror_origin
                )
            if looking and not self._closed:
                store._ask_mirror(LOOK_TIMEOUT_S)
                continue
            batches = self._watch.next(max(0.0, min(deadline_s - now_s, look_s)))
            if batches:
                store._learned(batches[-1].position, -math.inf)
                origin = store.authority.info.origin
                return [replace(batch, origin=origin) for batch in batches]
            if store._clock() >= deadline_s:
                return batches

    def close(self) -> None:
        self._closed = True
        self._watch.close()
