"""Overrides of the whole process, for tests: values that lie over every view made while they are active.

Owns the stack of them; whoever makes views registers here and is told of each change.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from weakref import WeakSet

from veltrix_mw.keys import check_key
from veltrix_mw.values import FrozenDict, freeze

__all__ = ["Overridden", "override_process", "process_overrides", "tell_of_overrides"]


class Overridden(Protocol):
    """What makes views, and must make them anew when the overrides change."""

    def override(self) -> None:
        """Take up `process_overrides()` as they are now."""
        ...


_process_overrides: Mapping[str, Any] = FrozenDict()
_process_layers: list[Mapping[str, Any]] = []
_process_lock = threading.Lock()  # protects what stands around it; held while views are rebuilt
_overridden: WeakSet[Overridden] = WeakSet()


def override_process(values: Mapping[str, Any]) -> Callable[[], None]:
    """Lay `values` over every view of the process that is made from now on; returns the function that ends it."""
    layer = FrozenDict({check_key(key): freeze(value) for key, value in values.items()})
    with _process_lock:
        _process_layers.append(layer)
        _rebuild_overrides()
    ended = threading.Event()

    def end() -> None:
        with _process_lock:
            if not ended.is_set():
                ended.set()
                # By identity: an equal layer of someone else stays.
                _process_layers[:] = [other for other in _process_layers if other is not layer]
                _rebuild_overrides()

    return end


def _rebuild_overrides() -> None:
    global _process_overrides
    merged: dict[str, Any] = {}
    for layer in _process_layers:
        merged.update(layer)
    _process_overrides = FrozenDict(merged) if merged else FrozenDict()
    for overridden in list(_overridden):
        overridden.override()


def process_overrides() -> Mapping[str, Any]:
    """What is active now; empty outside of tests."""
    return _process_overrides


def tell_of_overrides(overridden: Overridden) -> None:
    """Call `overridden.override()` at each change, for as long as it lives."""
    with _process_lock:
        _overridden.add(overridden)


def _renew_lock() -> None:
    """In a forked child: another thread of the parent may have held it, and no thread here would ever let go."""
    global _process_lock
    _process_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
