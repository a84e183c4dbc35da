"""The demo's stage: a temporary folder, the app's server and its workers, and the ways to ask them.

Owns every process and file of the demo; all are gone when `staged` ends, and nothing else is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Final
from urllib.parse import quote

from veltrix_mw.cli.demo_app import SPANS_VARIABLE

__all__ = ["DemoFailed", "Line", "Stage", "expect", "interruptible", "staged", "uninterrupted"]

_APP: Final = "veltrix_mw.cli.demo_app:app"
_HOST: Final = "127.0.0.1"
_START_S: Final = 60.0  # two workers need a second; on a machine that is busy, many
_STOP_S: Final = 5.0
_CALL_S: Final = 10.0
_LOOK_S: Final = 0.02

# Linux delays an acknowledgement by 40 ms, and a server that writes header and body apart waits for it: the figures
# would be the kernel's timer.
_QUICK: Final[int | None] = getattr(socket, "TCP_QUICKACK", None)


class DemoFailed(Exception):
    """What the demo is to show did not happen."""


def expect(held: bool, otherwise: str) -> None:
    """Raise `DemoFailed` unless the expectation held."""
    if not held:
        raise DemoFailed(otherwise)


class Line:
    """One kept connection, so one worker's: requests on it are all answered by the same process."""

    def __init__(self, port: int) -> None:
        self._connection = HTTPConnection(_HOST, port, timeout=_CALL_S)

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[dict[str, Any], float]:
        """The JSON answer, and the seconds it took."""
        begun_s = time.perf_counter()
        self._connection.request("GET", path, headers=dict(headers or {}))
        if _QUICK is not None:
            self._connection.sock.setsockopt(socket.IPPROTO_TCP, _QUICK, 1)
        response = self._connection.getresponse()
        body = response.read()
        took_s = time.perf_counter() - begun_s
        expect(response.status == 200, f"{path} was answered {response.status}")
        return json.loads(body), took_s

    def stream(self, path: str) -> Iterator[dict[str, Any]]:
        """The JSON lines of a streamed answer, as they come."""
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        expect(response.status == 200, f"{path} was answered {response.status}")
        while line := response.readline():
            yield json.loads(line)

    def close(self) -> None:
        self._connection.close()


class Stage:
    """The demo's folder and server. Made by `staged`, which also takes it away."""

    def __init__(self, folder: Path, workers: int, *, app: str = _APP, url: str = "", mirror_url: str = "") -> None:
        """`app` is what the workers serve; without `url` the config lies in a file of the folder."""
        self._folder = folder
        self._workers = workers
        self._port = 0
        self._server: subprocess.Popen[bytes] | None = None
        self._log_path = folder / "server.log"
        self._app = app
        self.url = url or f"sqlite:///{quote(str(folder / 'config.db'))}"
        self.mirror_url = mirror_url

    @property
    def address(self) -> str:
        return f"http://{_HOST}:{self._port}"

    def veltrix(self, *arguments: str, stdin: str = "") -> str:
        """Run the command `veltrix` in a process of its own; what it printed."""
        done = subprocess.run(  # noqa: S603  # this package's own command
            [*_command(), *arguments],
            env={**os.environ, "VELTRIX_URL": self.url, "VELTRIX_MIRROR_URL": ""},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=_START_S,
            check=False,
        )
        expect(done.returncode == 0, f"veltrix {arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def shown_command(self) -> str:
        """The command as a person may type it here."""
        script, *rest = _command()
        on_path = shutil.which("veltrix")
        if not rest and on_path is not None and Path(on_path).resolve() == Path(script).resolve():
            return "veltrix"
        with contextlib.suppress(ValueError):
            script = str(Path(script).relative_to(Path.cwd()))
        return shlex.join([script, *rest])

    def serve(self) -> float:
        """Start the server; the seconds until it answered."""
        begun_s = time.monotonic()
        self._port = _free_port()
        with self._log_path.open("wb") as log:
            self._server = subprocess.Popen(  # noqa: S603  # this Python
                [
                    *(sys.executable, "-m", "uvicorn", "--factory", self._app),
                    *("--host", _HOST, "--port", str(self._port), "--workers", str(self._workers)),
                    *("--log-level", "warning", "--timeout-keep-alive", "60", "--timeout-graceful-shutdown", "2"),
                ],
                env={
                    # What is exported for another app, its telemetry and its mirror, is not for this one.
                    **{name: value for name, value in os.environ.items() if not name.startswith("OTEL_")},
                    "VELTRIX_URL": self.url,
                    "VELTRIX_MIRROR_URL": self.mirror_url,
                    SPANS_VARIABLE: str(self._folder),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops the server in good order
            )
        while True:
            with contextlib.suppress(OSError, HTTPException), contextlib.closing(Line(self._port)) as line:
                line.get("/")
                return time.monotonic() - begun_s
            expect(self._server.poll() is None, "the server ended at once")
            expect(time.monotonic() - begun_s < _START_S, f"the server did not answer within {_START_S:g} s")
            threading.Event().wait(_LOOK_S)

    @contextmanager
    def lines_by_pid(self) -> Iterator[dict[int, Line]]:
        """A line to each worker: connections are opened until each of them took one."""
        lines: dict[int, Line] = {}
        spare: list[Line] = []
        end_s = time.monotonic() + _START_S
        try:
            while len(lines) < self._workers:
                expect(time.monotonic() < end_s, f"only {len(lines)} of {self._workers} workers answered")
                line = Line(self._port)
                spare.append(line)
                pid = line.get("/")[0]["pid"]
                if pid not in lines:
                    lines[pid] = spare.pop()
            yield dict(sorted(lines.items()))
        finally:
            for line in (*lines.values(), *spare):
                line.close()

    @contextmanager
    def stream(self) -> Iterator[Iterator[dict[str, Any]]]:
        """The lines of a streamed answer."""
        with contextlib.closing(Line(self._port)) as line:
            yield line.stream("/stream")

    def spans_of(self, trace_id: str, caller_id: str, timeout_s: float) -> list[dict[str, Any]]:
        """The spans of a request: the server's, the child of `caller_id`, then the others in the order they began."""
        end_s = time.monotonic() + timeout_s
        while True:
            spans = [span for span in self._spans() if span["trace_id"] == trace_id]
            # The server's span ends last, so that all are there when it is.
            if any(span["parent_id"] == caller_id for span in spans):
                return sorted(spans, key=lambda span: (span["parent_id"] != caller_id, span["start_ns"]))
            expect(time.monotonic() < end_s, "no worker exported the trace of the request")
            threading.Event().wait(_LOOK_S)

    def _spans(self) -> Iterator[dict[str, Any]]:
        for path in self._folder.glob("spans-*.jsonl"):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # else it is being written
                    yield json.loads(line)

    def wait(self) -> None:
        """Wait for as long as the server runs. Raises `DemoFailed` when it ends by itself."""
        assert self._server is not None
        code = self._server.wait()
        raise DemoFailed(f"the server ended with {code}{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines of the server's log, for a message; empty if there are none."""
        if not self._log_path.exists():
            return ""
        lines = self._log_path.read_text(errors="replace").splitlines()[-20:]
        return "".join(f"\n  {line}" for line in ("its server logged:", *lines)) if lines else ""

    def stop(self) -> None:
        """End the server and its workers, and wait for that."""
        server = self._server
        if server is None:
            return
        server.terminate()
        try:
            server.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)  # its own session: its workers, and nothing else
            server.wait()


@contextmanager
def staged(workers: int, *, app: str = _APP, url: str = "", mirror_url: str = "") -> Iterator[Stage]:
    """A stage in a temporary folder. Raises `DemoFailed` if the server is not installed."""
    expect(find_spec("uvicorn") is not None, "it serves with uvicorn, which is not installed: pip install uvicorn")
    with tempfile.TemporaryDirectory(prefix="veltrix-demo-") as folder:
        stage = Stage(Path(folder), workers, app=app, url=url, mirror_url=mirror_url)
        try:
            yield stage
        finally:
            with uninterrupted():
                stage.stop()


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and a terminal that is closed end it as Ctrl-C does: the workers must not outlive the demo."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not leave the workers behind; what it would cut short takes at most `_STOP_S`."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _command() -> list[str]:
    """The command `veltrix` of this Python: its script where it is installed, else its module."""
    script = Path(sys.executable).with_name("veltrix")
    return [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-m", "veltrix_mw.cli"]


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind((_HOST, 0))
        port: int = bound.getsockname()[1]
    return port
