"""Background threads, and signals: what goes on whoever started it, and can be waited for from anywhere.

Owns what gevent changes about that; knows nothing of what is done, or waited for. Imports no gevent.

A thread of a patched process is a greenlet of the native thread that starts it, and runs only while that waits for
something. Where a native thread beside the main one is the first to need a thread of ours, as one of gevent's own pool
that fetches, all others would wait for a greenlet that nobody runs any more. So it becomes one of the main thread's.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

__all__ = ["BackgroundThread", "Signal"]

_START_S: Final = 1.0  # a main thread that does not come to it by then runs no greenlets, or none for long

_found: list[Any] = []  # the main thread's hub, once it was looked for and there was one


class Signal:
    """Is set once, and any number of threads wait for it, as do greenlets of several of them.

    In a patched process an event of `threading` is gevent's, for which the greenlets of one native thread can wait.
    """

    __slots__ = ("_changed", "_is_set")

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())  # protects the one below; its waiters have a lock each
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        with self._changed:
            self._is_set = True
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it was set in time, in seconds."""
        with self._changed:
            return self._changed.wait_for(self.is_set, timeout)


class BackgroundThread(threading.Thread):
    """A daemon thread that goes on when the thread that started it has ended; any thread may join it."""

    def __init__(self, *, target: Callable[..., object], args: tuple[Any, ...] = (), name: str) -> None:
        super().__init__(target=target, args=args, name=name, daemon=True)
        self._has_ended = Signal()

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._has_ended.set()

    def start(self) -> None:
        """As a thread's. Raises `RuntimeError` where no more can be started."""
        hub = _hub_elsewhere()
        if hub is None:
            super().start()
            return
        turns, begun, faults = [self._start_here], Signal(), list[RuntimeError]()

        def begin() -> None:
            with suppress(IndexError):  # it took too long, and was started where it was asked for
                start = turns.pop()
                try:
                    start()
                except RuntimeError as exc:
                    faults.append(exc)
                finally:
                    begun.set()

        hub.loop.run_callback_threadsafe(sys.modules["gevent"].spawn, begin)
        if not begun.wait(_START_S):
            try:
                turns.pop()()
            except IndexError:
                begun.wait()  # it is being started at this moment
        for fault in faults:
            raise fault

    def _start_here(self) -> None:
        super().start()

    def join(self, timeout: float | None = None) -> None:
        """As a thread's."""
        if _hub_elsewhere() is None:
            super().join(timeout)
        else:
            self._has_ended.wait(timeout)  # greenlets of another native thread cannot be joined


def _hub_elsewhere() -> Any:
    """The hub of gevent's that runs the main thread's greenlets, where that is not the calling thread; else None."""
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return None
    if not _found:
        # gevent keeps each thread's hub for that thread alone; it looks for others in the same way itself.
        hub_type = sys.modules["gevent.hub"].Hub
        _found.extend(each for each in gc.get_objects() if issubclass(type(each), hub_type) and each.main_hub)
    if not _found or _found[0].thread_ident == monkey.get_original("_thread", "get_ident")():
        return None
    return _found[0]
