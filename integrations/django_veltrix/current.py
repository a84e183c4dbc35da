"""`config`: the current request's view, by a name that can be imported.

Owns where a read without a request at hand goes; pins nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Final, cast

from django.core.management.base import BaseCommand

from django_veltrix.project import get_client
from veltrix_mw import NoCurrentView, View, current_view

__all__ = ["CurrentConfig", "config"]


class CurrentConfig:
    """Reads like the view that is current where it is read: the request's, or that of `get_client().pinned()`.

    In a management command and in `manage.py shell`, where no request is, each access takes a fresh view of the
    project's client (so two accesses may see two revisions: pin one with `get_client().pinned()`). Elsewhere outside
    a request it raises `NoCurrentView`, or reads the values of an active `override_config`.
    """

    __slots__ = ()

    def __getitem__(self, key: str) -> Any:
        return _view()[key]

    def __contains__(self, key: object) -> bool:
        return key in _view()

    def __iter__(self) -> Iterator[str]:
        return iter(_view())

    def __len__(self) -> int:
        return len(_view())

    def __getattr__(self, name: str) -> Any:
        # Only what a view has: tools that look modules through ask everything for `__wrapped__` and the like, and
        # must hear AttributeError, not that there is no request.
        if name.startswith("_") or not hasattr(View, name):
            raise AttributeError(f"a view has no {name!r}")
        return getattr(_view(), name)

    def __repr__(self) -> str:
        return "<config of the current request>"


config: Final = cast("View", CurrentConfig())
"""The current request's view: `config["checkout/max_items"]`, `config.get(...)`, `config.bind(...)`."""


def _view() -> View:
    try:
        view = current_view()
    except NoCurrentView:
        if not _in_command():
            raise
        return _fresh_view()
    # With no current view, an active `override_config` is all that `current_view` knows; a command has a client too.
    return _fresh_view() if view.origin == "override" and _in_command() else view


def _fresh_view() -> View:
    return get_client().pinned().view


_EXECUTE: Final = BaseCommand.execute.__code__


def _in_command() -> bool:
    """Whether this code was called by a management command.

    Read from the stack, as Django tells nobody that a command runs; only what found no view comes here (some µs).
    Commands that run a server or tests run other code, which is to meet what it meets in production.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _EXECUTE:
        if frame.f_back is None:
            return False
        frame = frame.f_back
    from django.core.management.commands import runserver, test

    return not isinstance(frame.f_locals.get("self"), (runserver.Command, test.Command))
