"""veltrix-mw for Starlette and FastAPI: a view pinned to each HTTP request and websocket.

`app.add_middleware(ConfigMiddleware, client=client)`, then `request.state.config`, `get_config(request)`, or in
FastAPI a parameter `config: RequestConfig`. Needs FastAPI only once `RequestConfig` is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette_veltrix.accessor import get_config
from starlette_veltrix.middleware import ConfigMiddleware

if TYPE_CHECKING:
    from starlette_veltrix.parameter import RequestConfig

__all__ = ["ConfigMiddleware", "RequestConfig", "get_config"]


def __getattr__(name: str) -> Any:
    if name != "RequestConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from starlette_veltrix.parameter import RequestConfig
    except ModuleNotFoundError as exc:
        if exc.name != "fastapi":
            raise
        raise ImportError(
            "RequestConfig is a FastAPI parameter and FastAPI is not installed: pip install 'veltrix-mw[fastapi]'; "
            "in Starlette read request.state.config"
        ) from exc
    globals()[name] = RequestConfig
    return RequestConfig
