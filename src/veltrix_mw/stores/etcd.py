"""The store in etcd: the authority of a fleet, listed, watched and confirmed.

Owns what is asked of etcd and what its answers prove. Knows nothing of what values mean, nor of which member answers
(`etcd_members`), how messages travel to it (`etcd_gateway`, `etcd_grpc`), how keys are named (`etcd_space`) or how a
watch's messages become revisions (`etcd_watch`).

A revision is etcd's own. Every write of ours overwrites the record, in the same transaction, so the record read at a
revision says whether that revision was ours, and its random mark whether it is the one that was followed.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, TypeVar
from weakref import WeakSet

from veltrix_mw.errors import Compacted, StoreUnavailable
from veltrix_mw.protocols import (
    ChangeRecord,
    Confirmation,
    Limits,
    Listing,
    Position,
    RawOperation,
    RawUnit,
    RawVersion,
    Restored,
    StoreInfo,
)
from veltrix_mw.settings import shown
from veltrix_mw.stores.conditions import check
from veltrix_mw.stores.etcd_members import AnswerTooLarge, CompactedAt, FutureRevision, Members, Transport, WatchStream
from veltrix_mw.stores.etcd_messages import (
    RANGE,
    TRANSACT,
    Answer,
    Compare,
    Event,
    KeyValue,
    Message,
    Method,
    Operation,
    Range,
    Ranged,
    Transacted,
    Transaction,
    WatchCreate,
)
from veltrix_mw.stores.etcd_space import Change, Space, agrees, foreign_mark, is_derived
from veltrix_mw.stores.etcd_transports import TransportName, make_transport
from veltrix_mw.stores.etcd_watch import CHANGE, ENTRIES, LABEL, EtcdWatch, Opened
from veltrix_mw.stores.etcd_witness import Witness
from veltrix_mw.stores.tls import Tls
from veltrix_mw.stores.units import bounded
from veltrix_mw.values import MAX_VALUE_BYTES, MISSING, Missing

__all__ = ["EtcdStore", "Ignored"]

_MAX_OPERATIONS: Final = 128 - 2  # etcd's own limit, less the record and the label
# etcd takes 1.5 MiB by default. Names stand in a write up to three times (condition, write, and read if it fails), each
# of at most 640 bytes; the record is a few hundred bytes.
_MAX_TRANSACTION_BYTES: Final = (1536 - 256) * 1024
_MAX_KEYS: Final = 5_000  # of one page ...
_FIRST_KEYS: Final = 500  # ... and of the first, when it is not known yet how large they are
# One page is decoded at a stretch, and other threads wait for that: 20 ms. A gRPC client takes 4 MiB by default.
_PAGE_BYTES: Final = 3 * 1024 * 1024
_READ_KEYS: Final = 100
_READ_UNITS: Final = 63  # two ranges each, and the label: within the 128 operations of a transaction ...
_READ_AT_ONCE: Final = 8  # ... and transactions at a time: 500 units in the time of one
_NEWER_KEYS: Final = 20  # looked through for one that is ours
_LIST_TRIES: Final = 3
_EXAMPLES: Final = 5
_RENEW_WATCH_S: Final = 300.0
_QUIET_S: Final = 0.3  # etcd looks ten times a second for watches that ask for the past

A = TypeVar("A", bound=Answer)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ignored:
    """Keys below the prefix that are none of ours, by their shape: how many, and a few of them."""

    count: int = 0
    examples: tuple[str, ...] = ()


@dataclass(slots=True)
class _Page:
    """What was collected of a listing."""

    entries: list[tuple[str, bytes, int]]
    ignored: int
    examples: list[str]


@dataclass(frozen=True, slots=True)
class _Verified:
    """A position that was found in the history: what is stored there now, and from where to watch on."""

    start: int
    label: str
    cluster_id: str
    asked_at: int


class EtcdStore:
    """A namespace in an etcd cluster.

    Every read is linearizable. Thread-safe; usable after a fork: a child closes what it inherited, unused.
    """

    def __init__(
        self,
        hosts: Sequence[tuple[str, int]] = (("127.0.0.1", 2379),),
        *,
        namespace: str,
        tls: bool = False,
        user: str | None = None,
        password: str | None = None,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        timeout_s: float = 2.0,
        prefix: str | None = None,
        values: Literal["json", "text"] = "json",
        lazy: Sequence[str] = (),
        renew_watch_s: float = _RENEW_WATCH_S,
        transport: TransportName | Transport = "gateway",
        login: str | None = None,
    ) -> None:
        """Name the members; nothing is opened.

        `ca`, `cert` and `key` are files in PEM. `timeout_s` is how long members are tried in turn while none answers.
        `prefix` stands in place of `<namespace>/` before each key. `values="text"` takes what is not JSON as a string.
        `lazy` are the prefixes that are left out wherever the namespace is listed, watched or counted.
        `renew_watch_s` is how often a watch is opened anew, so that a permission that was taken away is noticed: five
        minutes, as a confirmation notices it sooner. `transport` is what is spoken, etcd's JSON gateway or gRPC, or one
        that was made already; `login` then says what to do where etcd wants a user.
        """
        self._space = Space(namespace, prefix=prefix, lazy=lazy, is_text=values == "text")
        self._members = Members(
            hosts,
            make_transport(transport, Tls(ca, cert, key) if tls else None) if isinstance(transport, str) else transport,
            user=user,
            password=password,
            timeout_s=timeout_s,
            namespace=namespace,
            remedy=_remedy(self._space, namespace),
            **({} if login is None else {"login": login}),
        )
        where = ",".join(map(shown, hosts))
        limits = Limits(MAX_VALUE_BYTES, _MAX_OPERATIONS, _MAX_TRANSACTION_BYTES)
        url = f"etcd{'s' if tls else ''}://{where}/{namespace}{'?transport=grpc' if transport == 'grpc' else ''}"
        self._info = StoreInfo("etcd", url, namespace, limits, self._space.lazy)
        self._timeout_s = timeout_s
        self._renew_watch_s = renew_watch_s
        self._witness_of = (os.getpid(), Witness())
        # Protects the set of watches, which `close` ends.
        self._lock = threading.Lock()
        self._watches: WeakSet[EtcdWatch] = WeakSet()
        self._ignored: Ignored | None = None
        self._ignored_at = 0  # the revision of the cluster as of which they were counted

    @property
    def info(self) -> StoreInfo:
        return self._info

    @property
    def failovers(self) -> int:
        return self._members.failovers

    @property
    def ignored(self) -> Ignored:
        """The keys that were passed over when they were last counted."""
        return self._ignored or Ignored()

    # --- followed

    def list(self, *, timeout_s: float) -> Listing:
        deadline_s = time.monotonic() + timeout_s
        for _ in range(_LIST_TRIES):
            epoch = self._witness.seen.epoch
            try:
                listing, asked_at, page = self._listing(0, deadline_s)
            except Compacted:
                continue  # between two pages
            self._note_ignored(page, asked_at)
            position = self._witness.recall(listing.position, asked_at)
            self._witness.remember(position, asked_at, epoch)
            return Listing(position, listing.entries, ignored=listing.ignored)
        raise StoreUnavailable("etcd was compacted again and again while it was listed; list again")

    def watch(self, position: Position, *, timeout_s: float) -> EtcdWatch:
        watch = EtcdWatch(
            self, self._witness, self._space, position, renew_s=self._renew_watch_s, timeout_s=self._timeout_s
        )
        watch.open(time.monotonic() + timeout_s)
        with self._own_lock():
            self._watches.add(watch)
        return watch

    def confirm(self, position: Position, *, timeout_s: float) -> Confirmation:
        deadline_s = time.monotonic() + timeout_s
        space, witness, applied = self._space, self._witness, position.revision
        witness.check()
        epoch = witness.seen.epoch
        newer = Range(
            space.prefix,
            space.end,
            limit=_NEWER_KEYS,
            sort_order="DESCEND",
            sort_target="MOD",
            keys_only=True,
            min_mod_revision=applied + 1,
        )
        asked = [Range(space.label), Range(space.change), newer]
        asked += [Range(begin, end, count_only=True) for begin, end in space.lazy_spans]
        if _is_foreign(position):
            asked.append(self._put_at(applied, 0))
        answer = self._ranges(asked, deadline_s)
        cost_s = self._members.served_in_s
        witness.check()
        label, change = _text(answer.ranges[0]), _change(answer.ranges[1])
        found, *others = answer.ranges[2:]
        if answer.header.revision < applied:
            raise self._restored(f"revision {applied} is not in etcd any more")
        self._check_label(position, label, answer.header.cluster_id)
        newest = max(applied, change.revision if change else 0, self._newest_of(found, newer, deadline_s))
        if newest > applied:
            self._verified(position, deadline_s, may_confirm=False)
        else:
            self._check_mark(position, change, others[-1] if _is_foreign(position) else None)
            witness.remember(position, answer.header.revision, epoch)
        lazy_count = sum(each.count for each in others[: len(space.lazy_spans)])
        ignored = self._count_ignored(found, answer.header.revision, deadline_s)
        incarnation = label or position.incarnation or (f"{answer.header.cluster_id}?" if newest else "")
        return Confirmation(incarnation, newest, found.count - lazy_count - ignored, cost_s=cost_s)

    def recognize(self, position: Position, *, timeout_s: float) -> None:
        """By two keys, where `confirm` has etcd look through the namespace, as a revision of other tools needs, too."""
        self._verified(position, time.monotonic() + timeout_s, may_confirm=False)

    # --- written

    def commit(self, operations: Sequence[RawOperation], record: ChangeRecord, *, timeout_s: float) -> int:
        if not operations:
            raise ValueError("a transaction needs at least one operation")
        deadline_s = time.monotonic() + timeout_s
        space = self._space
        conditional = [op for op in operations if op.expected is not None or isinstance(op.value, Missing)]
        compare = [_condition(space.name(op.key), op) for op in conditional]
        writes = [_write(space.name(op.key), op) for op in operations]
        writes.append(Operation.put(space.change, Change.written(record)))
        look = [Operation.range(Range(space.name(op.key))) for op in conditional]
        look.append(Operation.range(Range(space.label, keys_only=True)))
        has_label = True
        while True:
            labelled, extra = Compare.present(space.label), list[Operation]()
            if not has_label:
                labelled = Compare.at(space.label, 0)
                extra = [Operation.put(space.label, secrets.token_hex(8).encode())]
            asked = Transaction([*writes, *extra], [*compare, labelled], look)
            answer = self._call(TRANSACT, asked, deadline_s, once=True)
            if answer.succeeded:
                return answer.header.revision
            *entries, label = answer.ranges
            for operation, found in zip(conditional, entries, strict=True):
                stored = found.kvs[0] if found.kvs else KeyValue()
                value = space.value(stored.value)
                check(operation, stored.mod_revision, lambda value=value: value)  # type: ignore[misc]
            # All conditions hold but that of the label: it is not there yet, or another writer was first.
            has_label = bool(label.kvs)
            if time.monotonic() >= deadline_s:
                raise StoreUnavailable("the namespace's label came and went until the deadline; nothing was written")

    def read(self, keys: Sequence[str], revision: int | None, *, timeout_s: float) -> dict[str, tuple[bytes, int]]:
        deadline_s = time.monotonic() + timeout_s
        at = 0
        if revision is not None:
            at = self._past(revision, deadline_s)
            if not at:
                return {}
        found: dict[str, tuple[bytes, int]] = {}
        for start in range(0, len(keys), _READ_KEYS):
            part = keys[start : start + _READ_KEYS]
            answer = self._ranges([Range(self._space.name(key), revision=at) for key in part], deadline_s)
            at = at or answer.header.revision
            for key, ranged in zip(part, answer.ranges, strict=True):
                for stored in ranged.kvs:
                    found[key] = self._space.value(stored.value), stored.mod_revision
        return found

    def renew_incarnation(self, known: str, *, timeout_s: float) -> str:
        deadline_s = time.monotonic() + timeout_s
        label, renewed = self._space.label, secrets.token_hex(8)
        look = [Operation.range(Range(label))]
        absent = Compare.at(label, 0)
        condition = absent if is_derived(known) else Compare.holds(label, known.encode())
        while True:
            # Sent twice it does no harm: the second finds what the first one wrote.
            asked = Transaction([Operation.put(label, renewed.encode())], [condition], look)
            answer = self._call(TRANSACT, asked, deadline_s)
            stored = renewed if answer.succeeded else _text(answer.ranges[0])
            if stored or condition is absent:
                return stored
            condition = absent  # it is gone altogether

    # --- remembered

    def history(self, key: str, *, limit: int, timeout_s: float) -> Sequence[RawVersion]:
        deadline_s = time.monotonic() + timeout_s
        name = self._space.name(key)
        now = self._ranges([Range(name, keys_only=True), Range(self._space.change)], deadline_s)
        current = now.ranges[0].kvs[0].mod_revision if now.ranges[0].kvs else 0
        change = _change(now.ranges[1])
        events, oldest = self._events(name, current, change.revision if change else 0, deadline_s)
        versions = {event.kv.mod_revision: MISSING if event.type == "DELETE" else event.kv.value for event in events}
        if oldest > 1:
            # What the key was when everything before was forgotten.
            for stored in self._range(Range(name, revision=oldest), deadline_s).kvs:
                versions.setdefault(stored.mod_revision, stored.value)
        revisions = sorted(versions, reverse=True)[:limit]
        records = self._records(revisions, oldest, deadline_s)
        return [RawVersion(key, self._handed(versions[each]), each, records[each]) for each in revisions]

    def list_at(self, revision: int, *, timeout_s: float) -> Listing:
        deadline_s = time.monotonic() + timeout_s
        at = self._past(revision, deadline_s)
        if not at:
            return Listing(Position(_text(self._range(Range(self._space.label), deadline_s)), 0), [])
        listing, _, _ = self._listing(at, deadline_s)
        return Listing(self._witness.recall(listing.position, at), listing.entries, ignored=listing.ignored)

    # --- a unit at a time

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> dict[str, RawUnit]:
        deadline_s = time.monotonic() + timeout_s
        if not position.revision:
            return {name: RawUnit(()) for name in names}
        try:
            return self._read_units(names, position, deadline_s)
        except Compacted:
            if not position.fingerprint:
                raise
        # The cluster went on without the namespace: up to where nothing newer was found, it is as it was.
        self.confirm(position, timeout_s=max(0.0, deadline_s - time.monotonic()))
        return self._read_units(names, position, deadline_s)

    def _read_units(self, names: Sequence[str], position: Position, deadline_s: float) -> dict[str, RawUnit]:
        at = max(position.revision, self._witness.complete_to(position))
        parts = [names[start : start + _READ_UNITS] for start in range(0, len(names), _READ_UNITS)]
        if len(parts) <= 1:
            return self._read_part(names, position, at, deadline_s)
        found: dict[str, RawUnit] = {}
        # At once, as a cluster may be far away: one after the other they would take as many round trips.
        with ThreadPoolExecutor(min(_READ_AT_ONCE, len(parts)), "veltrix-units") as pool:
            for read in pool.map(lambda part: self._read_part(part, position, at, deadline_s), parts):
                found.update(read)
        return found

    def _read_part(self, names: Sequence[str], position: Position, at: int, deadline_s: float) -> dict[str, RawUnit]:
        if len(names) > 1:
            try:
                return self._read_at_once(names, position, at, deadline_s, _FIRST_KEYS)
            except AnswerTooLarge:
                half = len(names) // 2
            return {
                name: raw
                for part in (names[:half], names[half:])
                for name, raw in self._read_part(part, position, at, deadline_s).items()
            }
        try:
            return self._shrinking(
                lambda limit: self._read_at_once(names, position, at, deadline_s, limit), _FIRST_KEYS
            )
        except AnswerTooLarge as exc:
            return {
                name: RawUnit((), f"the lazy unit {name!r} has a value that cannot be read: {exc}") for name in names
            }

    def _read_at_once(
        self, names: Sequence[str], position: Position, at: int, deadline_s: float, limit: int
    ) -> dict[str, RawUnit]:
        space = self._space
        spans = [span for name in names for span in space.unit_spans(name)]
        asked = [Range(space.label), *(Range(*span, limit=limit, revision=at) for span in spans)]
        try:
            answer = self._ranges(asked, deadline_s)
        except FutureRevision as exc:
            raise self._restored(f"revision {position.revision} is not in etcd any more") from exc
        except Compacted as exc:
            raise Compacted(f"revision {position.revision} is no longer kept in etcd") from exc
        self._witness.check()
        self._check_label(position, _text(answer.ranges[0]), answer.header.cluster_id)
        return {
            name: bounded(name, self._unit_entries(name, own, below, at, deadline_s))
            for name, own, below in zip(names, answer.ranges[1::2], answer.ranges[2::2], strict=True)
        }

    def _unit_entries(
        self, name: str, own: Ranged, below: Ranged, at: int, deadline_s: float
    ) -> Iterator[tuple[str, bytes, int]]:
        space = self._space
        _, (_, end) = space.unit_spans(name)
        for ranged in (own, *self._pages(below, end, (), at, deadline_s)):
            for stored in ranged.kvs:
                key = space.key(stored.key)
                if key is not None:
                    yield key, space.value(stored.value), stored.mod_revision

    def close(self) -> None:
        """End the watches and close every connection. Idempotent; a later call opens anew."""
        with self._own_lock():
            watches = tuple(self._watches)
        for watch in watches:
            watch.close()
        self._members.close()

    # --- for its watches

    def open_stream(self, position: Position, deadline_s: float) -> Opened:
        self._witness.check()
        verified = self._verified(position, deadline_s)
        space, start = self._space, verified.start
        creates = [
            WatchCreate(space.prefix, space.end, start, ENTRIES, fragment=True),
            WatchCreate(space.change, b"", start, CHANGE, fragment=True),
            # Labels before were replaced by the one that is verified.
            WatchCreate(space.label, b"", verified.asked_at + 1, LABEL, fragment=True),
        ]
        try:
            stream = self._members.watch(creates, deadline_s=deadline_s)
        except CompactedAt as exc:
            raise Compacted(f"etcd no longer keeps what follows revision {position.revision}; list again") from exc
        try:
            # Again: compacted in between, right up to a deletion, etcd 3.4 would keep that deletion to itself.
            self._range(Range(space.label, revision=max(1, start - 1), count_only=True), deadline_s)
            self._witness.check()
        except FutureRevision as exc:
            stream.close()
            raise self._restored(f"revision {position.revision} is not in etcd any more") from exc
        except BaseException:
            stream.close()
            raise
        return Opened(stream, verified.label, verified.cluster_id)

    def newest_change(self, revision: int, deadline_s: float) -> tuple[Change | None, str]:
        space = self._space
        answer = self._ranges([Range(space.change, revision=revision), Range(space.label)], deadline_s)
        return _change(answer.ranges[0]), _text(answer.ranges[1])

    def ignored_changed(self) -> None:
        self._ignored_at = 0

    # --- calls

    @property
    def _witness(self) -> Witness:
        pid, witness = self._witness_of
        if pid != os.getpid():
            # A lock of its own: the one there may be held by a thread that stayed in the parent.
            witness = Witness(witness.seen)
            self._witness_of = (os.getpid(), witness)
            self._lock = threading.Lock()
        return witness

    def _own_lock(self) -> threading.Lock:
        assert self._witness  # makes the lock anew in a child
        return self._lock

    def _call(self, method: Method[A], request: Message, deadline_s: float, *, once: bool = False) -> A:
        """A call whose answer is linearizable, and so a witness."""
        witness = self._witness
        before = witness.seen
        answer = self._members.call(method, request, deadline_s=deadline_s, once=once)
        witness.answered(answer.header, before)
        return answer

    def _range(self, asked: Range, deadline_s: float) -> Ranged:
        return self._call(RANGE, asked, deadline_s)

    def _ranges(self, asked: Sequence[Range], deadline_s: float) -> Transacted:
        """All of them at one moment."""
        return self._call(TRANSACT, Transaction([Operation.range(each) for each in asked]), deadline_s)

    def _past(self, revision: int, deadline_s: float) -> int:
        """The revision to ask for what was there at `revision`, 0 where nothing was. Raises unless it is known."""
        if revision < 0:
            raise ValueError(f"there is no revision {revision}; the first one is 0")
        try:
            # The cluster's revision 1 is before every write.
            self._range(Range(self._space.change, revision=max(1, revision), count_only=True), deadline_s)
        except FutureRevision as exc:
            raise ValueError(f"there is no revision {revision} yet") from exc
        except Compacted as exc:
            raise Compacted(f"revision {revision} is no longer kept; ask for a newer one") from exc
        return revision

    # --- positions

    def _verified(self, position: Position, deadline_s: float, *, may_confirm: bool = True) -> _Verified:
        """Find `position` in the history. Raises `Restored` where it is not there, `Compacted` where nobody knows."""
        applied, space = position.revision, self._space
        at = max(1, applied)
        asked = [Range(space.label), Range(space.change, revision=at)]
        if _is_foreign(position):
            asked.append(self._put_at(applied, at))
        try:
            answer = self._ranges(asked, deadline_s)
        except FutureRevision as exc:
            raise self._restored(f"revision {applied} is not in etcd any more") from exc
        except Compacted:
            # A deletion by others cannot be listed: who stands at one would seem to be ahead of what a list shows.
            if may_confirm and position.fingerprint == foreign_mark(()) and not self._witness.complete_to(position):
                self.confirm(position, timeout_s=max(0.0, deadline_s - time.monotonic()))
            return self._verified_by_memory(position, deadline_s)
        self._witness.check()
        label, change = _text(answer.ranges[0]), _change(answer.ranges[1])
        self._check_label(position, label, answer.header.cluster_id)
        if applied and not position.fingerprint:
            raise Compacted(f"nothing proves that revision {applied} is the one that was followed; list again")
        self._check_mark(position, change, answer.ranges[-1] if _is_foreign(position) else None)
        return _Verified(at + 1 if applied else 1, label, answer.header.cluster_id, answer.header.revision)

    def _verified_by_memory(self, position: Position, deadline_s: float) -> _Verified:
        """Go on from where nothing newer than `position` was found, if that is still kept."""
        gone = f"etcd no longer keeps what follows revision {position.revision}; list again"
        complete_to = self._witness.complete_to(position)
        space = self._space
        try:
            asked = [Range(space.label), Range(space.change, revision=max(1, complete_to), count_only=True)]
            answer = self._ranges(asked, deadline_s)
        except FutureRevision as exc:
            raise self._restored(f"revision {complete_to} is not in etcd any more") from exc
        except Compacted:
            label = self._range(Range(space.label), deadline_s)
            self._check_label(position, _text(label), label.header.cluster_id)
            raise Compacted(gone) from None
        self._witness.check()
        label_now = _text(answer.ranges[0])
        self._check_label(position, label_now, answer.header.cluster_id)
        return _Verified(complete_to + 1, label_now, answer.header.cluster_id, answer.header.revision)

    def _check_label(self, position: Position, label: str, cluster_id: str) -> None:
        """A position of no incarnation is of before the first write: any label may follow it."""
        followed = position.incarnation
        if not followed or followed == label:
            return
        if followed == f"{cluster_id}?":
            if not label:
                return
            raise Compacted("the namespace was given its incarnation since; list again")
        raise self._restored("the namespace has another incarnation than the one that was followed")

    def _check_mark(self, position: Position, change: Change | None, put: Ranged | None) -> None:
        """Compare what is left of the position's revision with its fingerprint."""
        if not position.revision:
            return
        if change is not None and change.revision == position.revision:
            is_same = change.fingerprint == position.fingerprint
        else:
            is_same = put is not None and agrees(self._foreign_mark(put), position.fingerprint)
        if not is_same:
            raise self._restored(f"revision {position.revision} is not the one that was followed")

    def _restored(self, what: str) -> Restored:
        # A listing must not go by what was true of another history.
        self._witness.forget()
        return Restored(f"{what}; list again")

    def _put_at(self, revision: int, at: int) -> Range:
        """What a revision put, as far as it is still to be seen at the revision `at`."""
        space = self._space
        return Range(space.prefix, space.end, revision=at, min_mod_revision=revision, max_mod_revision=revision)

    def _foreign_mark(self, put: Ranged) -> str:
        return foreign_mark((each.key, each.value) for each in put.kvs if self._space.key(each.key) is not None)

    def _newest_of(self, found: Ranged, asked: Range, deadline_s: float) -> int:
        """The newest revision of a key of ours in an answer that is sorted so; 0 where there is none."""
        for stored in found.kvs:
            if self._space.key(stored.key) is not None:
                return stored.mod_revision
        if not found.more:
            return 0
        # So many keys of others': look through all of them.
        wider = Range(
            asked.key,
            asked.range_end,
            revision=asked.revision,
            sort_order="DESCEND",
            sort_target="MOD",
            keys_only=True,
            min_mod_revision=asked.min_mod_revision,
        )
        return self._newest_of(self._range(wider, deadline_s), wider, deadline_s)

    # --- listings

    def _listing(self, at: int, deadline_s: float) -> tuple[Listing, int, _Page]:
        """Everything at the revision `at`, 0 for now; which revision of the cluster that was; what was passed over."""
        space = self._space
        newest_lazy = [
            Range(*span, limit=_NEWER_KEYS, revision=at, sort_order="DESCEND", sort_target="MOD", keys_only=True)
            for span in space.lazy_spans
        ]
        (begin, end), *spans = space.eager_spans
        asked = [Range(space.label), Range(space.change, revision=at), *newest_lazy]
        answer = self._shrinking(
            lambda limit: self._ranges([*asked, Range(begin, end, limit=limit, revision=at)], deadline_s), _FIRST_KEYS
        )
        at = at or answer.header.revision
        label, change, *lazies, head = answer.ranges
        page = _Page([], 0, [])
        for ranged in self._pages(head, end, spans, at, deadline_s):
            self._collect(page, ranged)
        record = _change(change)
        newest = max(
            record.revision if record else 0,
            max((revision for _, _, revision in page.entries), default=0),
            *(self._newest_of(found, asked, deadline_s) for found, asked in zip(lazies, newest_lazy, strict=True)),
            0,
        )
        incarnation = _text(label) or (f"{answer.header.cluster_id}?" if newest else "")
        fingerprint = ""
        if record and record.revision == newest:
            fingerprint = record.fingerprint
        elif newest:
            fingerprint = self._foreign_mark(self._range(self._put_at(newest, at), deadline_s))
        position = Position(incarnation, newest, fingerprint)
        return Listing(position, page.entries, ignored=page.ignored), at, page

    def _pages(
        self,
        page: Ranged,
        end: bytes,
        spans: Sequence[tuple[bytes, bytes]],
        at: int,
        deadline_s: float,
        *,
        keys_only: bool = False,
    ) -> Iterator[Ranged]:
        """`page`, the rest of its span, and the other spans, all at one revision."""
        waiting, keys = list(spans), 0
        while True:
            yield page
            if page.more:
                begin = page.kvs[-1].key + b"\0"
            elif waiting:
                begin, end = waiting.pop(0)
            else:
                return
            if page.kvs:
                size = sum(len(each.value) for each in page.kvs) // len(page.kvs) + 64
                keys = max(1, min(_MAX_KEYS, _PAGE_BYTES // size))
            page = self._shrinking(
                lambda limit, begin=begin, end=end: self._range(  # type: ignore[misc]
                    Range(begin, end, limit=limit, revision=at, keys_only=keys_only), deadline_s
                ),
                keys or _FIRST_KEYS,
            )

    @staticmethod
    def _shrinking(ask: Callable[[int], T], limit: int) -> T:
        """Ask for so many keys, and for fewer where the answer would be longer than it may be."""
        while True:
            try:
                return ask(limit)
            except AnswerTooLarge:
                if limit == 1:
                    raise
                limit = max(1, limit // 8)

    def _collect(self, page: _Page, ranged: Ranged) -> None:
        space = self._space
        for stored in ranged.kvs:
            key = space.key(stored.key)
            if key is not None:
                page.entries.append((key, space.value(stored.value), stored.mod_revision))
                continue
            page.ignored += 1
            if len(page.examples) < _EXAMPLES:
                page.examples.append(stored.key.decode("utf-8", "backslashreplace"))

    def _note_ignored(self, page: _Page, at: int) -> None:
        self._ignored = Ignored(page.ignored, tuple(page.examples))
        self._ignored_at = at

    def _count_ignored(self, newer: Ranged, at: int, deadline_s: float) -> int:
        """How many keys in the eager spans are none of ours; counted anew where that may have changed."""
        known, known_at = self._ignored, self._ignored_at
        is_same = all(self._space.key(each.key) is not None or each.mod_revision <= known_at for each in newer.kvs)
        if known is not None and known_at and is_same:
            return known.count
        (begin, end), *spans = self._space.eager_spans
        page = _Page([], 0, [])
        first = self._range(Range(begin, end, limit=_MAX_KEYS, revision=at, keys_only=True), deadline_s)
        for ranged in self._pages(first, end, spans, at, deadline_s, keys_only=True):
            self._collect(page, ranged)
            page.entries.clear()
        self._note_ignored(page, at)
        return page.ignored

    # --- history

    def _events(self, name: bytes, current: int, change: int, deadline_s: float) -> tuple[Sequence[Event], int]:
        """Every kept event of a key up to the revision `current`, and the oldest revision that is kept.

        An absent key (`current` 0) has no last event to wait for. The record's newest one, at the revision `change`, is
        told in the same round as all that came before it; a moment of quiet after that is the end.
        """
        oldest = 1
        while True:
            if 0 < current < oldest:
                return [], oldest  # nothing of it is kept but what it is
            creates = [WatchCreate(name, b"", oldest, ENTRIES, fragment=True)]
            change = change if change >= oldest else 0
            if not current and change:
                creates.append(WatchCreate(self._space.change, b"", change, CHANGE, fragment=True))
            try:
                stream = self._members.watch(creates, deadline_s=deadline_s)
                try:
                    return self._all_events(stream, current, change, deadline_s), oldest
                finally:
                    stream.close()
            except CompactedAt as exc:
                if exc.revision <= oldest:
                    raise
                oldest = exc.revision

    @staticmethod
    def _all_events(stream: WatchStream, current: int, change: int, deadline_s: float) -> Sequence[Event]:
        events: list[Event] = []
        has_sentinel = bool(change) and not current
        while True:
            now_s = time.monotonic()
            if now_s > deadline_s:
                raise StoreUnavailable("etcd did not tell the key's history in time; try again")
            waits = bool(current) or has_sentinel
            messages = stream.receive(deadline_s if waits else min(deadline_s, now_s + _QUIET_S))
            for message in messages:
                if message.watch_id == ENTRIES:
                    events += message.events
                elif message.watch_id == CHANGE:
                    has_sentinel = False
            if current and events and events[-1].kv.mod_revision >= current:
                return events
            if not messages and not waits:
                return events

    def _records(self, revisions: Sequence[int], oldest: int, deadline_s: float) -> dict[int, ChangeRecord]:
        """The record of each revision; an empty one where it has none, or it is no longer kept."""
        records = dict.fromkeys(revisions, ChangeRecord())
        for start in range(0, len(revisions), _READ_KEYS):
            part = revisions[start : start + _READ_KEYS]
            asked = [Range(self._space.change, revision=max(oldest, revision)) for revision in part]
            for revision, ranged in zip(part, self._ranges(asked, deadline_s).ranges, strict=True):
                change = _change(ranged)
                if change is not None and change.revision == revision:
                    records[revision] = change.record
        return records

    def _handed(self, stored: bytes | Missing) -> bytes | Missing:
        return stored if isinstance(stored, Missing) else self._space.value(stored)


def _condition(name: bytes, operation: RawOperation) -> Compare:
    expected = operation.expected
    if expected is None:
        return Compare.present(name)
    if expected == 0 and isinstance(operation.value, Missing):
        return Compare.at(name, -1)  # never: there is nothing to delete where the key is absent
    return Compare.at(name, expected)


def _write(name: bytes, operation: RawOperation) -> Operation:
    value = operation.value
    return Operation.delete(name) if isinstance(value, Missing) else Operation.put(name, value)


def _is_foreign(position: Position) -> bool:
    return position.revision > 0 and position.fingerprint.startswith("x:")


def _text(ranged: Ranged) -> str:
    return ranged.kvs[0].value.decode("utf-8", "replace") if ranged.kvs else ""


def _change(ranged: Ranged) -> Change | None:
    return Change.of(ranged.kvs[0]) if ranged.kvs else None


def _remedy(space: Space, namespace: str) -> str:
    prefix = space.prefix.decode("utf-8", "backslashreplace")
    return (
        f"grant its role both prefixes (read to follow, readwrite to write): etcdctl role grant-permission ROLE "
        f"--prefix=true readwrite '{prefix}' and '.veltrix/{namespace}/'"
    )
