"""The extension: gives Flask apps their configuration.

Owns what `Veltrix(app)` does to an app; how requests get their views is in `pins`, what settings mean in `settings`.
"""

from __future__ import annotations

from flask import Flask

from flask_veltrix.pins import Layers, Pins, Prefetch
from flask_veltrix.settings import chosen_client
from flask_veltrix.templates import add_to_templates
from veltrix_mw import ConfigClient, SettingsError
from veltrix_mw.request_layers import InvalidLayerPolicy, checked_policy

__all__ = ["Veltrix"]


class Veltrix:
    """The Flask extension: every request of an app reads one revision of its configuration.

    One object serves any number of apps; what belongs to an app lives in `app.extensions["veltrix"]`, whose `client`
    is the app's `ConfigClient`. Nothing is opened or started before the first request.

    Args:
        app: the app, or none, to call `init_app` later.
        client: the client of every app that is given none of its own; else each app's is made from its `VELTRIX_*`
            settings. A client that is handed in is the caller's to close.
        layers: `layers(request)` gives the prefixes laid over the base for this request, for example
            `["tenants/acme/"]`. Called once a request, before the app's own `before_request` functions. Units that lie
            below lazy prefixes are loaded then.
        prefetch: `prefetch(request)` gives keys below lazy prefixes whose units are loaded then, too, all at once. The
            view function then only reads; what could not be loaded raises `NotLoaded` there.
        on_invalid_layer: `reject` answers 400 to a request whose layer is no prefix, or whose key to prefetch is none;
            `ignore` drops it.

    Raises:
        SettingsError: a setting is missing, wrong or unknown, or the app has a Veltrix already.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        client: ConfigClient | None = None,
        layers: Layers | None = None,
        prefetch: Prefetch | None = None,
        on_invalid_layer: InvalidLayerPolicy = "reject",
    ) -> None:
        if layers is not None and not callable(layers):
            raise SettingsError(
                "layers= is a function of the request; prefixes that every request has are VELTRIX_LAYERS"
            )
        if prefetch is not None and not callable(prefetch):
            raise SettingsError("prefetch= is a function of the request, which gives keys")
        self._client = client
        self._layers = layers
        self._prefetch = prefetch
        self._on_invalid_layer: InvalidLayerPolicy = checked_policy(on_invalid_layer)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, *, client: ConfigClient | None = None) -> None:
        """Give `app` its configuration: from `client`, else the constructor's, else the app's settings.

        Raises `SettingsError` as the class says.
        """
        if "veltrix" in app.extensions:
            raise SettingsError(f"the app {app.name!r} has a Veltrix already: call init_app once for each app")
        chosen = chosen_client(app, self._client if client is None else client)
        pins = Pins(
            app,
            client=chosen.client,
            url=chosen.url,
            mirror=chosen.mirror,
            layers=self._layers,
            prefetch=self._prefetch,
            on_invalid_layer=self._on_invalid_layer,
        )
        pins.install(revision_header=chosen.revision_header)
        add_to_templates(app)
        app.extensions["veltrix"] = pins
