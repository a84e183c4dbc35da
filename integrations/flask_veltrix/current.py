"""`config`: the current view, wherever an app's code runs.

Owns what "current" means in Flask; the views are made in `pins`.
"""

from __future__ import annotations

from flask import current_app
from werkzeug.local import LocalProxy

from flask_veltrix.pins import Pins
from veltrix_mw import NoCurrentView, View, current_view

__all__ = ["config"]


class _OutsideOfFlask(NoCurrentView, RuntimeError):
    """`NoCurrentView`, as a proxy's `repr`, `bool` and `dir` expect it: as a RuntimeError."""


def _current() -> View:
    pins: Pins | None = current_app.extensions.get("veltrix") if current_app else None
    if pins is not None:
        return pins.view()
    try:
        return current_view()  # a thread that was given the request's view and no app
    except NoCurrentView:
        raise _OutsideOfFlask(
            "config was read on an app without Veltrix: call Veltrix(app) where the app is made"
            if current_app
            else "config was read outside of a request: push one with `with app.app_context():`, or give a thread "
            "the request's view with `veltrix_mw.carry_view(fn)`"
        ) from None


config: View = LocalProxy(_current)  # type: ignore[assignment]
"""The view of the request that is being handled: `config["checkout/max_items"]`.

Within a request, its copies in threads and its streamed body, every read sees one revision. In an app context
without a request (`flask shell`, a command) each read sees the newest, or the view of `client.pinned()` around it.
Elsewhere it raises `NoCurrentView`.
"""
