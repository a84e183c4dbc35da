"""WSGI middleware: pins a view to each request, to the last byte of its body.

Owns the WSGI side of a request's view; knows no framework.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final

from veltrix_mw.client import ConfigClient
from veltrix_mw.current import Pinned, report
from veltrix_mw.errors import InvalidKey, SettingsError
from veltrix_mw.pinning import pinned_view as _current
from veltrix_mw.request_layers import (
    BAD_LAYER,
    InvalidLayerPolicy,
    checked_policy,
    requested_keys,
    requested_layers,
    requested_view,
)
from veltrix_mw.telemetry import current_context
from veltrix_mw.view import View

__all__ = ["VIEW_KEY", "ConfigMiddleware", "carried_body"]

Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[bytes], object]]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

VIEW_KEY: Final = "veltrix.view"
"""Where the environ carries the view."""


_COMPLETE: Final = frozenset({list, tuple})

_pin, _unpin = _current.set, _current.reset  # bound once: every request calls both


class ConfigMiddleware:
    """Gives every request of `app` a view pinned to one snapshot.

    The view is `environ["veltrix.view"]` and `current_view()`, in the app and while its body is iterated and closed,
    in whichever thread. The app and the server see nothing else changed. Never raises on its own.

    Args:
        app: the WSGI application.
        client: the client; started by the first request at the latest.
        layers: `layers(environ)` gives the prefixes laid over the base for this request. Units that lie below lazy
            prefixes are loaded before the app is called.
        prefetch: `prefetch(environ)` gives keys below lazy prefixes whose units are loaded before the app is called,
            too, all of them at once. The handler then only reads; what could not be loaded raises `NotLoaded` there.
        revision_header: whether responses carry `X-Config-Revision`.
        on_invalid_layer: `reject` answers 400 to a request whose layer is no prefix, or whose key to prefetch is none;
            `ignore` drops it.
    """

    def __init__(
        self,
        app: App,
        *,
        client: ConfigClient,
        layers: Callable[[Environ], Sequence[str]] | None = None,
        prefetch: Callable[[Environ], Sequence[str]] | None = None,
        revision_header: bool = False,
        on_invalid_layer: InvalidLayerPolicy = "reject",
    ) -> None:
        if not isinstance(client, ConfigClient):
            raise SettingsError(f"client is a ConfigClient, not {type(client).__name__}")
        self.app = app
        self.client = client
        self._layers = layers
        self._prefetch = prefetch
        self._is_lazy = bool(client.lazy)
        self._revision_header = revision_header
        self._on_invalid_layer: InvalidLayerPolicy = checked_policy(on_invalid_layer)
        self._views = client._views
        self._plain = False  # whether the client is ready and requests ask for nothing more

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if VIEW_KEY in environ or not self._plain:
            return self._call_asking(environ, start_response)
        # The rest is what most requests pay, written out: the calls of `client.view()` would be a third of it, and so
        # would be to ask the kernel each time whether this still is the process that follows. Forks are told by a
        # hook; only one made in C, past the hook, is noticed here, up to 15 requests late.
        views = self._views
        views.made = made = views.made + 1
        if not made & 15:
            views.ensure_running()
        view, context = views.base, current_context()
        if context and (counting := views.counted(view, context)) is not None:
            return self._call_with(counting, partial(report, counting), environ, start_response)
        environ[VIEW_KEY] = view
        token = _pin(view)
        try:
            body = self.app(environ, start_response)
        finally:
            _unpin(token)
        return body if type(body) is list else carried_body(body, environ, view, _nothing)

    def _call_asking(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Serve a request that may be pinned further out, or may have layers, or may have to wait for the start."""
        outer: View | None = environ.get(VIEW_KEY)
        # A view that is not the current one was left by a request that this environ was sent for before.
        if outer is not None and _current.get(None) is outer:
            return self._call_inside(outer, environ, start_response)
        waited_ns = 0 if self._plain else self._start()
        try:
            view = requested_view(self.client, self._layers, environ, self._on_invalid_layer)
            context = current_context()
            counting = self._views.counted(view, context) if context else None
            if counting is not None:
                counting._tally.total_ns += waited_ns
                view = counting
            if self._is_lazy:
                view._prefetch(requested_keys(self.client, self._prefetch, environ, self._on_invalid_layer))
        except InvalidKey:
            return _refuse(environ, start_response)
        if self._revision_header:
            start_response = _with_header(start_response, view)
        end = _nothing if counting is None else partial(report, counting)
        return self._call_with(view, end, environ, start_response)

    def _call_with(
        self, view: View, end: Callable[[], None], environ: Environ, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve a request with its view, and call `end` after its last byte."""
        environ[VIEW_KEY] = view
        token = _pin(view)
        try:
            body = self.app(environ, start_response)
        except BaseException:
            end()
            raise
        finally:
            _unpin(token)
        if type(body) is list:
            end()
            return body
        return carried_body(body, environ, view, end)

    @property
    def _asks_nothing(self) -> bool:
        """Whether requests get no more here than a view."""
        return self._layers is None and self._prefetch is None and not self._revision_header

    def _call_inside(self, outer: View, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Serve a request that is pinned further out, to `outer`.

        Of the same client it keeps its revision, and gets what is asked for here on top. Further out, all stays as it
        was.
        """
        same = outer._views is self._views
        if same and self._asks_nothing:
            return self.app(environ, start_response)
        if not same and not self._plain:
            self._start()
        pinned = Pinned(outer if same else self.client.view())
        try:
            if self._layers is not None:
                pinned.lay(requested_layers(self._layers, environ), on_invalid_layer=self._on_invalid_layer)
            if self._is_lazy:
                pinned.view._prefetch(requested_keys(self.client, self._prefetch, environ, self._on_invalid_layer))
        except InvalidKey:
            return _refuse(environ, start_response)
        view = pinned.view
        if self._revision_header:
            start_response = _with_header(start_response, view)

        def end() -> None:
            environ[VIEW_KEY] = outer
            pinned.report()

        environ[VIEW_KEY] = view
        pinned.__enter__()
        try:
            body = self.app(environ, start_response)
        except BaseException:
            end()
            raise
        finally:
            pinned.leave()
        return carried_body(body, environ, view, end)

    def _start(self) -> int:
        """Wait for the client's start, if it has not begun; returns how long that took, in nanoseconds."""
        client, begun_ns = self.client, time.perf_counter_ns()
        waits = not client.begun
        if waits:
            client._ensure_running()
            client.wait_start()
        # A client that is ready stays so, also across a fork.
        self._plain = client.ready and self._asks_nothing and not self._is_lazy
        return time.perf_counter_ns() - begun_ns if waits else 0


def _nothing() -> None:
    """What there is to do at the end of a request that nobody traces."""


def carried_body(body: Iterable[bytes], environ: Environ, view: View, end: Callable[[], None]) -> Iterable[bytes]:
    """`body`, iterated and closed with `view` as the current one; `end` is called after it.

    A body that reads no config any more goes back untouched, and `end` is called now.
    """
    if _is_complete(body, environ):
        end()
        return body
    return (_SizedBody if hasattr(body, "__len__") else _Body)(body, view, end)


def _is_complete(body: Iterable[bytes], environ: Environ) -> bool:
    """Whether the body reads no config any more: a list, or a file, which servers send in their own way.

    Servers recognize their file wrapper by its type (gunicorn) or its identity (uWSGI): it must go back untouched.
    """
    if type(body) in _COMPLETE or hasattr(body, "read"):
        return True
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(wrapper, type) and isinstance(body, wrapper)


class _Body:
    """A response body that is iterated and closed with the request's view as the current one.

    The view is set around each step, not from first to last: a body may be iterated in one context, and closed in
    another. What else the app's own object has is reached through it: a Django response stays one to its tests.
    """

    __slots__ = ("_body", "_end", "_iterator", "_view")

    def __init__(self, body: Iterable[bytes], view: View, end: Callable[[], None]) -> None:
        self._body = body
        self._iterator: Iterator[bytes] | None = None
        self._view = view
        self._end = end

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        token = _current.set(self._view)
        try:
            if self._iterator is None:
                self._iterator = iter(self._body)
            return next(self._iterator)
        finally:
            _current.reset(token)

    def close(self) -> None:
        token = _current.set(self._view)
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            _current.reset(token)
            end, self._end = self._end, _nothing
            end()

    def __bytes__(self) -> bytes:
        return bytes(self._body)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


class _SizedBody(_Body):
    """A body that knows its number of parts: servers derive Content-Length from a single one."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


def _refuse(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    body = BAD_LAYER.encode()
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
    start_response("400 Bad Request", headers)
    return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]


def _with_header(start_response: StartResponse, view: View) -> StartResponse:
    def starting(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Callable[[bytes], object]:
        ours = ("X-Config-Revision", str(view.revision))
        # A middleware further in may have sent it already.
        return start_response(status, headers if ours in headers else [*headers, ours], *exc_info)

    return starting
