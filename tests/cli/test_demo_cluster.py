"""The demo on etcd and Redis, from end to end: its figures, its table on a terminal, and that it leaves nothing."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cli.conftest import Shell
from tests.support.waiting import wait_until

PLAY_S: Final = 280  # it takes 40 s; a machine that is busy gets this long

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def temporary(shell: Shell) -> Path:
    """Where the demo makes its folders."""
    folder = shell.folder / "tmp"
    folder.mkdir()
    shell.environ["TMPDIR"] = str(folder)
    return folder


def processes_of(temporary: Path) -> list[str]:
    """What runs with that folder for its temporary files: the demo, and all that it started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ = (process / "environ").read_bytes().split(b"\0")
            # Redis writes its title over its environment, but works in its folder.
            if f"TMPDIR={temporary}".encode() in environ or str(process.joinpath("cwd").readlink()).startswith(
                f"{temporary}/"
            ):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has ended, or is another user's
    return found


def assert_nothing_is_left(temporary: Path) -> None:
    wait_until(lambda: not processes_of(temporary), 15, reason="the end of all that the demo started")
    assert list(temporary.iterdir()) == []


def test_no_request_fails_whatever_is_killed(shell: Shell, temporary: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "veltrix_mw.cli", "demo", "--cluster", "--json"],
        env=shell.process_env(),
        capture_output=True,
        text=True,
        timeout=PLAY_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    played = json.loads(done.stdout)
    assert played["failed"] == 0
    assert played["requests"] > played["outage"]["requests"] > 0
    through_mirror, _, redis_killed, all_back, *_, last = played["steps"]
    for step in played["steps"]:
        assert_converged(step)
    assert {one["origin"] for one in through_mirror["workers"]} == {"redis"}
    assert {one["origin"] for one in redis_killed["workers"]} == {"etcd"}
    assert {one["origin"] for one in last["workers"]} == {"redis"}
    assert redis_killed["revision"] < all_back["revision"] < last["revision"]
    outage = played["outage"]["workers"]
    assert [one["stale"] for one in outage] == [True] * 4
    assert all(one["age_s"] > 15 for one in outage)
    pids = {str(one["pid"]) for one in outage}
    assert len(pids) == 4
    assert played["relays"]
    assert set(played["relays"]) <= pids
    assert_nothing_is_left(temporary)


def assert_converged(step: dict[str, Any]) -> None:
    assert [one["value"] for one in step["workers"]] == [step["value"]] * 4
    assert all(one["revision"] >= step["revision"] for one in step["workers"])
    assert step["converged_s"] == max(one["after_s"] for one in step["workers"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_in_the_middle_of_the_live_table_leaves_nothing(
    shell: Shell, temporary: Path, number: signal.Signals
) -> None:
    with shell.running("demo", "--cluster", terminal=True, width=100) as demo:
        demo.until("3  Kill etcd", PLAY_S)
        demo.until("failed", PLAY_S)
        assert re.search(r"worker +revision +value +age +origin +stale +requests +failed", demo.text)
        assert any("redis-server" in line for line in processes_of(temporary))
        assert demo.signalled(number) in {130, -signal.SIGINT}
        assert_nothing_is_left(temporary)


def test_an_expectation_that_fails_ends_it_with_what_it_was(shell: Shell, temporary: Path) -> None:
    code = "from veltrix_mw.cli import demo_cluster, main\ndemo_cluster._PATIENCE_S = 0\nmain()"
    done = shell.process("demo", "--cluster", "--json", command=("-c", code))
    assert done.code == 1, done
    assert done.out == ""
    assert done.err.startswith("error: the demo failed: waited 0 s, but not yet so: every worker follows the mirror")
    assert_nothing_is_left(temporary)


def test_of_the_servers_it_names_the_one_that_lacks(shell: Shell, temporary: Path) -> None:
    found = shutil.which("etcd")
    assert found is not None
    shell.folder.joinpath("etcd").symlink_to(found)
    shell.environ["PATH"] = str(shell.folder)
    done = shell.process("demo", "--cluster")
    assert done.code == 1
    assert "it starts redis-server, which PATH does not have" in done.err
    assert "apt-get install redis-server" in done.err
    assert_nothing_is_left(temporary)


def test_without_the_servers_it_says_how_to_install_them(shell: Shell, temporary: Path) -> None:
    shell.environ["PATH"] = str(shell.folder)
    done = shell.process("demo", "--cluster")
    assert done.code == 1
    assert "apt-get install etcd-server redis-server" in done.err
    assert_nothing_is_left(temporary)
