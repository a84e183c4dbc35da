"""The middleware for `app.add_middleware`: the core's, which can make a client of its own.

Owns where the client comes from; all that happens to a request is `veltrix_mw.asgi`'s.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, Self, cast

from starlette.types import ASGIApp, Scope

from veltrix_mw import ConfigClient, SettingsError, asgi
from veltrix_mw.events import Events
from veltrix_mw.request_layers import InvalidLayerPolicy

__all__ = ["ConfigMiddleware"]

_events = Events()

_INSTRUMENTED: Final = ("opentelemetry.instrumentation.asgi", "starlette.middleware.opentelemetry")


class ConfigMiddleware(asgi.ConfigMiddleware):
    """Gives every HTTP request and websocket of the app a view pinned to one snapshot: `request.state.config`.

    The app and the server see nothing else changed. Never raises on its own, and never blocks the event loop. Where
    OpenTelemetry's middleware is next further in, as its instrumentation of Starlette puts it there, this one goes in
    once more: the span that says what config cost a request is to have begun.

    Args:
        app: given by Starlette.
        client: the client; what the app reads and writes with outside of requests too.
        url: instead of a client, its URL: `sqlite:///config.db`; without both, `$VELTRIX_URL`. The client that is
            made so is started by the lifespan or by the first request, and closed by the lifespan.
        layers: `layers(scope)` gives the prefixes laid over the base for this request. Units that lie below lazy
            prefixes are loaded before the app is called.
        prefetch: `prefetch(scope)` gives keys below lazy prefixes whose units are loaded then, too.
        attribute: the name in `request.state`.
        revision_header: whether responses carry `X-Config-Revision`.
        on_invalid_layer: `reject` answers 400 (a websocket is closed with 1008) to a request whose layer is no
            prefix, or whose key to prefetch is none; `ignore` drops it.
        settings: without `client`, what `ConfigClient` takes: `mirror=` (default `$VELTRIX_MIRROR_URL`), `lazy=`,
            `relay=`, `instance=`, `schemas=`, `defaults=`, `last_known_good=`, ...

    Raises:
        SettingsError: a setting is missing or wrong. Starlette makes its middleware when the app starts, so that is
            where it shows.
    """

    def __new__(cls, app: ASGIApp, **settings: Any) -> Self:
        """Where the server's span is begun next further in, that middleware with this one inside of it."""
        if not _begins_spans(app):
            return super().__new__(cls)
        app.app = cls(app.app, **settings)  # type: ignore[attr-defined]
        return cast("Self", app)

    def __init__(
        self,
        app: ASGIApp,
        *,
        client: ConfigClient | None = None,
        url: str | None = None,
        layers: Callable[[Scope], Sequence[str]] | None = None,
        prefetch: Callable[[Scope], Sequence[str]] | None = None,
        attribute: str = "config",
        revision_header: bool = False,
        on_invalid_layer: InvalidLayerPolicy = "reject",
        **settings: Any,
    ) -> None:
        try:
            made = _client(client, url, settings)
        except SettingsError as exc:
            # Starlette makes its middleware when the server asks for the start-up, and a server may take an error
            # there for an app without a lifespan: without this line it would start, and say nothing.
            _events.tell("veltrix.misconfigured", logging.ERROR, once=True, reason=str(exc))
            raise
        super().__init__(
            app,
            client=made,
            layers=layers,
            prefetch=prefetch,
            attribute=attribute,
            revision_header=revision_header,
            on_invalid_layer=on_invalid_layer,
        )


def _begins_spans(app: ASGIApp) -> bool:
    """Whether it is the middleware of OpenTelemetry's instrumentation, or Starlette's own of that kind."""
    modules = (sys.modules.get(name) for name in _INSTRUMENTED)
    return any(module is not None and isinstance(app, module.OpenTelemetryMiddleware) for module in modules)


def _client(client: ConfigClient | None, url: str | None, settings: dict[str, Any]) -> ConfigClient:
    if client is None:
        try:
            return ConfigClient(url, **settings)
        except TypeError as exc:
            raise SettingsError(f"ConfigMiddleware: {exc}") from exc
    if url is not None or settings:
        extra = ", ".join([*(["url"] if url is not None else []), *settings])
        raise SettingsError(f"client= is a client that is made already; give it these settings there: {extra}")
    return client
