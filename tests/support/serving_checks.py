"""What an app with two real workers is asked, whatever framework and server it has.

The app is one of `tests.support.apps`, or answers as they do.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.support.command import veltrix_put
from tests.support.serving import Served
from veltrix_mw import ConfigClient

__all__ = ["check_that_a_change_reaches_each_worker_and_no_stream_in_flight", "check_that_it_ended_cleanly"]

KEY = "checkout/max_items"
PROMISED_S = 2.0


def check_that_a_change_reaches_each_worker_and_no_stream_in_flight(
    served: Served, writer: ConfigClient, folder: Path
) -> None:
    """Change the value while a response is being streamed: each worker serves it in time, the stream never does."""
    before, after = 41, 80
    assert served.get()["value"] == before
    fifo = folder / "go-on"
    os.mkfifo(fifo)
    with urllib.request.urlopen(f"{served.url}/stream?fifo={quote(str(fifo))}", timeout=60) as stream:
        first = json.loads(stream.readline())
        revision = veltrix_put(writer.status().tiers[0].url, KEY, after)
        _until_each_worker_serves(served, after, revision)
        fifo.write_text("go on")
        last = json.loads(stream.readline())
        assert stream.read() == b""
    assert first["value"] == before
    assert first["revision"] < revision
    assert last == first, "the stream keeps its revision to the last byte"


def _until_each_worker_serves(served: Served, value: Any, revision: int) -> None:
    """Ask until two workers gave the new value. What one of them answers after the promised time is never old.

    Which worker answers is the kernel's choice, so it may take longer than that until each was asked.
    """
    begun_s, seen = time.monotonic(), set[int]()
    while len(seen) < 2:
        asked_s = time.monotonic() - begun_s
        answer = served.get()
        assert answer["revision"] == answer["current_revision"]
        assert answer["value"] == answer["current_value"]
        if answer["value"] == value:
            assert answer["revision"] == revision
            seen.add(answer["pid"])
        else:
            assert asked_s < PROMISED_S, f"{asked_s:.1f} s after the change {answer}\n{served.log}"
        assert asked_s < 30, f"only {seen} ever answered\n{served.log}"


def check_that_it_ended_cleanly(served: Served, exit_codes: frozenset[int] = frozenset({0})) -> None:
    """SIGTERM ends it in time, and nothing was logged that looks like a failure."""
    assert served.stop() in exit_codes
    assert "Traceback" not in served.log
    assert "Exception" not in served.log
    assert "rror" not in served.log
