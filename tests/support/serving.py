"""Real web servers with real worker processes, for tests and for nothing else.

A served app answers `GET /config` with JSON that has at least `pid`, `revision` and whatever the test reads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
Server = Literal["gunicorn", "uvicorn", "granian", "uwsgi"]


@dataclass
class Served:
    """A running server: its address, its process and what it has logged so far."""

    url: str
    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def get(self, path: str = "/config", *, headers: Mapping[str, str] | None = None, timeout_s: float = 10) -> Any:
        """The JSON answer of one request, over a connection of its own (so that any worker may answer)."""
        request = urllib.request.Request(self.url + path, headers={"Connection": "close", **(headers or {})})
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)

    def until_each_worker(
        self, field: str, wanted: Any, *, workers: int = 2, path: str = "/config", timeout_s: float = 10
    ) -> dict[int, float]:
        """Ask until `workers` processes answered with `wanted` in `field`; the seconds it took each, by pid.

        Polls: only the processes themselves know, and a request is the way to ask them.
        """
        begun_s, seen, latest = time.monotonic(), {}, {}
        while len(seen) < workers:
            answer = self.get(path)
            latest[answer["pid"]] = answer[field]
            if answer[field] == wanted:
                seen.setdefault(answer["pid"], time.monotonic() - begun_s)
            if time.monotonic() - begun_s > timeout_s:
                raise AssertionError(f"after {timeout_s} s the workers serve {latest}, not {wanted!r}\n{self.log}")
        return seen

    def stop(self, timeout_s: float = 15) -> int:
        """SIGTERM, and the exit code; a server that does not go in time is a failure."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"the server did not stop within {timeout_s} s of SIGTERM\n{self.log}") from None


def _command(server: Server, app: str, port: int, workers: int, asgi: bool, options: Sequence[str]) -> list[str]:
    python = sys.executable
    match server:
        case "gunicorn":
            base = [python, "-m", "gunicorn", "-w", str(workers), "-b", f"127.0.0.1:{port}", "--threads", "4"]
            return [*base, *options, app]
        case "uvicorn":
            base = [python, "-m", "uvicorn", "--port", str(port), "--workers", str(workers)]
            return [*base, "--log-level", "warning", *options, app]
        case "granian":
            interface = "asgi" if asgi else "wsgi"
            base = [str(Path(python).parent / "granian"), "--interface", interface, "--port", str(port)]
            return [*base, "--workers", str(workers), *options, app]
        case "uwsgi":
            base = [str(Path(python).parent / "uwsgi"), "--http", f"127.0.0.1:{port}", "--processes", str(workers)]
            return [*base, "--master", "--enable-threads", "--module", app, "--die-on-term", "--need-app", *options]


@contextmanager
def serve(
    app: str,
    *,
    server: Server,
    workers: int = 2,
    env: Mapping[str, str] | None = None,
    app_dir: Path | None = None,
    asgi: bool = False,
    options: Sequence[str] = (),
    start_timeout_s: float = 60,
    probe: str = "/config",
) -> Iterator[Served]:
    """Serve `app` ("module:attribute", found in `app_dir`) until the block ends; every process is gone then."""
    port = free_port()
    paths = [str(app_dir)] if app_dir else []
    paths += [str(ROOT / "src"), str(ROOT / "integrations"), str(ROOT)]
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "server.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                _command(server, app, port, workers, asgi, options),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **(env or {})},
                cwd=app_dir or ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        served = Served(f"http://127.0.0.1:{port}", process, log_path)
        try:
            _wait_until_it_answers(served, probe, start_timeout_s)
            yield served
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _wait_until_it_answers(served: Served, probe: str, timeout_s: float) -> None:
    deadline_s, never = time.monotonic() + timeout_s, threading.Event()
    while True:
        try:
            urllib.request.urlopen(served.url + probe, timeout=10).close()
            return
        except urllib.error.HTTPError as answered:
            answered.close()
            return
        except OSError:
            if served.process.poll() is not None:
                raise AssertionError(f"the server ended at once\n{served.log}") from None
            if time.monotonic() > deadline_s:
                raise AssertionError(f"the server did not answer within {timeout_s} s\n{served.log}") from None
            never.wait(0.05)  # a port that nobody listens on yet can only be tried
