"""Forks: what comes to rest before one, and goes on after it, in an order.

Owns the order alone. `os.register_at_fork` runs its hooks by who was imported last, which is no order: a follower
must come to rest before the store that it calls is closed, or each waits for the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, NamedTuple

__all__ = ["FOLLOWERS", "STORES", "around_forks"]

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

    For modules, once each. What a hook raises is told by the interpreter, and does not keep the fork from happening.
    """
    _hooks.append(_Hooks(order, before, after_in_parent, after_in_child))
    _hooks.sort(key=lambda hooks: hooks.order)


def _before() -> None:
    for hooks in _hooks:
        hooks.before()


def _after_in_parent() -> None:
    for hooks in reversed(_hooks):
        hooks.after_in_parent()


def _after_in_child() -> None:
    for hooks in reversed(_hooks):
        hooks.after_in_child()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
