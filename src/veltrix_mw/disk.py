"""The last-known-good file: a whole validated snapshot on disk, for a cold start with every store away.

Owns the file: its format, its name, who may write it and when, and the thread that does. Knows nothing of
stores, followers or clients, and decides nothing about what a snapshot is good for: who loads one treats it
as stale until it is confirmed.

The folder holds, for each namespace, `<hash>.lkg` (current), `<hash>.prev` (the good copy before it) and
`<hash>.lock`; while a save runs also `<hash>.new` and `<hash>.link`. Replacing is: write and fsync `.new`, link
the current copy to `.prev`, rename `.new` over it, fsync the folder. Killed anywhere in between, at least one of
the two copies is complete.

Format, big-endian::

    head    magic 8 bytes, format version u16, length u32, JSON of so many bytes, checksum 16 bytes
    chunk   number of entries u16, length u32, msgpack of so many bytes, checksum 16 bytes; as often as needed

A checksum is BLAKE2b-128 over the checksum before it and all of its own part, so chunks can neither be changed
nor swapped, and the number of entries in the head says when the last one was had. A format version concerns the
chunks only: the head stays as it is, so that any version can tell which copy is newer.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import stat
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from operator import lt
from pathlib import Path
from typing import Any, BinaryIO, Final

from veltrix_mw.background import BackgroundThread
from veltrix_mw.events import NO_THREAD, Events, told_after
from veltrix_mw.protocols import Position
from veltrix_mw.sorted_map import Item
from veltrix_mw.values import FrozenDict

__all__ = ["LastKnownGood", "Saved"]

_MAGIC: Final = b"VLTXLKG\n"
_VERSION: Final = 1
_HEAD: Final = struct.Struct(">8sHI")
_CHUNK: Final = struct.Struct(">HI")
_CHECKSUM_BYTES: Final = 16
_MAX_HEAD_BYTES: Final = 64 * 1024  # a head takes some 300 bytes; the rest is room for long fingerprints
_MAX_FILE_BYTES: Final = 1 << 30  # eager keyspaces are bounded to 256 MiB; what is larger was not written here

# A chunk is what one call into C decodes while it holds the GIL: 0.5 ms at 1,000 small entries. Between chunks,
# reading, writing and hashing let others run, so an event loop beside a load of any size stalls no longer than that.
_CHUNK_ENTRIES: Final = 1000
_CHUNK_BYTES: Final = 256 * 1024  # a chunk is closed once it is larger; a single value may make it larger still

_LOOKS: Final = 3  # two suffice wherever files can be linked; without links, each save hides the current copy briefly
_LOCK_RETRY_S: Final = 0.05  # for a flush, which has a deadline; a save by another process takes about as long
_MIN_BACKOFF_S: Final = 1.0
_MAX_BACKOFF_S: Final = 60.0  # a full disk is tried again this often: soon enough for a file that is hours old
_MAX_LOGGED: Final = 64  # distinct reasons; they hold no values, so there are only a handful

# O_NONBLOCK: opening a FIFO that somebody planted must not hang. Regular files ignore it.
_SAFE: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

_ADVICE: Final = {
    errno.EACCES: "make the folder one that this user can write to",
    errno.EPERM: "make the folder one that this user can write to",
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some space, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "name a folder on a writable file system in last_known_good",
    errno.ENOTDIR: "name a folder, not a file, in last_known_good",
}


@dataclass(frozen=True, slots=True)
class Saved:
    """One snapshot as the last-known-good file holds it.

    `digest` has 64 bits, `saved_at_s` is Unix time in seconds; `entries` are (key, frozen value, mod_revision),
    ascending by key. A key that was held back is absent, or has its last good value.
    """

    position: Position
    digest: int
    saved_at_s: float
    entries: Sequence[Item]


class _Unusable(Exception):
    """A copy that cannot be loaded; the message says why. It may be replaced."""


class _NotOurs(_Unusable):
    """What lies there was put there by somebody else; it is neither loaded nor replaced."""


@dataclass(frozen=True, slots=True)
class _Head:
    version: int
    position: Position
    digest: int
    saved_at_s: float
    count: int
    origin: str
    checksum: bytes


def _without_secrets(url: str) -> str:
    """Drop user, password and query; greedy, so that an unquoted `@`, `/` or `?` in a password goes with it."""
    return re.sub(r"//.*@", "//", url).partition("?")[0]


def _checksum(before: bytes, *parts: bytes | bytearray) -> bytes:
    hashed = blake2b(before, digest_size=_CHECKSUM_BYTES)
    for part in parts:
        hashed.update(part)
    return hashed.digest()


# --- values: msgpack and back -------------------------------------------------------------------------------
#
# Measured with 10^5 small entries, one in five an object (CPython 3.11, medians, freezing included): msgpack
# read by msgspec 107 ms, JSON read by msgspec 103 ms, JSON by values.decode 285 ms a chunk at a time and 480 ms
# an entry at a time; json.loads of one document, frozen by nobody, 106 ms. The two of msgspec are equal within
# the noise; msgpack is a fifth smaller, and can carry integers beyond 64 bits, which msgspec's JSON reads as floats.

_BIG_INTEGER: Final = 1  # the one msgpack extension: a signed big-endian integer that needs more than 64 bits
_PLAIN: Final = frozenset({str, int, bool, type(None)})


def _frozen(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is float:
        if not math.isfinite(value):
            raise _Unusable("it holds a number that is not finite")
        return value
    if kind is list:
        return tuple([item if type(item) in _PLAIN else _frozen(item) for item in value])
    if kind is dict:
        if not all(type(name) is str for name in value):
            raise _Unusable("it holds an object with a member name that is not a string")
        return FrozenDict({name: item if type(item) in _PLAIN else _frozen(item) for name, item in value.items()})
    raise _Unusable("it holds something that is no JSON value")


def _big_integer(code: int, data: memoryview) -> int:
    if code != _BIG_INTEGER:
        raise _Unusable("it holds an unknown extension")
    return int.from_bytes(data, "big", signed=True)


def _with_extensions(value: Any) -> Any:
    """The value with each integer that msgpack cannot carry as an extension."""
    import msgspec

    if isinstance(value, dict):
        return {name: _with_extensions(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_extensions(item) for item in value]
    if type(value) is int and not -(1 << 63) <= value < 1 << 64:
        return msgspec.msgpack.Ext(_BIG_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
    return value


@cache
def _decoder() -> Callable[[bytes], list[Item]]:
    # Late, as everywhere: importing msgspec takes 30 ms, and most processes never read a file.
    from typing import Annotated

    import msgspec

    return msgspec.msgpack.Decoder(
        # A revision is kept in a signed 64-bit array.
        list[tuple[str, Any, Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]]],
        ext_hook=_big_integer,
    ).decode


def _decoded(payload: bytes) -> list[Item]:
    return [item if type(item[1]) in _PLAIN else (item[0], _frozen(item[1]), item[2]) for item in _decoder()(payload)]


def _encoded(saved: Saved, *, namespace: str, origin: str) -> Iterator[bytes | bytearray]:
    """The file in parts, each small enough to write in one go. Raises `ValueError` when keys do not ascend."""
    import msgspec

    head = json.dumps(
        {
            "incarnation": saved.position.incarnation,
            "revision": saved.position.revision,
            "fingerprint": saved.position.fingerprint,
            "digest": saved.digest,
            "saved_at_s": saved.saved_at_s,
            "count": len(saved.entries),
            "namespace": namespace,
            "origin": origin,
        },
        allow_nan=False,
    ).encode()
    if len(head) > _MAX_HEAD_BYTES:
        raise ValueError("the position is too long")
    start = _HEAD.pack(_MAGIC, _VERSION, len(head)) + head
    checksum = _checksum(b"", start)
    yield start + checksum

    encode_into = msgspec.msgpack.Encoder().encode_into
    payload, count, before = bytearray(b"\xdc\0\0"), 0, ""  # array 16: up to 65,535 items, their number filled in last
    for item in saved.entries:
        if not before < item[0]:
            raise ValueError("the entries are not ascending by key")
        before, mark = item[0], len(payload)
        try:
            encode_into(item, payload, mark)
        except OverflowError:
            del payload[mark:]
            encode_into((item[0], _with_extensions(item[1]), item[2]), payload, mark)
        count += 1
        if count >= _CHUNK_ENTRIES or len(payload) >= _CHUNK_BYTES:
            part, checksum = _chunk(payload, count, checksum)
            yield part
            payload, count = bytearray(b"\xdc\0\0"), 0
    if count:
        yield _chunk(payload, count, checksum)[0]


def _chunk(payload: bytearray, count: int, before: bytes) -> tuple[bytearray, bytes]:
    struct.pack_into(">H", payload, 1, count)
    start = _CHUNK.pack(count, len(payload))
    checksum = _checksum(before, start, payload)
    return bytearray().join((start, payload, checksum)), checksum


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise _Unusable("it ends too early")
    return data


def _read_head(file: BinaryIO, *, namespace: str) -> _Head:
    start = _read_exactly(file, _HEAD.size)
    magic, version, length = _HEAD.unpack(start)
    if magic != _MAGIC:
        raise _Unusable("it is not a last-known-good file")
    if length > _MAX_HEAD_BYTES:
        raise _Unusable("its head is damaged")
    head = _read_exactly(file, length)
    checksum = _read_exactly(file, _CHECKSUM_BYTES)
    if _checksum(b"", start, head) != checksum:
        raise _Unusable("its head is damaged")
    fields = json.loads(head)
    if fields["namespace"] != namespace:
        raise _Unusable("it belongs to another namespace")
    position = Position(str(fields["incarnation"]), int(fields["revision"]), str(fields["fingerprint"]))
    return _Head(
        int(version),
        position,
        int(fields["digest"]),
        float(fields["saved_at_s"]),
        int(fields["count"]),
        str(fields["origin"]),
        checksum,
    )


def _payloads(file: BinaryIO, head: _Head, *, size: int) -> Iterator[tuple[int, bytes]]:
    """Each chunk's number of entries and payload, checked; ends in `_Unusable` unless the file is whole."""
    missing, before = head.count, head.checksum
    while missing > 0:
        start = _read_exactly(file, _CHUNK.size)
        count, length = _CHUNK.unpack(start)
        if not 0 < count <= missing or length > size:
            raise _Unusable("a part of it is damaged")
        payload = _read_exactly(file, length)
        checksum = _read_exactly(file, _CHECKSUM_BYTES)
        if _checksum(before, start, payload) != checksum:
            raise _Unusable("a part of it is damaged")
        missing, before = missing - count, checksum
        yield count, payload
    if file.read(1):
        raise _Unusable("it goes on after its end")


_Signature = tuple[int, int, int, int]


def _signature(found: os.stat_result) -> _Signature:
    """What changes when a file is replaced or written to. Not ctime: linking the previous copy changes that."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _write_all(fd: int, data: bytes | bytearray) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


# Instances that a forked child must renew; weak, so that the registration keeps none alive.
_instances: weakref.WeakSet[LastKnownGood] = weakref.WeakSet()


def _renew_in_child() -> None:
    for instance in list(_instances):
        instance._renew()


os.register_at_fork(after_in_child=_renew_in_child)


class LastKnownGood:
    """The last-known-good file of one namespace in a folder.

    Whatever happens to disk or process, `load` gives a complete snapshot that was once saved or None, and never
    raises; saving happens on a thread of its own and never makes the caller wait.

    `folder` is created (0700) by the first save; it is for one user: a copy is believed only if it belongs to this
    process's user or to root (who could change it anyway) and nobody else may write to it, as in a folder open to
    all anyone can plant one. `origin_url` is the authority's address: it is kept in the file without secrets, to
    say in the log when a copy came from another address. It is no part of the file's name, because an authority
    keeps its entries when a host is added or TLS turned on, and then the file is wanted most. So give different
    authorities with one namespace different folders.

    `min_interval_s` is the least time between two saves, by all processes of the host together: 5 s loses little
    of what matters after hours of being away, and bounds the fsyncs of a namespace that changes all the time.
    `clock` is monotonic, `wall_clock` Unix time, compared with the file's own age; both in seconds.

    Safe to use from several threads, and after a fork: the child starts a thread of its own at its first offer.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        namespace: str,
        origin_url: str,
        min_interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        name = blake2b(namespace.encode(), digest_size=16).hexdigest()
        self.path: Final = Path(os.path.abspath(folder)) / f"{name}.lkg"
        """Where the current copy lies: absolute, as servers change folders; a hash, as a namespace holds slashes."""
        self.error: str | None = None
        """Why the last load or save was not what it should be; None when it was. Holds no value."""
        self._name = name
        self._namespace = namespace
        self._origin = _without_secrets(origin_url)
        self._min_interval_s = min_interval_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._events = Events(__name__, part="last_known_good", namespace=namespace)
        self._logged: set[str] = set()
        # The copy that was last found whole, its version and position, so that it is not read again before each save.
        self._known: tuple[_Signature, int, Position] | None = None
        self._renew()
        _instances.add(self)

    def _renew(self) -> None:
        """Forget thread, lock and open files: they are the parent's. What was offered there is saved there."""
        # Closed, not unlocked: the parent may be in mid-save. Open, they would hold its lock after its death.
        for fd in getattr(self, "_held", ()):
            with suppress(OSError):
                os.close(fd)
        self._held: set[int] = set()
        self._changed = threading.Condition()  # protects all that follows; never held during I/O
        self._thread: threading.Thread | None = None
        self._make: Callable[[], Saved] | None = None  # the newest offer not yet saved
        self._offered = 0  # its number
        self._settled = 0  # the number of the newest offer that is on disk, or older than what is
        self._urgent = False  # somebody flushes
        self._due_s = -math.inf
        self._failures = 0

    # --- loading ------------------------------------------------------------------------------------------------

    def load(self) -> Saved | None:
        """The current copy, else the previous one, else None; blocks for the time it takes to read it.

        Never raises: why a copy was not used is in `error`, and logged once. None with no error means that
        nothing was saved yet.
        """
        found, missing, reasons = self._load_either()
        for _ in range(_LOOKS - 1):
            # A first save may come between the look at the current copy and that at the one before.
            if found is None or not missing or not os.path.lexists(self.path):
                break
            found, missing, reasons = self._load_either()
        if reasons:
            self._report("veltrix.last_known_good_unread", "; ".join(reasons))
        else:
            self.error = None
        return found

    def _load_either(self) -> tuple[Saved | None, bool, list[str]]:
        """The better of the two copies, whether the current one was missing, and what there is to say about it."""
        reasons: list[str] = []
        missing = False
        for path in (self.path, self.path.with_suffix(".prev")):
            try:
                found, origin = self._load(path.name)
            except FileNotFoundError:
                missing = missing or path is self.path
                continue
            except _Unusable as exc:
                reasons.append(f"{path} was not loaded: {exc}")
            except OSError as exc:
                reasons.append(f"{path} was not loaded: {exc.strerror or type(exc).__name__}")
            except Exception as exc:  # noqa: BLE001 - no content of a file may keep an application from starting
                # The type alone: a parser's message may hold a value.
                reasons.append(f"{path} was not loaded: it is damaged ({type(exc).__name__})")
            else:
                if path is not self.path:
                    reasons.append(f"{path}, the copy before, was loaded instead of {self.path.name}")
                if origin != self._origin:
                    reasons.append(
                        f"the copy loaded was saved from {origin}, not from {self._origin}; if these are two "
                        "authorities, give each a folder of its own"
                    )
                return found, missing, reasons
        return None, missing, reasons

    def _load(self, name: str) -> tuple[Saved, str]:
        with (
            self._opened(os.fspath(self.path.parent), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) as folder,
            self._copy(name, folder) as (file, found),
        ):
            head = _read_head(file, namespace=self._namespace)
            if head.version > _VERSION:
                raise _Unusable(f"its format version is {head.version}, and this release reads up to {_VERSION}")
            entries: list[Item] = []
            last = ""
            for count, payload in _payloads(file, head, size=found.st_size):
                part = _decoded(payload)
                keys = [last, *(item[0] for item in part)]
                # Chunk by chunk: over 10^6 keys this one call would hold the GIL for 30 ms.
                if len(part) != count or not all(map(lt, keys, keys[1:])):
                    raise _Unusable("a part of it is damaged")
                entries += part
                last = keys[-1]
        return Saved(head.position, head.digest, head.saved_at_s, entries), head.origin

    @contextmanager
    def _opened(self, name: str, flags: int, *, folder: int | None = None) -> Iterator[int]:
        fd = os.open(name, flags, 0o600, dir_fd=folder)
        self._held.add(fd)
        try:
            yield fd
        finally:
            self._held.discard(fd)
            os.close(fd)

    @contextmanager
    def _copy(self, name: str, folder: int) -> Iterator[tuple[BinaryIO, os.stat_result]]:
        """Open one copy for reading, if it may be believed."""
        self._check_kind(os.stat(name, dir_fd=folder, follow_symlinks=False))
        with ExitStack() as stack:
            try:
                fd = stack.enter_context(self._opened(name, os.O_RDONLY | _SAFE, folder=folder))
            except PermissionError as exc:
                raise _Unusable("this user may not read it; give each user a folder of its own") from exc
            # Again, and now for certain: it may have been replaced in between.
            found = os.fstat(fd)
            self._check_kind(found)
            if found.st_mode & 0o022:
                raise _Unusable("others may write to it; take that right away (chmod go-w)")
            if found.st_size > _MAX_FILE_BYTES:
                raise _Unusable(f"it has {found.st_size} bytes; at most {_MAX_FILE_BYTES} are read")
            yield stack.enter_context(open(fd, "rb", buffering=_CHUNK_BYTES, closefd=False)), found

    @staticmethod
    def _check_kind(found: os.stat_result) -> None:
        if stat.S_ISLNK(found.st_mode):
            raise _NotOurs("it is a symbolic link, which is not followed; remove it")
        if not stat.S_ISREG(found.st_mode):
            raise _NotOurs("it is not a regular file; remove it")
        if found.st_uid not in {os.geteuid(), 0}:
            raise _NotOurs(f"it belongs to another user (uid {found.st_uid}); give each user a folder of its own")

    # --- saving: the caller's side ------------------------------------------------------------------------------

    def offer(self, make: Callable[[], Saved]) -> None:
        """Have the snapshot that `make` returns saved, soon; replaces an offer that was not yet saved.

        Never blocks and does no I/O. `make` is called later, on another thread, and only if its snapshot is about
        to be written. Whatever goes wrong is in `error`, logged once for each distinct reason until something is saved,
        and tried again.
        """
        with told_after(), self._changed:
            self._make = make
            self._offered += 1
            self._ensure_thread()
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Save now what was offered; whether it is on disk (or something newer is) after at most `timeout_s`."""
        with told_after(), self._changed:
            wanted = self._offered
            if self._settled >= wanted:
                return True
            self._urgent, self._due_s = True, -math.inf
            self._ensure_thread()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._settled >= wanted or not self._urgent, timeout_s)
            self._urgent = False
            return self._settled >= wanted

    def close(self, timeout_s: float) -> None:
        """Save what was offered and end the thread, in at most `timeout_s`; what then hangs is left behind.

        Idempotent. A later offer starts anew.
        """
        deadline_s = time.monotonic() + timeout_s
        self.flush(timeout_s)
        with self._changed:
            thread, self._thread, self._make = self._thread, None, None
            self._settled = self._offered
            self._changed.notify_all()
        if thread is not None:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _ensure_thread(self) -> None:
        if self._make is None or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = BackgroundThread(target=self._run, name="veltrix-last-known-good")
        try:
            self._thread.start()
        except RuntimeError:  # no more threads, or the interpreter is ending
            self._thread = None
            self._urgent = False
            self._report("veltrix.last_known_good_unsaved", f"{self.path} was not saved: {NO_THREAD}")

    def _report(self, event: str, reason: str) -> None:
        self.error = reason
        if reason not in self._logged and len(self._logged) < _MAX_LOGGED:
            self._logged.add(reason)
            self._events.tell(event, logging.WARNING, once=True, reason=reason)

    def _saved_again(self) -> None:
        """A reason that comes back is told again."""
        self._logged.clear()
        self._events.tell_end("veltrix.last_known_good_saved", path=os.fspath(self.path))

    # --- saving: the thread's side ------------------------------------------------------------------------------

    def _run(self) -> None:
        me = threading.current_thread()
        while (taken := self._next(me)) is not None:
            make, number, urgent = taken
            wait_s, failed = self._attempt(make, urgent=urgent)
            with self._changed:
                if self._thread is not me:
                    return
                now_s = self._clock()
                if wait_s is None:
                    self._failures = 0
                    self._settled = number
                    if self._make is make:
                        self._make = None
                    # A flush may have come while an older offer was being saved: it is not to wait for its turn.
                    flushing = self._urgent and self._make is not None
                    self._due_s = -math.inf if flushing else now_s + self._min_interval_s
                elif failed:
                    self._failures += 1
                    self._urgent = False
                    self._due_s = now_s + wait_s
                elif self._urgent and not urgent:
                    self._due_s = -math.inf  # the flush came while this one was being put off
                else:
                    self._due_s = now_s + wait_s
                self._changed.notify_all()

    def _next(self, me: threading.Thread) -> tuple[Callable[[], Saved], int, bool] | None:
        """Wait for the next offer that is due; None when this thread is no longer wanted."""
        with self._changed:
            while self._thread is me:
                if self._make is None:
                    self._changed.wait()
                    continue
                wait_s = self._due_s - self._clock()
                if wait_s <= 0:
                    return self._make, self._offered, self._urgent
                self._changed.wait(min(wait_s, _MAX_BACKOFF_S))
        return None

    def _attempt(self, make: Callable[[], Saved], *, urgent: bool) -> tuple[float | None, bool]:
        """Try to save; (seconds to wait before the next try, or None when there is nothing more to do; failed)."""
        try:
            wait_s = self._save(make, urgent=urgent)
        except _Unusable as exc:
            reason = f"{self.path} was not saved: {exc}"
        except OSError as exc:
            advice = _ADVICE.get(exc.errno or 0, "see to that disk, or name another folder in last_known_good")
            reason = f"{self.path} was not saved: {exc.strerror or type(exc).__name__}; {advice}"
        except Exception as exc:  # noqa: BLE001 - the thread must outlive anything; no message, as it may hold a value
            reason = f"{self.path} was not saved: the snapshot could not be encoded ({type(exc).__name__}); report this"
        else:
            if wait_s is None:
                self.error = None
                self._saved_again()
            return wait_s, False
        self._report("veltrix.last_known_good_unsaved", reason)
        backoff_s = max(_MIN_BACKOFF_S, self._min_interval_s) * 2 ** min(self._failures, 10)
        return min(backoff_s, _MAX_BACKOFF_S), True

    def _save(self, make: Callable[[], Saved], *, urgent: bool) -> float | None:
        """Save if the lock is free, it is time, and nothing newer is there; returns as `_attempt` does."""
        os.makedirs(self.path.parent, mode=0o700, exist_ok=True)
        with (
            self._opened(os.fspath(self.path.parent), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) as folder,
            self._opened(f"{self._name}.lock", os.O_RDWR | os.O_CREAT | _SAFE, folder=folder) as lock,
        ):
            if not stat.S_ISREG(os.fstat(lock).st_mode):
                raise _NotOurs(f"{self._name}.lock is not a regular file; remove it")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return _LOCK_RETRY_S if urgent else max(_LOCK_RETRY_S, self._min_interval_s)
            try:
                if not urgent:
                    early_s = self._early_s(folder)
                    if early_s > 0:
                        return early_s
                self._replace(make(), folder)
            finally:
                # Not left to close: a child forked in the meantime may still have this file open.
                fcntl.flock(lock, fcntl.LOCK_UN)
        return None

    def _early_s(self, folder: int) -> float:
        """How long until the file is `min_interval_s` old, whoever wrote it; a time in the future says nothing."""
        try:
            written_s = os.stat(self.path.name, dir_fd=folder, follow_symlinks=False).st_mtime
        except FileNotFoundError:
            return 0.0
        age_s = self._wall_clock() - written_s
        return self._min_interval_s - age_s if age_s >= 0 else 0.0

    def _replace(self, saved: Saved, folder: int) -> None:
        """Put `saved` in place of the current copy, unless that is newer. The lock is held."""
        current = self._whole(self.path.name, folder)
        newest = current or self._whole(f"{self._name}.prev", folder)
        if newest is not None:
            version, position = newest
            if position.incarnation == saved.position.incarnation and (
                position.revision > saved.position.revision
                # What only a newer release can load, or a previous copy alone, is no reason to leave it at that.
                or (position.revision == saved.position.revision and newest is current and version <= _VERSION)
            ):
                return
        new, link = f"{self._name}.new", f"{self._name}.link"
        # Left over from a process that was killed: under the lock nobody else is writing them.
        for name in (new, link):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
        try:
            with self._opened(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE, folder=folder) as fd:
                os.fchmod(fd, 0o600)  # whatever the umask
                size = 0
                for part in _encoded(saved, namespace=self._namespace, origin=self._origin):
                    size += len(part)
                    if size > _MAX_FILE_BYTES:
                        raise _Unusable(f"it would have more than {_MAX_FILE_BYTES} bytes")
                    _write_all(fd, part)
                os.fsync(fd)
                written = os.fstat(fd)
            if current is not None:
                self._keep(folder)
            os.rename(new, self.path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            for name in (new, link):
                with suppress(OSError):
                    os.unlink(name, dir_fd=folder)
            raise
        self._known = _signature(written), _VERSION, saved.position
        os.fsync(folder)

    def _keep(self, folder: int) -> None:
        """Make the current copy the previous one too."""
        current, previous, link = self.path.name, f"{self._name}.prev", f"{self._name}.link"
        with suppress(FileNotFoundError):
            # Killed right after this step the last time: renaming a file onto itself would leave the link behind.
            if os.path.samestat(
                os.stat(current, dir_fd=folder, follow_symlinks=False),
                os.stat(previous, dir_fd=folder, follow_symlinks=False),
            ):
                return
        try:
            os.link(current, link, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except OSError:
            # A file system without hard links: for a moment there is only the previous copy.
            os.rename(current, previous, src_dir_fd=folder, dst_dir_fd=folder)
        else:
            os.rename(link, previous, src_dir_fd=folder, dst_dir_fd=folder)

    def _whole(self, name: str, folder: int) -> tuple[int, Position] | None:
        """Format version and position of a copy, None if it is not whole; raises `_NotOurs` if it must stay."""
        try:
            with self._copy(name, folder) as (file, found):
                if self._known is not None and self._known[0] == _signature(found):
                    return self._known[1:]
                head = _read_head(file, namespace=self._namespace)
                if head.version <= _VERSION:
                    for _ in _payloads(file, head, size=found.st_size):
                        pass
                self._known = _signature(found), head.version, head.position
                return self._known[1:]
        except _NotOurs:
            raise
        except (_Unusable, OSError, ValueError, KeyError, TypeError):
            return None
