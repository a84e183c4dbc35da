"""The tests' own tools."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import wait_until

ROOT = Path(__file__).parent.parent


def test_waiting_returns_the_first_true_value() -> None:
    values = iter([0, "", "here"])
    assert wait_until(lambda: next(values), 5, reason="a true value", interval_s=0) == "here"


def test_waiting_in_vain_says_what_for_and_what_was_seen() -> None:
    with pytest.raises(AssertionError, match=r"waited 0 s for: the moon; last seen: \[\]"):
        wait_until(list, 0, reason="the moon")


def test_waiting_looks_once_more_after_the_deadline() -> None:
    looks = []
    assert wait_until(lambda: looks.append(1) or len(looks) == 2, 0.001, reason="a second look", interval_s=0.05)


def test_a_free_port_can_be_bound(free_port: int) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", free_port))


def test_exported_variables_reach_no_test_and_no_process_that_a_test_starts(tmp_path: Path) -> None:
    inner = tmp_path / "test_inner.py"
    inner.write_text(
        "import os, subprocess, sys\n"
        "def test_inner():\n"
        "    assert not [name for name in os.environ if name.startswith(('VELTRIX_', 'OTEL_'))]\n"
        "    show = \"import os; print('VELTRIX_URL' in os.environ)\"\n"
        "    assert subprocess.check_output([sys.executable, '-c', show], text=True) == 'False\\n'\n"
    )
    (tmp_path / "conftest.py").write_text("from tests.conftest import _own_environment\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), str(inner)],
        env={**os.environ, "VELTRIX_URL": "memory://", "OTEL_SDK_DISABLED": "true", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
