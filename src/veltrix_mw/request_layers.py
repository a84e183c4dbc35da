"""Layers that a request asks for: checked, and refused or dropped when they are none.

Owns what happens to an invalid layer; knows neither ASGI nor WSGI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from veltrix_mw.client import ConfigClient
from veltrix_mw.errors import InvalidKey, SettingsError
from veltrix_mw.keys import check_prefix
from veltrix_mw.view import View

__all__ = ["BAD_LAYER", "InvalidLayerPolicy", "checked_policy", "requested_view"]

InvalidLayerPolicy = Literal["reject", "ignore"]
"""`reject` answers 400 to a request whose layer is no prefix; `ignore` drops the layer."""

BAD_LAYER: Final = b"the request names a config layer that is not valid"
"""What the client is told; never the layer itself."""


def checked_policy(policy: InvalidLayerPolicy) -> InvalidLayerPolicy:
    """`policy`, if it is one; raises `SettingsError`."""
    if policy not in {"reject", "ignore"}:
        raise SettingsError(f"on_invalid_layer is 'reject' or 'ignore', not {policy!r}")
    return policy


def requested_view(
    client: ConfigClient, layers: Callable[[Any], Sequence[str]] | None, request: Any, policy: InvalidLayerPolicy
) -> View:
    """The view with the layers that `layers(request)` gives, if it is given.

    Raises `InvalidKey` for an invalid one, unless `policy` is to drop it; `SettingsError` for a `str`: that is the
    app's mistake, not the request's.
    """
    if layers is None:
        return client.view()
    given = layers(request)
    if isinstance(given, str):
        raise SettingsError("layers=... gave a str: return a sequence of prefixes, such as (prefix,)")
    asked = tuple(given)
    try:
        return client.view(layers=asked)
    except InvalidKey:
        if policy == "reject":
            raise
    return client.view(layers=tuple(layer for layer in asked if _is_prefix(layer)))


def _is_prefix(layer: object) -> bool:
    try:
        check_prefix(layer)
    except InvalidKey:
        return False
    return True
