"""Pinning: the ContextVar that holds the current view.

Owns the variable alone, so that whoever pins (`current`) and the view, which pins itself while it derives, share it.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veltrix_mw.view import View

__all__ = ["pinned_view"]

pinned_view: ContextVar[View] = ContextVar("veltrix_view")
