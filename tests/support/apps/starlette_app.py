"""A Starlette app."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from starlette_veltrix import ConfigMiddleware
from tests.support.apps.answers import line, report, wait_for
from veltrix_mw import ConfigClient


async def config(request: Request) -> Response:
    return JSONResponse(report(request.state.config))


async def stream(request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        yield line(request.state.config)
        await asyncio.to_thread(wait_for, request.query_params["fifo"])
        yield line(request.state.config)

    return StreamingResponse(parts(), media_type="application/json")


app = Starlette(routes=[Route("/config", config), Route("/stream", stream)])
app.add_middleware(ConfigMiddleware, client=ConfigClient())
