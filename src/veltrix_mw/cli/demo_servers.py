"""The demo's servers: a cluster of three etcd and one Redis, to be killed and started again.

Owns every process and file of theirs; all are gone when `serving` ends, and nothing else is touched. Knows neither the
play nor the app, and speaks to the servers without their drivers: only whether they answer, and who leads.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final

from veltrix_mw.cli.demo_stage import DemoFailed, expect, uninterrupted

__all__ = ["Server", "Servers", "check_installed", "serving"]

MEMBERS: Final = 3  # the fewest of which one may die
NAMESPACE: Final = "shop"

_HOST: Final = "127.0.0.1"
_START_S: Final = 40.0  # a cluster needs two seconds; on a machine that is busy, many
_TRIES: Final = 3  # another process may take a port before the server does
_CALL_S: Final = 2.0
_LOOK_S: Final = 0.02
# Below the ports that Linux gives to outgoing connections: a worker that calls a dead server over and over could
# otherwise be given the server's own port, and the server could not start again.
_PORTS: Final = range(15_000, 32_000)


@dataclass(eq=False)
class Server:
    """One server's process, running or not."""

    name: str
    port: int
    command: Sequence[str]
    log_path: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def runs(self) -> bool:
        return self.process is not None

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603  # what PATH has by the names that `check_installed` saw
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends the servers
            )

    def kill(self) -> None:
        """kill -9, and wait. Idempotent."""
        process = self.process
        if process is not None:
            process.kill()
            process.wait()
            self.process = None

    def check_alive(self) -> None:
        """Raise `DemoFailed` with the end of its log if it ended by itself."""
        if self.process is not None and self.process.poll() is not None:
            lines = self.log_path.read_text(errors="replace").splitlines()[-5:]
            raise DemoFailed("".join(f"\n  {line}" for line in (f"{self.name} ended by itself; it logged:", *lines)))


class Servers:
    """The cluster and its Redis. Made by `serving`, which also takes them away."""

    def __init__(self, folder: Path) -> None:
        ports = _free_ports(2 * MEMBERS + 1)
        peers = ports[:MEMBERS]
        cluster = ",".join(f"etcd{number}=http://{_HOST}:{port}" for number, port in enumerate(peers, 1))
        self.etcd = [
            _etcd(folder, f"etcd{number}", port, peer, cluster)
            for number, (port, peer) in enumerate(zip(ports[MEMBERS:-1], peers, strict=True), 1)
        ]
        self.redis = _redis(folder, ports[-1])

    @property
    def url(self) -> str:
        hosts = ",".join(f"{_HOST}:{server.port}" for server in self.etcd)
        return f"etcd://{hosts}/{NAMESPACE}"

    @property
    def mirror_url(self) -> str:
        return f"redis://{_HOST}:{self.redis.port}/0"

    @property
    def all(self) -> list[Server]:
        return [*self.etcd, self.redis]

    def start(self) -> float:
        """Start each server that does not run; the seconds until all of them answered."""
        begun_s = time.monotonic()
        for server in self.all:
            if not server.runs:
                server.start()
        for member in self.etcd:
            self._until(member, _is_healthy, begun_s)
        self._until(self.redis, _answers_ping, begun_s)
        return time.monotonic() - begun_s

    def leader(self) -> Server:
        """The etcd that leads now."""
        end_s = time.monotonic() + _START_S
        while True:
            for member in self.etcd:
                if member.runs and _leads(member):
                    return member
            expect(time.monotonic() < end_s, "no etcd leads the cluster")
            threading.Event().wait(_LOOK_S)

    def kill_all(self) -> None:
        for server in self.all:
            server.kill()

    def _until(self, server: Server, answers: Callable[[Server], bool], begun_s: float) -> None:
        while not answers(server):
            server.check_alive()
            late = time.monotonic() - begun_s > _START_S
            expect(not late, f"{server.name} did not answer within {_START_S:g} s")
            threading.Event().wait(_LOOK_S)


def check_installed() -> None:
    """Raise `DemoFailed` that says how to install what lacks."""
    packages = {"etcd": "etcd-server", "redis-server": "redis-server"}
    missing = {name: package for name, package in packages.items() if shutil.which(name) is None}
    if missing:
        raise DemoFailed(
            f"it starts {' and '.join(missing)}, which PATH does not have; on Debian and Ubuntu: "
            f"apt-get install {' '.join(missing.values())}"
        )


@contextmanager
def serving() -> Iterator[Servers]:
    """The servers, up, in a temporary folder. Raises `DemoFailed` if they are not installed or do not start."""
    check_installed()
    with tempfile.TemporaryDirectory(prefix="veltrix-demo-") as folder, contextlib.ExitStack() as stack:
        yield _started(Path(folder), stack)


def _started(folder: Path, stack: contextlib.ExitStack) -> Servers:
    for attempt in range(1, _TRIES + 1):
        place = folder / f"try-{attempt}"
        place.mkdir()
        servers = Servers(place)
        stack.callback(_end, servers)
        try:
            servers.start()
        except DemoFailed:
            if attempt == _TRIES:
                raise
            servers.kill_all()  # and once more, on other ports
        else:
            return servers
    raise AssertionError("the last try returns or raises")


def _end(servers: Servers) -> None:
    with uninterrupted():
        servers.kill_all()


def _etcd(folder: Path, name: str, port: int, peer_port: int, cluster: str) -> Server:
    here, peer = f"http://{_HOST}:{port}", f"http://{_HOST}:{peer_port}"
    command = [
        *("etcd", "--name", name, "--data-dir", str(folder / name)),
        *("--listen-client-urls", here, "--advertise-client-urls", here),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", cluster, "--initial-cluster-token", folder.parent.name),
        *("--logger", "zap", "--log-level", "error"),
    ]
    return Server(name, port, command, folder / f"{name}.log")


def _redis(folder: Path, port: int) -> Server:
    data = folder / "redis"
    data.mkdir()
    # Without a dump: it comes back empty, as a cache does that was lost.
    command = ["redis-server", "--bind", _HOST, "--port", str(port), "--dir", str(data), "--save", ""]
    return Server("redis", port, command, folder / "redis.log")


def _is_healthy(member: Server) -> bool:
    """Whether a linearizable read through it is answered: it is up, and the cluster has a leader."""
    answer = _asked(member, "/v3/kv/range", {"key": "AA=="})
    return "header" in answer


def _leads(member: Server) -> bool:
    answer = _asked(member, "/v3/maintenance/status", {})
    leader = answer.get("leader", "0")  # "0" while there is none
    return bool(leader != "0" and leader == answer.get("header", {}).get("member_id"))


def _asked(member: Server, path: str, question: dict[str, str]) -> dict[str, Any]:
    """What it answers; empty if it does not."""
    with contextlib.closing(HTTPConnection(_HOST, member.port, timeout=_CALL_S)) as connection:
        try:
            connection.request("POST", path, json.dumps(question))
            response = connection.getresponse()
            answer = json.loads(response.read()) if response.status == 200 else {}
        except (OSError, HTTPException, ValueError):
            return {}
    return answer if isinstance(answer, dict) else {}


def _answers_ping(server: Server) -> bool:
    try:
        with socket.create_connection((_HOST, server.port), timeout=_CALL_S) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    ports: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as bound:
            try:
                bound.bind((_HOST, port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise DemoFailed(f"no {count} ports of {_HOST} are free")
