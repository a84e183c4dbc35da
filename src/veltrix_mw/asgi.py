"""ASGI middleware: pins a view to each HTTP request and websocket.

Owns the ASGI side of a request's view and of the client's lifetime; knows no framework.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Final, TypeVar

from veltrix_mw.awaiting import in_thread
from veltrix_mw.client import ConfigClient
from veltrix_mw.current import Pinned, annotate, report
from veltrix_mw.errors import InvalidKey, SettingsError
from veltrix_mw.events import Events
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
from veltrix_mw.values import MISSING
from veltrix_mw.view import View

__all__ = ["VIEW_KEY", "ConfigMiddleware"]

T = TypeVar("T")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

VIEW_KEY: Final = "veltrix.view"
"""Where the scope carries the view; `scope["state"]["config"]` is the name that apps use."""

_PINNED: Final = frozenset({"http", "websocket"})
_LAST: Final = frozenset({"http.response.trailers", "http.response.pathsend"})  # that end a response, beside a body

_UNKNOWN_SCOPE: Final = frozenset({ValueError, AssertionError, KeyError, NotImplementedError, TypeError})
"""What apps that know no lifespan raise: Django, Channels and asgiref a ValueError; by hand, `assert` and lookups."""

_events = Events()


_pin, _unpin = _current.set, _current.reset  # bound once: every request calls both


class ConfigMiddleware:
    """Gives every HTTP request and websocket of `app` a view pinned to one snapshot.

    The view is `scope["state"]["config"]` (`request.state.config`) and `current_view()`. The app and the server see
    nothing else changed. Never raises on its own, and never blocks the event loop, whatever the stores do.

    Args:
        app: the ASGI application.
        client: the client; started by the lifespan or by the first request, and closed by the lifespan if it was
            not started before.
        layers: `layers(scope)` gives the prefixes laid over the base for this request, for example
            `["tenants/acme/"]`. Units that lie below lazy prefixes are loaded before the app is called.
        prefetch: `prefetch(scope)` gives keys below lazy prefixes whose units are loaded before the app is called, too,
            all of them at once. The handler then only reads; what could not be loaded raises `NotLoaded` there.
        attribute: the name in `scope["state"]`.
        revision_header: whether responses carry `X-Config-Revision`.
        on_invalid_layer: `reject` answers 400 (a websocket is closed with 1008) to a request whose layer is no
            prefix, or whose key to prefetch is none; `ignore` drops it.
    """

    def __init__(
        self,
        app: App,
        *,
        client: ConfigClient,
        layers: Callable[[Scope], Sequence[str]] | None = None,
        prefetch: Callable[[Scope], Sequence[str]] | None = None,
        attribute: str = "config",
        revision_header: bool = False,
        on_invalid_layer: InvalidLayerPolicy = "reject",
    ) -> None:
        if not isinstance(client, ConfigClient):
            raise SettingsError(f"client is a ConfigClient, not {type(client).__name__}")
        self.app = app  # a name that OpenTelemetry's FastAPI instrumentation walks along
        self.client = client
        self._layers = layers
        self._prefetch = prefetch
        self._is_lazy = bool(client.lazy)
        self._attribute = attribute
        self._revision_header = revision_header
        self._on_invalid_layer: InvalidLayerPolicy = checked_policy(on_invalid_layer)
        self._views = client._views
        self._plain = False  # whether the client is ready and requests ask for nothing more

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # One coroutine from server to app: a second one costs a third of all that attaching a view does.
        kind = scope["type"]
        if kind not in _PINNED:
            handler = _Lifespan(self.app, self.client) if kind == "lifespan" else self.app
            await handler(scope, receive, send)
            return
        outer: View | None = scope.get(VIEW_KEY)
        if outer is None and self._plain:
            # As in `wsgi`: `client.view()`, written out, and a look at the process id now and then.
            views = self._views
            views.made = made = views.made + 1
            if not made & 15:
                views.ensure_running()
            view = views.base
            context = current_context()
            counting = views.counted(view, context) if context else None
        else:
            # A view that is not the current one was left by a request that this scope was sent for before.
            if outer is not None and _current.get(None) is outer:
                await self._call_inside(outer, scope, receive, send)
                return
            waited_ns = 0 if self._plain else await self._start()
            try:
                view = requested_view(self.client, self._layers, scope, self._on_invalid_layer)
                context = current_context()
                counting = self._views.counted(view, context) if context else None
                if counting is not None:
                    counting._tally.total_ns += waited_ns
                    view = counting
                if self._is_lazy:
                    keys = requested_keys(self.client, self._prefetch, scope, self._on_invalid_layer)
                    await view._aprefetch(keys)
            except InvalidKey:
                await _refuse(scope, receive, send)
                return
            if self._revision_header and kind == "http":
                send = _with_header(send, view)
        if counting is not None:
            view = counting
            if kind == "http":
                send = _before_the_last(send, annotate, counting)
        # In place: a copied scope would hide what inner parts add to it (`route`) from outer middleware.
        state = scope.setdefault("state", {})
        state[self._attribute] = scope[VIEW_KEY] = view
        token = _pin(view)
        try:
            await self.app(scope, receive, send)
        finally:
            try:  # noqa: SIM105 - `suppress` would be a call for each request
                _unpin(token)
            except ValueError:
                pass  # closed by the garbage collector, in another context: there is nothing to undo
            if counting is not None:
                report(counting)

    @property
    def _asks_nothing(self) -> bool:
        """Whether requests get no more here than a view."""
        return self._layers is None and self._prefetch is None and not self._revision_header

    async def _call_inside(self, outer: View, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request that is pinned further out, to `outer`: wrapped twice, or mounted in an app that is wrapped.

        Of the same client it keeps its revision, and gets what is asked for here on top. Further out, all stays as it
        was.
        """
        same = outer._views is self._views
        state = scope.setdefault("state", {})
        shadowed = state.get(self._attribute, MISSING)
        if same and self._asks_nothing and shadowed is outer:
            await self.app(scope, receive, send)
            return
        if not same and not self._plain:
            await self._start()
        pinned = Pinned(outer if same else self.client.view())
        try:
            if self._layers is not None:
                pinned.lay(requested_layers(self._layers, scope), on_invalid_layer=self._on_invalid_layer)
            if self._is_lazy:
                await pinned.view._aprefetch(requested_keys(self.client, self._prefetch, scope, self._on_invalid_layer))
        except InvalidKey:
            await _refuse(scope, receive, send)
            return
        if scope["type"] == "http":
            if self._revision_header:
                send = _with_header(send, pinned.view)
            if pinned._span is not None:
                send = _before_the_last(send, Pinned.annotate, pinned)
        state[self._attribute] = scope[VIEW_KEY] = pinned.view
        try:
            with pinned:
                await self.app(scope, receive, send)
        finally:
            scope[VIEW_KEY] = outer
            if shadowed is MISSING:
                state.pop(self._attribute, None)
            else:
                state[self._attribute] = shadowed

    async def _start(self) -> int:
        """Wait for the client's start, if it has not begun; returns how long that took, in nanoseconds."""
        client, begun_ns = self.client, time.perf_counter_ns()
        waits = not client.begun
        if waits:
            client._ensure_running()
            await client.await_start()
        # A client that is ready stays so, also across a fork.
        self._plain = client.ready and self._asks_nothing and not self._is_lazy
        return time.perf_counter_ns() - begun_ns if waits else 0


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()  # the connect; only then may it be closed
        await send({"type": "websocket.close", "code": 1008, "reason": BAD_LAYER})
        return
    body = BAD_LAYER.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _with_header(send: Send, view: View) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            ours, headers = (b"x-config-revision", b"%d" % view.revision), list(message.get("headers", ()))
            # A middleware further in may have sent it already.
            if not any((name.lower(), value) == ours for name, value in headers):
                message = {**message, "headers": [*headers, ours]}
        await send(message)

    return sending


def _before_the_last(send: Send, annotate: Callable[[T], None], request: T) -> Send:
    """Tell the span before the response's last message: OpenTelemetry's instrumentation of ASGI ends it then."""

    def sending(message: Message) -> Awaitable[None]:
        kind = message["type"]
        if (kind == "http.response.body" and not message.get("more_body", False)) or kind in _LAST:
            annotate(request)
        return send(message)  # and no coroutine around it

    return sending


class _Lifespan:
    """One lifespan of the app: the client runs while it does.

    The app's own answers and failures go through unchanged. An app that ends before it asked for the first message
    knows no lifespan; it is answered for here, and served all the same.
    """

    def __init__(self, app: App, client: ConfigClient) -> None:
        self._app = app
        self._client = client
        self._spoke = False
        self._release: Callable[[], None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._release = self._client.hold()

        async def receiving() -> Message:
            self._spoke = True
            return await receive()

        async def sending(message: Message) -> None:
            self._spoke = True
            if message["type"] != "lifespan.startup.complete":
                await self._let_go()
            await send(message)

        try:
            try:
                await self._run(scope, receiving, sending, receive, send)
            except GeneratorExit:
                raise  # the loop is gone: nothing can be awaited
            except BaseException:
                await self._let_go()
                raise
            await self._let_go()
        finally:
            self._released()  # what could not be awaited: also trio's cancelled tasks await nothing

    async def _run(self, scope: Scope, receiving: Receive, sending: Send, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receiving, sending)
        except Exception as exc:
            # Exactly these: what is derived from them (a failed decoding, an app's own class) tells of a failure.
            if self._spoke or type(exc) not in _UNKNOWN_SCOPE:
                raise
            _events.tell("veltrix.no_lifespan", logging.INFO, once=True, error=type(exc).__name__)
        if self._spoke:
            return
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await sending({"type": "lifespan.shutdown.complete"})

    async def _let_go(self) -> None:
        """Release the client, without blocking the loop: closing waits for threads."""
        if self._release is not None:
            await in_thread(self._released)

    def _released(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()
