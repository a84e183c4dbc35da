"""Settings: what `VELTRIX_*` in `app.config` means.

Owns the settings' names and the fallback of debug mode; what their values may be is the client's to say.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final
from urllib.parse import quote

from flask import Flask

from veltrix_mw import ConfigClient, SettingsError
from veltrix_mw.events import Events

__all__ = ["CLIENT_SETTINGS", "Chosen", "MissingUrl", "chosen_client"]

CLIENT_SETTINGS: Final[Mapping[str, str]] = {
    "VELTRIX_URL": "url",
    "VELTRIX_MIRROR_URL": "mirror",
    "VELTRIX_NAMESPACE": "namespace",
    "VELTRIX_LAZY": "lazy",
    "VELTRIX_LAYERS": "layers",
    "VELTRIX_DEFAULTS": "defaults",
    "VELTRIX_SCHEMAS": "schemas",
    "VELTRIX_LAST_KNOWN_GOOD": "last_known_good",
    "VELTRIX_TELEMETRY": "telemetry",
    "VELTRIX_MAX_AGE_S": "max_age_s",
    "VELTRIX_FRESHNESS": "freshness",
    "VELTRIX_START_TIMEOUT_S": "start_timeout_s",
    "VELTRIX_FETCH_TIMEOUT_S": "fetch_timeout_s",
    "VELTRIX_LAZY_MAX_BYTES": "lazy_max_bytes",
    "VELTRIX_RELAY": "relay",
    "VELTRIX_INSTANCE": "instance",
}
"""Each setting that makes the client, and the argument of `ConfigClient` that it is."""

_REVISION_HEADER: Final = "VELTRIX_REVISION_HEADER"

_events = Events("flask_veltrix")


class MissingUrl(SettingsError):
    """No store is named, and debug mode is off. Name one."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What an app's settings came to: its client, the URLs if it was made here, and whether `X-Config-Revision` is
    sent.

    `mirror` is empty where the app has none.
    """

    client: ConfigClient
    url: str | None
    mirror: str | None
    revision_header: bool


def chosen_client(app: Flask, client: ConfigClient | None) -> Chosen:
    """`client`, else one made from the app's settings. Raises `SettingsError` for what is wrong in them."""
    given = {name: value for name, value in app.config.items() if name.startswith("VELTRIX_")}
    for name in given:
        _check_name(name)
    header = given.pop(_REVISION_HEADER, False)
    if not isinstance(header, bool):
        raise SettingsError(f"{_REVISION_HEADER} is True or False, not {header!r}")
    arguments = {CLIENT_SETTINGS[name]: value for name, value in given.items() if value is not None}
    if client is None:
        url = arguments.pop("url", None) or os.environ.get("VELTRIX_URL") or _fallback(app)
        mirror = arguments.pop("mirror", os.environ.get("VELTRIX_MIRROR_URL", ""))
        return Chosen(ConfigClient(url, mirror=mirror, **arguments), url, mirror, header)
    if not isinstance(client, ConfigClient):
        raise SettingsError(f"client is a ConfigClient, not {type(client).__name__}")
    idle = sorted(name for name, value in given.items() if value is not None)
    if idle:
        raise SettingsError(f"{', '.join(idle)} would change nothing beside client=: keep the client or the settings")
    return Chosen(client, None, None, header)


def _check_name(name: str) -> None:
    known = [*CLIENT_SETTINGS, _REVISION_HEADER]
    if name not in known:
        prefix = len("VELTRIX_")  # all have it: it would make any two names look alike
        close = get_close_matches(name[prefix:], [other[prefix:] for other in known], n=1)
        hint = f"did you mean VELTRIX_{close[0]}?" if close else f"there are {', '.join(known)}"
        raise SettingsError(f"{name} in app.config is no setting of veltrix; {hint}")


def _fallback(app: Flask) -> str:
    """The file of debug mode, in the app's own folder: it exists and it is where its developer looks."""
    if not app.debug:
        raise MissingUrl(
            f"no config store is named for the app {app.name!r}: "
            'write app.config["VELTRIX_URL"] = "sqlite:////srv/shop/config.db" (embedded: a file, no server) '
            "or set $VELTRIX_URL; without either it runs in debug mode only (flask --debug run)"
        )
    url = "sqlite:///" + quote(str(Path(app.root_path).absolute() / "veltrix.db"))
    text = "no VELTRIX_URL is set; outside of debug mode this is an error"
    _events.tell("veltrix.debug_store", logging.WARNING, text, once=True, url=url)
    return url
