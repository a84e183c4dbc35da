"""The FastAPI parameter: `config: RequestConfig` in an endpoint or a dependency.

Owns the dependency; the one module here that imports FastAPI.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from starlette_veltrix.accessor import get_config
from veltrix_mw import View

__all__ = ["RequestConfig"]


async def _request_config(connection: HTTPConnection) -> View:
    # `async`, though it awaits nothing: FastAPI runs a plain function in a thread, which costs 450 us a request.
    return get_config(connection)


RequestConfig = Annotated[View, Depends(_request_config)]
"""The request's view, in HTTP and websocket endpoints; no part of the OpenAPI schema."""
