"""Pins: one view for each request of an app, to the last byte of its body.

Owns where in Flask's handling of a request the view is pinned, layered, counted and let go. The request's environ
holds the pin: `g` may be another request's (an app context that was pushed before), and teardown functions may run
twice, in another thread, or never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Final, Literal

from flask import (
    Flask,
    Request,
    Response,
    current_app,
    g,
    got_request_exception,
    has_request_context,
    request,
    request_finished,
)
from werkzeug.exceptions import BadRequest

from veltrix_mw import ConfigClient, InvalidKey, Pinned, SettingsError, View
from veltrix_mw.request_layers import BAD_LAYER, InvalidLayerPolicy
from veltrix_mw.wsgi import VIEW_KEY, ConfigMiddleware, carried_body

__all__ = ["Layers", "Pins", "Prefetch"]

Layers = Callable[[Request], Iterable[str]]
Prefetch = Callable[[Request], Iterable[str]]

_Environ = dict[str, Any]
_App = Callable[[_Environ, Any], Iterable[bytes]]

_TRACER: Final = "opentelemetry."  # the modules whose before_request functions begin the request's span


class _InvalidLayer(BadRequest):
    """The request's layer is no prefix; answered before the app's own functions run. Never shows the layer."""

    description = BAD_LAYER


@dataclass(slots=True, eq=False)
class _Held:
    """The pin of one request. `thread` is set if a hook entered it: the WSGI layer leaves its own by itself."""

    pinned: Pinned
    served: bool
    laid: Literal["no", "now", "yes"] = "no"
    thread: int | None = None


class Pins:
    """Gives each request of one app its view, and says which view is current in a context of that app.

    Every read within a request sees one revision, whichever way the request came in: through `wsgi_app`, through
    `full_dispatch_request`, or as a bare `test_request_context`.
    """

    def __init__(
        self,
        app: Flask,
        *,
        client: ConfigClient,
        url: str | None,
        mirror: str | None,
        layers: Layers | None,
        prefetch: Prefetch | None,
        on_invalid_layer: InvalidLayerPolicy,
    ) -> None:
        self.client = client
        self._url = url
        self._mirror = mirror
        self._app = app
        self._layers = layers
        self._prefetch = prefetch
        self._on_invalid_layer: InvalidLayerPolicy = on_invalid_layer
        self._key = f"flask_veltrix.{id(self):x}"  # an environ may pass through several apps
        self._placed = False

    def install(self, *, revision_header: bool) -> None:
        """Put the hooks and the WSGI middleware into the app; raises `AssertionError` after its first request."""
        app = self._app
        app.before_request(self._begin)
        app.before_request(self._attach)
        app.teardown_request(self._end)
        self._place()
        # The span of OpenTelemetry's instrumentation ends in a teardown function, before the body is sent.
        request_finished.connect(self._annotate, app)
        got_request_exception.connect(self._annotate, app)
        app.wsgi_app = ConfigMiddleware(  # type: ignore[method-assign]
            _PinnedApp(app.wsgi_app, self), client=self.client, revision_header=revision_header
        )

    # What is current

    @property
    def url(self) -> str:
        """The URL of the app's store; without its password if the client was handed in."""
        return self._url or self.client.status().tiers[0].url

    @property
    def mirror(self) -> str:
        """The URL of its mirror, empty if it has none; without its password if the client was handed in."""
        if self._mirror is not None:
            return self._mirror
        return next((tier.url for tier in self.client.status().tiers if tier.role == "mirror"), "")

    def view(self) -> View:
        """The view of this app's request; in an app context alone (CLI, shell) the current or a fresh one.

        Raises `BadRequest` where a request with an invalid layer is read before it is refused.
        """
        if has_request_context():
            held: _Held | None = request.environ.get(self._key)
            if held is not None and held.laid == "yes":
                return held.pinned.view
            if held is not None or self._is_own_request():
                return self._held(request.environ).pinned.view
        return Pinned.prefer_current(self.client.pinned().view)

    def _is_own_request(self) -> bool:
        """Whether the request is this app's: another's context may be pushed over it."""
        from flask.globals import app_ctx

        merged = getattr(app_ctx, "has_request", None)  # Flask 3.2 has one context for both
        if merged is not None:
            return bool(merged) and current_app == self._app
        from flask.globals import request_ctx

        return request_ctx.app is self._app

    def _held(self, environ: _Environ) -> _Held:
        """The pin of the request, made and layered now if there is none yet."""
        held: _Held | None = environ.get(self._key)
        if held is None:
            self._place_once()
            held = environ[self._key] = _Held(self.client.pinned(), served=False)
        if held.laid == "no":
            held.laid = "now"  # what `layers` itself reads is the base
            try:
                self._lay(held.pinned)
            except BaseException:
                held.laid = "no"
                raise
            held.laid = "yes"
        return held

    def _lay(self, pinned: Pinned) -> None:
        """Lay the request's layers, then load what of them is lazy, and what the app wants beside it."""
        try:
            if self._layers is not None:
                layers = self._layers(request._get_current_object())  # type: ignore[attr-defined]
                if isinstance(layers, str):
                    raise SettingsError(
                        "layers= returns a sequence of prefixes, for example ['tenants/acme/'], not a str"
                    )
                pinned.lay(tuple(layers), on_invalid_layer=self._on_invalid_layer)
            if self.client.lazy:
                pinned.load(self._keys(), on_invalid_key=self._on_invalid_layer)
        except InvalidKey as exc:
            raise _InvalidLayer from exc

    def _keys(self) -> tuple[str, ...]:
        if self._prefetch is None:
            return ()
        keys = self._prefetch(request._get_current_object())  # type: ignore[attr-defined]
        if isinstance(keys, str):
            raise SettingsError("prefetch= returns a sequence of keys, for example ['tenants/acme/limit'], not a str")
        return tuple(keys)

    # Flask's hooks

    def begin_serving(self, environ: _Environ) -> Pinned:
        """The pin of a request that comes in through `wsgi_app`, which leaves and reports it."""
        self._place_once()
        pinned = Pinned(environ[VIEW_KEY])
        environ[self._key] = _Held(pinned, served=True)
        return pinned

    def _begin(self) -> Response | None:
        environ = request.environ
        try:
            held = self._held(environ)
        except _InvalidLayer as refusal:
            return Response(refusal.description, 400, mimetype="text/plain")
        if not held.served and held.thread is None:
            held.thread = get_ident()
            held.pinned.__enter__()
        self._show(environ, held.pinned.attach())
        return None

    def _attach(self) -> None:
        environ = request.environ
        held: _Held | None = environ.get(self._key)
        if held is not None:
            view = held.pinned.view
            if held.pinned.attach() is not view:
                self._show(environ, held.pinned.view)

    def _show(self, environ: _Environ, view: View) -> None:
        environ[VIEW_KEY] = g.config = view

    def _annotate(self, _sender: Flask, **_details: object) -> None:
        held: _Held | None = request.environ.get(self._key)
        if held is not None:
            held.pinned.attach()  # a span that no before_request function came to see
            held.pinned.annotate()

    def _end(self, _error: BaseException | None) -> None:
        held: _Held | None = request.environ.get(self._key)
        # A copy of the request's context ends in its own thread, where the view was never set.
        if held is not None and held.thread == get_ident():
            held.pinned.leave()
            held.pinned.report()

    def _place_once(self) -> None:
        """At the first request, when no function can be registered any more."""
        if not self._placed:
            self._place()
            self._placed = True

    def _place(self) -> None:
        """Put `_begin` before the app's own functions, `_attach` behind the one that begins the span, whoever came
        first.

        The list is swapped, not changed: another thread may be going through it.
        """
        hooks = [hook for hook in self._app.before_request_funcs[None] if hook not in (self._begin, self._attach)]
        traced = [at for at, hook in enumerate(hooks) if _begins_span(hook)]
        leading = next((at for at, hook in enumerate(hooks) if not _begins_span(hook)), len(hooks))
        last = traced[-1] + 1 if traced else 0
        self._app.before_request_funcs[None] = [
            *hooks[:leading],
            self._begin,
            *hooks[leading:last],
            self._attach,
            *hooks[max(leading, last) :],
        ]


def _begins_span(hook: Callable[..., Any]) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_TRACER)


class _PinnedApp:
    """The app inside of `ConfigMiddleware`: where its hooks put another view in place, the body gets that too."""

    __slots__ = ("_app", "_pins")

    def __init__(self, app: _App, pins: Pins) -> None:
        self._app = app
        self._pins = pins

    def __call__(self, environ: _Environ, start_response: Any) -> Iterable[bytes]:
        pinned = self._pins.begin_serving(environ)
        first = pinned.view

        def end() -> None:
            environ[VIEW_KEY] = first  # what further out knows as its own
            pinned.report()

        pinned.__enter__()
        try:
            body = self._app(environ, start_response)
        except BaseException:
            end()
            raise
        finally:
            pinned.leave()
        if pinned.view is first:
            return body  # ConfigMiddleware's own view: it sees to the body
        return carried_body(body, environ, pinned.view, end)
