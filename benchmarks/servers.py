"""The servers that measurements use: one etcd, one Redis, on free ports of this machine, gone when the block ends.

Owns also what holds back what passes to them, as if they were far away.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import redis
import urllib3

__all__ = ["Delayed", "Servers", "delayed", "forked", "servers"]


@dataclass(frozen=True, slots=True)
class Servers:
    """Where they listen."""

    etcd: int
    redis: int

    @property
    def url(self) -> str:
        return f"etcd://127.0.0.1:{self.etcd}/shop"

    @property
    def mirror(self) -> str:
        return f"redis://127.0.0.1:{self.redis}/0"

    def metrics(self) -> dict[str, float]:
        """etcd's own counters, each with its labels in its name."""
        text = urllib3.request("GET", f"http://127.0.0.1:{self.etcd}/metrics").data.decode()
        lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}


@contextlib.contextmanager
def servers() -> Iterator[Servers]:
    etcd, peers, mirror = _free_ports(3)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        client, peer = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peers}"
        etcd_command = f"etcd --name n --data-dir {folder}/etcd --listen-client-urls {client}"
        etcd_command += f" --advertise-client-urls {client} --listen-peer-urls {peer}"
        etcd_command += f" --initial-advertise-peer-urls {peer} --initial-cluster n={peer}"
        etcd_command += " --unsafe-no-fsync --logger zap --log-level error"
        redis_command = f"redis-server --port {mirror} --bind 127.0.0.1 --maxclients 10000 --dir {folder} --save"
        for command in (etcd_command.split(), [*redis_command.split(), ""]):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            running.callback(process.wait)
            running.callback(process.kill)
        found = Servers(etcd, mirror)
        _until(lambda: redis.Redis(port=mirror, socket_timeout=1).ping())
        _until(lambda: found.metrics()["etcd_server_has_leader"] == 1)
        yield found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def _until(ready: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with contextlib.suppress(Exception):
            if ready():
                return
        time.sleep(0.05)
    raise RuntimeError("a server did not start")


@contextlib.contextmanager
def forked(count: int, body: Callable[[int], None]) -> Iterator[int]:
    """`count` children that run `body` with the writing end of one pipe; yields its reading end, and kills them."""
    reading, writing = os.pipe()
    children = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reading)
                body(writing)
            finally:
                os._exit(0)
        children.append(pid)
    os.close(writing)
    try:
        yield reading
    finally:
        for pid in children:
            os.kill(pid, 9)
        for pid in children:
            os.waitpid(pid, 0)
        os.close(reading)


@dataclass(frozen=True, slots=True)
class Delayed:
    """Where something listens that passes all to a server, and back, each later than it came."""

    port: int
    _counted: mmap.mmap

    @property
    def marked(self) -> int:
        """The requests with the marker that have passed."""
        count: int = struct.unpack_from("=q", self._counted)[0]
        return count


@contextlib.contextmanager
def delayed(port: int, delay_s: float, *, marker: bytes = b"") -> Iterator[Delayed]:
    """A server as it is seen from `delay_s` away. In a process of its own: it must not wait for who measures."""
    counted = mmap.mmap(-1, 8)
    with (
        socket.create_server(("127.0.0.1", 0), backlog=4096) as listening,
        forked(1, lambda _pipe: asyncio.run(_pass(listening, port, delay_s, marker, counted))),
    ):
        yield Delayed(listening.getsockname()[1], counted)


async def _pass(listening: socket.socket, port: int, delay_s: float, marker: bytes, counted: mmap.mmap) -> None:
    loop = asyncio.get_running_loop()

    class End(asyncio.Protocol):
        """One end of a passage. What comes before the other end is there comes at once when it is."""

        def __init__(self, other: End | None = None) -> None:
            self.other = other
            self.is_front = other is None
            self.transport: asyncio.Transport | None = None
            self.early: list[bytes] = []

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport
            if self.other is None:
                self.other = End(self)
                opening = loop.create_connection(lambda: self.other, "127.0.0.1", port)
                self.opening = loop.create_task(opening)
            for data in self.early:
                transport.write(data)

        def data_received(self, data: bytes) -> None:
            if self.is_front and marker and marker in data:
                struct.pack_into("=q", counted, 0, struct.unpack_from("=q", counted)[0] + 1)
            assert self.other is not None
            loop.call_later(delay_s, self.other.write, data)

        def connection_lost(self, _exc: Exception | None) -> None:
            assert self.other is not None
            loop.call_later(delay_s, self.other.close)

        def write(self, data: bytes) -> None:
            if self.transport is None:
                self.early.append(data)
            else:
                self.transport.write(data)

        def close(self) -> None:
            if self.transport is not None:
                self.transport.close()

    async with await loop.create_server(End, sock=listening):
        await asyncio.Event().wait()
