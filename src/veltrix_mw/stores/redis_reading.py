"""Reading a namespace in Redis: listings, positions and watches, the same for an authority and a mirror.

Owns how what is there becomes one keyspace at one revision. Knows what the two make of a fault only through their
`Rules`, and writes nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol
from weakref import WeakSet

from veltrix_mw.digest import digest_of
from veltrix_mw.errors import Compacted, StoreError, StoreUnavailable
from veltrix_mw.protocols import Batch, Filled, Position
from veltrix_mw.stores.redis_layout import (
    META_FIELDS,
    MIRROR,
    Meta,
    Names,
    StreamEntry,
    age_of,
    meta_of,
    pairs_of,
    stream_entry_of,
    stream_id,
)
from veltrix_mw.stores.redis_link import Command, Connection, RedisLink
from veltrix_mw.values import Missing

__all__ = ["Listed", "Page", "Reader", "RedisWatch", "Rules", "Torn", "digest_modulo", "entries_of"]

_SCAN_COUNT: Final = 1_000  # fields a page: some 100 KB, and far below a millisecond of the server's one thread
_LIST_TRIALS: Final = 5

_FIRST_PAGE: Final = 32  # stream entries in one answer; then as many as make about a megabyte ...
_MAX_PAGE: Final = 256  # ... and no more than this: a follower publishes between two calls
_PAGE_BYTES: Final = 1024 * 1024

_BLOCK_S: Final = 1.0  # how long the server is let wait, so that one that hangs is noticed in about twice that
_LOOK_S: Final = 2.0  # how often a quiet watch looks whether it still watches what is there
_OVERTIME_S: Final = 10.0  # beyond `next`'s own timeout, while bytes keep coming: a large answer over a slow link

_DIGEST_MOD: Final = 1 << 64


def digest_modulo(total: int) -> int:
    """A sum of `digest_of`, as the keyspace's digest."""
    return total % _DIGEST_MOD


class Rules(Protocol):
    """What an authority or a mirror makes of what was found: each returns the error to raise."""

    kind: bytes

    def nothing(self, *, left: bool) -> StoreError | None:
        """There is no meta; None where that is no fault. `left`: something says that there was."""
        ...

    def wrong_kind(self) -> StoreError:
        """The meta is of the other kind."""
        ...

    def other_history(self, reason: str) -> StoreError: ...

    def ahead(self, position: Position, newest: int) -> StoreError:
        """The position is beyond the newest revision there is."""
        ...


@dataclass(frozen=True, slots=True)
class Listed:
    """The keyspace at one revision: `meta` says which; `age_s` is a mirror's, counted from before it was read."""

    meta: Meta | None
    entries: dict[str, tuple[bytes, int]]
    age_s: float = 0.0

    @property
    def position(self) -> Position:
        return Position("", 0) if self.meta is None else self.meta.position

    def ascending(self, lazy: tuple[str, ...] = ()) -> list[tuple[str, bytes, int]]:
        found = ((key, value, revision) for key, (value, revision) in self.entries.items())
        return sorted(entry for entry in found if not lazy or not entry[0].startswith(lazy))


class Torn(StoreUnavailable):
    """What was read does not make one keyspace: read it again."""


class Page:
    """How many stream entries to ask for: few while they are large, so that an answer stays about a megabyte."""

    def __init__(self) -> None:
        self.count = _FIRST_PAGE

    def saw(self, entries: Sequence[StreamEntry]) -> None:
        if sum(entry.size for entry in entries) > _PAGE_BYTES:
            self.count = max(1, self.count // 4)
        elif len(entries) == self.count:
            self.count = min(_MAX_PAGE, self.count * 2)


class Reader:
    """Reads one namespace by one kind's rules.

    Thread-safe; holds no state but its watches.
    """

    def __init__(self, link: RedisLink, names: Names, rules: Rules) -> None:
        self.link = link
        self.names = names
        self.rules = rules
        self._get_meta: Command = ("HMGET", names.entries, *META_FIELDS)
        # Protects the set of watches, which `close` ends.
        self._lock = threading.Lock()
        self._watches: WeakSet[RedisWatch] = WeakSet()

    def close(self) -> None:
        """End the watches and close the link."""
        with self._lock:
            watches = tuple(self._watches)
        for watch in watches:
            watch.close()
        self.link.close()

    def watch(self, position: Position, *, timeout_s: float, patience_s: float, **options: Any) -> RedisWatch:
        watch = RedisWatch(self, position, patience_s=patience_s, **options)
        watch.open(timeout_s)
        with self._lock:
            self._watches.add(watch)
        return watch

    # --- meta and positions

    def meta(self, connection: Connection) -> Meta | None:
        """The meta, checked to be of our kind; None where nothing is there and that is no fault."""
        meta, _ = self.meta_and(connection, [])
        return meta

    def meta_and(self, connection: Connection, commands: Sequence[Command]) -> tuple[Meta | None, list[Any]]:
        """The meta, and the replies to commands sent right after the question for it."""
        while True:
            values, *replies = connection.pipeline([self._get_meta, *commands])
            meta = meta_of(values)
            if meta is not None:
                self.check_kind(meta)
                return meta, replies
            if self.is_nothing(connection):
                return None, replies

    def check_kind(self, meta: Meta) -> None:
        if meta.kind != self.rules.kind:
            raise self.rules.wrong_kind()

    def is_nothing(self, connection: Connection) -> bool:
        """Whether there is rightly no meta, where none was found; False where it was made since.

        Raises where there should be one.
        """
        names = self.names
        # In this order: what is made in between makes both, and then the entries are seen.
        changes, entries = connection.pipeline([("EXISTS", names.changes), ("EXISTS", names.entries)])
        if entries:
            values: list[bytes | None] = connection.execute(*self._get_meta)
            if meta_of(values) is None:
                raise self.link.not_ours(f"{names.entries}, without our meta,")
            return False
        fault = self.rules.nothing(left=bool(changes))
        if fault is not None:
            raise fault
        return True

    def check(self, connection: Connection, position: Position) -> Meta | None:
        """The meta, once `position` was found in the history with all that follows it."""
        if position.revision:
            at = stream_id(position.revision)
            look: Command = ("XRANGE", self.names.changes, at, at)
        else:
            look = ("XRANGE", self.names.changes, "-", "+", "COUNT", 1)
        meta, (found,) = self.meta_and(connection, [look])
        if meta is None:
            self.check_never_written(position)
            return None
        entries = entries_of(found)
        self._judge(meta, position, entries[0] if entries else None)
        return meta

    def check_never_written(self, position: Position) -> None:
        """Raise where there is no meta, and `position` says that there was."""
        fault = self.rules.nothing(left=True) if position.revision else None
        if fault is not None:
            raise fault

    def judge_newest(self, meta: Meta, position: Position) -> None:
        """Raise unless `position` is in the history that `meta` is of, as far as meta alone can tell."""
        if position.incarnation and position.incarnation != meta.position.incarnation:
            raise self.rules.other_history("it has another incarnation than the one that was followed")
        if position.revision > meta.revision:
            raise self.rules.ahead(position, meta.revision)
        if position.revision == meta.revision and position.fingerprint not in {"", meta.position.fingerprint}:
            raise self.rules.other_history(f"revision {position.revision} is not the one that was followed")

    def _judge(self, meta: Meta, position: Position, at: StreamEntry | None) -> None:
        self.judge_newest(meta, position)
        revision = position.revision
        if revision == meta.revision:
            known = True  # the newest needs no stream, which may have been evicted
        elif revision:
            known = at is not None
            if at is not None and position.fingerprint not in {"", at.position.fingerprint}:
                raise self.rules.other_history(f"revision {revision} is not the one that was followed")
        else:
            known = at is not None and at.previous == 0 and not at.relist
        if not known:
            raise Compacted(f"the history after revision {revision} is no longer kept; list again")
        if revision and not position.fingerprint:
            raise Compacted(f"nothing proves that revision {revision} is the one that was followed; list again")

    # --- listing

    def list(self, timeout_s: float, *, newest: bool = False) -> Listed:
        """Everything, at one revision; an authority that was never written to has no meta. `newest` as the link's."""
        with self.link.session(timeout_s, newest=newest) as connection:
            return self.list_in(connection)

    def list_in(self, connection: Connection) -> Listed:
        """As `list`, on a connection whose deadline is set."""
        for _ in range(_LIST_TRIALS - 1):
            with contextlib.suppress(Torn):
                return self._list_once(connection)
        try:
            return self._list_once(connection)
        except Torn as exc:
            raise Torn(
                f"{self.names.entries} at {self.link.url} did not add up in {_LIST_TRIALS} readings: {exc}; try again"
            ) from exc

    def _list_once(self, connection: Connection) -> Listed:
        scan = ("HSCAN", self.names.entries)
        first, (now, page) = self.meta_and(connection, [("TIME",), (*scan, "0", "COUNT", _SCAN_COUNT)])
        if first is None:
            return Listed(None, {})
        entries: dict[str, tuple[bytes, int]] = {}
        while True:
            cursor, fields = page
            for key, value, revision in pairs_of(fields):
                entries[key] = (value, revision)
            if cursor == b"0":
                break
            page = connection.execute(*scan, cursor, "COUNT", _SCAN_COUNT)
        last = self.meta(connection)
        if last is None or last.position.incarnation != first.position.incarnation:
            raise Torn("another history came in between")
        if last.position != first.position:
            self._catch_up(connection, entries, first.position, last.position)
        self._verify(last, entries)
        age_s = age_of(first, int(now[0]) * 1_000_000 + int(now[1])) if last.kind == MIRROR else 0.0
        return Listed(last, entries, age_s)

    def _catch_up(
        self, connection: Connection, entries: dict[str, tuple[bytes, int]], since: Position, until: Position
    ) -> None:
        """Replay what was changed during a scan, which shows some of it and some not."""
        for entry in self.stream(connection, since, until):
            if entry.relist:
                raise Torn("it was filled in between")
            for change in entry.changes:
                if entry.left_out and change.key.startswith(entry.left_out):
                    continue
                if isinstance(change.value, Missing):
                    entries.pop(change.key, None)
                else:
                    entries[change.key] = (change.value, entry.position.revision)

    def stream(self, connection: Connection, since: Position, until: Position) -> Iterator[StreamEntry]:
        """The entries after one position up to another, without a gap."""
        at, page = since, Page()
        while at.revision < until.revision:
            found = entries_of(
                connection.execute(
                    "XRANGE",
                    self.names.changes,
                    stream_id(at.revision + 1),
                    stream_id(until.revision),
                    "COUNT",
                    page.count,
                )
            )
            page.saw(found)
            for entry in found:
                if (entry.previous, entry.previous_mark) != (at.revision, at.fingerprint):
                    raise Torn("the stream has a gap")
                at = entry.position
                yield entry
            if not found:
                raise Torn("the stream ends too early")
        if at.fingerprint != until.fingerprint:
            raise Torn("another history came in between")

    def _verify(self, meta: Meta, entries: dict[str, tuple[bytes, int]]) -> None:
        if len(entries) != meta.count:
            raise Torn(f"{len(entries)} entries, where its meta counts {meta.count}")
        if meta.kind == MIRROR:
            digest = digest_modulo(sum(digest_of(key, revision) for key, (_, revision) in entries.items()))
            if digest != meta.digest:
                raise Torn("the digest is not the one of its meta")


def entries_of(reply: Sequence[Any]) -> list[StreamEntry]:
    """The entries in the reply to XRANGE, or in one stream's part of the reply to XREAD."""
    # A deleted entry's fields are None in some servers' answers.
    return [stream_entry_of(entry_id, fields) for entry_id, fields in reply if fields is not None]


class RedisWatch:
    """A watch: blocks on the stream, and checks that each entry follows the one before.

    `XREAD` passes over trimmed entries and gaps in silence, and blocks for ever on a stream that was replaced: so each
    entry names the revision and mark before it, and a quiet watch looks at the meta every two seconds.
    """

    def __init__(
        self,
        reader: Reader,
        position: Position,
        *,
        patience_s: float,
        lazy: tuple[str, ...] = (),
        origin: str = "",
        filled: Filled | None = None,
    ) -> None:
        self._reader = reader
        self._position = position
        self._patience_s = patience_s
        self._lazy = lazy
        self._origin = origin
        self._filled = filled
        self._filled_to: str | bytes = "0-0"  # the announcement that was read last
        self._page = Page()
        self._looked_s = 0.0
        self._is_closed = False
        self._is_waiting = False
        self._pid = os.getpid()
        # Protects `_is_closed`, `_is_waiting` and the connection: `close` may come from another thread. Not held while
        # waiting.
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def open(self, timeout_s: float) -> None:
        """Connect, and check the position."""
        deadline_s = time.monotonic() + timeout_s
        with self._reader.link.translating(timeout_s):
            try:
                connection = self._connected(deadline_s)
                connection.end_by(deadline_s)
                self._reader.check(connection, self._position)
                if self._filled is not None:
                    last = connection.execute("XREVRANGE", self._reader.names.filled, "+", "-", "COUNT", 1)
                    self._filled_to = last[0][0] if last else "0-0"
            except BaseException:
                self._let_go()
                raise
        self._looked_s = time.monotonic()

    def next(self, timeout_s: float) -> Sequence[Batch]:
        until_s = time.monotonic() + timeout_s
        self._forget_parents()
        with self._lock:
            self._is_waiting = True
        try:
            with self._reader.link.translating(self._patience_s):
                return self._wait(until_s)
        except BaseException as exc:
            self._let_go()
            if self._is_closed and isinstance(exc, StoreError):
                raise StoreUnavailable("the watch was closed; watch again") from exc
            raise
        finally:
            with self._lock:
                self._is_waiting = False
            if self._is_closed:
                self._let_go()

    def close(self) -> None:
        self._forget_parents()
        with self._lock:
            self._is_closed = True
            connection, waiting = self._connection, self._is_waiting
        if connection is not None and waiting:
            connection.shut_down()  # who waits on it closes it
        else:
            self._let_go()

    # ---

    def _forget_parents(self) -> None:
        if self._pid != os.getpid():
            # A fork: the parent's threads may have held the lock, and the connection is the parent's.
            self._pid, self._is_waiting = os.getpid(), False
            self._lock, self._connection = threading.Lock(), None

    def _wait(self, until_s: float) -> Sequence[Batch]:
        while True:
            connection = self._connected(time.monotonic() + self._patience_s)
            if time.monotonic() - self._looked_s >= _LOOK_S:
                batches = self._look(connection)
            else:
                batches = self._read(connection, min(_BLOCK_S, until_s - time.monotonic()))
            if batches or time.monotonic() >= until_s:
                return batches

    def _read(self, connection: Connection, block_s: float) -> Sequence[Batch]:
        """What follows the position, waiting for at most `block_s`."""
        block_ms = int(block_s * 1000)
        waits = ("BLOCK", block_ms) if block_ms > 0 else ()  # 0 would wait for ever
        due_s = time.monotonic() + max(0.0, block_s)
        ends_s = due_s + self._patience_s + _OVERTIME_S
        connection.end_by(ends_s, patience_s=max(0.0, block_s) + self._patience_s)
        reply = connection.execute(*self._command(*waits))
        self._reader.link.check_late(connection, due_s, ends_s)
        return self._taken(reply)

    def _look(self, connection: Connection) -> Sequence[Batch]:
        """Whether what is watched is still there, and at the server that is to be asked.

        The stream is read after the meta: it brings all that meta knows.
        """
        self._reader.link.look(time.monotonic() + self._patience_s)
        connection.end_by(time.monotonic() + self._patience_s + _OVERTIME_S, patience_s=self._patience_s)
        meta, (found,) = self._reader.meta_and(connection, [self._command()])
        self._looked_s = time.monotonic()
        batches = self._taken(found)
        if batches:
            return batches
        if meta is None:
            self._reader.check_never_written(self._position)
            return batches
        self._reader.judge_newest(meta, self._position)
        if meta.revision > self._position.revision:
            raise Compacted(f"the stream does not reach back to revision {self._position.revision}; list again")
        return batches

    def _command(self, *waits: str | int) -> Command:
        names = self._reader.names
        read_to: dict[str, str | bytes] = {names.changes: stream_id(self._position.revision)}
        if self._filled is not None:
            read_to[names.filled] = self._filled_to
        return ("XREAD", "COUNT", self._page.count, *waits, "STREAMS", *read_to, *read_to.values())

    def _taken(self, reply: Sequence[Any] | None) -> Sequence[Batch]:
        streams = dict(reply or ())
        self._take_filled(streams.get(self._reader.names.filled.encode(), ()))
        entries = entries_of(streams.get(self._reader.names.changes.encode(), ()))
        self._page.saw(entries)
        batches = []
        for entry in entries:
            self._check(entry)
            self._position = entry.position
            batches.append(entry.batch(lazy=self._lazy, origin=self._origin))
        return batches

    def _take_filled(self, announced: Sequence[Any]) -> None:
        for entry_id, fields in announced:
            self._filled_to = entry_id
            if self._filled is not None and fields:
                self._filled(fields[1].decode(errors="replace").split())

    def _check(self, entry: StreamEntry) -> None:
        position, rules = self._position, self._reader.rules
        if position.incarnation and entry.position.incarnation != position.incarnation:
            raise rules.other_history("it has another incarnation than the one that was followed")
        if entry.relist:
            raise Compacted(f"revision {entry.position.revision} can only be listed; list again")
        if entry.previous != position.revision:
            raise Compacted(f"the stream does not reach back to revision {position.revision}; list again")
        if entry.previous_mark != position.fingerprint:
            raise rules.other_history(f"revision {position.revision} is not the one that was followed")

    def _connected(self, deadline_s: float) -> Connection:
        if self._is_closed:
            raise StoreUnavailable("the watch was closed; watch again")
        if self._connection is None:
            connection = self._reader.link.open(deadline_s)
            self._looked_s = 0.0  # the server may be another one
            with self._lock:
                self._connection = connection
                closed = self._is_closed
            if closed:
                raise StoreUnavailable("the watch was closed; watch again")
        return self._connection

    def _let_go(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            self._reader.link.shut(connection)
