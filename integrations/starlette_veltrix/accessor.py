"""The accessor: the view of a request or websocket, wherever the app holds one.

Owns where the view is looked for; knows Starlette's connections only as things with a scope.
"""

from __future__ import annotations

from starlette.requests import HTTPConnection

from veltrix_mw import NoCurrentView, View, current_view
from veltrix_mw.asgi import VIEW_KEY

__all__ = ["get_config"]


def get_config(connection: HTTPConnection) -> View:
    """The view of this request or websocket.

    Also where the context is gone already, as in `exception_handler(Exception)`: the scope is read first, the
    current view second. Raises `NoCurrentView` when the app has no `ConfigMiddleware`.
    """
    view: View | None = connection.scope.get(VIEW_KEY)
    if view is not None:
        return view
    try:
        return current_view()
    except NoCurrentView:
        raise NoCurrentView(
            "no view is pinned to this request: add the middleware, "
            "app.add_middleware(ConfigMiddleware, client=client); a test without one uses override_config"
        ) from None
