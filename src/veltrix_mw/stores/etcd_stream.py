"""Bytes from etcd's JSON gateway: an HTTP/1.1 response taken apart as it comes, and the connection around it.

Owns the response's framing, the lines of JSON in it, and every open connection across a fork. Knows neither etcd's
messages nor its addresses. The parsers are pure: bytes in, bytes out.

Not the standard library's client: its buffered reader is of no more use once a read has timed out, which is what a
watch does all day, and it bounds single reads, never a whole call.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from enum import Enum, auto
from typing import Final

from veltrix_mw.errors import StoreUnavailable
from veltrix_mw.forking import STORES, around_forks
from veltrix_mw.stores.tls import send_all

__all__ = ["Connection", "Lines", "LineStream", "NotHttp", "Response", "outside_forks"]

_MAX_HEAD_BYTES: Final = 64 * 1024  # far above any gateway's or proxy's; what has no end is no head
_RECEIVE_BYTES: Final = 256 * 1024
_PIECES_S: Final = 1.0  # between two pieces of a line, before it counts as broken off


class NotHttp(Exception):
    """What came is no HTTP/1.1 response; `begin` is how it began."""

    def __init__(self, message: str, begin: bytes = b"") -> None:
        super().__init__(message)
        self.begin = begin


class _At(Enum):
    HEAD = auto()
    BODY = auto()  # of a known length
    REST = auto()  # until the connection ends
    CHUNK_SIZE = auto()
    CHUNK = auto()
    CHUNK_END = auto()
    TRAILER = auto()
    DONE = auto()


class Response:
    """One HTTP/1.1 response, fed in pieces of any size.

    However the bytes are split, the same body comes out. Each byte is looked at a bounded number of times.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._at = _At.HEAD
        self._held = bytearray()
        self._left = 0  # bytes of the body, or of the chunk, still to come
        self._is_last = False

    @property
    def begun(self) -> bool:
        """Whether the head is complete."""
        return self._at is not _At.HEAD

    @property
    def done(self) -> bool:
        return self._at is _At.DONE

    @property
    def reusable(self) -> bool:
        """Whether another request may follow on the connection."""
        return self.done and not self._is_last and not self._held

    def feed(self, data: bytes) -> bytes:
        """Take what came; returns the bytes of the body that were in it. Raises `NotHttp`."""
        self._held += data
        body: list[bytes] = []
        while self._step(body):
            pass
        return b"".join(body)

    def end(self) -> None:
        """Take the connection's end. Raises `NotHttp` where the response is not complete."""
        if self._at is _At.REST:
            self._at = _At.DONE
        if not self.done:
            raise NotHttp("the connection ended within the response", bytes(self._held[:200]))

    def _step(self, body: list[bytes]) -> bool:
        """Take one piece off what is held; whether there may be another."""
        match self._at:
            case _At.HEAD:
                return self._take_head()
            case _At.BODY | _At.CHUNK:
                taken = bytes(self._held[: self._left])
                del self._held[: len(taken)]
                body.append(taken)
                self._left -= len(taken)
                if self._left:
                    return False
                self._at = _At.DONE if self._at is _At.BODY else _At.CHUNK_END
                return True
            case _At.REST:
                body.append(bytes(self._held))
                self._held.clear()
                return False
            case _At.CHUNK_SIZE | _At.CHUNK_END | _At.TRAILER:
                return self._take_line()
            case _At.DONE:
                return False

    def _take_head(self) -> bool:
        end = self._held.find(b"\r\n\r\n")
        if end < 0:
            if not b"HTTP/1.".startswith(bytes(self._held[:7])) or len(self._held) > _MAX_HEAD_BYTES:
                raise NotHttp("what came is no HTTP/1.1 response", bytes(self._held[:200]))
            return False
        lines = bytes(self._held[:end]).decode("latin-1").split("\r\n")
        begin = bytes(self._held[:200])
        del self._held[: end + 4]
        version, _, rest = lines[0].partition(" ")
        code = rest[:3]
        if not version.startswith("HTTP/1.") or not (code.isascii() and code.isdigit() and len(code) == 3):
            raise NotHttp("what came is no HTTP/1.1 response", begin)
        if code.startswith("1"):
            return True  # "100 Continue": the response itself follows
        self.status = int(code)
        self.headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        self._is_last = version == "HTTP/1.0" or "close" in self.headers.get("connection", "").lower()
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._at = _At.CHUNK_SIZE
        elif "content-length" in self.headers or code in {"204", "304"}:
            self._left = _number(self.headers.get("content-length", "0"), 10)
            self._at = _At.BODY
        else:
            self._at, self._is_last = _At.REST, True
        return True

    def _take_line(self) -> bool:
        end = self._held.find(b"\r\n")
        if end < 0:
            if len(self._held) > _MAX_HEAD_BYTES:
                raise NotHttp("a chunk's size has no end", bytes(self._held[:200]))
            return False
        line = bytes(self._held[:end])
        del self._held[: end + 2]
        match self._at:
            case _At.CHUNK_SIZE:
                self._left = _number(line.partition(b";")[0].decode("latin-1"), 16)
                self._at = _At.CHUNK if self._left else _At.TRAILER
            case _At.CHUNK_END:
                if line:
                    raise NotHttp("a chunk is longer than it says", line[:200])
                self._at = _At.CHUNK_SIZE
            case _:
                if not line:
                    self._at = _At.DONE
        return True


def _number(text: str, base: int) -> int:
    text = text.strip()
    # int() takes signs, underscores and other alphabets' digits.
    if not text or len(text) > 16 or not all(digit in "0123456789abcdefABCDEF" for digit in text):
        raise NotHttp("a length is no number", text[:40].encode("latin-1", "replace"))
    try:
        return int(text, base)
    except ValueError as exc:
        raise NotHttp("a length is no number", text.encode("latin-1", "replace")) from exc


class Lines:
    """Lines of a body that comes in pieces of any size. Empty lines are left out."""

    def __init__(self) -> None:
        self._begun: list[bytes] = []

    @property
    def begun(self) -> bool:
        """Whether a line has begun that has no end yet."""
        return any(self._begun)

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are complete now."""
        first, *others = data.split(b"\n")
        self._begun.append(first)
        if not others:
            return []
        # Joined once a line is whole: one of many megabytes is not copied anew with each piece.
        lines = [b"".join(self._begun), *others[:-1]]
        self._begun = [others[-1]]
        return [line for line in lines if line.strip()]


class Connection:
    """One TCP or TLS connection.

    Used by one thread at a time, but for `interrupt`. What a fork left in a child is closed there unused: nothing is
    ever said on it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.pid = os.getpid()
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _open.add(self)

    @property
    def address(self) -> tuple[str, int]:
        """Where it goes to, as numbers."""
        host, port = socket.getnameinfo(self._sock.getpeername(), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
        return host, int(port)

    def send(self, data: bytes, by_s: float) -> None:
        """Send all of it. Raises `OSError`, and then not all of it was sent."""
        self._sock.settimeout(max(0.001, by_s - time.monotonic()))
        send_all(self._sock, data)

    def receive(self, by_s: float) -> bytes:
        """What comes next, empty at the end. Raises `TimeoutError` where nothing came by then; looks at least once."""
        self._sock.settimeout(max(0.0, by_s - time.monotonic()))
        try:
            return self._sock.recv(_RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError) as exc:
            raise TimeoutError("nothing came yet") from exc
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return b""

    def is_at_rest(self) -> bool:
        """Whether nothing has come, no end either: another request may be sent."""
        try:
            # poll, not select: that one takes no descriptor above 1023.
            looking = select.poll()
            looking.register(self._sock, select.POLLIN)
            return not looking.poll(0)
        except (OSError, ValueError):
            return False

    def exchange(self, request: bytes, *, begun_by_s: float, by_s: float) -> tuple[Response, bytes]:
        """Send a request and read its response, whose head comes by `begun_by_s` and the rest by `by_s`."""
        response, body = Response(), list[bytes]()
        self.send(request, begun_by_s)
        try:
            while not response.done:
                piece = self.receive(by_s if response.begun else begun_by_s)
                if piece:
                    body.append(response.feed(piece))
                else:
                    response.end()
        except (OSError, NotHttp) as exc:
            raise Unanswered(exc) from exc
        return response, b"".join(body)

    def interrupt(self) -> None:
        """End a `receive` in another thread, which sees the connection's end."""
        with contextlib.suppress(OSError):
            # The plain socket's: that of TLS would take the state away from under the one who reads.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Idempotent."""
        _open.discard(self)
        with contextlib.suppress(OSError):
            # By its descriptor: no farewell, which in a child would be the parent's.
            descriptor = self._sock.detach()
            if descriptor >= 0:
                os.close(descriptor)


class Unanswered(Exception):
    """The request was sent, and no whole response came; `reason` is what came instead."""

    def __init__(self, reason: OSError | NotHttp) -> None:
        super().__init__(str(reason))
        self.reason = reason


class LineStream:
    """A response without end, line by line. Used by one thread, but for `interrupt`."""

    def __init__(self, connection: Connection, response: Response, begun: bytes) -> None:
        self._connection = connection
        self._response = response
        self._lines = Lines()
        self._waiting = self._lines.feed(begun)
        self._came_at_s = 0.0

    def is_amid(self, now_s: float) -> bool:
        """Whether a line has begun, and went on within the last moment."""
        return self._lines.begun and now_s - self._came_at_s < _PIECES_S

    def receive(self, by_s: float) -> list[bytes]:
        """The next lines, none where none came by then; looks at least once. Raises `EOFError` at the end."""
        while not self._waiting:
            # The response may end and its connection live on: nothing more would ever come.
            if self._response.done:
                raise EOFError("the stream has ended")
            try:
                piece = self._connection.receive(by_s)
            except TimeoutError:
                return []
            if not piece:
                raise EOFError("the connection has ended")
            self._came_at_s = time.monotonic()
            self._waiting = self._lines.feed(self._response.feed(piece))
        waiting, self._waiting = self._waiting, []
        return waiting

    def interrupt(self) -> None:
        self._connection.interrupt()

    def close(self) -> None:
        self._connection.close()


# Forks

_FORK_WAIT_S: Final = 5.0  # every call ends by its own deadline, 2 s by default; only a slow list takes longer

# Every connection that is open in this process. Single additions and removals, which the interpreter makes whole.
_open: set[Connection] = set()


class _Gate:
    """Lets a fork wait for the calls that run: within one, a lock of a resolver or of TLS may be held."""

    def __init__(self) -> None:
        # Protects the two below; notified when a call ends and when a fork is over.
        self.changed = threading.Condition()
        self.calls = 0
        self.is_forking = False


_gate = _Gate()


@contextlib.contextmanager
def outside_forks(by_s: float) -> Iterator[None]:
    """Hold off forks while the block runs; wait for one that is under way."""
    gate = _gate
    with gate.changed:
        while gate.is_forking:
            if not gate.changed.wait(max(0.0, by_s - time.monotonic())):
                raise StoreUnavailable("the process was forking until the deadline; try again")
        gate.calls += 1
    try:
        yield
    finally:
        with gate.changed:
            gate.calls -= 1
            gate.changed.notify_all()


def _before_fork() -> None:
    deadline_s = time.monotonic() + _FORK_WAIT_S
    with _gate.changed:
        _gate.is_forking = True
        while _gate.calls and _gate.changed.wait(max(0.0, deadline_s - time.monotonic())):
            pass


def _after_fork_in_parent() -> None:
    with _gate.changed:
        _gate.is_forking = False
        _gate.changed.notify_all()


def _after_fork_in_child() -> None:
    global _gate
    _gate = _Gate()
    for connection in tuple(_open):
        connection.close()


around_forks(STORES, before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
