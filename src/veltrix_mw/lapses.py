"""Lapses: has memos forget what has become too old to be read without a look at its age.

Owns the thread that sees to it, one a client; knows no view, no key and no rule.

Views live on for as long as requests and streams do, and their reads must not pay for a clock: so what was read while
it was fresh stays a dictionary's, and a thread empties that at the moment when the age passes the limit. The follower
cannot be that thread: it hangs in a call to the store just then.
"""

from __future__ import annotations

import contextvars
import logging
import math
import threading
from collections.abc import Callable
from typing import Final
from weakref import WeakSet

from veltrix_mw.background import BackgroundThread
from veltrix_mw.events import NO_THREAD, Events
from veltrix_mw.memo import Memo

__all__ = ["Lapses"]

_WAIT_MOST_S: Final = 3600.0  # `Condition.wait` takes no number of seconds that a clock cannot hold


class Lapses:
    """Forgets in time what memos keep; thread-safe.

    What is not kept, as no thread runs here (before the start, after the end, in a forked child), is judged by its age
    at each read.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._events = Events(part="lapses")
        # Protects all below, and every memo's limit. Reentrant: a finalizer may read a view while it is held.
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._kept: WeakSet[Memo] = WeakSet()
        self._due_s = math.inf  # until when the thread waits

    @property
    def running(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        """Start the thread, unless it runs."""
        with self._changed:
            if self._thread is not None:
                return
            # An empty context: it is no child of the request that happens to start it.
            thread = BackgroundThread(target=contextvars.Context().run, args=(self._run,), name="veltrix-lapses")
            self._thread = thread
            started = True
            try:
                thread.start()
            except RuntimeError:  # no more threads, or the interpreter is ending: each read is judged by itself
                self._thread = None
                started = False
        if started:
            self._events.tell_end("veltrix.lapses_started")
        else:
            self._events.tell("veltrix.lapses_not_started", logging.WARNING, NO_THREAD)

    def stop(self) -> None:
        """End the thread; nothing is kept from here on. Idempotent."""
        with self._changed:
            self._thread = None
            self._changed.notify_all()
        self._forget_all()

    def after_fork(self) -> None:
        """In a forked child: the thread stayed in the parent, and so did whoever held the lock."""
        self._changed = threading.Condition()
        self._thread = None
        self._due_s = math.inf
        self._forget_all()

    def keep(self, memo: Memo, limit_s: float) -> None:
        """Have `memo` forget at this age what was put there just now, and all else."""
        with self._changed:
            running = self._thread is not None
            if running:
                memo.limit_s = min(memo.limit_s, limit_s)
                self._kept.add(memo)
                if memo.lapses_at_s < self._due_s:
                    self._changed.notify_all()
        if not running:
            memo.forget()

    def look(self, memo: Memo) -> None:
        """Have `memo` forget now, if it is to have."""
        if memo.lapses_at_s <= self._clock():
            self._lapse([memo])

    def sweep(self) -> None:
        """Have all forget now that are to have."""
        now_s = self._clock()
        with self._changed:
            lapsed = [memo for memo in self._kept if memo.lapses_at_s <= now_s]
        self._lapse(lapsed)

    def _lapse(self, memos: list[Memo]) -> None:
        # Let go of before they are emptied: whoever puts something in after that has it kept anew.
        with self._changed:
            for memo in memos:
                self._kept.discard(memo)
                memo.limit_s = math.inf
        for memo in memos:  # without the lock: what was kept may have finalizers
            memo.forget()

    def _forget_all(self) -> None:
        kept, self._kept = self._kept, WeakSet()
        self._lapse(list(kept))

    def _run(self) -> None:
        while self._waited():
            self.sweep()

    def _waited(self) -> bool:
        """Wait until a memo is to forget; whether this thread is still the one to see to it."""
        with self._changed:
            mine = self._thread is threading.current_thread()
            self._due_s = min((memo.lapses_at_s for memo in self._kept), default=math.inf)
            wait_s = self._due_s - self._clock()
            if mine and wait_s > 0:
                self._changed.wait(min(wait_s, _WAIT_MOST_S))
            return self._thread is threading.current_thread()
