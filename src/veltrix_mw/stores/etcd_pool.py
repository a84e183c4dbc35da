"""Connections to etcd's members that wait for the next call.

Owns how many wait, and that a process uses none that it inherited. Knows nothing of what is said on them.
"""

from __future__ import annotations

import os
import threading
from typing import Final, Generic, Protocol, TypeVar

from veltrix_mw.settings import Host

__all__ = ["Pool", "Resting"]

_MAX_IDLE: Final = 4  # of one member: a follower and a few writers at once


class Resting(Protocol):
    """A connection that one call at a time is made on."""

    def is_at_rest(self) -> bool:
        """Whether another call may be made on it."""
        ...

    def close(self) -> None: ...


C = TypeVar("C", bound=Resting)


class _Kept(Generic[C]):
    """What one process keeps. `lock` protects all of it; `epoch` counts how often all of it was closed."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.idle: dict[Host, list[C]] = {}
        self.epoch = 0


class Pool(Generic[C]):
    """The idle connections to each member.

    Thread-safe. In a forked child it is empty, and what was inherited is closed, unused.
    """

    def __init__(self) -> None:
        self._kept = _Kept[C]()

    @property
    def epoch(self) -> int:
        """Which of its lives the pool is in: a connection that was opened in an earlier one is not taken back."""
        return self._here().epoch

    @property
    def idle(self) -> tuple[C, ...]:
        """What waits now."""
        here = self._here()
        with here.lock:
            return tuple(connection for each in here.idle.values() for connection in each)

    def borrow(self, host: Host) -> C | None:
        here = self._here()
        with here.lock:
            idle = here.idle.get(host, [])
            while idle:
                connection = idle.pop()
                if connection.is_at_rest():
                    return connection
                connection.close()
        return None

    def give_back(self, host: Host, connection: C, epoch: int) -> None:
        here = self._here()
        with here.lock:
            idle = here.idle.setdefault(host, [])
            if epoch == here.epoch and len(idle) < _MAX_IDLE:
                idle.append(connection)
                return
        connection.close()

    def drop(self, host: Host | None = None) -> None:
        """Close what waits for a member; without one, for all, and what is in use when it comes back."""
        here = self._here()
        with here.lock:
            if host is None:
                here.epoch += 1
                doomed = [connection for each in here.idle.values() for connection in each]
                here.idle = {}
            else:
                doomed = here.idle.pop(host, [])
        for connection in doomed:
            connection.close()

    def _here(self) -> _Kept[C]:
        here = self._kept
        if here.pid != os.getpid():
            # A child, and one that no hook told so. The lock there may be held by a thread that it does not have.
            inherited, here = here, _Kept[C]()
            self._kept = here
            for each in inherited.idle.values():
                for connection in each:
                    connection.close()
        return here
