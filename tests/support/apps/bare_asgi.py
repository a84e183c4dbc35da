"""A bare ASGI app that knows no lifespan, like Django's."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import parse_qs

from tests.support.apps.answers import line, report, wait_for
from veltrix_mw import ConfigClient
from veltrix_mw.asgi import ConfigMiddleware


async def bare(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise ValueError(f"this app serves HTTP, not {scope['type']}")
    view = scope["state"]["config"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    if scope["path"] == "/stream":
        await send({"type": "http.response.body", "body": line(view), "more_body": True})
        await asyncio.to_thread(wait_for, parse_qs(scope["query_string"].decode())["fifo"][0])
        await send({"type": "http.response.body", "body": line(view), "more_body": False})
    else:
        await send({"type": "http.response.body", "body": json.dumps(report(view)).encode()})


app = ConfigMiddleware(bare, client=ConfigClient())
