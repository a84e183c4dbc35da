"""The SQLite file of a store: who may open it, and every connection to it.

Owns the file's schema, its connections (also across a fork) and the translation of SQLite's errors. Knows nothing of
revisions or of what the rows mean; `sqlite` does.

Only a commit creates the file. What only reads leaves no file behind and touches no one else's database.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from typing import Any, Final, Protocol
from urllib.parse import quote
from weakref import WeakSet

from veltrix_mw.errors import AuthFailed, NeverWritten, StoreError, StoreUnavailable
from veltrix_mw.forking import STORES, around_forks

__all__ = ["Connection", "Follower", "SqliteFile", "primary_code"]

_APPLICATION_ID: Final = 0x56454C54  # "VELT": what makes a database file ours
_SCHEMA_VERSION: Final = 1

_SCHEMA: Final = (
    """CREATE TABLE namespaces (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        incarnation TEXT NOT NULL,
        revision INTEGER NOT NULL,
        oldest INTEGER NOT NULL,
        kept_bytes INTEGER NOT NULL,
        entries INTEGER NOT NULL,
        checksum INTEGER NOT NULL
    )""",
    """CREATE TABLE revisions (
        namespace INTEGER NOT NULL,
        revision INTEGER NOT NULL,
        mark TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        author TEXT NOT NULL,
        reason TEXT NOT NULL,
        time_s REAL NOT NULL,
        traceparent TEXT NOT NULL,
        PRIMARY KEY (namespace, revision)
    ) WITHOUT ROWID""",
    # `value` stands last: a column before it is read without walking the pages of a large value.
    """CREATE TABLE versions (
        id INTEGER PRIMARY KEY,
        namespace INTEGER NOT NULL,
        key TEXT NOT NULL,
        revision INTEGER NOT NULL,
        until INTEGER,
        value BLOB CHECK (typeof(value) IN ('blob', 'null'))
    )""",
    "CREATE UNIQUE INDEX versions_by_key ON versions (namespace, key, revision)",
    "CREATE INDEX versions_by_revision ON versions (namespace, revision)",
    # The newest version of each key alone: a list costs what is there, not what ever was.
    "CREATE UNIQUE INDEX versions_newest ON versions (namespace, key) WHERE until IS NULL",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)

_MAX_IDLE: Final = 4  # connections kept for the next call: a follower and a few writers at once
_PROGRESS_STEPS: Final = 20_000  # SQLite's steps between two looks at the deadline: some 2 ms
_WAL_KEPT_BYTES: Final = 4 * 1024 * 1024  # what a checkpoint leaves of a log that one large import made long
_RETRY_S: Final = 0.005  # the switch to WAL gives up at once where another connection is writing
_FORK_WAIT_S: Final = 5.0  # every call ends by its own deadline, 2 s by default; only a slow list takes longer


class Connection:
    """One open connection, and which file it was opened on.

    Used by one thread at a time.
    """

    __slots__ = ("deadline_s", "identity", "is_wal", "raw")

    def __init__(self, raw: sqlite3.Connection, identity: tuple[int, int]) -> None:
        self.raw = raw
        self.identity = identity
        self.is_wal = False
        self.deadline_s = math.inf
        raw.set_progress_handler(lambda: time.monotonic() > self.deadline_s, _PROGRESS_STEPS)

    def execute(self, sql: str, parameters: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        return self.raw.execute(sql, parameters)

    def one(self, sql: str, parameters: tuple[Any, ...] = ()) -> Any:
        """The first column of the first row; None when there is no row."""
        row = self.raw.execute(sql, parameters).fetchone()
        return None if row is None else row[0]

    def end_by(self, deadline_s: float) -> None:
        """Let statements wait and work until `deadline_s`, no longer."""
        self.deadline_s = deadline_s
        left_ms = max(1, int((deadline_s - time.monotonic()) * 1000))
        self.raw.execute(f"PRAGMA busy_timeout = {left_ms}")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """One read transaction: all that is read inside is of one moment."""
        self.raw.execute("BEGIN")
        yield
        self.raw.execute("COMMIT")

    def close(self) -> None:
        self.raw.close()


_Connections = list[Connection]


class Follower(Protocol):
    """What keeps a connection of its own beside the file's, such as a watch."""

    def wake(self) -> None:
        """This process has committed."""
        ...

    def let_go(self) -> None:
        """Shut the connection before a fork; it may be opened anew at the next use."""
        ...

    def begin_anew(self) -> None:
        """Make locks anew in a child, and forget the connection without closing it."""
        ...


class SqliteFile:
    """The file at one path, and this process's connections to it.

    Thread-safe. No connection crosses a fork: they are closed before it and opened anew on both sides.
    """

    def __init__(self, path: str | os.PathLike[str], *, hint: str) -> None:
        """Name the file; nothing is opened. `hint` is the command that creates it, for the error that says so."""
        self.path = os.path.abspath(path)  # a later change of the working directory changes nothing
        self._uri = f"file:{quote(os.fsencode(self.path))}"
        self._hint = hint
        self._was_there = False  # this process had it open: a file that is gone now is not one that is not there yet
        self._begin_anew()
        with _files_lock:
            _files.add(self)

    def _begin_anew(self) -> None:
        """Forget every connection without closing it: what a process does with what it inherited."""
        self._pid = os.getpid()
        # Protects the attributes below (`_opened` takes single removals without it); notified when a call ends and
        # when a fork is over.
        self._gate = threading.Condition()
        self._idle: _Connections = []
        self._opened: set[Connection] = set()
        self._followers: WeakSet[Follower] = WeakSet()
        self._calls = 0
        self._epoch = 0
        self._is_forking = False

    def is_at(self, identity: tuple[int, int]) -> bool:
        """Whether the path still names the file of that identity."""
        return _identity(self.path) == identity

    def add(self, follower: Follower) -> None:
        """Have `follower` woken by commits of this process, and mind it in forks, for as long as it lives."""
        with self._gate:
            self._followers.add(follower)

    def close(self) -> None:
        """Close every connection that is not in use; the others are closed when their calls end."""
        with self._gate:
            self._epoch += 1
            self._shut_idle()

    def rest(self, deadline_s: float) -> None:
        """Let no call begin, wait for those that run, and close every connection."""
        with self._gate:
            self._is_forking = True
            while self._calls and self._gate.wait(max(0.0, deadline_s - time.monotonic())):
                pass
            if self._calls:
                return
            self._shut_idle()
            followers = tuple(self._followers)
        for follower in followers:
            follower.let_go()

    def go_on(self) -> None:
        """End what `rest` began."""
        with self._gate:
            self._is_forking = False
            self._gate.notify_all()

    def abandon(self) -> None:
        """Begin anew in a child: the locks' holders and the connections' users are threads of the parent."""
        _abandoned.extend(self._opened)
        followers = tuple(self._followers)
        self._begin_anew()
        for follower in followers:
            follower.begin_anew()
            self._followers.add(follower)

    @contextlib.contextmanager
    def inside(self, deadline_s: float) -> Iterator[None]:
        """Hold off forks: inside, SQLite may be at work in this thread."""
        if self._pid != os.getpid():
            self.abandon()
        with self._gate:
            while self._is_forking:
                if not self._gate.wait(max(0.0, deadline_s - time.monotonic())):
                    raise StoreUnavailable("the process was forking until the deadline; try again")
            self._calls += 1
        try:
            yield
        finally:
            with self._gate:
                self._calls -= 1
                self._gate.notify_all()

    @contextlib.contextmanager
    def session(self, timeout_s: float, *, creates: bool = False) -> Iterator[Connection]:
        """A connection for one call, which ends by `timeout_s`; SQLite's errors come out as the store's."""
        deadline_s = time.monotonic() + timeout_s
        with self.inside(deadline_s), self.translating(timeout_s):
            db, epoch = self._borrow(deadline_s, creates=creates)
            done = False
            try:
                db.end_by(deadline_s)
                yield db
                done = not db.raw.in_transaction
            except sqlite3.Error:
                raise
            except Exception:
                # Ours (a conflict, a compaction): the connection is as good as before once nothing is open on it.
                db.raw.rollback()
                done = True
                raise
            finally:
                self._give_back(db, epoch, reusable=done)

    @contextlib.contextmanager
    def writing(self, timeout_s: float, *, creates: bool = False) -> Iterator[Connection]:
        """One write transaction: sealed when the block ends, undone when it raises."""
        deadline_s = time.monotonic() + timeout_s
        with self.session(timeout_s, creates=creates) as db:
            self._ensure_wal(db, deadline_s)
            db.end_by(deadline_s)
            # IMMEDIATE: a transaction that reads first and then writes could not wait for another writer.
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
            if not self.is_at(db.identity):
                raise StoreUnavailable(
                    f"{self.path} was replaced while it was written to, and what is there now may not hold the write; "
                    "read it, then write again"
                )
        with self._gate:
            followers = tuple(self._followers)
        for follower in followers:
            follower.wake()

    def _borrow(self, deadline_s: float, *, creates: bool) -> tuple[Connection, int]:
        identity = _identity(self.path)
        with self._gate:
            epoch = self._epoch
            while self._idle:
                connection = self._idle.pop()
                if connection.identity == identity:
                    return connection, epoch
                # The file was replaced: what is written to the old one would be lost.
                self.shut(connection)
        return self.open(deadline_s, creates=creates), epoch

    def _give_back(self, connection: Connection, epoch: int, *, reusable: bool) -> None:
        connection.deadline_s = math.inf
        with self._gate:
            if reusable and epoch == self._epoch and len(self._idle) < _MAX_IDLE and not self._is_forking:
                self._idle.append(connection)
            else:
                self.shut(connection)

    def _shut_idle(self) -> None:
        while self._idle:
            self.shut(self._idle.pop())

    def shut(self, connection: Connection) -> None:
        """Close a connection that was opened here."""
        self._opened.discard(connection)
        # A checkpoint that fails as the last connection closes loses nothing: the log stays and is read again.
        with contextlib.suppress(sqlite3.Error):
            connection.close()

    def open(self, deadline_s: float, *, creates: bool = False) -> Connection:
        """Open the file and check that it is ours; creates both file and schema only where `creates`."""
        while True:
            identity = self._found(creates=creates)
            left_s = max(0.001, deadline_s - time.monotonic())
            raw = sqlite3.connect(
                # rw, also to read: a reader must be able to mark its place in the log that writers share.
                f"{self._uri}?mode={'rwc' if creates else 'rw'}",
                uri=True,
                timeout=left_s,
                isolation_level=None,
                check_same_thread=False,
            )
            connection = Connection(raw, identity or _identity(self.path) or (0, 0))
            try:
                if self.is_at(connection.identity):
                    self._prepare(connection, creates=creates)
                    with self._gate:
                        self._opened.add(connection)
                    return connection
            except BaseException:
                connection.close()
                raise
            connection.close()
            if time.monotonic() > deadline_s:
                raise StoreUnavailable(f"{self.path} is being replaced over and over; try again when it is at rest")

    def _found(self, *, creates: bool) -> tuple[int, int] | None:
        """Which file is there; None where there is none and one may be created."""
        try:
            found = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError) as exc:
            folder = os.path.dirname(self.path)
            if not creates:
                raise self._absent("does not exist") from exc
            if not os.path.isdir(folder):
                raise StoreError(f"the folder {folder} does not exist; create it with: mkdir -p '{folder}'") from exc
            if not os.access(folder, os.W_OK | os.X_OK):
                raise self._needs_permission(f"this user may not create files in {folder}") from exc
            return None
        except OSError as exc:
            raise self._needs_permission(f"this user may not look into {os.path.dirname(self.path)}") from exc
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{self.path} is not a file; name a file in the URL, for example sqlite:///config.db")
        return found.st_dev, found.st_ino

    def _prepare(self, db: Connection, *, creates: bool) -> None:
        # FULL, not NORMAL: both survive kill -9, but under WAL only FULL keeps an acknowledged write through a power
        # cut. A write is a person's or a deploy's, some a day: one fsync (1-10 ms) is no price for it.
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA journal_size_limit = {_WAL_KEPT_BYTES}")
        if self._is_ours(db):
            self._was_there = True
            return
        if not creates:
            raise self._absent("holds nothing")
        # In one transaction with the schema, and before WAL: nobody ever sees half of it.
        db.execute("BEGIN IMMEDIATE")
        if not self._is_ours(db):
            for statement in _SCHEMA:
                db.execute(statement)
        db.execute("COMMIT")

    def _is_ours(self, db: Connection) -> bool:
        """Whether the file has our schema; False when it is empty. Raises `StoreError` for anything else."""
        application = db.one("PRAGMA application_id")
        if application == _APPLICATION_ID:
            version = db.one("PRAGMA user_version")
            if version > _SCHEMA_VERSION:
                raise StoreError(
                    f"{self.path} was made by a newer veltrix-mw (its schema is {version}, this one knows "
                    f"{_SCHEMA_VERSION}); upgrade veltrix-mw here"
                )
            return True
        if application or db.one("SELECT count(*) FROM sqlite_master"):
            raise StoreError(
                f"{self.path} is a database of another program, and was left as it is; name a file of its own "
                "for the config"
            )
        return False

    def _ensure_wal(self, db: Connection, deadline_s: float) -> None:
        while not db.is_wal:
            try:
                mode = db.one("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as exc:
                if primary_code(exc) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                    raise
                _never.wait(_RETRY_S)
                continue
            if mode != "wal":
                raise StoreError(
                    f"{self.path} lies on a file system without shared memory (a network share?), where processes "
                    "cannot write it together; move it to a local disk"
                )
            db.is_wal = True

    # --- what is said

    @contextlib.contextmanager
    def translating(self, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise self.translated(exc, timeout_s) from exc

    def translated(self, exc: sqlite3.Error, timeout_s: float) -> StoreError:
        path, name = self.path, getattr(exc, "sqlite_errorname", type(exc).__name__)
        match primary_code(exc):
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED | sqlite3.SQLITE_PROTOCOL:
                return StoreUnavailable(
                    f"{path} was locked by another process for {timeout_s:g} s; try again, and if it stays locked, see "
                    f"who holds it: fuser -v '{path}'"
                )
            case sqlite3.SQLITE_INTERRUPT:
                return StoreUnavailable(f"{path} did not answer within {timeout_s:g} s; try again")
            case sqlite3.SQLITE_NOTADB:
                return StoreError(f"{path} is not a SQLite database; name another file, or move this one away")
            case sqlite3.SQLITE_CORRUPT:
                return StoreError(f"{path} is damaged ({name}); stop its users and put a backup in its place")
            case sqlite3.SQLITE_FULL:
                return StoreUnavailable(f"the disk of {path} is full, nothing was written; free some space")
            case sqlite3.SQLITE_READONLY if exc.sqlite_errorcode == sqlite3.SQLITE_READONLY_DBMOVED:
                return StoreUnavailable(f"{path} was moved or replaced; try again")
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH | sqlite3.SQLITE_CANTOPEN:
                return self._refused(name)
            case sqlite3.SQLITE_IOERR | sqlite3.SQLITE_NOMEM:
                return StoreUnavailable(
                    f"{path} could not be read or written ({name}); try again, and look at the disk"
                )
        return StoreError(f"{path} cannot be used ({name}); check that nothing else changed its tables")

    def _refused(self, name: str) -> StoreError:
        """What stands between this user and the file, as far as the file system tells."""
        path, folder = self.path, os.path.dirname(self.path)
        try:
            # Not `exists`, which takes a folder that this user may not search for a file that is not there.
            self._found(creates=False)
        except StoreError as exc:
            return exc
        if not os.access(path, os.R_OK):
            return self._needs_permission(f"this user may not read {path}")
        if not os.access(path, os.W_OK):
            return self._needs_permission(f"{path} is read-only for this user")
        if not os.access(folder, os.W_OK | os.X_OK):
            return self._needs_permission(f"this user may not create files in {folder}")
        for side in (f"{path}-wal", f"{path}-shm"):
            if os.path.exists(side) and not os.access(side, os.R_OK | os.W_OK):
                return self._needs_permission(f"this user may not write {side}")
        return StoreUnavailable(f"{path} could not be opened ({name}); check the limit of open files, then try again")

    def _needs_permission(self, fault: str) -> AuthFailed:
        folder = os.path.dirname(self.path)
        return AuthFailed(
            f"{fault}. All users of a SQLite config, readers too, keep its -wal and -shm files beside it: give this "
            f"user write permission on the folder and the files in it, for example with a group of their own: chgrp -R "
            f"GROUP '{folder}' && chmod -R g+rwX '{folder}'"
        )

    def _absent(self, state: str) -> StoreUnavailable:
        if self._was_there:
            return StoreUnavailable(
                f"{self.path} is gone: it was there before. Put it or a backup of it back before anything is written: "
                "a write now would begin an empty one"
            )
        return NeverWritten(f"{self.path} {state} yet; the first write creates it: {self._hint}")

    def mixed(self) -> StoreError:
        """What is said of a file whose rows contradict each other."""
        return StoreError(
            f"{self.path} holds parts of two histories: it was overwritten beside a -wal file that belonged to the one "
            f"before. Restore into the open database instead: sqlite3 '{self.path}' \".restore 'BACKUP'\""
        )


def _identity(path: str) -> tuple[int, int] | None:
    """Which file the path names now; None when none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def primary_code(exc: sqlite3.Error) -> int:
    """SQLite's primary result code: the extended one says why, this one what."""
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF


# Protects the registry of files; held through a fork.
_files_lock = threading.Lock()
_files: WeakSet[SqliteFile] = WeakSet()
# Inherited connections that could not be closed before a fork. Never closed here, nor by the collector: to close
# one would end what another process has begun on it.
_abandoned: list[Connection] = []
_never: Final = threading.Event()


def _close_before_fork() -> None:
    """Close every connection, so that a child inherits none.

    SQLite keeps the state of its locks by file and process, and a child that opens the same file anew would share
    what the parent's connections left there: it believes to hold locks that only the parent has. The parent then
    takes itself for the last user and removes the -wal file under the child, and what the child commits is lost
    (seen with SQLite 3.40).
    """
    deadline_s = time.monotonic() + _FORK_WAIT_S
    _files_lock.acquire()
    for file in tuple(_files):
        file.rest(deadline_s)


def _go_on_in_parent() -> None:
    for file in tuple(_files):
        file.go_on()
    _files_lock.release()


def _go_on_in_child() -> None:
    global _files_lock
    _files_lock = threading.Lock()
    for file in tuple(_files):
        file.abandon()


around_forks(STORES, before=_close_before_fork, after_in_parent=_go_on_in_parent, after_in_child=_go_on_in_child)
