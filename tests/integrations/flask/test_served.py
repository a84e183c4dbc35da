"""Real servers with two workers each: every worker serves a change, and a response in flight does not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.serving import ROOT, Served, Server, serve
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient

BOUND_S = 2.0
"""Within this every worker serves a change."""

EARLY = {"SHOP_READS_EARLY": "1"}

SERVERS = pytest.mark.parametrize(
    ("server", "options", "env"),
    [
        pytest.param("gunicorn", (), {}, id="gunicorn"),
        pytest.param("gunicorn", ("--preload",), {}, id="gunicorn-preload"),
        pytest.param("gunicorn", ("--preload",), EARLY, id="gunicorn-preload-started-before-the-fork"),
        pytest.param("granian", ("--blocking-threads", "4"), {}, id="granian"),
        pytest.param("uwsgi", ("--threads", "4"), {}, id="uwsgi-master-forks"),
        pytest.param("uwsgi", ("--threads", "4"), EARLY, id="uwsgi-read-before-the-fork"),
        pytest.param("uwsgi", ("--threads", "4", "--lazy-apps"), {}, id="uwsgi-lazy-apps"),
    ],
)


def until_each_worker_serves(served: Served, limit: int, written_s: float, workers: int = 2) -> None:
    """Ask until each worker answered with `limit`; none may answer with another one after `BOUND_S`.

    Polls: which worker answers is the kernel's choice, so how long it takes to meet all of them says nothing. Eight
    ask at once, more than one worker has threads: of single requests, one worker may take every one.
    """
    met: dict[int, int] = {}

    def ask(_: int) -> None:
        asked_s = time.monotonic()
        answer = served.get()
        met[answer["pid"]] = answer["limit"]
        assert answer["limit"] == limit or asked_s - written_s < BOUND_S, f"an old value after {BOUND_S} s: {answer}"

    def all_met() -> bool:
        list(pool.map(ask, range(8)))
        return len(met) == workers and set(met.values()) == {limit}

    with ThreadPoolExecutor(8) as pool:
        wait_until(all_met, 30, reason=f"{workers} workers that serve {limit}, {served.log}")


def put(url: str) -> Callable[[int], float]:
    def write(limit: int) -> float:
        with ConfigClient(url) as client:
            client.put("limit", limit)
        return time.monotonic()

    return write


@SERVERS
def test_every_worker_serves_a_change_and_a_response_in_flight_keeps_its_revision(
    server: Server, options: tuple[str, ...], env: dict[str, str], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/shop.db"
    write = put(url)
    write(1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with serve(
        "shop:app",
        server=server,
        options=options,
        env={"VELTRIX_URL": url, **env},
        app_dir=Path(__file__).parent,
    ) as served:
        until_each_worker_serves(served, 1, time.monotonic())
        with urllib.request.urlopen(f"{served.url}/stream?pipe={pipe}", timeout=30) as body:
            first = body.readline()
            assert first.split()[1:] == [b"1", b"1"]
            assert body.headers["X-Config-Revision"] == "1"
            until_each_worker_serves(served, 2, write(2))
            opened = wait_until(lambda: _opened(pipe), 30, reason="the body waits at the pipe")
            os.close(opened[0])
            assert body.readline() == first
            assert body.read() == b""
        assert served.get()["revision"] == 2
        served.stop()


def _opened(pipe: Path) -> tuple[int] | None:
    """The pipe's writing end, once somebody reads from it."""
    try:
        return (os.open(pipe, os.O_WRONLY | os.O_NONBLOCK),)
    except OSError:
        return None


def test_a_change_made_on_the_command_line_reaches_every_worker(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shop.db"
    put(url)(1)
    with serve("shop:app", server="gunicorn", env={"VELTRIX_URL": url}, app_dir=Path(__file__).parent) as served:
        until_each_worker_serves(served, 1, time.monotonic())
        _run("-c", "from veltrix_mw.cli import main; main()", "put", "limit", "2", VELTRIX_URL=url)
        until_each_worker_serves(served, 2, time.monotonic())
        shop = str(Path(__file__).parent / "shop.py")
        _run("-m", "flask", "--app", shop, "veltrix", "put", "limit", "3", VELTRIX_URL=url)
        until_each_worker_serves(served, 3, time.monotonic())


def _run(*arguments: str, **env: str) -> None:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "integrations")])
    ran = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **env},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr.decode()
