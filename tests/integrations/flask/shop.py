"""The app that the real servers of `test_served` serve; its store is `$VELTRIX_URL`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flask import Flask, Response, request

from flask_veltrix import Veltrix, config
from veltrix_mw import current_view

app = Flask(__name__)
app.config["VELTRIX_REVISION_HEADER"] = True
Veltrix(app)

if os.environ.get("SHOP_READS_EARLY"):
    # The follower's thread runs before a preloading server forks.
    with app.app_context():
        EARLY = config["limit"]


@app.get("/config")
def show() -> dict[str, Any]:
    return {"pid": os.getpid(), "limit": config["limit"], "revision": config.revision}


@app.get("/stream")
def stream() -> Response:
    """One line, and when the named pipe was written to and closed, another."""
    pipe = Path(request.args["pipe"])

    def lines() -> Iterator[str]:
        yield f"{os.getpid()} {config['limit']} {config.revision}\n"
        pipe.read_bytes()
        yield f"{os.getpid()} {current_view()['limit']} {current_view().revision}\n"

    return Response(lines())
