"""A WSGI app that tells all about the view of each request, and keeps a trace of what its process published.

Each process appends a line of JSON to `$TRACE_FOLDER/<pid>.jsonl` for each snapshot it publishes, with the time by the
machine's monotonic clock: that clock is one for all processes, so whoever checks can compare times.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from veltrix_mw import ConfigClient, View, current_view
from veltrix_mw.wsgi import VIEW_KEY, ConfigMiddleware

logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(process)d %(message)s", datefmt="%T")


class TracedClient(ConfigClient):
    """A client that writes down what it publishes, when it is published."""

    def _publish(self, follower: Any, publication: Any) -> bool:
        taken = super()._publish(follower, publication)
        snapshot = publication.snapshot
        line = {
            "t": time.monotonic(),
            "pid": os.getpid(),
            "taken": taken,
            "incarnation": snapshot.incarnation,
            "revision": snapshot.revision,
            "digest": snapshot.digest,
            "origin": snapshot.origin,
            "count": len(snapshot),
        }
        with (Path(os.environ["TRACE_FOLDER"]) / f"{os.getpid()}.jsonl").open("a") as trace:
            trace.write(json.dumps(line) + "\n")
        return taken

    def _failed(self, follower: Any, error: Any) -> None:
        logging.getLogger("traced").info("failed %s: %s", type(error).__name__, error)
        super()._failed(follower, error)


def answer(view: View) -> dict[str, Any]:
    first = view.revision
    told = {
        "pid": os.getpid(),
        "t": time.monotonic(),
        "age_s": view.age_s if math.isfinite(view.age_s) else None,
        "stale": view.stale,
        "incarnation": view.incarnation,
        "origin": view.origin,
        "digest": view._snapshot.digest,
        "left": view.get("pair/left"),
        "right": view.get("pair/right"),
        "value": view.get("checkout/max_items"),
    }
    # Last: whatever happened meanwhile, it is one snapshot.
    return {**told, "revision": first, "last_revision": view.revision, "current_revision": current_view().revision}


def traced(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "application/json")])
    if environ["PATH_INFO"] == "/status":
        return [json.dumps({"pid": os.getpid(), **client.status().as_dict(), **_following()}).encode()]
    return [json.dumps(answer(environ[VIEW_KEY])).encode()]


def _following() -> dict[str, Any]:
    """What the follower is about, for a failure's message."""
    follower = client._follower
    if follower is None or follower._thread is None:
        return {"follower": "none"}
    replica, frame = follower.replica, sys._current_frames().get(follower._thread.ident or 0)
    return {
        "follower": {
            "step": repr(replica._step),
            "confirm_in_s": replica._confirm_at_s - time.monotonic(),
            "confirm_costs_s": list(replica._confirm_costs),
            "at": [f"{each.name}:{each.lineno}" for each in traceback.extract_stack(frame)][-8:],
        }
    }


client = TracedClient(
    relay=os.environ.get("TRACED_RELAY", "never"),
    last_known_good=os.environ.get("TRACED_LAST_KNOWN_GOOD"),
    start_timeout_s=float(os.environ.get("TRACED_START_TIMEOUT_S", "5")),
)
if os.environ.get("TRACED_EARLY"):
    client.start()
    client.wait_ready(30)
app = ConfigMiddleware(traced, client=client)
