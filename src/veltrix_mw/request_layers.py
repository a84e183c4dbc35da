"""Layers and keys that a request asks for: checked, and refused or dropped when they are none.

Owns what happens to an invalid one; knows neither ASGI nor WSGI nor a framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from veltrix_mw.errors import InvalidKey, SettingsError
from veltrix_mw.keys import check_key, check_layer, is_key

if TYPE_CHECKING:
    from veltrix_mw.client import ConfigClient
    from veltrix_mw.view import View
    from veltrix_mw.views import Views

__all__ = [
    "BAD_LAYER",
    "InvalidLayerPolicy",
    "checked_keys",
    "checked_policy",
    "kept_layers",
    "requested_keys",
    "requested_layers",
    "requested_view",
]

InvalidLayerPolicy = Literal["reject", "ignore"]
"""`reject` answers 400 to a request whose layer is no prefix, or whose key to prefetch is none; `ignore` drops what is
invalid, and counts it."""

BAD_LAYER: Final = "the request names a config layer that is not valid"
"""What the client is told; never the layer itself."""


def checked_policy(policy: InvalidLayerPolicy) -> InvalidLayerPolicy:
    """`policy`, if it is one; raises `SettingsError`."""
    if policy not in {"reject", "ignore"}:
        raise SettingsError(f"on_invalid_layer is 'reject' or 'ignore', not {policy!r}")
    return policy


def requested_layers(layers: Callable[[Any], Sequence[str]], request: Any) -> tuple[str, ...]:
    """What `layers(request)` gives, not checked yet.

    Raises `SettingsError` for a `str`: that is the app's mistake, not the request's.
    """
    given = layers(request)
    if isinstance(given, str):
        raise SettingsError("layers=... gave a str: return a sequence of prefixes, such as (prefix,)")
    return tuple(given)


def requested_keys(
    client: ConfigClient, prefetch: Callable[[Any], Sequence[str]] | None, request: Any, policy: InvalidLayerPolicy
) -> tuple[str, ...]:
    """What `prefetch(request)` gives, if it is given.

    Raises `InvalidKey` for what is no key, unless `policy` is to drop it, and `SettingsError` for a `str`.
    """
    if prefetch is None:
        return ()
    given = prefetch(request)
    if isinstance(given, str):
        raise SettingsError("prefetch=... gave a str: return a sequence of keys, such as (key,)")
    return checked_keys(client._views, given, policy)


def checked_keys(views: Views, keys: Iterable[str], policy: InvalidLayerPolicy) -> tuple[str, ...]:
    """`keys`, those that are none dropped and counted. Raises `InvalidKey` where they are to be refused."""
    asked = tuple(keys)
    if policy == "reject":
        return tuple(check_key(key) for key in asked)
    kept = tuple(key for key in asked if isinstance(key, str) and is_key(key))
    views.dropped += len(asked) - len(kept)
    return kept


def requested_view(
    client: ConfigClient, layers: Callable[[Any], Sequence[str]] | None, request: Any, policy: InvalidLayerPolicy
) -> View:
    """The newest view, with the layers that `layers(request)` gives, if it is given.

    Raises `InvalidKey` for an invalid one, unless `policy` is to drop it, and what `requested_layers` raises.
    """
    if layers is None:
        return client.view()
    asked = requested_layers(layers, request)
    return client.view(layers=asked if policy == "reject" else kept_layers(client._views, asked))


def kept_layers(views: Views, layers: Iterable[str]) -> tuple[str, ...]:
    """Those of `layers` that can be one; the others are counted as dropped."""
    asked = tuple(layers)
    kept = tuple(layer for layer in asked if _is_layer(layer, views.lazy))
    views.dropped += len(asked) - len(kept)
    return kept


def _is_layer(layer: object, lazy: Sequence[str]) -> bool:
    try:
        check_layer(layer, lazy)
    except InvalidKey:
        return False
    return True
