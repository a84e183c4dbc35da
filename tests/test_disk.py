"""The last-known-good file: never half a file, never an exception, never a wait.

Run as a script it is the process that a test kills, starves or forks: `python test_disk.py <scenario> <folder> ...`.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import veltrix_mw
from veltrix_mw import disk
from veltrix_mw.disk import LastKnownGood, Saved
from veltrix_mw.protocols import Position
from veltrix_mw.values import FrozenDict, freeze

WAIT_S = 30.0  # far beyond what anything here takes; only a failure waits so long


class Clock:
    """A clock that a test moves. It counts who asks, so that a test can wait until the thread has decided."""

    def __init__(self, start_s: float = 0.0) -> None:
        self.now_s = start_s
        self.asked = threading.Semaphore(0)
        self._owner = threading.get_ident()

    def __call__(self) -> float:
        if threading.get_ident() != self._owner:
            self.asked.release()
        return self.now_s

    def forget(self) -> None:
        while self.asked.acquire(blocking=False):
            pass


def saved(revision: int, *, incarnation: str = "one", entries: Any = None) -> Saved:
    if entries is None:
        entries = [("a/b", "colour", 1), ("a/c", freeze({"n": [1, {"m": None}], "x": 0.5}), revision), ("z", True, 2)]
    return Saved(Position(incarnation, revision, f"mark-{revision}"), (1 << 64) - revision, 1.5e9 + revision, entries)


_made: list[LastKnownGood] = []


@pytest.fixture(autouse=True)
def _close_all() -> Iterator[None]:
    yield
    while _made:
        _made.pop().close(WAIT_S)


def made(folder: str | os.PathLike[str], **options: Any) -> LastKnownGood:
    options = {"namespace": "shop", "origin_url": "memory://", "min_interval_s": 0.0} | options
    file = LastKnownGood(folder, **options)
    _made.append(file)
    return file


def save(file: LastKnownGood, what: Saved) -> bool:
    file.offer(lambda: what)
    return file.flush(WAIT_S)


@pytest.fixture
def file(tmp_path: Path) -> LastKnownGood:
    return made(tmp_path / "config")


def previous(file: LastKnownGood) -> Path:
    return file.path.with_suffix(".prev")


def names(file: LastKnownGood) -> set[str]:
    return {found.suffix for found in file.path.parent.iterdir()}


# --- what is saved comes back ---------------------------------------------------------------------------------


def test_what_was_saved_is_loaded_by_another_process_frozen(file: LastKnownGood) -> None:
    assert save(file, saved(3))
    loaded = made(file.path.parent).load()
    assert loaded == saved(3)
    value = loaded.entries[1][1]
    assert type(value) is FrozenDict
    assert type(value["n"]) is tuple
    assert type(value["n"][1]) is FrozenDict
    assert file.error is None


def test_nothing_saved_yet_is_no_error_and_loading_creates_nothing(file: LastKnownGood) -> None:
    assert file.load() is None
    assert file.error is None
    assert not file.path.parent.exists()


def test_an_empty_snapshot_is_a_snapshot(file: LastKnownGood) -> None:
    assert save(file, saved(0, entries=[]))
    assert file.load() == saved(0, entries=[])


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(1 << 70), max_value=1 << 70)
    | st.sampled_from([(1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 63) - 1, 10**4000, 0.1, 5e-324, 1.0, -0.0])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
).map(lambda value: freeze(FrozenDict(v=value))["v"])


@settings(max_examples=150, deadline=None)
@given(
    held=st.dictionaries(
        st.from_regex(r"[a-z]{1,3}(/[a-z]{1,3})?", fullmatch=True),
        st.tuples(json_values, st.integers(0, (1 << 63) - 1)),
        max_size=8,
    ),
    revision=st.integers(0, (1 << 63) - 1),
    incarnation=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    chunk=st.integers(1, 4),
)
def test_any_snapshot_makes_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, held: Any, revision: int, incarnation: str, chunk: int
) -> None:
    what = saved(revision, incarnation=incarnation, entries=[(key, *held[key]) for key in sorted(held)])
    file = made(tmp_path_factory.mktemp("trip"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "_CHUNK_ENTRIES", chunk)
        assert save(file, what), file.error
    loaded = file.load()
    file.close(WAIT_S)
    assert loaded == what
    assert repr(loaded) == repr(what)  # True is not 1, 1.0 is not 1, -0.0 is not 0.0


def test_many_entries_and_large_values_come_back_in_chunks(file: LastKnownGood) -> None:
    entries: list[Any] = [(f"k/{n:05d}", n, n) for n in range(2500)]
    entries += [(f"l/{n}", "x" * (disk._CHUNK_BYTES // 2 + n), n) for n in range(5)]
    assert save(file, saved(9, entries=entries))
    assert file.load() == saved(9, entries=entries)


def test_importing_the_file_does_not_import_msgspec() -> None:
    code = "import sys, veltrix_mw.disk; print('msgspec' in sys.modules)"
    assert run("-c", code).stdout.strip() == "False"


# --- damage ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two_copies(file: LastKnownGood, monkeypatch: pytest.MonkeyPatch) -> tuple[LastKnownGood, bytes]:
    """Revision 1 as the previous copy, revision 2 as the current one, in chunks of two entries."""
    monkeypatch.setattr(disk, "_CHUNK_ENTRIES", 2)
    assert save(file, saved(1))
    assert save(file, saved(2))
    assert previous(file).read_bytes() != file.path.read_bytes()
    return file, file.path.read_bytes()


def test_every_flipped_bit_is_noticed_and_the_previous_copy_loaded(two_copies: tuple[LastKnownGood, bytes]) -> None:
    file, whole = two_copies
    for at in range(len(whole)):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            damaged = bytearray(whole)
            damaged[at] ^= flip
            file.path.write_bytes(damaged)
            assert file.load() == saved(1), (at, flip)
            assert file.error is not None
    file.path.write_bytes(whole)
    assert file.load() == saved(2)
    assert file.error is None


def test_every_flipped_byte_without_a_previous_copy_gives_none(two_copies: tuple[LastKnownGood, bytes]) -> None:
    file, whole = two_copies
    previous(file).unlink()
    for at in range(len(whole)):
        file.path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        assert file.load() is None, at


def test_every_truncation_and_any_addition_is_noticed(two_copies: tuple[LastKnownGood, bytes]) -> None:
    file, whole = two_copies
    for damaged in [whole[:length] for length in range(len(whole))] + [whole + b"\0", whole + whole]:
        file.path.write_bytes(damaged)
        assert file.load() == saved(1), len(damaged)


def test_swapped_and_foreign_chunks_are_noticed(file: LastKnownGood, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_CHUNK_ENTRIES", 1)
    parts = [bytes(p) for p in disk._encoded(saved(1), namespace="shop", origin="memory://")]
    other = [bytes(p) for p in disk._encoded(saved(2), namespace="shop", origin="memory://")]
    file.path.parent.mkdir()
    file.path.write_bytes(b"".join(parts))
    assert file.load() == saved(1)
    file.path.write_bytes(b"".join([*parts[:2], other[2], parts[3]]))  # each chunk whole, two revisions mixed
    assert file.load() is None
    for order in ((0, 2, 1, 3), (0, 1, 1, 3), (0, 1, 3), (0, 1, 2, 3, 3)):
        file.path.write_bytes(b"".join(parts[n] for n in order))
        assert file.load() is None, order


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_no_content_makes_loading_raise(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, with_magic: bool
) -> None:
    file = made(tmp_path_factory.mktemp("any"))
    file.path.write_bytes((disk._MAGIC if with_magic else b"") + content)
    file.path.chmod(0o600)
    assert file.load() is None
    assert file.error is not None


def chunk_of(payload: bytes, count: int = 1) -> bytes:
    """A file of one chunk whose checksums all hold, whatever is in it."""
    head = next(iter(disk._encoded(saved(1, entries=[("k", 1, 1)] * count), namespace="shop", origin="memory://")))
    start = disk._CHUNK.pack(count, len(payload))
    return bytes(head) + start + payload + disk._checksum(bytes(head[-16:]), start, payload)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_no_chunk_with_a_right_checksum_makes_loading_raise(
    tmp_path_factory: pytest.TempPathFactory, payload: bytes
) -> None:
    file = made(tmp_path_factory.mktemp("chunk"))
    file.path.write_bytes(chunk_of(payload))
    file.path.chmod(0o600)
    loaded = file.load()
    assert loaded is None or len(loaded.entries) == 1


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), b"bytes", {1: 2}, {"deep": [b"bytes"]}],
    ids=["nan", "inf", "bytes", "number as a member name", "bytes within"],
)
def test_what_is_no_json_value_is_not_loaded_whatever_its_checksum(file: LastKnownGood, value: Any) -> None:
    import msgspec

    file.path.parent.mkdir()
    file.path.write_bytes(chunk_of(msgspec.msgpack.encode([("k", 1, 1)])))
    assert file.load() is not None
    file.path.write_bytes(chunk_of(msgspec.msgpack.encode([("k", value, 1)])))
    assert file.load() is None


@pytest.mark.parametrize("entries", [[("b", 1, 1), ("a", 2, 2)], [("a", 1, 1), ("a", 2, 2)]], ids=["order", "twice"])
def test_entries_out_of_order_are_neither_saved_nor_loaded(file: LastKnownGood, entries: Any) -> None:
    import msgspec

    assert not save(file, saved(1, entries=entries))
    assert file.error is not None
    assert "ValueError" in file.error
    assert names(file) == {".lock"}
    file.path.write_bytes(chunk_of(msgspec.msgpack.encode(entries), count=2))
    assert file.load() is None


def test_another_namespace_is_not_loaded(file: LastKnownGood) -> None:
    assert save(file, saved(1))
    other = made(file.path.parent, namespace="other")
    assert other.path != file.path
    assert other.load() is None
    other.path.write_bytes(file.path.read_bytes())
    assert other.load() is None
    assert "namespace" in str(other.error)


def test_a_newer_format_is_not_loaded_but_its_revision_counts(
    file: LastKnownGood, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert save(file, saved(1))
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_VERSION", 2)
        assert save(file, saved(5))
    older_release = made(file.path.parent)
    assert older_release.load() == saved(1)
    assert "format version is 2" in str(older_release.error)
    assert save(older_release, saved(4))
    assert older_release.load() == saved(1)
    assert save(older_release, saved(5))  # as new, and this release can load it
    assert older_release.load() == saved(5)


def test_a_damaged_current_copy_never_replaces_the_good_previous_one(file: LastKnownGood) -> None:
    assert save(file, saved(1))
    assert save(file, saved(2))
    file.path.write_bytes(file.path.read_bytes()[:-1])
    assert save(file, saved(3))
    assert file.load() == saved(3)
    file.path.unlink()
    assert file.load() == saved(1)


def test_a_reason_is_logged_once(file: LastKnownGood, caplog: pytest.LogCaptureFixture) -> None:
    file.path.parent.mkdir()
    file.path.write_bytes(b"not ours")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert file.load() is None
    assert len(caplog.records) == 1


def test_a_copy_from_another_address_is_loaded_and_said_without_secrets(tmp_path: Path) -> None:
    first = made(tmp_path, origin_url="etcd://ops:se/c?r@t@h1:2379,h2/shop?password=hunter2")
    assert save(first, saved(1))
    first.close(WAIT_S)
    second = made(tmp_path, origin_url="etcd://h1:2379/shop")
    assert second.load() == saved(1)
    assert "etcd://h1:2379,h2/shop" in str(second.error)
    for secret in ("ops", "se/c", "r@t", "hunter2"):
        assert secret not in str(second.error)
        assert secret.encode() not in first.path.read_bytes()


# --- newer, older ---------------------------------------------------------------------------------------------


def test_an_older_revision_never_replaces_a_newer_one(file: LastKnownGood) -> None:
    other = made(file.path.parent)
    assert save(file, saved(10))
    assert save(other, saved(9))
    assert file.load() == saved(10)
    assert save(other, saved(11))
    assert file.load() == saved(11)


def test_a_newer_previous_copy_counts_when_the_current_one_is_damaged(file: LastKnownGood) -> None:
    assert save(file, saved(10))
    assert save(file, saved(11))
    file.path.write_bytes(b"")
    assert save(file, saved(9))
    assert file.load() == saved(10)
    assert save(file, saved(10))
    assert file.load() == saved(10)
    assert file.error is None


def test_another_incarnation_replaces_a_higher_revision(file: LastKnownGood) -> None:
    assert save(file, saved(10))
    assert save(file, saved(2, incarnation="two"))
    assert file.load() == saved(2, incarnation="two")


def test_the_same_revision_is_not_written_again(file: LastKnownGood) -> None:
    assert save(file, saved(10))
    before = file.path.stat().st_ino
    assert save(made(file.path.parent), saved(10))
    assert file.path.stat().st_ino == before
    assert not previous(file).exists()


# --- who may read and write -----------------------------------------------------------------------------------


def test_files_are_0600_and_the_folder_0700_whatever_the_umask(file: LastKnownGood) -> None:
    before = os.umask(0)
    try:
        assert save(file, saved(1))
        assert save(file, saved(2))
    finally:
        os.umask(before)
    assert names(file) == {".lkg", ".prev", ".lock"}
    for found in file.path.parent.iterdir():
        assert stat.S_IMODE(found.stat().st_mode) == 0o600
        assert "shop" not in found.name
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("ending", [".lkg", ".lock", ".new"])
def test_a_symbolic_link_is_not_followed(file: LastKnownGood, tmp_path: Path, ending: str) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    file.path.parent.mkdir()
    planted = file.path.with_suffix(ending)
    planted.symlink_to(target)
    assert save(file, saved(1)) is (ending == ".new")
    assert target.read_bytes() == b"precious"
    if ending != ".new":
        assert planted.is_symlink()
        assert file.error is not None


def test_a_symbolic_link_is_not_loaded(file: LastKnownGood, tmp_path: Path) -> None:
    assert save(file, saved(1))
    elsewhere = tmp_path / "elsewhere"
    file.path.rename(elsewhere)
    file.path.symlink_to(elsewhere)
    assert file.load() is None
    assert "symbolic link" in str(file.error)


def test_a_planted_fifo_does_not_hang(file: LastKnownGood) -> None:
    file.path.parent.mkdir()
    os.mkfifo(file.path)
    assert file.load() is None
    assert not save(file, saved(1))
    assert "regular file" in str(file.error)


def test_a_fifo_that_takes_the_file_s_place_while_it_is_opened_does_not_hang(
    file: LastKnownGood, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert save(file, saved(1))
    looked_at = os.stat(file.path)
    file.path.unlink()
    os.mkfifo(file.path)
    monkeypatch.setattr(os, "stat", lambda *_, **__: looked_at)
    assert file.load() is None
    assert "regular file" in str(file.error)


def test_a_copy_that_others_may_write_is_not_loaded_but_replaced(file: LastKnownGood) -> None:
    assert save(file, saved(1))
    file.path.chmod(0o622)
    assert file.load() is None
    assert "chmod" in str(file.error)
    assert save(file, saved(1))
    assert file.load() == saved(1)


def test_a_copy_of_another_user_is_neither_loaded_nor_replaced(
    file: LastKnownGood, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert save(file, saved(1))
    if os.geteuid() == 0:
        os.chown(file.path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    before = file.path.stat().st_ino
    assert file.load() is None
    assert "another user" in str(file.error)
    assert not save(file, saved(2))
    assert file.path.stat().st_ino == before


def test_root_s_copy_is_believed(file: LastKnownGood, monkeypatch: pytest.MonkeyPatch) -> None:
    assert save(file, saved(1))
    owner = 0

    def owned(actual: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def call(*args: Any, **options: Any) -> os.stat_result:
            found = actual(*args, **options)
            return os.stat_result([*found[:4], owner, *found[5:]])

        return call

    monkeypatch.setattr(os, "stat", owned(os.stat))
    monkeypatch.setattr(os, "fstat", owned(os.fstat))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert file.load() == saved(1)
    owner = 54321
    assert file.load() is None


# --- when it is written ---------------------------------------------------------------------------------------


def test_constructing_and_offering_do_no_io_and_construction_starts_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    file = made(tmp_path / "config")
    assert threading.active_count() == before
    assert not file.path.parent.exists()
    file.close(WAIT_S)
    assert file.flush(0.0)
    assert threading.active_count() == before


def test_at_most_one_save_an_interval_and_then_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    file = made(tmp_path, min_interval_s=5.0, clock=clock, wall_clock=lambda: time.time() + clock.now_s)
    file.offer(lambda: saved(1))
    until(lambda: file.path.exists() and file.load() == saved(1))
    until(lambda: file._make is None)
    clock.forget()
    calls: list[int] = []
    tries: list[object] = []
    actual = os.makedirs
    monkeypatch.setattr(os, "makedirs", lambda *args, **options: (tries.append(args), actual(*args, **options)))

    def offer(revision: int) -> None:
        file.offer(lambda: calls.append(revision) or saved(revision))  # type: ignore[func-returns-value]

    for revision in (2, 3):
        offer(revision)
        assert clock.asked.acquire(timeout=WAIT_S)  # the thread has looked, and decided to wait
    clock.now_s = 4.9
    offer(4)
    assert clock.asked.acquire(timeout=WAIT_S)
    assert file.load() == saved(1)
    clock.now_s = 5.5
    offer(5)
    until(lambda: file.load() == saved(5))
    assert calls == [5]
    assert len(tries) == 1  # before it was due, not even the folder was looked at
    file.close(WAIT_S)


def test_the_interval_counts_for_all_processes_of_a_host(tmp_path: Path) -> None:
    clock = Clock()
    wall_s = time.time()
    options: dict[str, Any] = {"min_interval_s": 5.0, "clock": clock}
    one = made(tmp_path, wall_clock=lambda: wall_s, **options)
    other = made(tmp_path, wall_clock=lambda: wall_s + 0.5 + clock.now_s, **options)
    assert save(one, saved(1))
    os.utime(one.path, (wall_s, wall_s))
    clock.forget()
    other.offer(lambda: saved(2))
    # Asked before the attempt, after it (put off), and again before going to wait.
    for _ in range(3):
        assert clock.asked.acquire(timeout=WAIT_S)
    assert one.load() == saved(1)
    clock.now_s = 4.6
    other.offer(lambda: saved(3))
    until(lambda: one.load() == saved(3))


def test_a_file_dated_in_the_future_holds_nothing_up(tmp_path: Path) -> None:
    file = made(tmp_path, min_interval_s=5.0)
    assert save(file, saved(1))
    file.close(WAIT_S)
    os.utime(file.path, (time.time() + 86_400,) * 2)
    file = made(tmp_path, min_interval_s=5.0)
    file.offer(lambda: saved(2))
    until(lambda: file.load() == saved(2))
    file.close(WAIT_S)


def test_closing_saves_what_was_offered_ends_the_thread_and_a_later_offer_starts_anew(tmp_path: Path) -> None:
    file = made(tmp_path, min_interval_s=3600.0)
    assert save(file, saved(1))
    file.offer(lambda: saved(2))
    file.close(WAIT_S)
    assert file.load() == saved(2)
    assert not [thread for thread in threading.enumerate() if "last-known-good" in thread.name]
    file.offer(lambda: saved(3))
    file.close(WAIT_S)
    assert file.load() == saved(3)


def test_a_hanging_disk_blocks_neither_offers_nor_closing(file: LastKnownGood, monkeypatch: pytest.MonkeyPatch) -> None:
    assert save(file, saved(1))
    hangs, heal = threading.Event(), threading.Event()
    actual = os.fsync

    def fsync(fd: int) -> None:
        hangs.set()
        assert heal.wait(WAIT_S)
        actual(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    file.offer(lambda: saved(2))
    assert hangs.wait(WAIT_S)
    for revision in range(3, 1000):
        file.offer(lambda revision=revision: saved(revision))  # type: ignore[misc]
    assert not file.flush(0.01)
    assert file.load() == saved(1)
    hung = file._thread
    assert hung is not None
    file.close(0.01)  # comes back, although the thread does not
    assert hung.is_alive()
    file.offer(lambda: saved(1000))  # a new thread, that finds the lock taken
    assert not file.flush(0.01)
    heal.set()
    assert file.flush(WAIT_S)
    assert file.load() == saved(1000)
    hung.join(WAIT_S)
    assert not hung.is_alive()


def test_a_snapshot_that_cannot_be_made_harms_nothing_and_names_no_value(
    file: LastKnownGood, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Saved:
        raise RuntimeError("hunter2")

    file.offer(fail)
    with caplog.at_level(logging.DEBUG):
        assert not file.flush(WAIT_S)
    assert "RuntimeError" in str(file.error)
    assert "hunter2" not in str(file.error) + caplog.text
    assert save(file, saved(1))
    assert file.error is None


def test_who_finds_the_lock_taken_tries_again_later(tmp_path: Path) -> None:
    import fcntl

    file = made(tmp_path)
    assert save(file, saved(1))
    with open(file.path.with_suffix(".lock"), "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file.offer(lambda: saved(2))
        assert not file.flush(0.2)
        assert file.load() == saved(1)
        assert file.error is None
        other = made(tmp_path)
        other.offer(lambda: saved(1))
        waiting = other._thread
        assert waiting is not None
        other.close(0.1)
        waiting.join(WAIT_S)
        assert not waiting.is_alive()  # it did not wait for the lock
    until(lambda: file.load() == saved(2))


def test_a_flush_that_comes_during_a_save_does_not_wait_for_the_interval(tmp_path: Path) -> None:
    file = made(tmp_path / "lkg", min_interval_s=1000.0)
    saving, go_on = threading.Event(), threading.Event()

    def first() -> Saved:
        saving.set()
        assert go_on.wait(10)
        return saved(1)

    file.offer(first)
    assert saving.wait(10)
    file.offer(lambda: saved(2))
    flushed: list[bool] = []
    flushing = threading.Thread(target=lambda: flushed.append(file.flush(10)))
    flushing.start()
    until(lambda: file._urgent)
    go_on.set()
    flushing.join(20)
    assert flushed == [True]
    found = made(tmp_path / "lkg").load()
    assert found is not None
    assert found.position.revision == 2


def test_what_is_offered_during_a_save_is_saved_after_it(file: LastKnownGood, monkeypatch: pytest.MonkeyPatch) -> None:
    actual = os.rename

    def rename(*args: Any, **options: Any) -> None:
        monkeypatch.setattr(os, "rename", actual)
        file.offer(lambda: saved(2))
        actual(*args, **options)

    monkeypatch.setattr(os, "rename", rename)
    file.offer(lambda: saved(1))
    until(lambda: file.load() == saved(2))


def test_a_copy_of_the_lock_s_descriptor_elsewhere_does_not_keep_it(
    file: LastKnownGood, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[int] = []
    actual = os.fsync

    def fsync(fd: int) -> None:
        copies.extend(os.dup(held) for held in file._held)
        actual(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert save(file, saved(1))
    try:
        other = made(file.path.parent)
        other.offer(lambda: saved(2))
        assert other.flush(5.0)
    finally:
        for fd in copies:
            os.close(fd)
    file.close(WAIT_S)


# --- a disk that fails ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename", "makedirs", "fchmod"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_a_failing_call_leaves_the_copies_as_they_are(
    file: LastKnownGood, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    assert save(file, saved(1))
    assert save(file, saved(2))

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        assert not save(file, saved(3))
    assert os.strerror(number) in str(file.error)
    assert names(file) == {".lkg", ".prev", ".lock"}
    assert file.load() in (saved(2), saved(3))
    assert save(file, saved(4))
    assert file.load() == saved(4)
    assert file.error is None


def test_a_failing_disk_is_tried_ever_less_often_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    file = made(blocked, clock=clock)
    tries = 0
    actual = os.makedirs

    def makedirs(*args: Any, **options: Any) -> None:
        nonlocal tries
        tries += 1
        actual(*args, **options)

    monkeypatch.setattr(os, "makedirs", makedirs)
    with caplog.at_level(logging.WARNING):
        for _ in range(20):  # at half-second steps: 10 s, in which it is tried at about 0, 1, 3 and 7 s
            clock.forget()
            file.offer(lambda: saved(1))
            assert clock.asked.acquire(timeout=WAIT_S)
            until(lambda: file._due_s > clock.now_s)
            clock.now_s += 0.5
    assert 2 <= tries <= 5
    assert len(caplog.records) == 1
    file.close(WAIT_S)


def test_without_hard_links_the_previous_copy_is_kept_all_the_same(
    file: LastKnownGood, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    assert save(file, saved(1))
    assert save(file, saved(2))
    file.path.write_bytes(b"")
    assert file.load() == saved(1)


def test_left_over_temporaries_are_cleaned_up(file: LastKnownGood) -> None:
    file.path.parent.mkdir()
    for ending in (".new", ".link"):
        file.path.with_suffix(ending).write_bytes(b"left by a killed process")
    assert save(file, saved(1))
    assert names(file) == {".lkg", ".lock"}


# --- processes ------------------------------------------------------------------------------------------------


def until(condition: Callable[[], bool]) -> None:
    """Poll, as a file on disk tells nobody when it changes."""
    deadline_s = time.monotonic() + WAIT_S
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        tick.wait(0.005)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The path as it is here: the package may not be installed.
    environment = os.environ | {"PYTHONPATH": str(Path(veltrix_mw.__path__[0]).parent), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def scenario(name: str, *arguments: object) -> list[str]:
    return run(__file__, name, *map(str, arguments)).stdout.split()


def test_killed_at_any_step_there_is_a_whole_copy_and_the_next_save_works(tmp_path: Path) -> None:
    steps = int(scenario("killed", tmp_path)[0])
    assert steps > 20  # there are as many calls to the system in a save, each with a before and an after


def test_a_file_size_limit_is_reported_and_the_old_copy_stays(tmp_path: Path) -> None:
    assert scenario("limited", tmp_path) == ["ok"]


def test_processes_that_save_at_once_leave_whole_copies_and_the_newest_wins(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(veltrix_mw.__path__[0]).parent)}
    writers = [
        subprocess.Popen(
            [sys.executable, __file__, "writer", str(tmp_path), str(first)], env=environment, stdout=subprocess.PIPE
        )
        for first in (0, 1, 2)
    ]
    reader = made(tmp_path)
    seen = 0
    try:
        while any(writer.poll() is None for writer in writers):
            loaded = reader.load()
            assert reader.error is None, (seen, reader.error)
            assert loaded is not None or seen == 0
            if loaded is not None:
                assert loaded == saved(loaded.position.revision)
                assert loaded.position.revision >= seen
                seen = loaded.position.revision
    finally:
        outputs = [writer.communicate(timeout=60)[0].strip() for writer in writers]
    assert outputs == [b"ok"] * 3
    assert [writer.returncode for writer in writers] == [0] * 3
    assert reader.load() == saved(302)
    assert names(reader) == {".lkg", ".prev", ".lock"}


def test_a_load_that_began_before_the_first_save_still_finds_the_newest_copy(
    file: LastKnownGood, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.path.parent.mkdir()
    reader = made(file.path.parent)
    actual = reader._load

    def load(name: str) -> Any:
        try:
            return actual(name)
        except FileNotFoundError:
            monkeypatch.setattr(reader, "_load", actual)
            assert save(file, saved(1))  # between the look at the current copy and that at the one before
            assert save(file, saved(2))
            raise

    monkeypatch.setattr(reader, "_load", load)
    assert reader.load() == saved(2)
    assert reader.error is None


def test_a_forked_child_saves_on_a_thread_of_its_own_whatever_was_held_at_the_fork(tmp_path: Path) -> None:
    assert scenario("forked", tmp_path) == ["child-saved", "parent-saved"]


def test_a_child_forked_in_mid_save_does_not_keep_the_lock_of_a_killed_parent(tmp_path: Path) -> None:
    assert scenario("orphan", tmp_path) == ["busy", "saved"]


# --- what the scenarios do in their own process ---------------------------------------------------------------

STEPS = ("makedirs", "open", "write", "fsync", "link", "rename", "unlink", "fchmod", "close")


def _in_child(work: Callable[[], None]) -> int:
    """Fork, work, and return how the child ended: minus a signal's number, or an exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _killed(folder: Path) -> None:
    def die_at(step: int) -> None:
        left = step

        def counted(actual: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    if actual is write:
                        write(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                result = actual(*args, **options)
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        write = os.write
        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        assert save(made(here), saved(3))

    step, ended = 0, -signal.SIGKILL
    while ended == -signal.SIGKILL:
        step += 1
        here = folder / str(step)
        assert _in_child(lambda here=here: _save_two(here)) == 0  # type: ignore[misc]
        ended = _in_child(lambda step=step: die_at(step))  # type: ignore[misc]
        file = made(here)
        loaded = file.load()
        assert loaded in (saved(2), saved(3)), (step, loaded)
        assert file.error is None, (step, file.error)
        before = made(here)._load(previous(file).name)[0]
        assert before in (saved(1), saved(2)), (step, before)
        assert _in_child(lambda here=here: _save_four(here)) == 0  # type: ignore[misc]
        assert file.load() == saved(4), step
        assert names(file) == {".lkg", ".prev", ".lock"}, step
    assert ended == 0
    print(step)


def _save_two(folder: Path) -> None:
    file = made(folder)
    assert save(file, saved(1))
    assert save(file, saved(2))


def _save_four(folder: Path) -> None:
    assert save(made(folder), saved(4))


def _limited(folder: Path) -> None:
    import resource

    file = made(folder)
    assert save(file, saved(1))
    size = file.path.stat().st_size
    large = [(f"k/{n:06d}", "x" * 100, n) for n in range(5000)]
    # Python ignores SIGXFSZ, so a write beyond the limit first comes up short and then fails.
    for limit in (0, 1, size // 2, size, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        assert not save(file, saved(2, entries=large)), limit
        assert "ulimit" in str(file.error), file.error
        assert file.load() == saved(1)
        assert names(file) == {".lkg", ".lock"}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert save(file, saved(2, entries=large))
    assert file.load() == saved(2, entries=large)
    print("ok")


def _writer(folder: Path, first: int) -> None:
    file = made(folder)
    for revision in range(first, 303, 3):
        assert save(file, saved(revision)), file.error
    file.close(WAIT_S)
    print("ok")


def _forked(folder: Path) -> None:
    file = made(folder)
    assert save(file, saved(1))
    taken, free = threading.Event(), threading.Event()

    def hold() -> None:
        with file._changed:
            taken.set()
            free.wait(WAIT_S)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(WAIT_S)

    def child() -> None:
        assert file.load() == saved(1)
        assert save(file, saved(2))
        file.close(WAIT_S)
        print("child-saved", flush=True)

    assert _in_child(child) == 0
    free.set()
    holder.join()
    assert file.load() == saved(2)
    assert save(file, saved(3))
    assert file.load() == saved(3)
    file.close(WAIT_S)
    print("parent-saved")


def _orphan(folder: Path) -> None:
    def parent() -> None:
        file = made(folder)
        assert save(file, saved(1))
        reached = threading.Event()
        actual = os.fsync

        def hang(_: int) -> None:
            reached.set()
            threading.Event().wait()

        os.fsync = hang
        file.offer(lambda: saved(2))
        assert reached.wait(WAIT_S)
        alive, living = os.pipe()
        told, telling = os.pipe()
        if os.fork() == 0:
            os.fsync = actual
            os.close(living)
            file.offer(lambda: saved(3))
            # The lock is the parent's while that lives ...
            print("saved" if file.flush(0.3) else "busy", flush=True)
            os.write(telling, b".")
            os.read(alive, 1)  # ends when the parent does
            # ... and nobody's afterwards: the child kept no copy of it.
            print("saved" if file.flush(WAIT_S) else f"failed:{file.error}", flush=True)
            os._exit(0)
        os.read(told, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    assert _in_child(parent) == -signal.SIGKILL


if __name__ == "__main__":
    _scenarios: dict[str, Callable[..., None]] = {
        "killed": _killed,
        "limited": _limited,
        "forked": _forked,
        "orphan": _orphan,
        "writer": lambda folder, first: _writer(folder, int(first)),
    }
    _scenarios[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
