"""The app of the demo on etcd and Redis: bare ASGI, wrapped as any app would be. Runs in the demo's workers.

Owns what it answers: what the request's view holds, how old that is, and which tier it came from. `demo_cluster`
starts it and asks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from veltrix_mw import ConfigClient, View
from veltrix_mw.asgi import ConfigMiddleware

__all__ = ["app"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_FOLLOWED: Final = frozenset({"following", "listing", "waiting"})  # the states of the one tier that is followed


def app() -> App:
    """The app, wrapped; what a server calls in each of its workers."""
    client = ConfigClient(instance=str(os.getpid()))  # both URLs are in the environment
    return ConfigMiddleware(_shop(client), client=client)


def _shop(client: ConfigClient) -> App:
    async def shop(scope: Message, _receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = json.dumps(_served(client, scope["state"]["config"])).encode() + b"\n"
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return shop


def _served(client: ConfigClient, config: View) -> dict[str, Any]:
    age_s, status = config.age_s, client.status()
    return {
        "pid": os.getpid(),
        "revision": config.revision,
        "max_items": config["checkout/max_items"],
        "origin": config.origin,
        "age_s": age_s if math.isfinite(age_s) else None,
        "stale": config.stale,
        "digest": client.snapshot.digest,
        "follows": next((tier.name for tier in status.tiers if tier.state in _FOLLOWED), None),
        "relay": status.relay,
    }
