"""Real servers with two workers: each serves a change, and a stream in flight keeps its revision."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.command import veltrix_put
from tests.support.serving import ROOT, Served, serve
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient

WSGI = {"app": "tests.integrations.django.project.wsgi:application", "server": "gunicorn"}
ASGI = {"app": "tests.integrations.django.project.asgi:application", "server": "uvicorn", "asgi": True}
SERVERS = {
    "gunicorn": WSGI,
    "gunicorn preloaded": {**WSGI, "options": ("--preload",)},
    "uvicorn": ASGI,
}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/config.db"


@pytest.fixture
def writer(url: str) -> Iterator[ConfigClient]:
    """A client of another process's kind: the servers know nothing of it."""
    with ConfigClient(url, telemetry="off") as client:
        client.put("greeting", "before")
        yield client


@contextmanager
def served(server: str, url: str) -> Iterator[Served]:
    with serve(**SERVERS[server], env={"TESTS_CONFIG_URL": url}) as running:
        yield running


@pytest.mark.parametrize("server", SERVERS)
def test_each_worker_serves_a_change_within_two_seconds_and_the_server_stops(server, url, writer):
    with served(server, url) as running:
        running.until_each_worker("greeting", "before")
        revision = veltrix_put(writer.status().tiers[0].url, "greeting", "after")
        running.until_each_worker("greeting", "after", timeout_s=2)
        running.until_each_worker("revision", revision, timeout_s=2)
        assert running.stop() in {0, -signal.SIGTERM, 143}
        assert "Traceback" not in running.log


STREAMS = [("gunicorn", "/stream"), ("gunicorn preloaded", "/stream"), ("uvicorn", "/stream-async")]


@pytest.mark.parametrize(("server", "path"), STREAMS, ids=[server for server, _ in STREAMS])
def test_a_stream_in_flight_keeps_its_revision_to_the_last_byte(server, path, url, writer, tmp_path: Path):
    gate = tmp_path / "gate"
    with served(server, url) as running, ExitStack() as stack:
        running.until_each_worker("greeting", "before")
        # urlopen blocks until the first bytes are there, so the stream stands between its parts when this returns.
        response: Any = stack.enter_context(
            urllib.request.urlopen(f"{running.url}{path}?gate={quote(str(gate))}", timeout=20)
        )
        first = response.readline().split()
        writer.put("greeting", "after")
        running.until_each_worker("greeting", "after", timeout_s=5)  # the stream's own worker too
        gate.touch()
        assert response.readline().split() == first
        assert first[2] == b"before"
        assert response.read() == b""


def test_runserver_follows_in_the_reloaded_child_and_not_in_its_parent(url, writer, tmp_path: Path, free_port: int):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "django", "runserver", f"127.0.0.1:{free_port}", "--skip-checks"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "integrations"), str(ROOT)])
    env = {
        **os.environ,
        "PYTHONPATH": paths,
        "DJANGO_SETTINGS_MODULE": "tests.integrations.django.project.settings",
        "TESTS_CONFIG_URL": url,
    }
    with log.open("wb") as out:
        parent = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        running = Served(f"http://127.0.0.1:{free_port}", parent, log)

        def answered() -> Any:
            assert parent.poll() is None, running.log
            try:
                return running.get()
            except OSError:
                return None

        answer = wait_until(answered, 30, reason="runserver answers")
        assert answer["greeting"] == "before"
        assert answer["pid"] != parent.pid
        assert len(os.listdir(f"/proc/{parent.pid}/task")) == 1
        assert not any("config.db" in os.readlink(fd) for fd in Path(f"/proc/{parent.pid}/fd").iterdir())
    finally:
        os.killpg(parent.pid, signal.SIGTERM)
        parent.wait(15)


def test_the_example_runs(url, writer):
    folder = ROOT / "examples" / "django_app"
    writer.put("checkout/max_items", 7)
    with serve("wsgi:application", server="gunicorn", app_dir=folder, env={"VELTRIX_URL": url}) as running:
        running.until_each_worker("max_items", 7)
        with urllib.request.urlopen(running.url + "/", timeout=10) as page:
            assert b"At most 7 items" in page.read()
        writer.put("checkout/max_items", 8)
        running.until_each_worker("max_items", 8, timeout_s=2)
