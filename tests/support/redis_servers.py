"""Real Redis servers for tests, each on a free port of 127.0.0.1 with its data in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.ports import free_port
from tests.support.stopping import stop
from tests.support.waiting import wait_until
from veltrix_mw.stores.redis_routes import slot_of

__all__ = [
    "PRIMARY",
    "Certificates",
    "ClusterSet",
    "RedisServer",
    "RedisSet",
    "SentinelSet",
    "cluster_set",
    "cut_off",
    "redis_server",
    "sentinel_set",
    "wait_copied",
]

PRIMARY: Final = "mymaster"
"""What the sentinels call the primary."""

Tls = tuple[Path, Path, Path]  # CA, certificate, key

_START_S: Final = 30.0  # an end to waiting in vain; a server is up in a few milliseconds
_REPLACED_S: Final = 90.0  # sentinels that stood still for 2 s do nothing for 30 s, as on a machine that is overloaded
_ONCE: Final = Retry(NoBackoff(), 0)
_TRIES: Final = 5  # another process may take the port before the server does
_REPLICATING: Final = ("--repl-diskless-sync-delay", "0")  # by default 5 s, for further replicas to come
_AWAY_MS: Final = 1_000  # after this a primary that does not answer is replaced


class Certificates:
    """A CA of the test's own, and certificates that it signed, as files in `folder`."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.ca = folder / f"{name}.pem"
        self._ca_key = folder / f"{name}.key"
        self._openssl(
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", self._ca_key, "-out", self.ca, "-days", "2",
            "-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip

    def issue(
        self, name: str, *, days: int = 2, san: str = "IP:127.0.0.1,DNS:localhost", subject: str | None = None
    ) -> tuple[Path, Path]:
        """A certificate and its key; `days` below 0: one that has expired. Its common name is `name`, unless told."""
        cert, key, request = (self.folder / f"{name}.{end}" for end in ("pem", "key", "csr"))
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(
            f"subjectAltName={san}\nextendedKeyUsage=serverAuth,clientAuth\nkeyUsage=digitalSignature\n"
            "authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\nbasicConstraints=CA:FALSE\n"
        )
        self._openssl(
            "req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", subject or f"/CN={name}"
        )
        self._openssl(
            "x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._ca_key, "-CAcreateserial", "-out", cert,
            "-days", str(days), "-extfile", extensions,
        )  # fmt: skip
        return cert, key

    @staticmethod
    def _openssl(*arguments: str | Path) -> None:
        done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


class RedisServer:
    """One `redis-server`. It is up once constructed; `close` ends it and removes its folder."""

    def __init__(self, *options: str, tls: Tls | None = None) -> None:
        """`options` are the server's own; `tls` its CA, certificate and key: then it speaks TLS alone."""
        self._options = options
        self._tls = tls
        self.folder = Path(tempfile.mkdtemp(prefix="veltrix-redis-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._client: redis.Redis | None = None
        self.port = 0
        for attempt in range(_TRIES):
            self.port = free_port()
            with contextlib.suppress(AssertionError) if attempt < _TRIES - 1 else contextlib.nullcontext():
                self.start()
                return

    @property
    def url(self) -> str:
        return f"{'redis' if self._tls is None else 'rediss'}://127.0.0.1:{self.port}/0"

    def owner_of(self, key: str) -> RedisServer:  # sets have several
        """The server that has a key."""
        return self

    @property
    def dump(self) -> Path:
        """The file that `save` writes and a start reads."""
        return self.folder / "dump.rdb"

    @property
    def client(self) -> redis.Redis:
        """A plain client, as the default user."""
        if self._client is None:
            secure: dict[str, Any] = {}
            if self._tls is not None:
                _, cert, key = map(str, self._tls)
                # Not verified: what is wrong with a certificate is for the code under test to find.
                secure = {"ssl": True, "ssl_cert_reqs": "none"}
                if "--tls-auth-clients" in self._options:
                    secure |= {"ssl_certfile": cert, "ssl_keyfile": key}
            self._client = redis.Redis("127.0.0.1", self.port, socket_timeout=_START_S, retry=_ONCE, **secure)
        return self._client

    def run(self, *command: Any) -> Any:
        """The reply to one command."""
        return self.client.execute_command(*command)

    def raw(self, *command: Any) -> Any:
        """The reply to one command as it comes, which the client would make something of."""
        pool = self.client.connection_pool
        connection: Any = pool.get_connection()
        try:
            connection.send_command(*command)
            return connection.read_response()
        finally:
            pool.release(connection)

    def start(self, *, wait: bool = True) -> None:
        """Start it again after `kill`, on the same port and folder; `wait`: until it serves."""
        self._process = process = subprocess.Popen(
            self._command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

        def answers() -> bool:
            assert process.poll() is None, f"redis-server ended: {(self.folder / 'log').read_text()[-2000:]}"
            try:
                return bool(self.run("PING"))
            except (redis.AuthenticationError, redis.ResponseError):
                return True
            except redis.BusyLoadingError:
                return not wait
            except redis.ConnectionError:
                return False

        try:
            wait_until(answers, _START_S, reason="redis-server to answer")
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """kill -9, and wait."""
        self._forget_client()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGSTOP: it goes on listening, and answers nothing."""
        assert self._process is not None
        stop(self._process.pid)

    def cont(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def restart(self, *, dump: bytes | None = None, wait: bool = True) -> None:
        """Kill it and start it again: with that dump, or with nothing."""
        self.kill()
        if dump is None:
            self.dump.unlink(missing_ok=True)
        else:
            self.dump.write_bytes(dump)
        self.start(wait=wait)

    def save(self) -> bytes:
        """The dump of now."""
        self.run("SAVE")
        return self.dump.read_bytes()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)

    @property
    def is_up(self) -> bool:
        """Whether its process is there, stopped or not."""
        return self._process is not None

    def _command(self) -> list[str]:
        return [
            "redis-server", "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "", "--dbfilename", "dump.rdb",
            "--logfile", str(self.folder / "log"), "--enable-debug-command", "yes", *self._listening(), *self._options,
        ]  # fmt: skip

    def _listening(self) -> Sequence[str]:
        if self._tls is None:
            return ("--port", str(self.port))
        ca, cert, key = map(str, self._tls)
        return (
            "--port", "0", "--tls-port", str(self.port), "--tls-ca-cert-file", ca, "--tls-cert-file", cert,
            "--tls-key-file", key, "--tls-auth-clients", "optional",
        )  # fmt: skip

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def _forget_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()


@contextlib.contextmanager
def redis_server(*options: str, tls: Tls | None = None) -> Iterator[RedisServer]:
    """A server for the length of the block."""
    server = RedisServer(*options, tls=tls)
    try:
        yield server
    finally:
        server.close()


class Sentinel(RedisServer):
    """One sentinel, which keeps what it knows in its folder."""

    def __init__(self, primary: RedisServer, *lines: str, tls: Tls | None = None) -> None:
        """`lines` are of its configuration."""
        self._lines = (
            f"sentinel monitor {PRIMARY} 127.0.0.1 {primary.port} 2",
            f"sentinel down-after-milliseconds {PRIMARY} {_AWAY_MS}",
            f"sentinel failover-timeout {PRIMARY} 4000",
            *(["tls-replication yes"] if tls else []),
            *lines,
        )
        super().__init__(tls=tls)

    def _command(self) -> list[str]:
        config = self.folder / "sentinel.conf"
        if not config.exists() or f"port {self.port}\n" not in config.read_text():  # another port is tried
            listening = self._listening()
            pairs = [f"{name[2:]} {value}" for name, value in zip(listening[::2], listening[1::2], strict=True)]
            head = ["bind 127.0.0.1", f"dir {self.folder}", f"logfile {self.folder / 'log'}"]
            config.write_text("\n".join([*head, *pairs, *self._lines]) + "\n")
        return ["redis-server", str(config), "--sentinel"]


def _pairs(reply: Any) -> dict[bytes, bytes]:
    """Names and values, which come in turn."""
    return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))


def _has_replica(server: RedisServer) -> bool:
    role = server.raw("ROLE")
    return role[0] == b"master" and bool(role[2])


def wait_copied(primary: RedisServer, replica: RedisServer) -> None:
    """Wait until the replica has all that the primary was told."""
    wait_until(
        lambda: int(replica.raw("ROLE")[4]) >= int(primary.raw("ROLE")[1]),
        _START_S,
        reason="the replica has all that was written",
    )


def cut_off(primary: RedisServer, replica: RedisServer) -> None:
    """Stop the replica, and let nothing of what the primary is told from here on reach it when it goes on."""
    replica.stop()
    primary.run("CLIENT", "KILL", "TYPE", "REPLICA")


def _is_joined(server: RedisServer) -> bool:
    """Whether it is a replica that has its primary's data."""
    role = server.raw("ROLE")
    return role[0] == b"slave" and role[3] == b"connected"


class SentinelSet:
    """A primary, its replica, and three sentinels that watch them."""

    def __init__(self, *options: str, lines: Sequence[str] = (), tls: Tls | None = None) -> None:
        """`options` are the servers', `lines` the sentinels'."""
        self.servers: list[RedisServer] = []
        self.sentinels: list[Sentinel] = []
        self._tls = tls
        options += _REPLICATING
        if tls:
            options += ("--tls-replication", "yes")
        try:
            first = RedisServer(*options, tls=tls)
            self.servers.append(first)
            self.servers.append(RedisServer("--replicaof", "127.0.0.1", str(first.port), *options, tls=tls))
            for _ in range(3):
                self.sentinels.append(Sentinel(first, *lines, tls=tls))
            self.wait_whole()
        except BaseException:
            self.close()
            raise

    @property
    def hosts(self) -> tuple[tuple[str, int], ...]:
        """The sentinels'."""
        return tuple(("127.0.0.1", sentinel.port) for sentinel in self.sentinels)

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for _, port in self.hosts)
        return f"{'rediss' if self._tls else 'redis'}+sentinel://{hosts}/{PRIMARY}/0"

    def primary(self) -> RedisServer:
        """The server that the sentinels name."""
        return self._named(self.sentinels[0])

    def owner_of(self, key: str) -> RedisServer:  # it has all
        """The server that has a key."""
        return self.primary()

    def run(self, *command: Any) -> Any:
        """The primary's reply to one command."""
        return self.primary().run(*command)

    def replica_of(self, primary: RedisServer) -> RedisServer:
        return self.other(primary)

    def other(self, than: RedisServer) -> RedisServer:
        return next(server for server in self.servers if server is not than)

    def wait_replaced(self, old: RedisServer, key: str = "") -> RedisServer:  # it has all
        """Wait until all sentinels name another primary than `old`; that one."""
        wait_until(
            lambda: all(self._named(sentinel) is not old for sentinel in self.sentinels),
            _REPLACED_S,
            reason="the sentinels name another primary",
        )
        return self.primary()

    def wait_whole(self) -> None:
        """Wait until each sentinel knows the others and a replica, and that one has all."""
        wait_until(self._is_whole, _START_S, reason="sentinels and servers know each other")

    def heal(self) -> None:
        for server in self.servers:
            if server.is_up:
                server.cont()
            else:
                server.start()
        primary = self.primary()
        replica = self.other(primary)
        if replica.raw("ROLE")[0] == b"master":  # the sentinels see to that too, within some 10 s
            replica.run("REPLICAOF", "127.0.0.1", primary.port)
        for sentinel in self.sentinels:
            self._wake(sentinel)
        self.wait_whole()

    def close(self) -> None:
        for server in (*self.sentinels, *self.servers):
            server.close()

    @staticmethod
    def _wake(sentinel: Sentinel) -> None:
        """One that stood still for 2 s, stopped or for want of a processor, replaces nobody for the next 30 s."""
        if sentinel.run("INFO", "sentinel")["sentinel_tilt"]:
            sentinel.kill()
            sentinel.start()

    def _named(self, sentinel: Sentinel) -> RedisServer:
        _, port = sentinel.raw("SENTINEL", "GET-MASTER-ADDR-BY-NAME", PRIMARY)
        return next(server for server in self.servers if server.port == int(port))

    def _is_whole(self) -> bool:
        primary = self.primary()
        for sentinel in self.sentinels:
            said = _pairs(sentinel.raw("SENTINEL", "MASTER", PRIMARY))
            if (said[b"num-other-sentinels"], said[b"num-slaves"], said[b"flags"]) != (b"2", b"1", b"master"):
                return False
            (replica,) = map(_pairs, sentinel.raw("SENTINEL", "REPLICAS", PRIMARY))
            if replica[b"flags"] != b"slave":
                return False
        return _has_replica(primary) and _is_joined(self.other(primary))


class ClusterSet:
    """Three primaries of a Redis Cluster, each with a replica."""

    def __init__(self, *options: str, tls: Tls | None = None) -> None:
        self.servers: list[RedisServer] = []
        self._tls = tls
        options += _REPLICATING
        if tls:
            options += ("--tls-replication", "yes", "--tls-cluster", "yes")
        try:
            for _ in range(6):
                bus = str(free_port())  # by default 10,000 above the port, which may be more than there are
                timeout = ("--cluster-node-timeout", str(_AWAY_MS), "--cluster-replica-validity-factor", "0")
                node = ("--cluster-enabled", "yes", "--cluster-port", bus, *timeout)
                self.servers.append(RedisServer(*node, *options, tls=tls))
                if len(self.servers) > 1:
                    self.servers[0].run("CLUSTER", "MEET", "127.0.0.1", self.servers[-1].port, bus)
            self._ids = {server.raw("CLUSTER", "MYID").decode(): server for server in self.servers}
            primaries, ids = self.servers[:3], list(self._ids)
            for number, server in enumerate(primaries):
                first, last = number * 16_384 // 3, (number + 1) * 16_384 // 3 - 1
                server.run("CLUSTER", "ADDSLOTSRANGE", first, last)
            wait_until(
                lambda: all(len(self._nodes(each)) == 6 for each in self.servers), _START_S, reason="all nodes have met"
            )
            for number, server in enumerate(self.servers[3:]):
                server.run("CLUSTER", "REPLICATE", ids[number])
            self.wait_whole()
        except BaseException:
            self.close()
            raise

    @property
    def hosts(self) -> tuple[tuple[str, int], ...]:
        return tuple(("127.0.0.1", server.port) for server in self.servers)

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for _, port in self.hosts)
        return f"{'rediss' if self._tls else 'redis'}+cluster://{hosts}"

    def owner(self, slot: int, *, asked: RedisServer | None = None) -> RedisServer:
        """The primary that has a slot, as a node that runs says."""
        asked = next(server for server in self.servers if server.is_up) if asked is None else asked
        owner = self._find_owner(slot, asked)
        assert owner is not None, f"nobody has slot {slot}"
        return owner

    def _find_owner(self, slot: int, asked: RedisServer) -> RedisServer | None:
        """None where the node that is asked knows of nobody, as for a moment while another takes over."""
        for first, last, place, *_ in self._slots(asked):
            if first <= slot <= last:
                return self._at(place[1])
        return None

    def owner_of(self, key: str) -> RedisServer:
        """The server that has a key."""
        return self.owner(slot_of(key))

    def another(self, than: RedisServer) -> RedisServer:
        """Another primary."""
        return next(self._at(place[1]) for _, _, place, *_ in self._slots(than) if place[1] != than.port)

    def wait_replaced(self, old: RedisServer, key: str) -> RedisServer:
        """Wait until all other nodes say that a key has another owner than `old`; that one."""
        slot = slot_of(key)
        others = [server for server in self.servers if server is not old]

        def replaced() -> bool:
            return all(self._find_owner(slot, each) not in {None, old} for each in others)

        wait_until(replaced, _REPLACED_S, reason="the nodes name another owner")
        return self.owner(slot, asked=others[0])

    def begin_moving(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """From here on the slot's keys may be moved."""
        target.run("CLUSTER", "SETSLOT", slot, "IMPORTING", source.raw("CLUSTER", "MYID"))
        source.run("CLUSTER", "SETSLOT", slot, "MIGRATING", target.raw("CLUSTER", "MYID"))

    def move_keys(self, slot: int, source: RedisServer, target: RedisServer, *, most: int = 1_000) -> None:
        for key in source.raw("CLUSTER", "GETKEYSINSLOT", slot, most):
            source.run("MIGRATE", "127.0.0.1", target.port, key, 0, 10_000)

    def end_moving(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """The slot is the target's."""
        for server in (target, source, *(each for each in self.servers if each not in {source, target})):
            if server.raw("ROLE")[0] == b"master":
                server.run("CLUSTER", "SETSLOT", slot, "NODE", target.raw("CLUSTER", "MYID"))

    def move(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        self.begin_moving(slot, source, target)
        self.move_keys(slot, source, target)
        self.end_moving(slot, source, target)

    def run(self, *command: Any) -> None:
        """On each primary."""
        for server in self.servers:
            if server.raw("ROLE")[0] == b"master":
                server.run(*command)

    def replica_of(self, primary: RedisServer) -> RedisServer:
        return self._at(int(primary.raw("ROLE")[2][0][1]))

    def wait_whole(self) -> None:
        """Wait until each node says that all are well, and each primary has a replica that has all."""
        wait_until(self._is_whole, _START_S, reason="the cluster's nodes are well, and agree")

    def heal(self) -> None:
        for server in self.servers:
            if server.is_up:
                server.cont()
            else:
                server.start()
        self.wait_whole()

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def _at(self, port: int) -> RedisServer:
        return next(server for server in self.servers if server.port == port)

    @staticmethod
    def _slots(server: RedisServer) -> Any:
        return server.raw("CLUSTER", "SLOTS")

    @staticmethod
    def _nodes(server: RedisServer) -> list[list[bytes]]:
        return [line.split() for line in server.raw("CLUSTER", "NODES").splitlines()]

    def _is_whole(self) -> bool:
        for server in self.servers:
            if b"cluster_state:ok" not in server.raw("CLUSTER", "INFO"):
                return False
            flags = {flag for words in self._nodes(server) for flag in words[2].split(b",")}
            if flags & {b"fail", b"fail?", b"handshake", b"noaddr"}:
                return False
            if not (_has_replica(server) or _is_joined(server)):
                return False
        return all(len(self._slots(server)) >= 3 for server in self.servers)


RedisSet = RedisServer | SentinelSet | ClusterSet


@contextlib.contextmanager
def sentinel_set(*options: str, lines: Sequence[str] = (), tls: Tls | None = None) -> Iterator[SentinelSet]:
    """Sentinels and their servers for the length of the block."""
    made = SentinelSet(*options, lines=lines, tls=tls)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def cluster_set(*options: str, tls: Tls | None = None) -> Iterator[ClusterSet]:
    """A cluster for the length of the block."""
    made = ClusterSet(*options, tls=tls)
    try:
        yield made
    finally:
        made.close()
