"""A shop on FastAPI whose checkout limit is changed while it runs.

export VELTRIX_URL=sqlite:///shop.db
veltrix put checkout/max_items 50
uvicorn examples.fastapi_app:app --workers 2 --lifespan on

curl -X POST 'http://127.0.0.1:8000/checkout?items=60'   # 409: at most 50 items
veltrix put checkout/max_items 80                        # in another terminal
curl -X POST 'http://127.0.0.1:8000/checkout?items=60'   # 200, without a restart, from each worker

On many hosts the code stays as it is:

export VELTRIX_URL=etcd://h1:2379,h2:2379,h3:2379/shop VELTRIX_MIRROR_URL=redis://h4:6379/0
"""

import os
from dataclasses import dataclass

from fastapi import BackgroundTasks, FastAPI, HTTPException

from starlette_veltrix import ConfigMiddleware, RequestConfig
from veltrix_mw import current_view


@dataclass(frozen=True)
class Checkout:
    """What is below `checkout/`. A change that does not fit is rejected, and the last good value stays."""

    max_items: int = 50
    currency: str = "EUR"


app = FastAPI()
app.add_middleware(ConfigMiddleware, schemas={"checkout/": Checkout})  # a client of its own, from VELTRIX_URL


@app.post("/checkout")
def checkout(config: RequestConfig, tasks: BackgroundTasks, items: int = 1) -> dict[str, int | str]:
    settings = config.bind(Checkout, "checkout/")
    if items > settings.max_items:
        raise HTTPException(409, f"at most {settings.max_items} items")
    tasks.add_task(send_receipt, items)
    return {"bought": items, "currency": settings.currency}


def send_receipt(items: int) -> None:
    """Runs after the response, in a thread, with the view of the request that ordered it."""
    view = current_view()
    print(f"receipt for {items} items, by the settings of revision {view.revision}")


@app.get("/config")
async def show(config: RequestConfig) -> dict[str, int | str | bool]:
    """Which process answered, from which revision, and how old that is."""
    return {
        "pid": os.getpid(),
        "checkout/max_items": config.bind(Checkout, "checkout/").max_items,
        "revision": config.revision,
        "origin": config.origin,
        "stale": config.stale,
    }
