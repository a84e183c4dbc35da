"""A Starlette app whose spans and metrics go to a collector, from each of its workers, to the last one.

export VELTRIX_URL=sqlite:///shop.db OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 OTEL_SERVICE_NAME=shop
veltrix put checkout/max_items 50
pip install opentelemetry-instrumentation-starlette
uvicorn examples.otlp_starlette:app --workers 2 --lifespan on
granian --interface asgi --workers 2 examples.otlp_starlette:app

curl http://127.0.0.1:8000/config
"""

import contextlib
import os

from opentelemetry.instrumentation.starlette import StarletteInstrumentor
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples import otlp
from starlette_veltrix import ConfigMiddleware


async def show(request):
    config = request.state.config
    answer = {"pid": os.getpid(), "checkout/max_items": config["checkout/max_items"], "revision": config.revision}
    return JSONResponse(answer)


@contextlib.asynccontextmanager
async def lifespan(app):
    yield
    await run_in_threadpool(otlp.end)  # uvicorn ends a worker without `atexit`


app = Starlette(routes=[Route("/config", show)], lifespan=lifespan)
app.add_middleware(ConfigMiddleware)
StarletteInstrumentor.instrument_app(app)
