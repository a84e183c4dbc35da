"""Any ASGI app, without a framework: one line wraps it.

export VELTRIX_URL=sqlite:///shop.db
veltrix put checkout/max_items 50
uvicorn examples.asgi_app:app --workers 2 --lifespan on

curl http://127.0.0.1:8000/                                       # at most 50 items
veltrix put tenants/acme/checkout/max_items 500                   # in another terminal
curl -H 'X-Tenant: acme' http://127.0.0.1:8000/                   # at most 500 items
"""

import json
import os

from veltrix_mw import ConfigClient
from veltrix_mw.asgi import ConfigMiddleware


async def shop(scope, receive, send):
    config = scope["state"]["config"]
    answer = {
        "pid": os.getpid(),
        "checkout/max_items": config["checkout/max_items"],
        "revision": config.revision,
        "origin": config.origin,
        "stale": config.stale,
    }
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


def tenant(scope):
    """The layers of a request. In earnest, take the tenant from what you have authenticated."""
    for name, value in scope["headers"]:
        if name == b"x-tenant":
            return [f"tenants/{value.decode('latin-1')}/"]
    return []


app = ConfigMiddleware(
    shop, client=ConfigClient(defaults={"checkout/max_items": 50}), layers=tenant, revision_header=True
)
