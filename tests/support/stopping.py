"""Stopping a process, and knowing that it is."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.support.waiting import wait_until

__all__ = ["stop"]


def stop(pid: int) -> None:
    """SIGSTOP, and wait until each of its threads stands: on a loaded machine some go on answering for a while."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _stands(pid), 30, reason=f"process {pid} to be stopped")


def _stands(pid: int) -> bool:
    # The state follows the name, which is in brackets and may hold any.
    states = [task.read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(state in "TtZX" for state in states)
