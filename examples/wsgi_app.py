"""Any WSGI app, without a framework: one line wraps it.

export VELTRIX_URL=sqlite:///shop.db
veltrix put checkout/max_items 50
gunicorn examples.wsgi_app:app --workers 2

curl http://127.0.0.1:8000/                                       # at most 50 items
veltrix put tenants/acme/checkout/max_items 500                   # in another terminal
curl -H 'X-Tenant: acme' http://127.0.0.1:8000/                   # at most 500 items
"""

import json
import os

from veltrix_mw import ConfigClient
from veltrix_mw.wsgi import ConfigMiddleware


def shop(environ, start_response):
    config = environ["veltrix.view"]
    answer = {
        "pid": os.getpid(),
        "checkout/max_items": config["checkout/max_items"],
        "revision": config.revision,
        "origin": config.origin,
        "stale": config.stale,
    }
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]


def tenant(environ):
    """The layers of a request. In earnest, take the tenant from what you have authenticated."""
    name = environ.get("HTTP_X_TENANT")
    return [f"tenants/{name}/"] if name else []


app = ConfigMiddleware(
    shop, client=ConfigClient(defaults={"checkout/max_items": 50}), layers=tenant, revision_header=True
)
