"""A shop of many tenants, read on demand, with a page that shows live what that costs.

uvicorn examples.tenants_app:app --workers 2 --lifespan on        # a store that is empty gets 2,000 tenants
wrk -t2 -c64 -d60s -s examples/tenants.lua http://127.0.0.1:8000  # meanwhile, open http://127.0.0.1:8000/live

curl http://127.0.0.1:8000/shop/eu/acme                           # acme's limit, its region's currency, the base's tax
export VELTRIX_URL=sqlite:///tenants.db                           # in another terminal; it is the default here
veltrix put tenants/acme/checkout/max_items 5                     # the next curl shows it; no tenant is read anew

On many hosts the code stays as it is. An empty store is seeded by the app; `seed` adds as many tenants as it is told:

export VELTRIX_URL=etcd://h1:2379,h2:2379,h3:2379/shop VELTRIX_MIRROR_URL=redis://h4:6379/0
python examples/tenants_app.py seed 50000
"""

import contextlib
import os
import sys
import time
from collections import deque
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Route

from starlette_veltrix import ConfigMiddleware
from veltrix_mw import ConfigClient, Conflict, NotLoaded, Put, StoreError

TENANTS = 2_000
USERS = 200
BASE = {"checkout/max_items": 50, "checkout/currency": "USD", "checkout/tax_percent": 0}
REGIONS = {"eu": {"currency": "EUR", "tax_percent": 20}, "uk": {"currency": "GBP"}, "jp": {"currency": "JPY"}}
AT_ONCE = 100  # operations in one revision: etcd takes 126

PAGE = Path(__file__).with_name("tenants_page")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

client = ConfigClient(
    os.environ.get("VELTRIX_URL", "sqlite:///tenants.db"),  # and, if it is set, VELTRIX_MIRROR_URL
    lazy=("tenants/", "users/"),
    lazy_max_bytes=1024 * 1024,  # a few hundred tenants, so that the page shows how they come and go
)


# --- what a request needs; in earnest, take the tenant and the user from what you have authenticated


def layers(scope):
    """A tenant's own settings over those of the region over the base; a name that is none is answered with 400."""
    match scope["path"].split("/"):
        case ["", "shop", region, tenant]:
            return [f"tenants/{tenant}/", f"regions/{region}/"]
    return []


def prefetch(scope):
    """The user's settings, read together with the tenant's."""
    user = user_of(scope)
    return [f"users/{user}/discount_percent"] if user else []


def user_of(scope):
    return QueryParams(scope["query_string"]).get("user", "")


# --- the shop

served = 0
latest = deque(maxlen=8)


async def shop(request):
    global served
    served += 1
    config, tenant, user = request.state.config, request.path_params["tenant"], user_of(request.scope)
    if f"tenants/{tenant}/name" not in config:
        return JSONResponse({"error": "there is no such shop"}, status_code=404)
    answer = {
        "name": config["name"],
        "max_items": config["checkout/max_items"],
        "currency": config["checkout/currency"],
        "tax_percent": config["checkout/tax_percent"],
        "discount_percent": config.get(f"users/{user}/discount_percent", 0) if user else 0,
    }
    latest.appendleft({"tenant": tenant, "region": request.path_params["region"], **answer})
    return JSONResponse(answer | {"pid": os.getpid(), "revision": config.revision})


async def not_loaded(request, exc):
    """The store is away, or more is asked for than it may be asked; what is held is served on."""
    return JSONResponse({"error": "try again"}, status_code=503, headers={"Retry-After": "1"})


# --- the page


async def live(request):
    return FileResponse(PAGE / "live.html", headers=HEADERS)


async def style(request):
    return FileResponse(PAGE / "live.css", headers=HEADERS)


async def script(request):
    return FileResponse(PAGE / "live.js", media_type="text/javascript", headers=HEADERS)


async def figures(request):
    """What this process counts. It closes the connection, so that the next answer may be another process's."""
    status = client.status().as_dict()
    told = {name: status[name] for name in ("revision", "origin", "age_s", "stale", "lazy")}
    told |= {"pid": os.getpid(), "at_s": time.monotonic(), "requests": served, "latest": list(latest)}
    return JSONResponse(told, headers={"Cache-Control": "no-store", "Connection": "close"})


# --- what an empty store gets


def write_base():
    """Raises `Conflict` where it is there."""
    regions = {f"regions/{name}/checkout/{key}": value for name, own in REGIONS.items() for key, value in own.items()}
    client.write([Put(key, value, expected=0) for key, value in (BASE | regions).items()])


def write_tenants(tenants=TENANTS):
    own = {"tenants/acme/name": "Acme", "tenants/acme/checkout/max_items": 500}
    for number in range(1, tenants + 1):
        own[f"tenants/t{number:04}/name"] = f"Shop {number}"
        if number % 3 == 0:
            own[f"tenants/t{number:04}/checkout/max_items"] = 100 + number
        if number % 10 == 0:
            own[f"tenants/t{number:04}/checkout/currency"] = "CHF"
    own |= {f"users/{number}/discount_percent": number % 30 for number in range(1, USERS + 1)}
    operations = [Put(key, value) for key, value in own.items()]
    for at in range(0, len(operations), AT_ONCE):
        client.write(operations[at : at + AT_ONCE])


def seed():
    """Of workers that start at once, the first does it."""
    with contextlib.suppress(Conflict, StoreError):  # it is seeded, or away: then what this process has is served
        write_base()
        write_tenants()


@contextlib.asynccontextmanager
async def lifespan(app):
    await run_in_threadpool(seed)
    yield


app = Starlette(
    routes=[
        Route("/shop/{region}/{tenant}", shop),
        Route("/live", live),
        Route("/live/live.css", style),
        Route("/live/live.js", script),
        Route("/live/figures", figures),
    ],
    exception_handlers={NotLoaded: not_loaded},
    lifespan=lifespan,
)
app.add_middleware(ConfigMiddleware, client=client, layers=layers, prefetch=prefetch)

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["seed", *tenants]:
            with client:
                with contextlib.suppress(Conflict):
                    write_base()
                count = int(tenants[0]) if tenants else TENANTS
                write_tenants(count)
                print(f"{count:,} tenants are written")
        case _:
            sys.exit("usage: python examples/tenants_app.py seed [TENANTS]; the app itself: see the first lines")
