"""What the served apps answer, whatever serves them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from veltrix_mw import View, current_view

__all__ = ["line", "report", "wait_for"]


def report(view: View) -> dict[str, int]:
    """Who answers, what the request's view says, and what the current view says."""
    current = current_view()
    return {
        "pid": os.getpid(),
        "revision": view.revision,
        "value": view["checkout/max_items"],
        "current_revision": current.revision,
        "current_value": current["checkout/max_items"],
    }


def line(view: View) -> bytes:
    """One line of a streamed answer."""
    return json.dumps(report(view)).encode() + b"\n"


def wait_for(fifo: str) -> None:
    """Return when someone has opened the FIFO, written and closed it."""
    Path(fifo).read_bytes()
