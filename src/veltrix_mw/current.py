"""The current view: which view a piece of code reads, wherever it runs.

Owns the pin that holds it for a request, a task or a script and reports the reads at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from veltrix_mw.counting_view import CountingView
from veltrix_mw.errors import NoCurrentView
from veltrix_mw.overrides import process_overrides
from veltrix_mw.pinning import pinned_view
from veltrix_mw.request_layers import InvalidLayerPolicy, checked_keys, kept_layers
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.telemetry import current_context
from veltrix_mw.view import View
from veltrix_mw.views import Views, checked_layers

if TYPE_CHECKING:
    from opentelemetry.trace import Span

__all__ = ["Pinned", "annotate", "carry_view", "current_view", "report"]

T = TypeVar("T")

_current: ContextVar[View] = pinned_view


def current_view() -> View:
    """The view of the request that is being handled here.

    Works in whatever was given the request's context: handlers, templates, tasks, `asyncio.to_thread`. Outside of
    a request, and without `client.pinned()` around the call, raises `NoCurrentView`; while `override_config` is
    active it then gives a view of the overrides alone.
    """
    view = _current.get(None)
    if view is not None:
        return view
    if process_overrides():
        return _overrides_alone()
    raise NoCurrentView(
        "there is no request here: wrap the call in `with client.pinned():`, or give a thread or greenlet of your own "
        "the request's view with `carry_view(fn)`"
    )


def carry_view(fn: Callable[..., T]) -> Callable[..., T]:
    """`fn`, run with the view that is current now, wherever it is called.

    For what does not inherit the context: `loop.run_in_executor`, `threading.Thread`, `gevent.spawn`.
    """
    view = current_view()

    def run(*args: Any, **kwargs: Any) -> T:
        token = _current.set(view)
        try:
            return fn(*args, **kwargs)
        finally:
            _current.reset(token)

    return run


def reset_current(token: Token[View]) -> None:
    """End a `_current.set`; does nothing in a context that is not the one it was set in."""
    try:
        _current.reset(token)
    except ValueError:
        # A coroutine or generator that the garbage collector closes is closed in another context: nothing to undo.
        return


class Pinned:
    """A view that is current for a while: a request, a task, a script.

    A context manager; leaving it ends the pin and reports the request's reads to its span, once. Of a pin within a pin
    the outer one tells the reads, too: a span is told once what config cost.
    """

    __slots__ = ("_counted_outside", "_reported", "_span", "_tokens", "view")

    def __init__(self, view: View) -> None:
        self.view: View = view
        self._counted_outside = isinstance(view, CountingView)
        self._span: Span | None = None
        self._reported = False
        self._tokens: list[Token[View]] = []
        self.attach()

    def __enter__(self) -> View:
        self._tokens.append(_current.set(self.view))
        return self.view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()
        self.report()

    def attach(self) -> View:
        """Take the span that is current as the request's, if it has none; for frameworks that begin theirs late.

        Returns the view to read from now on, at the same revision.
        """
        if self._span is None and not self._counted_outside and not self._reported:
            counting = self.view._views.counted(self.view, current_context())
            if counting is not None:
                span, outer = counting._tally.span, _current.get(None)
                if isinstance(outer, CountingView) and outer._tally.span is span:
                    # Of a request that has a view already, this client's or another's: that one tells of all reads.
                    counting._tally, self._counted_outside = outer._tally, True
                else:
                    self._span = span
                self._replace(counting)
        return self.view

    def lay(self, layers: Sequence[str], *, on_invalid_layer: InvalidLayerPolicy = "reject") -> View:
        """Lay a request's prefixes over the base and over the layers that it has, at the revision that is pinned.

        Raises `InvalidKey` for what is no prefix; with `ignore` it is dropped, and counted, instead. Returns the view
        to read from now on.
        """
        view, views = self.view, self.view._views
        if on_invalid_layer == "ignore" and not isinstance(layers, str):
            layers = kept_layers(views, layers)
        wanted = tuple(dict.fromkeys((*checked_layers(layers, views.lazy), *view._request_layers)))
        if wanted == view._request_layers:
            return view
        laid = views._layered_view(wanted, None)
        if laid._snapshot is not view._snapshot or laid._overrides is not view._overrides:
            laid = View._make(views, view._snapshot, wanted, view._overrides, {}, view._own)
        if views.lazy:
            laid = laid._of_one(view._units)
        if isinstance(view, CountingView):
            laid = views.counting(laid, view._tally)
        self._replace(laid)
        return laid

    def load(self, keys: Sequence[str] = (), *, on_invalid_key: InvalidLayerPolicy = "reject") -> None:
        """Load the lazy units that the view's layers lie in, and those of `keys`, at once: what a handler then reads.

        What cannot be loaded is no error here; the read that needs it raises `NotLoaded`, and says why. Raises
        `InvalidKey` for what is no key; with `ignore` it is dropped, and counted, instead.
        """
        self.view._prefetch(checked_keys(self.view._views, keys, on_invalid_key))

    async def aload(self, keys: Sequence[str] = (), *, on_invalid_key: InvalidLayerPolicy = "reject") -> None:
        """`load` without blocking the event loop."""
        await self.view._aprefetch(checked_keys(self.view._views, keys, on_invalid_key))

    def _replace(self, view: View) -> None:
        self.view = view
        if self._tokens:
            _current.set(view)  # the token of the first `set` still ends it

    def leave(self) -> None:
        """Make the view current no longer; idempotent."""
        if self._tokens:
            reset_current(self._tokens.pop())

    def annotate(self) -> None:
        """Tell the request's span what config cost so far; for spans that end before the request does."""
        if self._span is not None and isinstance(self.view, CountingView):
            annotate(self.view)

    def report(self) -> None:
        """Tell the request's span what config cost, once; idempotent."""
        reported, self._reported = self._reported, True
        if reported:
            return
        span, self._span = self._span, None
        if span is not None and isinstance(self.view, CountingView):
            report(self.view)

    @staticmethod
    def prefer_current(view: View) -> View:
        """The current view if it is of the same client as `view`, else `view`."""
        current = _current.get(None)
        return current if current is not None and current._views is view._views else view


def annotate(view: CountingView) -> None:
    """Tell a request's span what config cost it so far."""
    tally, snapshot, views = view._tally, view._snapshot, view._views
    stale = view._age() > views.max_age_s
    views.telemetry.annotate_request(
        tally.span, snapshot._revision, snapshot._origin, stale, tally.count, tally.total_ns / 1e9
    )
    tally.told_ns = tally.total_ns


def report(view: CountingView) -> None:
    """Tell a request's span what config cost it, unless it knows that, and the histogram."""
    tally = view._tally
    if tally.told_ns != tally.total_ns:
        annotate(view)
    view._views.telemetry.record_request(tally.context, view._snapshot._origin, tally.total_ns / 1e9)


_detached: Views | None = None


def _overrides_alone() -> View:
    """A view of the process's overrides, for code under test that runs without a client."""
    global _detached
    if _detached is None:
        _detached = Views()
        _detached.publish(Snapshot(origin="override"), None)
    return _detached.base
