"""The counting view: what a traced request reads, counted and timed for its span.

Owns what is counted and what is timed, and at level `lookups` a span around each read. What a read gives is `view`'s to
say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from veltrix_mw.deriving import Derived
from veltrix_mw.section import Section
from veltrix_mw.telemetry import LookupOutcome, unless_current
from veltrix_mw.values import MISSING
from veltrix_mw.view import View

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

__all__ = ["CountingView", "LookupView", "Tally"]


class Tally:
    """How many reads a request made, and how long they and its waits took; its views share it.

    `span` is the request's, and `context` OpenTelemetry's as it began, with that span.
    """

    __slots__ = ("context", "count", "span", "told_ns", "total_ns")

    def __init__(self, span: Span, context: Context) -> None:
        self.span = span
        self.context = context
        self.count = 0
        self.total_ns = 0
        self.told_ns = -1  # of these, what the span was told


class CountingView(View):
    """The view of a request whose span records: it counts and times its reads, and times its waits.

    Reads of several threads at once may be counted as one: the figures are for people.
    """

    __slots__ = ("_tally",)

    _tally: Tally

    def renew(self) -> View:
        renewed = super().renew()._as(type(self))
        renewed._tally = self._tally
        return renewed

    def __getitem__(self, key: str) -> Any:
        begun = time.perf_counter_ns()
        try:
            return View.__getitem__(self, key)
        finally:
            self._counted(begun)

    def get(self, key: str, /, default: Any = None) -> Any:
        begun = time.perf_counter_ns()
        try:
            return View.get(self, key, default)
        finally:
            self._counted(begun)

    def __contains__(self, key: object) -> bool:
        begun = time.perf_counter_ns()
        try:
            return View.__contains__(self, key)
        finally:
            self._counted(begun)

    def _section(self, prefix: str) -> Section:
        begun = time.perf_counter_ns()
        try:
            return super()._section(prefix)
        finally:
            self._counted(begun)

    def _all_keys(self) -> tuple[str, ...]:
        begun = time.perf_counter_ns()
        try:
            return super()._all_keys()
        finally:
            self._counted(begun)

    def _derive(self, name: Any, fn: Callable[[View], Any], model: Any) -> Derived:
        begun = time.perf_counter_ns()
        try:
            return super()._derive(name, fn, model)
        finally:
            self._counted(begun)

    def _load(self, wanted: list[str], timeout_s: float | None) -> None:
        begun = time.perf_counter_ns()
        try:
            super()._load(wanted, timeout_s)
        finally:
            self._waited(begun)

    async def _aload(self, wanted: list[str], timeout_s: float | None) -> None:
        begun = time.perf_counter_ns()
        try:
            await super()._aload(wanted, timeout_s)
        finally:
            self._waited(begun)

    def _prefetch(self, keys: Iterable[str]) -> None:
        begun = time.perf_counter_ns()
        try:
            super()._prefetch(keys)
        finally:
            self._waited(begun)

    async def _aprefetch(self, keys: Iterable[str]) -> None:
        begun = time.perf_counter_ns()
        try:
            await super()._aprefetch(keys)
        finally:
            self._waited(begun)

    def _trace(self) -> Context | None:
        # A body may be streamed, and a thread may read, where no span is current any more.
        return unless_current(self._tally.context)

    def _waited(self, begun_ns: int) -> None:
        self._tally.total_ns += time.perf_counter_ns() - begun_ns

    def _counted(self, begun_ns: int) -> None:
        tally = self._tally
        tally.count += 1
        tally.total_ns += time.perf_counter_ns() - begun_ns


class LookupView(CountingView):
    """A counting view that also opens a span for each read: level `lookups`.

    The span of a section names its prefix, that of a derived value what makes it, that of an iteration names nothing.
    """

    __slots__ = ()

    def __getitem__(self, key: str) -> Any:
        with self._lookup(key):
            return super().__getitem__(key)

    def get(self, key: str, /, default: Any = None) -> Any:
        with self._lookup(key) as outcome:
            value = super().get(key, MISSING)
            if value is MISSING:
                outcome.result = "miss"
                return default
            return value

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        with self._lookup(key) as outcome:
            found = super().__contains__(key)
            if not found:
                outcome.result = "miss"
            return found

    def _section(self, prefix: str) -> Section:
        with self._lookup(prefix):
            return super()._section(prefix)

    def _all_keys(self) -> tuple[str, ...]:
        with self._lookup(""):
            return super()._all_keys()

    def _derive(self, name: Any, fn: Callable[[View], Any], model: Any) -> Derived:
        with self._lookup(getattr(fn, "__qualname__", type(fn).__qualname__)):
            return super()._derive(name, fn, model)

    def _lookup(self, key: str) -> AbstractContextManager[LookupOutcome]:
        return self._views.telemetry.lookup(key, self._trace())
