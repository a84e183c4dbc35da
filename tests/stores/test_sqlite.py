"""The SQLite store: the contract, and what is its own: the file, its faults, its bounds."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.stores import jobs
from tests.stores.contract import (
    WITHIN_S,
    Harness,
    SharedStoreContract,
    delete,
    drain,
    entries,
    here,
    in_a_fork,
    put,
    write,
)
from veltrix_mw.errors import AuthFailed, Compacted, StoreError, StoreUnavailable
from veltrix_mw.protocols import ChangeRecord, Position, RawOperation, Restored
from veltrix_mw.stores import sqlite_file
from veltrix_mw.stores.sqlite import SqliteStore

NOBODY = 65534


class SqliteHarness(Harness):
    """A file in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "config.db"

    def spec(self, **options: Any) -> dict[str, Any]:
        options = {"path": str(self.path), "namespace": self.namespace, **options}
        return {"store": "veltrix_mw.stores.sqlite:SqliteStore", "options": options}

    def make(self, **options: Any) -> SqliteStore:
        return SqliteStore(self.path, namespace=self.namespace, **options)

    def forget(self, oldest: int) -> None:
        newest = here(self.open()).revision
        put(self.open(keep_revisions=newest - oldest + 2), "forgotten", b"1")


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[SqliteHarness]:
    harness = SqliteHarness(tmp_path)
    # A namespace of its own beside the one under test: what is read there finds a file, with nothing in it.
    neighbour = SqliteStore(harness.path, namespace="neighbour")
    put(neighbour, "theirs", b"1")
    neighbour.close()
    yield harness
    harness.close()


@pytest.fixture
def open_store() -> Iterator[Callable[..., SqliteStore]]:
    opened: list[SqliteStore] = []

    def open_store(path: Path, **options: Any) -> SqliteStore:
        opened.append(SqliteStore(path, **options))
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()


OpenStore = Callable[..., SqliteStore]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.db"


def read_in_every_way(store: SqliteStore, *, timeout_s: float = 1) -> list[Callable[[], object]]:
    return [
        lambda: store.list(timeout_s=timeout_s),
        lambda: store.list_at(0, timeout_s=timeout_s),
        lambda: store.read(["a"], None, timeout_s=timeout_s),
        lambda: store.history("a", limit=1, timeout_s=timeout_s),
        lambda: store.confirm(Position("", 0), timeout_s=timeout_s),
        lambda: store.watch(Position("", 0), timeout_s=timeout_s),
        lambda: store.renew_incarnation("", timeout_s=timeout_s),
    ]


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users can reach: pytest's own are private, and every session makes them so again."""
    folder = Path(tempfile.mkdtemp(prefix="veltrix-test-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


def as_nobody(body: Callable[[], None]) -> None:
    """Run `body` as a user without rights; as the file modes alone have it where the tests are no root."""

    def unprivileged() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        body()

    in_a_fork(unprivileged)


class TestSqliteStore(SharedStoreContract):
    """The contract over `SqliteStore`."""


# --- a read creates nothing


def test_reading_creates_no_file_and_says_how_to_create_it(path: Path, open_store: OpenStore) -> None:
    for call in read_in_every_way(open_store(path, namespace="shop")):
        with pytest.raises(StoreUnavailable) as caught:
            call()
        assert f"veltrix --url 'sqlite:///{path}?namespace=shop' put KEY VALUE" in str(caught.value)
    assert list(path.parent.iterdir()) == []


def test_reading_creates_no_file_where_one_vanished_just_then(
    path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(path)
    found = store._file._found

    def found_and_gone(*, creates: bool) -> Any:
        monkeypatch.setattr(store._file, "_found", found)
        path.touch()
        identity = found(creates=creates)
        path.unlink()
        return identity

    monkeypatch.setattr(store._file, "_found", found_and_gone)
    with pytest.raises(StoreUnavailable, match="does not exist yet"):
        store.list(timeout_s=1)
    assert not path.exists()


def test_constructing_opens_nothing(path: Path) -> None:
    SqliteStore(path)
    assert list(path.parent.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path / "no" / "config.db")
    with pytest.raises(StoreError, match="mkdir -p") as caught:
        put(store, "a", b"1")
    assert str(tmp_path / "no") in str(caught.value)
    with pytest.raises(StoreUnavailable, match="does not exist yet"):
        store.list(timeout_s=1)


def test_an_empty_file_is_not_written_to_by_reading_and_is_taken_by_a_commit(path: Path, open_store: OpenStore) -> None:
    path.touch()
    store = open_store(path)
    for call in read_in_every_way(store):
        with pytest.raises(StoreUnavailable, match="holds nothing yet"):
            call()
    assert path.read_bytes() == b""
    put(store, "a", b"1")
    assert set(entries(store)) == {"a"}


def test_a_path_is_taken_as_it_is_written(tmp_path: Path, open_store: OpenStore) -> None:
    path = tmp_path / "a b?c#d%41\u00e9.db"
    store = open_store(path)
    put(store, "a", b"1")
    assert path.exists()
    assert set(entries(store)) == {"a"}


def test_a_relative_path_is_of_the_folder_at_construction(
    tmp_path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("config.db")
    monkeypatch.chdir("/")
    put(store, "a", b"1")
    assert (tmp_path / "config.db").exists()
    assert store.info.url == f"sqlite:///{tmp_path}/config.db"


def test_eight_processes_may_create_the_file_at_once(tmp_path: Path) -> None:
    harness = SqliteHarness(tmp_path)
    made = harness.race(jobs.put, [{"key": f"k{n}", "text": "1"} for n in range(8)])
    assert sorted(made) == list(range(1, 9))
    assert len(entries(harness.open())) == 8
    harness.close()


# --- what is not ours


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, open_store: OpenStore) -> None:
    path.write_text("[settings]\ncolour = blue\n" * 100)
    before = path.read_bytes()
    store = open_store(path)
    for call in [*read_in_every_way(store), lambda: put(store, "a", b"1")]:
        with pytest.raises(StoreError, match="not a SQLite database") as caught:
            call()
        assert type(caught.value) is StoreError
        assert caught.value.__cause__ is not None
    assert path.read_bytes() == before


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
@pytest.mark.parametrize("application_id", [0, 77])
def test_another_programs_database_is_refused_and_left_alone(
    path: Path, open_store: OpenStore, journal_mode: str, application_id: int
) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(f"PRAGMA journal_mode = {journal_mode}")
        other.execute(f"PRAGMA application_id = {application_id}")
        other.execute("CREATE TABLE users (name)")
    before = path.read_bytes()
    store = open_store(path)
    for call in [*read_in_every_way(store), lambda: put(store, "a", b"1")]:
        with pytest.raises(StoreError, match="another program"):
            call()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["config.db"]


def test_a_newer_schema_is_refused(path: Path, open_store: OpenStore) -> None:
    put(store := open_store(path), "a", b"1")
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as newer:
        newer.execute("PRAGMA user_version = 99")
    for call in [*read_in_every_way(store), lambda: put(store, "a", b"1")]:
        with pytest.raises(StoreError, match="upgrade veltrix-mw"):
            call()


def test_a_folder_is_no_file(tmp_path: Path, open_store: OpenStore) -> None:
    for call in [*read_in_every_way(open_store(tmp_path)), lambda: put(open_store(tmp_path), "a", b"1")]:
        with pytest.raises(StoreError, match="is not a file"):
            call()


def test_a_damaged_file_is_said_to_be_damaged(path: Path, open_store: OpenStore) -> None:
    put(store := open_store(path), "a", b'"' + b"x" * 50_000 + b'"')
    store.close()
    raw = bytearray(path.read_bytes())
    raw[4096:] = os.urandom(len(raw) - 4096)
    path.write_bytes(raw)
    with pytest.raises(StoreError, match=r"damaged|cannot be used"):
        store.list(timeout_s=1)


# --- permissions (as a user without rights, also where the tests run as root)


@pytest.fixture
def shared(shared_folder: Path, open_store: OpenStore) -> SqliteStore:
    """A store at rest, with one entry, whose folder other users can reach."""
    store = open_store(shared_folder / "config.db")
    put(store, "a", b"1")
    store.close()
    return store


def test_an_unreadable_file_is_a_matter_of_permission(shared_folder: Path, shared: SqliteStore) -> None:
    (shared_folder / "config.db").chmod(0)

    def child() -> None:
        for call in read_in_every_way(shared):
            with pytest.raises(AuthFailed, match=r"may not read .*chmod"):
                call()

    as_nobody(child)


def test_a_folder_that_may_not_be_searched_is_a_matter_of_permission(shared_folder: Path, shared: SqliteStore) -> None:
    shared_folder.chmod(0o600)

    def child() -> None:
        for call in [*read_in_every_way(shared), lambda: put(shared, "a", b"1")]:
            with pytest.raises(AuthFailed, match="may not look into"):
                call()

    as_nobody(child)


def test_a_folder_shut_between_two_looks_is_not_taken_for_an_absent_file(
    shared_folder: Path, shared: SqliteStore
) -> None:
    shared_folder.chmod(0o600)

    def child() -> None:
        refused = shared._file._refused("SQLITE_CANTOPEN")
        assert isinstance(refused, AuthFailed), refused

    as_nobody(child)


def test_a_reader_that_cannot_write_beside_the_file_is_told_the_remedy(
    shared_folder: Path, shared: SqliteStore
) -> None:
    (shared_folder / "config.db").chmod(0o444)
    shared_folder.chmod(0o555)

    def child() -> None:
        for call in read_in_every_way(shared):
            with pytest.raises(AuthFailed, match=r"-wal and -shm files beside it: give this user write permission"):
                call()

    as_nobody(child)
    assert os.listdir(shared_folder) == ["config.db"]


def test_a_read_only_file_can_be_read_and_not_written(shared_folder: Path, shared: SqliteStore) -> None:
    (shared_folder / "config.db").chmod(0o444)
    shared_folder.chmod(0o777)

    def child() -> None:
        assert set(entries(shared)) == {"a"}
        with pytest.raises(AuthFailed, match="read-only for this user"):
            put(shared, "a", b"2")
        shared.close()

    as_nobody(child)


def test_a_folder_without_write_permission_is_said_when_the_file_is_to_be_created(
    shared_folder: Path, open_store: OpenStore
) -> None:
    shared_folder.chmod(0o555)
    store = open_store(shared_folder / "config.db")

    def child() -> None:
        with pytest.raises(AuthFailed, match="may not create files in"):
            put(store, "a", b"1")

    as_nobody(child)


# --- locked


@pytest.fixture
def locked(path: Path, open_store: OpenStore) -> Iterator[SqliteStore]:
    """A store whose file another connection keeps to itself."""
    store = open_store(path, timeout_s=0.2)
    put(store, "a", b"1")
    store.close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        yield store


def test_a_locked_file_is_unavailable_after_the_timeout(locked: SqliteStore) -> None:
    for call in [
        *read_in_every_way(locked, timeout_s=0.05),
        lambda: locked.commit([RawOperation("a", b"2")], ChangeRecord(), timeout_s=0.05),
    ]:
        with pytest.raises(StoreUnavailable, match=r"locked by another process for .* fuser"):
            call()


def test_readers_do_not_wait_for_a_writer(path: Path, open_store: OpenStore) -> None:
    store = open_store(path)
    put(store, "a", b"1")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert set(entries(store)) == {"a"}
        with pytest.raises(StoreUnavailable, match="locked"):
            store.commit([RawOperation("a", b"2")], ChangeRecord(), timeout_s=0.05)
        other.execute("ROLLBACK")
    put(store, "a", b"2")


def test_a_watch_outlasts_a_short_lock_and_reports_a_long_one(path: Path, open_store: OpenStore) -> None:
    store = open_store(path, timeout_s=0.2)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=1)
    other = sqlite3.connect(path, isolation_level=None)
    with contextlib.closing(other):
        put(store, "a", b"2")
        store._file.close()
        watch.let_go()
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        assert list(watch.next(0)) == []
        with pytest.raises(StoreUnavailable, match="locked"):
            watch.next(WITHIN_S)
    assert len(drain(watch, 2)) == 1
    watch.close()


def test_the_switch_to_wal_waits_for_a_writer(
    path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite itself gives up at once there, whatever its timeout."""
    put(store := open_store(path), "a", b"1")
    store.close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = DELETE")
        writer.execute("BEGIN IMMEDIATE")

        class Pause:
            def wait(self, pause_s: float) -> None:
                writer.execute("COMMIT")

        monkeypatch.setattr(sqlite_file, "_never", Pause())
        put(store, "a", b"2")
        assert not writer.in_transaction
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_call_ends_by_its_timeout(path: Path, open_store: OpenStore) -> None:
    store = open_store(path)
    write(store, *(RawOperation(f"k{n}", b"1") for n in range(20_000)))
    with pytest.raises(StoreUnavailable, match="did not answer within"):
        store.list(timeout_s=0)
    assert len(entries(store)) == 20_000


# --- another file, another history


def back_up(path: Path, target: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(target)) as copy:
        source.backup(copy)


def put_in_place(backup: Path, path: Path) -> None:
    """Replace the file, as one does with its users stopped."""
    for side in ("-wal", "-shm"):
        path.with_name(path.name + side).unlink(missing_ok=True)
    os.replace(backup, path)


def restore_into(backup: Path, path: Path) -> None:
    """Overwrite the open database, as `.restore` of the sqlite3 shell does."""
    with contextlib.closing(sqlite3.connect(backup)) as source, contextlib.closing(sqlite3.connect(path)) as target:
        source.backup(target)


@pytest.mark.parametrize("restore", [put_in_place, restore_into])
@pytest.mark.parametrize("later", [0, 1, 5], ids=["older", "equal", "newer"])
def test_an_older_backup_put_in_place_is_noticed(
    path: Path, tmp_path: Path, open_store: OpenStore, restore: Callable[[Path, Path], None], later: int
) -> None:
    store = open_store(path)
    put(store, "a", b"1")
    back_up(path, tmp_path / "backup")
    put(store, "a", b"2")
    position = here(store)
    watch = store.watch(position, timeout_s=1)
    assert list(watch.next(0)) == []
    restore(tmp_path / "backup", path)
    for turn in range(later):
        put(store, "b", b"%d" % turn)
    with pytest.raises(Restored):
        watch.next(WITHIN_S)
    with pytest.raises(Restored):
        store.confirm(position, timeout_s=1)
    with pytest.raises(Restored):
        store.watch(position, timeout_s=1)
    assert entries(store)["a"] == (b"1", 1)
    renewed = store.renew_incarnation(position.incarnation, timeout_s=1)
    assert here(store).incarnation == renewed != position.incarnation
    watch.close()


def test_a_follower_from_before_the_backup_goes_on(path: Path, tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(path)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=1)
    back_up(path, tmp_path / "backup")
    put_in_place(tmp_path / "backup", path)
    revision = put(store, "a", b"2")
    assert [batch.position.revision for batch in drain(watch, revision)] == [revision]
    watch.close()


def test_a_vanished_file_is_said_and_a_new_one_is_another_history(path: Path, open_store: OpenStore) -> None:
    store = open_store(path)
    put(store, "a", b"1")
    position = here(store)
    watch = store.watch(position, timeout_s=1)
    for file in path.parent.iterdir():
        file.unlink()
    with pytest.raises(StoreUnavailable, match="is gone: it was there before"):
        watch.next(WITHIN_S)
    with pytest.raises(StoreUnavailable, match="is gone: it was there before"):
        store.list(timeout_s=1)
    put(store, "a", b"1")
    with pytest.raises(Restored):
        watch.next(WITHIN_S)
    assert here(store).incarnation != position.incarnation
    watch.close()


def test_a_write_to_a_file_that_was_replaced_meanwhile_is_not_acknowledged(
    path: Path, tmp_path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(path)
    put(store, "a", b"1")
    back_up(path, tmp_path / "backup")
    trimmed = store._trimmed

    def replaced_meanwhile(*args: Any, **options: Any) -> Any:
        os.replace(tmp_path / "backup", path)
        return trimmed(*args, **options)

    monkeypatch.setattr(store, "_trimmed", replaced_meanwhile)
    with pytest.raises(StoreUnavailable, match="replaced while"):
        put(store, "a", b"2")


@pytest.mark.parametrize(
    "fault", ["DELETE FROM versions WHERE key = 'a/b'", "UPDATE versions SET revision = 3 WHERE key = 'a/b'"]
)
@pytest.mark.parametrize("lazy", [(), ("a/",)], ids=["eager", "lazy"])
def test_a_listing_that_contradicts_its_own_sums_is_refused(
    path: Path, open_store: OpenStore, fault: str, lazy: tuple[str, ...]
) -> None:
    store = open_store(path, lazy=lazy)
    put(store, "a/b", b"1")
    put(store, "b", b"1")
    store.list(timeout_s=1)
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute(fault)
    with pytest.raises(StoreError, match=r"two histories.*\.restore"):
        store.list(timeout_s=1)


# --- bounds


def test_history_is_bounded_by_revisions(path: Path, open_store: OpenStore) -> None:
    store = open_store(path, keep_revisions=3)
    put(store, "still", b"1")
    made = [put(store, "a", b"%d" % turn) for turn in range(10)]
    assert [version.revision for version in store.history("a", limit=99, timeout_s=1)] == made[:-4:-1]
    assert set(entries(store, made[-3])) == {"a", "still"}
    with pytest.raises(Compacted):
        entries(store, made[-4])


def test_history_is_bounded_by_bytes(path: Path, open_store: OpenStore) -> None:
    store = open_store(path, keep_bytes=1000)
    made = [put(store, "a", b'"' + b"x" * 298 + b'"') for _ in range(10)]
    assert [version.revision for version in store.history("a", limit=99, timeout_s=1)] == made[:-4:-1]
    put(store, "a", b'"' + b"x" * 5000 + b'"')
    assert len(store.history("a", limit=99, timeout_s=1)) == 1


def test_what_is_forgotten_leaves_no_rows(path: Path, open_store: OpenStore) -> None:
    store = open_store(path, keep_revisions=2)
    put(store, "still", b"1")
    for turn in range(30):
        put(store, f"k{turn % 3}", b"%d" % turn)
        if turn % 5 == 4:
            delete(store, f"k{turn % 3}")
    live = len(entries(store))
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as other:
        (versions,) = other.execute("SELECT count(*) FROM versions").fetchone()
        (orphans,) = other.execute(
            "SELECT count(*) FROM revisions AS r WHERE NOT EXISTS "
            "(SELECT 1 FROM versions AS v WHERE v.revision = r.revision)"
        ).fetchone()
    assert versions <= live + 2
    assert orphans == 0


def test_lowered_bounds_take_effect_with_the_next_commits(path: Path, open_store: OpenStore) -> None:
    store = open_store(path)
    for turn in range(50):
        put(store, "a", b"%d" % turn)
    put(open_store(path, keep_revisions=5), "a", b"1")
    assert len(store.history("a", limit=99, timeout_s=1)) == 5


# --- connections


def test_close_leaves_no_connection_and_no_side_files(path: Path) -> None:
    store = SqliteStore(path)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: entries(store), range(40)))
    store.close()
    assert os.listdir(path.parent) == ["config.db"]
    with pytest.raises(StoreUnavailable, match="closed"):
        watch.next(0)


def test_no_connection_is_inherited_by_a_fork(path: Path, open_store: OpenStore) -> None:
    """A child that inherits one believes to hold the parent's locks, and loses what it then writes."""
    store = open_store(path)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=1)

    def child() -> None:
        names = [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if int(fd) > 2 and os.path.exists(f"/proc/self/fd/{fd}")
        ]
        assert [name for name in names if str(path) in name] == []

    in_a_fork(child)
    assert list(watch.next(0)) == []
    watch.close()


def test_what_a_forked_child_writes_is_there_after_the_parent_closed(path: Path, open_store: OpenStore) -> None:
    store = open_store(path)
    put(store, "a", b"1")
    to_child, to_parent = os.pipe(), os.pipe()

    def child() -> None:
        entries(store)
        os.write(to_parent[1], b"x")
        os.read(to_child[0], 1)
        put(store, "child", b"1")

    def parent() -> None:
        # Opened after the fork, and closed while the child has the file open.
        os.read(to_parent[0], 1)
        entries(store)
        store.close()
        os.write(to_child[1], b"x")

    closing = threading.Thread(target=parent)
    closing.start()
    in_a_fork(child)
    closing.join()
    for fd in (*to_child, *to_parent):
        os.close(fd)
    assert set(entries(store)) == {"a", "child"}


def test_a_watch_goes_on_in_both_processes_after_a_fork(path: Path, open_store: OpenStore) -> None:
    store = open_store(path)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=1)

    def child() -> None:
        revision = put(store, "a", b"2")
        assert len(drain(watch, revision)) == 1
        store.close()

    in_a_fork(child)
    assert len(drain(watch, 2)) == 1
    watch.close()


def test_leaving_without_closing_is_silent_in_a_child(path: Path) -> None:
    """Also where every warning is an error, and the parent's connections were open at the fork."""
    script = f"""
import os, sys
from veltrix_mw.protocols import ChangeRecord, RawOperation
from veltrix_mw.stores import sqlite_file
from veltrix_mw.stores.sqlite import SqliteStore
store = SqliteStore({str(path)!r})
store.commit([RawOperation("a", b"1")], ChangeRecord(), timeout_s=5)
watch = store.watch(store.list(timeout_s=5).position, timeout_s=5)
pid = os.fork()
if pid == 0:
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
store.close()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_errors_hold_no_value(path: Path, open_store: OpenStore) -> None:
    store = open_store(path)
    put(store, "a", b'"s3cret"')
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("DROP TABLE revisions")
    with pytest.raises(StoreError) as caught:
        put(store, "a", b'"s3cret too"')
    assert "s3cret" not in f"{caught.value} {caught.value.__cause__}"


def test_an_acknowledged_write_is_in_the_file_and_its_log_alone(
    path: Path, tmp_path: Path, open_store: OpenStore
) -> None:
    """What `kill -9` leaves behind is enough to open it elsewhere."""
    store = open_store(path)
    put(store, "a", b"1")
    revision = put(store, "a", b"2")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("config.db", "config.db-wal"):
        shutil.copy(tmp_path / name, elsewhere / name)
    assert entries(open_store(elsewhere / "config.db")) == {"a": (b"2", revision)}


def test_a_commit_wakes_the_watches_of_its_process_before_they_look(path: Path, open_store: OpenStore) -> None:
    store = open_store(path, poll_s=600)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=1)
    assert list(watch.next(0)) == []
    with ThreadPoolExecutor(1) as pool:
        try:
            waiting = pool.submit(watch.next, 600)
            revision = put(store, "a", b"2")
            assert [batch.position.revision for batch in waiting.result(WITHIN_S)] == [revision]
        finally:
            watch.close()


def test_a_call_that_runs_while_the_store_is_closed_leaves_nothing_open(path: Path, open_store: OpenStore) -> None:
    store = open_store(path)
    put(store, "a", b"1")
    with store._file.session(WITHIN_S):
        store.close()
    assert os.listdir(path.parent) == ["config.db"]


def test_connections_of_a_parent_that_forked_unseen_are_not_touched(
    path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that forks in C runs no hook: only the process id tells."""
    store = open_store(path)
    put(store, "a", b"1")
    (inherited,) = store._file._idle
    monkeypatch.setattr(store._file, "_pid", 0)
    assert set(entries(store)) == {"a"}
    assert inherited not in store._file._idle
    assert inherited.one("SELECT 1") == 1
    # It is this process's own, after all.
    sqlite_file._abandoned.remove(inherited)
    inherited.close()
