"""Real etcd servers on free ports, for tests: one node or a cluster, with users, TLS, faults and backups.

Data lies in a temporary folder; every process is gone when the block ends. A server that is missing is a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.ports import free_port
from tests.support.stopping import stop
from tests.support.waiting import wait_until

__all__ = ["Certificates", "EtcdCluster", "Member", "etcd", "make_certificates"]

START_S = 30.0


@dataclass(frozen=True)
class Certificates:
    """Files in PEM: a CA, a server's certificate for 127.0.0.1, and a client's, by default without a common name."""

    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path


@dataclass
class Member:
    """One member of a cluster, running or not."""

    name: str
    folder: Path
    port: int
    peer_port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @property
    def log(self) -> str:
        path = self.folder / f"{self.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""


@dataclass
class EtcdCluster:
    """Members that know each other. `options` go to each of them."""

    folder: Path
    members: list[Member]
    options: Sequence[str] = ()
    tls: Certificates | None = None
    user: str | None = None
    password: str | None = None
    token: str = "test"
    _stopped: set[str] = field(default_factory=set)

    @property
    def hosts(self) -> list[tuple[str, int]]:
        return [member.host for member in self.members]

    @property
    def scheme(self) -> str:
        return "https" if self.tls else "http"

    def start(self, *members: Member) -> None:
        """Start these members, or all, and wait until each of them answers."""
        self.spawn(*members)
        for member in members or self.members:
            self.wait_healthy(member)

    def spawn(self, *members: Member) -> None:
        """Start these members, or all; they may not answer yet."""
        for member in members or self.members:
            self._spawn(member)

    def _spawn(self, member: Member) -> None:
        here, peer = f"{self.scheme}://127.0.0.1:{member.port}", f"http://127.0.0.1:{member.peer_port}"
        command = ["etcd", "--name", member.name, "--data-dir", str(member.folder / member.name)]
        command += ["--listen-client-urls", here, "--advertise-client-urls", here]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        command += ["--initial-cluster", self._initial_cluster(), "--initial-cluster-token", self.token]
        command += ["--unsafe-no-fsync", "--logger", "zap", "--log-level", "error"]
        if len(self.members) == 1:
            # Alone it is elected by itself, after this time: a second, if it is left to itself.
            command += ["--heartbeat-interval", "10", "--election-timeout", "100"]
        if self.tls:
            command += ["--cert-file", str(self.tls.cert), "--key-file", str(self.tls.key)]
        with (member.folder / f"{member.name}.log").open("ab") as log:
            member.process = subprocess.Popen([*command, *self.options], stdout=log, stderr=log)

    def _initial_cluster(self) -> str:
        return ",".join(f"{each.name}=http://127.0.0.1:{each.peer_port}" for each in self.members)

    def wait_healthy(self, member: Member) -> None:
        """Wait until a linearizable read through this member is answered."""

        def healthy() -> bool:
            process = member.process
            assert process is not None
            assert process.poll() is None, f"{member.name} ended at once\n{member.log}"
            done = self._run("endpoint", "health", "--command-timeout=2s", members=[member])
            return done.returncode == 0

        wait_until(healthy, START_S, reason=f"{member.name} answers", interval_s=0.05)

    def kill(self, member: Member) -> None:
        """kill -9."""
        process = member.process
        assert process is not None
        process.kill()
        process.wait()
        member.process = None
        self._stopped.discard(member.name)

    def pause(self, member: Member) -> None:
        """SIGSTOP: it keeps its connections, and answers nothing."""
        assert member.process is not None
        stop(member.process.pid)
        self._stopped.add(member.name)

    def resume(self, member: Member) -> None:
        assert member.process is not None
        member.process.send_signal(signal.SIGCONT)
        self._stopped.discard(member.name)

    def leader(self) -> Member:
        """The member that leads now."""

        def found() -> Member | None:
            running = [each for each in self.members if each.process is not None and each.name not in self._stopped]
            for member in running:
                done = self._run("endpoint", "status", "-w", "json", "--command-timeout=2s", members=[member])
                if done.returncode == 0:
                    status = json.loads(done.stdout)[0]["Status"]
                    if status.get("leader") and status["leader"] == status["header"]["member_id"]:
                        return member
            return None

        leader = wait_until(found, START_S, reason="one of the members leads")
        assert leader is not None
        return leader

    def ctl(self, *arguments: str, stdin: bytes | None = None, user: str | None = None) -> str:
        """etcdctl; returns what it printed."""
        done = self._run(*arguments, stdin=stdin, user=user)
        assert done.returncode == 0, f"etcdctl {' '.join(arguments)}: {done.stderr.decode()}"
        return done.stdout.decode()

    def _run(
        self,
        *arguments: str,
        members: Sequence[Member] | None = None,
        stdin: bytes | None = None,
        user: str | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        running = [each for each in self.members if each.process is not None]
        endpoints = ",".join(f"{self.scheme}://127.0.0.1:{each.port}" for each in members or running)
        command = ["etcdctl", "--endpoints", endpoints]
        if self.tls:
            command += ["--cacert", str(self.tls.ca)]
            command += ["--cert", str(self.tls.client_cert), "--key", str(self.tls.client_key)]
        if user or self.user:
            command += ["--user", user or f"{self.user}:{self.password}"]
        return subprocess.run(
            [*command, *arguments],
            check=False,
            capture_output=True,
            input=stdin or b"",
            env={**os.environ, "ETCDCTL_API": "3"},
        )

    def put(self, key: str, value: str) -> int:
        """As a person does with plain etcdctl; returns the revision."""
        return int(json.loads(self.ctl("put", "-w", "json", "--", key, value))["header"]["revision"])

    def delete(self, key: str) -> int:
        return int(json.loads(self.ctl("del", "-w", "json", "--", key))["header"]["revision"])

    def revision(self) -> int:
        return int(json.loads(self.ctl("get", "-w", "json", "nothing"))["header"]["revision"])

    def compact(self, revision: int) -> None:
        self.ctl("compaction", "--physical=true", str(revision))

    def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """One request to the gateway, as anyone's program makes it."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.members[0].port}{path}", data=json.dumps(payload).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            said: dict[str, Any] = json.load(answer)
        return said

    def turn_auth_on(self, **passwords: str) -> None:
        """A user `root`, and one for each name, with a role of its own name."""
        for arguments in (
            ("user", "add", "root:root"),
            ("role", "add", "root"),
            ("user", "grant-role", "root", "root"),
        ):
            self.ctl(*arguments)
        for name, password in passwords.items():
            self.ctl("user", "add", f"{name}:{password}")
            self.ctl("role", "add", name)
            self.ctl("user", "grant-role", name, name)
        self.ctl("auth", "enable")
        self.user, self.password = "root", "root"

    def grant(self, role: str, *prefixes: str, access: str = "readwrite") -> None:
        for prefix in prefixes:
            self.ctl("role", "grant-permission", "--prefix=true", role, access, prefix)

    def back_up(self) -> Path:
        """A backup of one member, as an operator takes it."""
        path = Path(tempfile.mkstemp(dir=self.folder, suffix=".backup")[1])
        path.unlink()
        self._checked_run("snapshot", "save", str(path), members=self.members[:1])
        return path

    def restore(self, backup: Path) -> None:
        """Stop every member, restore the backup under the same names and token, and start again."""
        for member in self.members:
            if member.process is not None:
                self.kill(member)
            data = member.folder / member.name
            shutil.rmtree(data)
            arguments = ["snapshot", "restore", str(backup), "--name", member.name, "--data-dir", str(data)]
            arguments += ["--initial-cluster", self._initial_cluster(), "--initial-cluster-token", self.token]
            arguments += ["--initial-advertise-peer-urls", f"http://127.0.0.1:{member.peer_port}"]
            self._checked_run(*arguments, members=[member])
        self.start()

    def _checked_run(self, *arguments: str, members: Sequence[Member]) -> None:
        done = self._run(*arguments, members=members)
        assert done.returncode == 0, done.stderr.decode()

    def close(self) -> None:
        for member in self.members:
            if member.process is not None:
                self.kill(member)


@contextlib.contextmanager
def etcd(
    members: int = 1, *, options: Sequence[str] = (), tls: Certificates | None = None, waits: bool = True
) -> Iterator[EtcdCluster]:
    """A running cluster of that many members; healthy, unless nobody `waits` for that."""
    assert shutil.which("etcd"), "etcd is missing: apt-get install etcd-server etcd-client"
    with tempfile.TemporaryDirectory(prefix="veltrix-etcd-") as folder:
        path = Path(folder)
        made = [Member(f"n{number}", path, free_port(), free_port()) for number in range(members)]
        cluster = EtcdCluster(path, made, options, tls)
        try:
            if waits:
                cluster.start()
            else:
                cluster.spawn()
            yield cluster
        finally:
            cluster.close()


def make_certificates(folder: Path, *, days: int = 2, client_subject: str = "/O=veltrix") -> Certificates:
    """A CA, and what it signed; with `days` below 0 the server's certificate has expired."""

    def run(*arguments: str) -> None:
        done = subprocess.run(["openssl", *arguments], check=False, capture_output=True, cwd=folder)
        assert done.returncode == 0, done.stderr.decode()

    def signed(name: str, subject: str, *, extensions: str, days: int) -> None:
        run("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", subject,
            "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        (folder / f"{name}.ext").write_text(extensions)
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-extfile", f"{name}.ext", "-out", f"{name}.pem", "-days", str(days))  # fmt: skip

    folder.mkdir(parents=True, exist_ok=True)
    run("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "3",
        "-subj", "/CN=test CA",
        "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-keyout", "ca.key", "-out", "ca.pem")  # fmt: skip
    usage = "extendedKeyUsage=serverAuth,clientAuth\nauthorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n"
    signed("server", "/CN=etcd", extensions=f"subjectAltName=IP:127.0.0.1\n{usage}", days=days)
    signed("client", client_subject, extensions=usage, days=2)
    return Certificates(*(folder / name for name in ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")))
