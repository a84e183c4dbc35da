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
from tests.support.waiting import wait_until

__all__ = ["Certificates", "RedisServer", "redis_server"]

_START_S: Final = 30.0  # an end to waiting in vain; a server is up in a few milliseconds
_ONCE: Final = Retry(NoBackoff(), 0)
_TRIES: Final = 5  # another process may take the port before the server does


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

    def issue(self, name: str, *, days: int = 2, san: str = "IP:127.0.0.1,DNS:localhost") -> tuple[Path, Path]:
        """A certificate and its key; `days` below 0: one that has expired."""
        cert, key, request = (self.folder / f"{name}.{end}" for end in ("pem", "key", "csr"))
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(
            f"subjectAltName={san}\nextendedKeyUsage=serverAuth,clientAuth\nkeyUsage=digitalSignature\n"
            "authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\nbasicConstraints=CA:FALSE\n"
        )
        self._openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", f"/CN={name}")
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

    def __init__(self, *options: str, tls: tuple[Path, Path, Path] | None = None) -> None:
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

    def start(self, *, wait: bool = True) -> None:
        """Start it again after `kill`, on the same port and folder; `wait`: until it serves."""
        command = [
            "redis-server", "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "", "--dbfilename", "dump.rdb",
            "--logfile", str(self.folder / "log"), "--enable-debug-command", "yes", *self._listening(), *self._options,
        ]  # fmt: skip
        self._process = process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

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
        self._signal(signal.SIGSTOP)

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
def redis_server(*options: str, tls: tuple[Path, Path, Path] | None = None) -> Iterator[RedisServer]:
    """A server for the length of the block."""
    server = RedisServer(*options, tls=tls)
    try:
        yield server
    finally:
        server.close()
