"""The demo, from end to end: piped, and on a terminal until Ctrl-C."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.cli.conftest import Shell
from tests.support.serving import ROOT
from tests.support.waiting import wait_until


@pytest.fixture
def temporary(shell: Shell) -> Path:
    """Where the demo makes its folder."""
    folder = shell.folder / "tmp"
    folder.mkdir()
    shell.environ["TMPDIR"] = str(folder)
    return folder


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_the_demo_shows_what_it_did_and_leaves_nothing(shell: Shell, temporary: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/demo.py"],
        cwd=ROOT,
        env=shell.process_env(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    pids = {int(pid) for pid in re.findall(r"worker (\d+) +50 → 80 at revision 2, \d+ ms after the write", done.stdout)}
    assert len(pids) == 2
    assert re.search(r"streamed \d+ lines, begun before the change, ended after\n", done.stdout)
    assert "checkout/max_items = 50 at revision 1" in done.stdout.partition("straddled")[2]
    assert "veltrix.lookup.count 2" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert not any(is_running(pid) for pid in pids)
    assert list(temporary.iterdir()) == []


def test_the_demo_in_json_gives_its_figures(shell: Shell, temporary: Path) -> None:
    done = shell.process("demo", "--json")
    assert done.code == 0, done.err
    played = done.json
    assert [(one["old"], one["new"], one["revision"]) for one in played["workers"]] == [(50, 80, 2)] * 2
    assert all(0 < one["after_s"] < 60 for one in played["workers"])
    stream = played["stream"]
    assert (stream["revision"], stream["value"], stream["worker_revision"]) == (1, 50, 2)
    assert stream["lines"] > stream["lines_after"] >= 1
    server, *lookups = played["trace"]
    assert server["name"] == "GET /"
    assert server["attributes"]["veltrix.revision"] == 2
    assert [span["parent_id"] for span in lookups] == [server["span_id"]] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_on_a_terminal_the_app_stays_up_until_it_is_told_to_end(
    shell: Shell, temporary: Path, number: signal.Signals
) -> None:
    with shell.running("demo", terminal=True) as demo:
        demo.until(" watch\n", 100)
        assert demo.process.poll() is None
        found = re.search(r"export VELTRIX_URL=(\S+)", demo.text)
        assert found is not None
        changed = shell.process("--url", found[1], "put", "checkout/max_items", "120")
        assert changed.out == "3\n"
        pids = {int(pid) for pid in re.findall(r"worker (\d+)", demo.text)}
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
        assert demo.signalled(number) == 0
        wait_until(lambda: not any(is_running(pid) for pid in pids), 10, reason="the workers' end")
    assert list(temporary.iterdir()) == []


def test_an_interruption_in_the_middle_leaves_nothing(shell: Shell, temporary: Path) -> None:
    with shell.running("demo") as demo:
        demo.until("workers up", 100)
        # To a shell both are 130. CPython ends by the signal itself if it came in the middle of an `exec` of a string,
        # as the import of a module with dataclasses is.
        assert demo.signalled(signal.SIGINT) in {130, -signal.SIGINT}
    assert list(temporary.iterdir()) == []


def test_an_expectation_that_fails_ends_the_demo_with_what_it_was(shell: Shell, temporary: Path) -> None:
    code = (
        "from veltrix_mw.cli import demo, main\n"
        "demo.BEFORE = 51\n"
        "import json; demo.json = type('J', (), {'dumps': lambda first: json.dumps({**first, demo.KEY: 50})})\n"
        "main()"
    )
    done = shell.process("demo", command=("-c", code))
    assert done.code == 1
    assert re.fullmatch(r"error: the demo failed: worker \d+ serves 50, not 51\n", done.err)
    assert list(temporary.iterdir()) == []


def test_without_opentelemetrys_sdk_the_demo_says_so(shell: Shell, temporary: Path) -> None:
    # Neither the demo nor its workers find it: a package of that name that holds nothing stands before it.
    site = shell.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import sys; sys.modules['opentelemetry.sdk'] = None\n")
    environ = shell.process_env()
    environ["PYTHONPATH"] = f"{site}:{environ['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "veltrix_mw.cli", "demo"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "pip install opentelemetry-sdk" in done.stdout


def test_without_a_server_the_demo_says_what_to_install(shell: Shell) -> None:
    code = (
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'uvicorn' else find(name)\n"
        "from veltrix_mw.cli import main; main()"
    )
    done = shell.process("demo", command=("-c", code))
    assert done.code == 1
    assert "pip install uvicorn" in done.err
    assert tempfile.gettempdir()
