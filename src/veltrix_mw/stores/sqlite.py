"""The store in one SQLite file: the embedded default, written and followed by all processes of one machine.

Owns what is read and written, and the watch. Knows nothing of what values mean, nor of how the file is opened and
shared (`sqlite_file` does).

One file holds any number of namespaces, each with its own revisions and incarnation. `versions` has a row for each
version of each key that is kept, `until` being the revision that replaced it (NULL: none did); `revisions` has each
revision's random mark and its record. A revision's row outlives trimming for as long as a version of it does, so
that the current value of a key can always say who wrote it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote
from weakref import WeakSet

from veltrix_mw.errors import Compacted, StoreUnavailable
from veltrix_mw.keys import outermost
from veltrix_mw.protocols import (
    Batch,
    ChangeRecord,
    Confirmation,
    Limits,
    Listing,
    Position,
    RawChange,
    RawOperation,
    RawUnit,
    RawVersion,
    Restored,
    StoreInfo,
)
from veltrix_mw.stores.conditions import check
from veltrix_mw.stores.sqlite_file import Connection, SqliteFile, primary_code
from veltrix_mw.stores.units import MAX_UNIT_KEYS, bounded
from veltrix_mw.values import MAX_VALUE_BYTES, MISSING, Missing

__all__ = ["SqliteStore"]

_MAX_BATCHES: Final = 256  # revisions one `next` returns at most ...
_MAX_BATCH_BYTES: Final = 1024 * 1024  # ... and bytes of values, but for one revision that is larger itself


# The entries in one span of keys, as they are now.
_NEWEST: Final = (
    "FROM versions INDEXED BY versions_newest "
    "WHERE namespace = ? AND key >= ? AND key < ? AND until IS NULL AND value IS NOT NULL"
)

# The entries in one span of keys, as they were at a revision, which is given twice.
_PAST: Final = (
    "SELECT key, value, revision FROM versions INDEXED BY versions_by_key "
    "WHERE namespace = ? AND key >= ? AND key < ? "
    "AND revision <= ? AND (until IS NULL OR until > ?) AND value IS NOT NULL"
)

# INDEXED BY: left to itself SQLite walks the whole namespace for `new`, at every commit.
_FORGOTTEN: Final = (
    "SELECT old.id FROM versions AS new INDEXED BY versions_by_revision "
    "CROSS JOIN versions AS old INDEXED BY versions_by_key ON old.namespace = new.namespace "
    "AND old.key = new.key AND old.revision < new.revision "
    "WHERE new.namespace = :namespace AND new.revision = :oldest + 1 "
    "UNION SELECT id FROM versions INDEXED BY versions_by_revision "
    "WHERE namespace = :namespace AND revision = :oldest AND value IS NULL"
)
_FORGET: Final = f"DELETE FROM versions WHERE id IN ({_FORGOTTEN})"  # noqa: S608 (constants)
_FORGOTTEN_REVISIONS: Final = f"SELECT DISTINCT revision FROM versions WHERE id IN ({_FORGOTTEN})"  # noqa: S608


@dataclass(frozen=True, slots=True)
class _Head:
    """Where a namespace stands; `id` 0 when nothing was ever written to it."""

    id: int = 0
    incarnation: str = ""
    revision: int = 0
    oldest: int = 1
    kept_bytes: int = 0
    entries: int = 0
    checksum: int = 0


class SqliteStore:
    """A namespace in a SQLite file that several processes read and write at once.

    An acknowledged write survives `kill -9` and a power cut. Thread-safe; usable after a fork: connections are closed
    before it and opened anew on both sides.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        namespace: str = "default",
        timeout_s: float = 2.0,
        keep_revisions: int = 10_000,
        keep_bytes: int = 64 * 1024 * 1024,
        poll_s: float = 0.025,
        lazy: Sequence[str] = (),
    ) -> None:
        """Name the file; nothing is opened.

        `timeout_s` is how long a watch puts up with a locked file before it fails. `keep_revisions` and `keep_bytes`
        (of values) bound the history; the newest revision is always kept. `poll_s` is how often a watch looks for
        other processes' changes: 25 ms, so that 100 ms hold with room to spare, at less than 1 % of a core. `lazy`
        are the prefixes that are left out wherever the namespace is listed, watched or counted.
        """
        path = os.path.abspath(path)  # a later change of the working directory changes nothing
        url = f"sqlite:///{quote(os.fsencode(path))}"
        query = "" if namespace == "default" else f"?namespace={quote(namespace)}"
        self._file = SqliteFile(path, hint=f"veltrix --url '{url}{query}' put KEY VALUE")
        self._lazy = outermost(lazy)
        # '0' is the character after '/', which ends each prefix. No key holds the last character that there is.
        edges = ["", *(edge for prefix in self._lazy for edge in (prefix, prefix[:-1] + "0")), "\U0010ffff"]
        self._eager_spans = tuple(zip(edges[0::2], edges[1::2], strict=True))
        self._lazy_spans = tuple(zip(edges[1:-1:2], edges[2:-1:2], strict=True))
        self._info = StoreInfo("sqlite", url, namespace, Limits(max_value_bytes=MAX_VALUE_BYTES), self._lazy)
        self._timeout_s = timeout_s
        self._keep_revisions = keep_revisions
        self._keep_bytes = keep_bytes
        self._poll_s = poll_s
        # Protects the set of watches, which `close` ends.
        self._lock = threading.Lock()
        self._watches: WeakSet[_SqliteWatch] = WeakSet()

    @property
    def info(self) -> StoreInfo:
        return self._info

    # --- followed

    def list(self, *, timeout_s: float) -> Listing:
        with self._file.session(timeout_s) as db, db.reading():
            head = self._head(db)
            position = _position(db, head, head.revision)
            entries = [
                entry
                for span in self._eager_spans
                for entry in db.execute(
                    f"SELECT key, value, revision {_NEWEST} ORDER BY key",
                    (head.id, *span),
                )
            ]
            # Left out, but not unchecked: the sums are those of all entries.
            count, checksum = len(entries), sum(entry[2] for entry in entries)
            for span in self._lazy_spans:
                count += db.one(f"SELECT COUNT(*) {_NEWEST}", (head.id, *span))
                checksum += db.one(f"SELECT COALESCE(SUM(revision), 0) {_NEWEST}", (head.id, *span))
        if count != head.entries or checksum != head.checksum:
            raise self._file.mixed()
        return Listing(position, entries)

    def watch(self, position: Position, *, timeout_s: float) -> _SqliteWatch:
        watch = _SqliteWatch(self, position, poll_s=self._poll_s, patience_s=self._timeout_s)
        watch.open(timeout_s)
        with self._lock:
            self._watches.add(watch)
        return watch

    def confirm(self, position: Position, *, timeout_s: float) -> Confirmation:
        with self._file.session(timeout_s) as db, db.reading():
            head = self._head(db)
            _check_position(db, head, position)
            count = head.entries
            if self._lazy:
                # Of the eager ones, which are bounded; the lazy ones may be any number.
                spans = self._eager_spans
                count = sum(db.one(f"SELECT COUNT(*) {_NEWEST}", (head.id, *span)) for span in spans)
        return Confirmation(head.incarnation, head.revision, count)

    # --- written

    def commit(self, operations: Sequence[RawOperation], record: ChangeRecord, *, timeout_s: float) -> int:
        if not operations:
            raise ValueError("a transaction needs at least one operation")
        deadline_s = time.monotonic() + timeout_s
        with self._file.writing(timeout_s, creates=True) as db:
            head = self._head(db)
            if not head.id:
                head = self._create_namespace(db)
            found = _checked(db, head, operations)
            head = _apply(db, head, operations, found, record)
            # From here the write only needs to be sealed: an interruption would undo what is as good as done.
            db.deadline_s = math.inf
            head = self._trimmed(db, head, until_s=deadline_s - timeout_s / 2)
            db.execute(
                "UPDATE namespaces SET revision = ?, oldest = ?, kept_bytes = ?, entries = ?, checksum = ? "
                "WHERE id = ?",
                (head.revision, head.oldest, head.kept_bytes, head.entries, head.checksum, head.id),
            )
        return head.revision

    def read(self, keys: Sequence[str], revision: int | None, *, timeout_s: float) -> dict[str, tuple[bytes, int]]:
        found: dict[str, tuple[bytes, int]] = {}
        with self._file.session(timeout_s) as db, db.reading():
            head = self._head(db)
            if revision is not None:
                _check_past(head, revision)
            for key in keys:
                row = db.execute(
                    "SELECT value, revision FROM versions WHERE namespace = ? AND key = ? AND revision <= ? "
                    "ORDER BY revision DESC LIMIT 1",
                    (head.id, key, head.revision if revision is None else revision),
                ).fetchone()
                if row is not None and row[0] is not None:
                    found[key] = row
        return found

    def renew_incarnation(self, known: str, *, timeout_s: float) -> str:
        with self._file.writing(timeout_s) as db:
            head = self._head(db)
            if head.incarnation != known:
                return head.incarnation
            if not head.id:
                return self._create_namespace(db).incarnation
            renewed = secrets.token_hex(8)
            db.execute("UPDATE namespaces SET incarnation = ? WHERE id = ?", (renewed, head.id))
        return renewed

    # --- remembered

    def history(self, key: str, *, limit: int, timeout_s: float) -> Sequence[RawVersion]:
        with self._file.session(timeout_s) as db, db.reading():
            rows = db.execute(
                "SELECT v.value, v.revision, r.author, r.reason, r.time_s, r.traceparent FROM versions AS v "
                "JOIN revisions AS r ON r.namespace = v.namespace AND r.revision = v.revision "
                "WHERE v.namespace = ? AND v.key = ? ORDER BY v.revision DESC LIMIT ?",
                (self._head(db).id, key, limit),
            ).fetchall()
        return [RawVersion(key, _value(raw), revision, ChangeRecord(*record)) for raw, revision, *record in rows]

    def list_at(self, revision: int, *, timeout_s: float) -> Listing:
        with self._file.session(timeout_s) as db, db.reading():
            head = self._head(db)
            _check_past(head, revision)
            position = _position(db, head, revision)
            entries = [
                entry
                for span in self._eager_spans
                for entry in db.execute(f"{_PAST} ORDER BY key", (head.id, *span, revision, revision))
            ]
        return Listing(position, entries)

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> dict[str, RawUnit]:
        revision = position.revision
        with self._file.session(timeout_s) as db, db.reading():
            head = self._head(db)
            _check_kept(db, head, position)
            found: dict[str, RawUnit] = {}
            for name in names:
                # The key of that name, then what hangs below it: '0' is the character after '/'.
                rows = itertools.chain.from_iterable(
                    db.execute(f"{_PAST} ORDER BY key LIMIT ?", (head.id, *span, revision, revision, MAX_UNIT_KEYS + 1))
                    for span in ((name, f"{name}\0"), (f"{name}/", f"{name}0"))
                )
                found[name] = bounded(name, rows)
        return found

    def close(self) -> None:
        """End the watches and close every connection. Idempotent; a later call opens anew."""
        with self._lock:
            watches = tuple(self._watches)
        for watch in watches:
            watch.close()
        self._file.close()

    # --- rows

    def _head(self, db: Connection) -> _Head:
        row = db.execute(
            "SELECT id, incarnation, revision, oldest, kept_bytes, entries, checksum FROM namespaces WHERE name = ?",
            (self._info.namespace,),
        ).fetchone()
        return _Head() if row is None else _Head(*row)

    def _create_namespace(self, db: Connection) -> _Head:
        made = db.execute(
            "INSERT INTO namespaces (name, incarnation, revision, oldest, kept_bytes, entries, checksum) "
            "VALUES (?, ?, 0, 1, 0, 0, 0)",
            (self._info.namespace, secrets.token_hex(8)),
        )
        assert made.lastrowid
        return self._head(db)

    def _trimmed(self, db: Connection, head: _Head, *, until_s: float) -> _Head:
        """Forget the oldest revisions until what is kept is within bounds, or `until_s`; never the newest one.

        Where bounds were lowered the rest goes with later commits, so that no commit pays for all of it.
        """
        oldest, kept_bytes = head.oldest, head.kept_bytes
        while oldest < head.revision and (
            head.revision - oldest >= self._keep_revisions or kept_bytes > self._keep_bytes
        ):
            kept_bytes -= _forget(db, head.id, oldest)
            oldest += 1
            if time.monotonic() > until_s:
                break
        return _Head(head.id, head.incarnation, head.revision, oldest, kept_bytes, head.entries, head.checksum)


class _SqliteWatch:
    """A watch: looks every `poll_s` whether any process committed, and reads on from its position if so.

    What one `next` returns was read in one transaction, after the position was found in the history again.
    """

    def __init__(self, store: SqliteStore, position: Position, *, poll_s: float, patience_s: float) -> None:
        self._store = store
        self._file = store._file
        self._position = position
        self._poll_s = poll_s
        self._patience_s = patience_s
        self._is_closed = False
        self.begin_anew()

    def open(self, timeout_s: float) -> None:
        """Open the connection and check the position."""
        deadline_s = time.monotonic() + timeout_s
        with self._file.inside(deadline_s), self._file.translating(timeout_s), self._lock, self._or_shut():
            db = self._connected(deadline_s)
            db.end_by(deadline_s)
            with db.reading():
                _check_position(db, self._store._head(db), self._position)
            # From now on no waiting inside SQLite: `close` would wait for it too.
            db.execute("PRAGMA busy_timeout = 0")
            db.deadline_s = math.inf
            self._answered_s = time.monotonic()
        self._file.add(self)

    def next(self, timeout_s: float) -> Sequence[Batch]:
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._wake.clear()
            batches = self._look(deadline_s)
            left_s = deadline_s - time.monotonic()
            if batches or left_s <= 0:
                return batches
            self._wake.wait(min(self._poll_s, left_s))

    def close(self) -> None:
        self._is_closed = True
        self._wake.set()
        with self._lock:
            self._shut()

    # --- for the file

    def wake(self) -> None:
        self._wake.set()

    def let_go(self) -> None:
        with self._lock:
            self._shut()

    def begin_anew(self) -> None:
        # Protects the connection: `next` holds it while it looks, `close` and a fork while they shut it.
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._db: Connection | None = None
        self._seen: int | None = None
        self._answered_s = time.monotonic()

    # ---

    def _look(self, deadline_s: float) -> Sequence[Batch]:
        # A fork takes milliseconds: it is waited out, also where `next` was not to wait.
        with self._file.inside(deadline_s + self._patience_s), self._lock:
            if self._is_closed:
                raise StoreUnavailable("the watch was closed; watch again")
            try:
                with self._or_shut():
                    batches = self._read_on()
            except sqlite3.Error as exc:
                # Locked: the next look is the retry, until it has lasted for longer than a call may.
                waited_s = time.monotonic() - self._answered_s
                if primary_code(exc) == sqlite3.SQLITE_BUSY and waited_s < self._patience_s:
                    return ()
                raise self._file.translated(exc, waited_s) from exc
            self._answered_s = time.monotonic()
            return batches

    def _read_on(self) -> Sequence[Batch]:
        # No waiting for locks here, as `close` would wait too: what is locked is looked at again.
        db = self._connected(time.monotonic())
        # Before the transaction: what is committed in between is then found by the next look, never missed.
        seen: int = db.one("PRAGMA data_version")
        if seen == self._seen:
            return ()
        with db.reading():
            head = self._store._head(db)
            _check_position(db, head, self._position)
            batches = _batches(db, head, self._position.revision, self._store._lazy)
        if batches:
            self._position = batches[-1].position
        if self._position.revision == head.revision:
            self._seen = seen
        return batches

    def _connected(self, deadline_s: float) -> Connection:
        """The connection, opened anew where the file was replaced, or shut by a fork."""
        if self._db is not None and not self._file.is_at(self._db.identity):
            self._shut()
        if self._db is None:
            self._db = self._file.open(deadline_s)
            self._db.execute("PRAGMA query_only = ON")
            self._db.execute("PRAGMA busy_timeout = 0")
            self._seen = None
        return self._db

    @contextlib.contextmanager
    def _or_shut(self) -> Iterator[None]:
        """Shut the connection when the block raises: a transaction may be open on it."""
        try:
            yield
        except BaseException:
            self._shut()
            raise

    def _shut(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            self._file.shut(db)


def _value(raw: bytes | None) -> bytes | Missing:
    return MISSING if raw is None else raw


def _mark(db: Connection, head: _Head, revision: int) -> str | None:
    mark: str | None = db.one("SELECT mark FROM revisions WHERE namespace = ? AND revision = ?", (head.id, revision))
    return mark


def _position(db: Connection, head: _Head, revision: int) -> Position:
    return Position(head.incarnation, revision, _mark(db, head, revision) or "")


def _check_position(db: Connection, head: _Head, position: Position) -> None:
    """Raise `Restored` or `Compacted` unless what follows `position` is known.

    A position of no incarnation is of before the first write: any label may follow it.
    """
    if position.incarnation and position.incarnation != head.incarnation:
        raise Restored("the file has another incarnation than the one that was followed; list again")
    if position.revision > head.revision:
        raise Restored(
            f"revision {position.revision} is not in the file any more, an older one was put there; list again"
        )
    mark = _mark(db, head, position.revision)
    if position.fingerprint and mark not in {None, position.fingerprint}:
        raise Restored(f"revision {position.revision} in the file is not the one that was followed; list again")
    if _is_compacted(head, position.revision):
        raise Compacted(f"the history after revision {position.revision} is no longer kept; list again")
    if position.revision and not position.fingerprint:
        raise Compacted(f"nothing proves that revision {position.revision} is the one that was followed; list again")


def _check_past(head: _Head, revision: int) -> None:
    """Raise unless the namespace as of `revision` is known."""
    if not 0 <= revision <= head.revision:
        raise ValueError(f"there is no revision {revision}; the newest is {head.revision}")
    if _is_compacted(head, revision):
        raise Compacted(f"revision {revision} is no longer kept; the oldest that is kept is {head.oldest}")


def _check_kept(db: Connection, head: _Head, position: Position) -> None:
    """Raise `Restored` or `Compacted` unless the namespace as of `position` is known."""
    is_other = position.fingerprint and _mark(db, head, position.revision) not in {None, position.fingerprint}
    if position.incarnation not in {"", head.incarnation} or position.revision > head.revision or is_other:
        raise Restored(f"revision {position.revision} that was followed is not in the file any more; list again")
    _check_past(head, position.revision)


def _is_compacted(head: _Head, revision: int) -> bool:
    # Revision 0, the empty namespace, is known for as long as everything is.
    return revision < head.oldest and not (revision == 0 and head.oldest == 1)


def _checked(db: Connection, head: _Head, operations: Sequence[RawOperation]) -> list[tuple[int, int] | None]:
    """The newest version of each operation's key as (id, mod_revision or 0 if deleted), once all conditions hold."""
    found: list[tuple[int, int] | None] = []
    for operation in operations:
        row = db.execute(
            "SELECT id, CASE WHEN value IS NULL THEN 0 ELSE revision END FROM versions "
            "WHERE namespace = ? AND key = ? AND until IS NULL",
            (head.id, operation.key),
        ).fetchone()

        def load(row: tuple[int, int] = row) -> bytes:
            stored: bytes = db.one("SELECT value FROM versions WHERE id = ?", (row[0],))
            return stored

        check(operation, row[1] if row else 0, load)
        found.append(row)
    return found


def _apply(
    db: Connection,
    head: _Head,
    operations: Sequence[RawOperation],
    found: Sequence[tuple[int, int] | None],
    record: ChangeRecord,
) -> _Head:
    """Write all operations as the next revision."""
    revision = head.revision + 1
    entries, checksum, size = head.entries, head.checksum, 0
    for operation, newest in zip(operations, found, strict=True):
        if newest is not None:
            db.execute("UPDATE versions SET until = ? WHERE id = ?", (revision, newest[0]))
            if newest[1]:
                entries -= 1
                checksum -= newest[1]
        raw = None if isinstance(operation.value, Missing) else operation.value
        if raw is not None:
            entries += 1
            checksum += revision
            size += len(raw)
        db.execute(
            "INSERT INTO versions (namespace, key, revision, value) VALUES (?, ?, ?, ?)",
            (head.id, operation.key, revision, raw),
        )
    db.execute(
        "INSERT INTO revisions (namespace, revision, mark, bytes, author, reason, time_s, traceparent) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            head.id,
            revision,
            secrets.token_hex(8),
            size,
            record.author,
            record.reason,
            record.time_s,
            record.traceparent,
        ),
    )
    return _Head(head.id, head.incarnation, revision, head.oldest, head.kept_bytes + size, entries, checksum)


def _forget(db: Connection, namespace: int, oldest: int) -> int:
    """Make `oldest + 1` the oldest kept revision; returns the bytes that `oldest` counted for.

    What goes are the versions that `oldest + 1` replaced, and the deletions of `oldest`: no later revision shows
    them. What a key still is stays, however old, with the record of who wrote it.
    """
    size: int = db.one("SELECT bytes FROM revisions WHERE namespace = ? AND revision = ?", (namespace, oldest)) or 0
    named = {"namespace": namespace, "oldest": oldest}
    emptied = {row[0] for row in db.raw.execute(_FORGOTTEN_REVISIONS, named)}
    db.raw.execute(_FORGET, named)
    db.raw.executemany(
        "DELETE FROM revisions WHERE namespace = :namespace AND revision = :revision AND NOT EXISTS "
        "(SELECT 1 FROM versions WHERE namespace = :namespace AND revision = :revision)",
        [{"namespace": namespace, "revision": revision} for revision in emptied | {oldest}],
    )
    return size


def _batches(db: Connection, head: _Head, applied: int, lazy: tuple[str, ...]) -> list[Batch]:
    """The revisions after `applied`, as many as one call returns."""
    batches: list[Batch] = []
    size = 0
    rows = db.execute(
        "SELECT revision, mark, bytes, author, reason, time_s, traceparent FROM revisions "
        "WHERE namespace = ? AND revision > ? ORDER BY revision LIMIT ?",
        (head.id, applied, _MAX_BATCHES),
    ).fetchall()
    for revision, mark, length, *record in rows:
        size += length
        if batches and size > _MAX_BATCH_BYTES:
            break
        changes = [
            RawChange(key, _value(raw))
            for key, raw in db.execute(
                "SELECT key, value FROM versions WHERE namespace = ? AND revision = ? ORDER BY key", (head.id, revision)
            )
        ]
        batches.append(
            Batch(
                Position(head.incarnation, revision, mark),
                revision - 1,
                tuple(change for change in changes if not change.key.startswith(lazy)),
                ChangeRecord(*record),
                lazy_changes=tuple(change for change in changes if change.key.startswith(lazy)),
            )
        )
    return batches
