"""A shop on Starlette whose checkout limit is changed while it runs.

export VELTRIX_URL=sqlite:///shop.db
veltrix put checkout/max_items 50
uvicorn examples.starlette_app:app --workers 2 --lifespan on

curl -X POST 'http://127.0.0.1:8000/checkout?items=60'   # 409: at most 50 items
veltrix put checkout/max_items 80                        # in another terminal
curl -X POST 'http://127.0.0.1:8000/checkout?items=60'   # 200, without a restart, from each worker
curl -N http://127.0.0.1:8000/countdown                  # change the limit meanwhile: a stream sees one revision
"""

import asyncio
import os

from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from starlette_veltrix import ConfigMiddleware, get_config
from veltrix_mw import ConfigClient, current_view

client = ConfigClient(defaults={"checkout/max_items": 50})  # reads VELTRIX_URL; the app's lifespan starts and closes it


async def checkout(request):
    limit = request.state.config["checkout/max_items"]
    items = int(request.query_params.get("items", 1))
    if items > limit:
        return JSONResponse({"error": f"at most {limit} items"}, status_code=409)
    return JSONResponse({"bought": items})


async def show(request):
    """Which process answered, from which revision, and how old that is."""
    config = request.state.config
    return JSONResponse(
        {
            "pid": os.getpid(),
            "checkout/max_items": config["checkout/max_items"],
            "revision": config.revision,
            "origin": config.origin,
            "stale": config.stale,
        }
    )


async def countdown(request):
    async def lines():
        for left in (3, 2, 1, 0):
            view = current_view()  # anywhere in the request, without handing it through
            yield f"{left}: at most {view['checkout/max_items']} items, revision {view.revision}\n"
            await asyncio.sleep(left and 1)

    return StreamingResponse(lines(), media_type="text/plain")


async def limits(websocket):
    """A long connection asks for a new view when it wants one: `renew`."""
    await websocket.accept()
    config = get_config(websocket)
    async for _ in websocket.iter_text():
        config = config.renew()
        await websocket.send_json({"limit": config["checkout/max_items"], "revision": config.revision})


async def failed(request, exc):
    """The last handler of all, outside of every middleware, reads the same view."""
    return JSONResponse({"error": "we are sorry", "revision": get_config(request).revision}, status_code=500)


app = Starlette(
    routes=[
        Route("/checkout", checkout, methods=["POST"]),
        Route("/config", show),
        Route("/countdown", countdown),
        WebSocketRoute("/limits", limits),
    ],
    exception_handlers={Exception: failed},
)
app.add_middleware(ConfigMiddleware, client=client)
