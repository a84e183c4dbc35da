"""Settings: what a project's `VELTRIX` says, checked.

Owns the names that `VELTRIX` may hold, and what a project without a URL gets. Opens nothing, starts nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import quote

from django.conf import settings as project_settings
from django.http import HttpRequest
from django.utils.module_loading import import_string

from veltrix_mw import ConfigClient, SettingsError

__all__ = ["EMBEDDED_FILE", "MissingUrl", "OfRequest", "Settings", "embedded_url", "unknown_names"]

OfRequest = Callable[[HttpRequest], Any]
"""`REQUEST_LAYERS` and `REQUEST_PREFETCH`: request -> prefixes, or keys; or a coroutine function of that."""

EMBEDDED_FILE: Final = "veltrix.db"
"""The file in BASE_DIR that a project with DEBUG on and without a URL keeps its config in."""

_ARGUMENTS: Final[Mapping[str, str]] = {
    "URL": "url",
    "MIRROR_URL": "mirror",
    "NAMESPACE": "namespace",
    "LAZY": "lazy",
    "LAYERS": "layers",
    "DEFAULTS": "defaults",
    "SCHEMAS": "schemas",
    "LAST_KNOWN_GOOD": "last_known_good",
    "TELEMETRY": "telemetry",
    "MAX_AGE_S": "max_age_s",
    "FRESHNESS": "freshness",
    "START_TIMEOUT_S": "start_timeout_s",
    "FETCH_TIMEOUT_S": "fetch_timeout_s",
    "LAZY_MAX_BYTES": "lazy_max_bytes",
    "RELAY": "relay",
    "INSTANCE": "instance",
}
"""What makes the client, and the argument of `ConfigClient` that each is."""

_NAMES: Final = (*_ARGUMENTS, "CLIENT", "REQUEST_LAYERS", "REQUEST_PREFETCH", "ON_INVALID_LAYER", "REVISION_HEADER")

_TYPES: Final[Mapping[str, tuple[tuple[type, ...], str]]] = {
    "URL": ((str,), "a str such as 'sqlite:////srv/shop/config.db'"),
    "MIRROR_URL": ((str,), "a str such as 'redis://h4:6379/0'"),
    "NAMESPACE": ((str,), "a str"),
    "LAZY": ((list, tuple), "a list of prefixes such as ['tenants/']"),
    "LAYERS": ((list, tuple), "a list of prefixes such as ['env/prod/']"),
    "DEFAULTS": ((Mapping,), "a dict of key to value"),
    "SCHEMAS": ((Mapping,), "a dict of prefix or key to a model, or to the dotted path of one"),
    "LAST_KNOWN_GOOD": ((str, os.PathLike), "the path of a folder"),
    "TELEMETRY": ((str,), "'off', 'requests' or 'lookups'"),
    "FRESHNESS": ((list, tuple), "a list such as [Freshness('flags/', max_age_s=20, on_stale='fail')]"),
    "RELAY": ((str,), "'auto' or 'never'"),
    "INSTANCE": ((str,), "a str"),
    "REVISION_HEADER": ((bool,), "True or False"),
}


class MissingUrl(SettingsError):
    """No store is named, and DEBUG is off. Name one."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A project's `VELTRIX`, checked as far as that needs no store.

    `arguments` are those of `ConfigClient`; `client` is a client, a function that makes one, or None; `embedded`
    is the file that DEBUG fell back to, or None. `request_layers` and `request_prefetch` may be coroutine functions.
    """

    arguments: Mapping[str, Any]
    client: ConfigClient | Callable[[], object] | None
    embedded: Path | None
    request_layers: OfRequest | None
    request_prefetch: OfRequest | None
    ignore_invalid_layer: bool
    revision_header: bool

    @classmethod
    def read(cls) -> Settings:
        """The settings of the project. Raises `SettingsError` that names the setting and says what it takes."""
        given = _given()
        for name, close in unknown_names(given):
            hint = f"did you mean {close!r}?" if close else f"it takes {', '.join(sorted(_NAMES))}"
            raise SettingsError(f"settings.VELTRIX has no setting {name!r}; {hint}")
        for name, (types, meaning) in _TYPES.items():
            if name in given and not isinstance(given[name], types):
                raise SettingsError(f"settings.VELTRIX[{name!r}] is {meaning}, not {type(given[name]).__name__}")
        policy = given.get("ON_INVALID_LAYER", "reject")
        if policy not in {"reject", "ignore"}:
            raise SettingsError(f"settings.VELTRIX['ON_INVALID_LAYER'] is 'reject' or 'ignore', not {policy!r}")
        arguments = {argument: given[name] for name, argument in _ARGUMENTS.items() if name in given}
        client, embedded = _client(given), None
        if client is None:
            if "schemas" in arguments:
                arguments["schemas"] = dict(_models(arguments["schemas"]))
            if "url" not in arguments and not os.environ.get("VELTRIX_URL"):
                embedded = _embedded_file()
                arguments["url"] = embedded_url(embedded)
        return cls(
            arguments=arguments,
            client=client,
            embedded=embedded,
            request_layers=_of_request(given, "REQUEST_LAYERS", "prefixes"),
            request_prefetch=_of_request(given, "REQUEST_PREFETCH", "keys"),
            ignore_invalid_layer=policy == "ignore",
            revision_header=given.get("REVISION_HEADER", False),
        )


def unknown_names(given: Iterable[object]) -> Iterator[tuple[object, str | None]]:
    """The names in `given` that `VELTRIX` does not know, each with the known one that is closest, if any is."""
    for name in given:
        if name not in _NAMES:
            close = get_close_matches(str(name).upper(), _NAMES, n=1)
            yield name, close[0] if close else None


def embedded_url(file: Path) -> str:
    """The URL of an embedded store in `file`."""
    return f"sqlite:///{quote(str(file.absolute()))}"


def _given() -> dict[str, Any]:
    """What the project wrote; None and "" count as left out, so that `os.environ.get(...)` can be written there."""
    given = getattr(project_settings, "VELTRIX", None)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise SettingsError(f'settings.VELTRIX is a dict such as {{"URL": ...}}, not {type(given).__name__}')
    return {name: value for name, value in given.items() if value is not None and value != ""}


def _embedded_file() -> Path:
    if not project_settings.DEBUG:
        raise MissingUrl(
            "no config store is named: write for example "
            'VELTRIX = {"URL": "sqlite:////srv/shop/config.db"} (embedded: a file, no server) in the settings, or set '
            f"VELTRIX_URL; only with DEBUG on is {EMBEDDED_FILE} in BASE_DIR used (Django's test runner turns DEBUG "
            'off: tests can name "memory://")'
        )
    return Path(getattr(project_settings, "BASE_DIR", None) or Path.cwd()) / EMBEDDED_FILE


def _client(given: Mapping[str, Any]) -> ConfigClient | Callable[[], object] | None:
    client = given.get("CLIENT")
    if client is None:
        return None
    dead = [name for name in _ARGUMENTS if name in given]
    if dead:
        raise SettingsError(f"settings.VELTRIX names a CLIENT, so {', '.join(dead)} would change nothing: remove one")
    client = _imported("CLIENT", client)
    if isinstance(client, ConfigClient):
        return client
    if callable(client):
        return cast("Callable[[], object]", client)
    raise SettingsError(
        "settings.VELTRIX['CLIENT'] is a ConfigClient, a function that makes one, or the dotted path of either, "
        f"not {type(client).__name__}"
    )


def _of_request(given: Mapping[str, Any], name: str, gives: str) -> OfRequest | None:
    found = given.get(name)
    if found is None:
        return None
    found = _imported(name, found)
    if not callable(found):
        raise SettingsError(
            f"settings.VELTRIX[{name!r}] is a function of a request that gives {gives}, or its dotted path, "
            f"not {type(found).__name__}"
        )
    return cast("OfRequest", found)


def _models(schemas: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for prefix, model in schemas.items():
        yield prefix, _imported("SCHEMAS", model)


def _imported(name: str, found: object) -> object:
    """What the dotted path `found` names; anything but a str is taken as it is."""
    if not isinstance(found, str):
        return found
    try:
        return cast("object", import_string(found))
    except ImportError as exc:
        raise SettingsError(f"settings.VELTRIX[{name!r}]: {exc}; write a dotted path such as shop.config.name") from exc
