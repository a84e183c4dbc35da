"""A TCP proxy for tests, which delays, blackholes, resets, refuses and throttles what passes; needs no root.

A thread a direction of each connection: for the handful of connections that a test has.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Proxy"]

_CHUNK: Final = 64 * 1024
_HEAD: Final = 4096  # of a connection: its greetings and its first request
_NEVER: Final = struct.pack("ii", 1, 0)  # SO_LINGER: a close sends RST


@dataclass(eq=False)
class _Passage:
    """One connection: `front` to the client, `back` to the server.

    `first` is what the client began with, `last` its newest piece, some bytes of each.
    """

    front: socket.socket
    back: socket.socket
    first: bytes = b""
    last: bytes = b""
    closed: threading.Event = field(default_factory=threading.Event)

    def close(self, *, reset: bool = False) -> None:
        self.closed.set()
        for each in (self.front, self.back):
            with contextlib.suppress(OSError):
                if reset:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NEVER)
                # A thread that reads from it holds it open, so is to leave; nothing but RST is to be sent.
                each.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                each.close()


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes everything to `port`, until it is told otherwise.

    `delay_s` holds each piece back; `bytes_per_s` throttles each direction of a connection; `blackhole` swallows
    nothing and passes nothing, as if the packets were dropped: what was sent meanwhile arrives after `heal`, as with
    retransmission.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.delay_s = 0.0
        self.bytes_per_s = float("inf")
        self._open = {"up": threading.Event(), "down": threading.Event()}
        self._refusing = False
        self._lock = threading.Lock()  # protects the set of passages
        self._passages: set[_Passage] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._closed = False
        self.heal()
        threading.Thread(target=self._accept, name=f"proxy-{self.port}", daemon=True).start()

    # Faults

    def blackhole(self, *, up: bool = True, down: bool = True) -> None:
        """Drop what goes to the server (`up`), what comes from it (`down`), or both."""
        for name, wanted in (("up", up), ("down", down)):
            if wanted:
                self._open[name].clear()

    def heal(self) -> None:
        """Pass everything, at full speed."""
        self._refusing = False
        self.delay_s, self.bytes_per_s = 0.0, float("inf")
        for each in self._open.values():
            each.set()

    def reset(self) -> None:
        """End every connection with RST; new ones are let in."""
        with self._lock:
            passages, self._passages = self._passages, set()
        for each in passages:
            each.close(reset=True)

    def refuse(self) -> None:
        """End every connection, and each new one at once."""
        self._refusing = True
        self.reset()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.heal()
        self.reset()

    # What is seen

    def carries(self, marker: bytes) -> bool:
        """Whether the newest request of some open connection begins with `marker`."""
        with self._lock:
            return any(each.last.startswith(marker) for each in self._passages)

    def carried(self, marker: bytes) -> bool:
        """Whether some open connection began with a request that holds `marker`."""
        with self._lock:
            return any(marker in each.first for each in self._passages)

    # Passing

    def _accept(self) -> None:
        while not self._closed:
            try:
                front, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._refusing:
                    raise ConnectionRefusedError
                back = socket.create_connection(("127.0.0.1", self._target), timeout=10)
                back.settimeout(None)
            except OSError:
                with contextlib.suppress(OSError):
                    front.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NEVER)
                front.close()
                continue
            for each in (front, back):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            passage = _Passage(front, back)
            with self._lock:
                self._passages.add(passage)
            for source, sink, name in ((front, back, "up"), (back, front, "down")):
                threading.Thread(target=self._pump, args=(passage, source, sink, name), daemon=True).start()

    def _pump(self, passage: _Passage, source: socket.socket, sink: socket.socket, name: str) -> None:
        try:
            while data := source.recv(_CHUNK):
                if name == "up":
                    passage.last = data[:64]
                    passage.first += data[: _HEAD - len(passage.first)]
                held_s = self.delay_s + len(data) / self.bytes_per_s
                if held_s > 0:
                    passage.closed.wait(held_s)
                while not self._open[name].wait(0.5):
                    if passage.closed.is_set():
                        return
                sink.sendall(data)
        except OSError:
            pass
        finally:
            # A dropped FIN is dropped too.
            deadline_s = time.monotonic() + 120
            while not self._open[name].wait(0.5) and not passage.closed.is_set() and time.monotonic() < deadline_s:
                pass
            passage.close()
            with self._lock:
                self._passages.discard(passage)
