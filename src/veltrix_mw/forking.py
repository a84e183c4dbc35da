"""Forks: what comes to rest before one, and goes on after it, in an order; and what begins anew in a child.

Owns the order alone. `os.register_at_fork` runs its hooks by who was imported last, which is no order: a follower
must come to rest before the store that it calls is closed, or each waits for the other.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol
from weakref import WeakSet

from veltrix_mw.events import Events

__all__ = ["FOLLOWERS", "STORES", "anew_after_fork", "around_forks"]

_events = Events()

FOLLOWERS: Final = 0  # who calls stores
STORES: Final = 1


class _Hooks(NamedTuple):
    order: int
    before: Callable[[], None]
    after_in_parent: Callable[[], None]
    after_in_child: Callable[[], None]


_hooks: list[_Hooks] = []


def around_forks(
    order: int,
    *,
    before: Callable[[], None],
    after_in_parent: Callable[[], None],
    after_in_child: Callable[[], None],
) -> None:
    """Run these around every fork that Python makes: `before` in ascending order, the others in descending.

    For modules, once each. What a hook raises is logged, and keeps neither the fork nor another hook from happening.
    """
    _hooks.append(_Hooks(order, before, after_in_parent, after_in_child))
    _hooks.sort(key=lambda hooks: hooks.order)


class Forked(Protocol):
    """What a forked child finds in the middle of something: a lock that is held, a thread that stayed in the parent."""

    def _after_fork(self) -> None: ...


_anew: WeakSet[Forked] = WeakSet()


def anew_after_fork(thing: Forked) -> None:
    """Call `thing._after_fork()` in each forked child, before any hook of `around_forks`; keeps it not alive."""
    _anew.add(thing)


_failed: list[str] = []  # what hooks raised, until it can be told
_forking = threading.RLock()  # held from `before` to `after`: two threads that fork at once would mix what they hold


def _before() -> None:
    _forking.acquire()
    for hooks in _hooks:
        _run(hooks.before)


def _after_in_parent() -> None:
    for hooks in reversed(_hooks):
        _run(hooks.after_in_parent)
    failed = _taken()
    _forking.release()
    _tell(failed)


def _after_in_child() -> None:
    global _forking
    _forking = threading.RLock()
    _failed.clear()  # the parent tells it
    for thing in list(_anew):
        _run(thing._after_fork)
    for hooks in reversed(_hooks):
        _run(hooks.after_in_child)
    _tell(_taken())


def _run(hook: Callable[[], None]) -> None:
    try:
        hook()
    except Exception as exc:  # noqa: BLE001  # one hook that fails must not keep the others from letting go
        _failed.append(type(exc).__name__)


def _taken() -> list[str]:
    """What failed, with the lock held still: another thread's fork has its own."""
    taken = list(_failed)
    _failed.clear()
    return taken


def _tell(failed: list[str]) -> None:
    for error in failed:
        _events.tell("veltrix.fork_hook_failed", logging.ERROR, error=error)


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
