"""The demo's load: one thread a worker that asks it over and over, and what became of each request.

Owns the counting; decides nothing about what is good enough. Every request counts, and none is asked twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any, Final

from veltrix_mw.cli.demo_stage import DemoFailed, Line, expect

__all__ = ["Load", "loaded"]

_EVERY_S: Final = 0.02  # between two requests to one worker: the error of what is measured
_END_S: Final = 15.0  # longer than one request may take


class Load:
    """The requests to one worker. Written by its own thread alone; what others read of it is whole."""

    def __init__(self, pid: int, line: Line) -> None:
        self.pid = pid
        self.requests = 0
        self.failed = 0
        self.failure = ""  # the first one
        self.slowest_s = 0.0
        self.backwards = 0  # answers at a lower revision than one before them
        self.torn = 0  # answers with another value than one before them at the same revision
        self.answer: Mapping[str, Any] = {}  # the last one
        self.values: dict[int, Any] = {}  # by the revision they were served at
        self.relays: list[str] = []  # the worker's relays, in turn
        self._reached: list[tuple[int, float]] = []  # each revision, and when it was first served; ascending
        self._line = line

    def reached_s(self, revision: int) -> float | None:
        """When the worker first answered at that revision or a later one, on the monotonic clock."""
        return next((at_s for reached, at_s in list(self._reached) if reached >= revision), None)

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self._ask()
            stop.wait(_EVERY_S)

    def _ask(self) -> None:
        self.requests += 1
        try:
            answer, took_s = self._line.get("/")
            expect(answer["pid"] == self.pid, f"worker {answer['pid']} answered in the place of {self.pid}")
        except (OSError, HTTPException, ValueError, DemoFailed) as exc:
            self.failed += 1
            self.failure = self.failure or f"{type(exc).__name__}: {exc}"
            self._line.close()  # the next request opens it anew
            return
        self.slowest_s = max(self.slowest_s, took_s)
        self._note(answer)

    def _note(self, answer: Mapping[str, Any]) -> None:
        revision, value = answer["revision"], answer["max_items"]
        highest = self._reached[-1][0] if self._reached else -1
        if revision > highest:
            self._reached.append((revision, time.monotonic()))
        self.backwards += revision < highest
        self.torn += self.values.setdefault(revision, value) != value
        relay = answer["relay"]
        if relay is not None and self.relays[-1:] != [relay]:
            self.relays.append(relay)
        self.answer = answer


@contextmanager
def loaded(lines: Mapping[int, Line]) -> Iterator[list[Load]]:
    """Each worker under load, until the block ends."""
    loads = [Load(pid, line) for pid, line in lines.items()]
    stop = threading.Event()
    threads = [threading.Thread(target=load.run, args=(stop,), name=f"load-{load.pid}", daemon=True) for load in loads]
    for thread in threads:
        thread.start()
    try:
        yield loads
    finally:
        stop.set()
        for thread in threads:
            thread.join(_END_S)
