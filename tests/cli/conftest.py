"""What the tests of the command share: a store, the command in this process, and the command as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner

from tests.support.redis_servers import RedisServer, redis_server
from tests.support.serving import ROOT
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient
from veltrix_mw.cli import main

_STYLE: Final = re.compile("\x1b\\[[0-9;]*m")


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        return json.loads(self.err)["error"]


@dataclass
class Shell:
    """The command on one store."""

    folder: Path
    environ: dict[str, str] = field(default_factory=dict)
    store: str = ""

    @property
    def url(self) -> str:
        if self.store:
            return self.store
        return f"sqlite:///{self.folder}/c.db"

    def run(self, *arguments: str, stdin: str | bytes = "") -> Answer:
        """In this process, with click's runner: quick, and not on a terminal."""
        done = CliRunner().invoke(
            main, arguments, input=stdin, env={"VELTRIX_URL": self.url, "USER": "ana", **self.environ}
        )
        return Answer(done.exit_code, done.stdout, done.stderr)

    def ok(self, *arguments: str, stdin: str | bytes = "") -> str:
        """`run`, of which success is expected; its output without the last line's end."""
        done = self.run(*arguments, stdin=stdin)
        assert done.code == 0, done
        return done.out.removesuffix("\n")

    def process_env(self) -> dict[str, str]:
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "integrations")])
        return {**os.environ, "PYTHONPATH": paths, "VELTRIX_URL": self.url, "USER": "ana", **self.environ}

    def process(self, *arguments: str, stdin: str = "", command: Sequence[str] = ("-m", "veltrix_mw.cli")) -> Answer:
        """As a process of its own, whose output is piped."""
        done = subprocess.run(
            [sys.executable, *command, *arguments],
            env=self.process_env(),
            cwd=self.folder,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def client(self) -> Iterator[ConfigClient]:
        """The store, straight; for what the command is to have done."""
        with self.client_of(self.url) as client:
            yield client

    @contextmanager
    def client_of(self, url: str) -> Iterator[ConfigClient]:
        """Another store, straight."""
        client = ConfigClient(url)
        try:
            yield client
        finally:
            client.close()

    @contextmanager
    def running(self, *arguments: str, terminal: bool = False, width: int = 80) -> Iterator[Running]:
        """As a process that goes on, piped or on a pseudo-terminal; ended with the block."""
        environ = {**self.process_env(), "COLUMNS": str(width), "NO_COLOR": "1", "TERM": "xterm"}
        command = [sys.executable, "-m", "veltrix_mw.cli", *arguments]
        if terminal:
            ours, theirs = os.openpty()
            process = subprocess.Popen(
                command, env=environ, cwd=self.folder, stdin=theirs, stdout=theirs, stderr=theirs
            )
            os.close(theirs)
        else:
            ours, theirs = os.pipe()
            process = subprocess.Popen(
                command, env=environ, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
            )
            os.close(theirs)
        running = Running(process, ours)
        try:
            yield running
        finally:
            running.end()


class Running:
    """A command under way, and what it has written so far, on stdout and stderr together."""

    def __init__(self, process: subprocess.Popen[bytes], output: int) -> None:
        self.process = process
        self._output = output
        self._read: list[bytes] = []
        self._reader = threading.Thread(target=self._collect)
        self._reader.start()

    def _collect(self) -> None:
        while True:
            try:
                chunk = os.read(self._output, 65536)
            except OSError:
                return  # the terminal's other side is closed
            if not chunk:
                return
            self._read.append(chunk)

    @property
    def text(self) -> str:
        """Without colours and the like."""
        return _STYLE.sub("", b"".join(self._read).decode()).replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self._output, text.encode())

    def until(self, text: str, timeout_s: float = 60, *, count: int = 1) -> None:
        """Wait until it has written `text`, so many times."""
        wait_until(
            lambda: self.text.count(text) >= count or self._is_over(text),
            timeout_s,
            reason=f"{text!r} in its output, {count} times",
        )

    def _is_over(self, text: str) -> bool:
        if self.process.poll() is None or self._reader.is_alive():
            return False
        assert text in self.text, f"it ended with {self.process.returncode}:\n{self.text}"
        return True

    def signalled(self, number: signal.Signals) -> int:
        """Its exit code after that signal."""
        self.process.send_signal(number)
        return self.code()

    def code(self) -> int:
        code = self.process.wait(30)
        self._reader.join(30)
        return code

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(30)
        os.close(self._output)


@pytest.fixture(scope="session")
def _mirror_server() -> Iterator[RedisServer]:
    with redis_server("--maxmemory", "256mb") as server:
        yield server


@pytest.fixture
def redis(_mirror_server: RedisServer) -> RedisServer:
    """A Redis that holds nothing, to be a mirror; nobody stops it or kills it."""
    _mirror_server.run("FLUSHALL")
    return _mirror_server


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """The command, on a store that does not exist yet."""
    return Shell(tmp_path)


@pytest.fixture
def put(shell: Shell) -> Callable[[str, Any], int]:
    """Write a value, without the command."""

    def write(key: str, value: Any) -> int:
        with shell.client() as client:
            return client.put(key, value)

    return write
