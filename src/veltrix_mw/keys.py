"""What a key, a prefix, a namespace and a lease's name may look like.

Owns the syntax of names; knows nothing of values or stores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from veltrix_mw.errors import InvalidKey, SettingsError

__all__ = [
    "MAX_KEY_BYTES",
    "check_key",
    "check_layer",
    "check_lease_name",
    "check_namespace",
    "check_prefix",
    "is_key",
    "outermost",
    "unit_of",
]

MAX_KEY_BYTES: Final = 512
"""The longest key, in bytes of UTF-8 (the alphabet is ASCII, so also in characters)."""

_SEGMENT: Final = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._~:@-]+"
_KEY: Final = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*\Z")
_NAMESPACE: Final = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*\Z")
_LEASE_NAME: Final = re.compile(rf"{_SEGMENT}\Z")
_SHAPE: Final = "segments of [A-Za-z0-9._~:@-]+ joined by '/', none of them '.' or '..', for example checkout/max_items"


def is_key(key: str) -> bool:
    """Whether `key` is a valid key."""
    return len(key) <= MAX_KEY_BYTES and _KEY.match(key) is not None


def check_key(key: object) -> str:
    """Return `key`, or raise `InvalidKey` that says what a key looks like."""
    if not isinstance(key, str):
        raise InvalidKey(f"a key is a str, not {type(key).__name__}")
    if len(key) > MAX_KEY_BYTES:
        raise InvalidKey(
            f"the key {key[:40]!r}... has {len(key)} characters; at most {MAX_KEY_BYTES} bytes are allowed"
        )
    if _KEY.match(key) is None:
        raise InvalidKey(f"{key!r} is not a key: write {_SHAPE}")
    return key


def check_prefix(prefix: object) -> str:
    """Return `prefix` (a key followed by '/'), or raise `InvalidKey`."""
    if not isinstance(prefix, str):
        raise InvalidKey(f"a prefix is a str, not {type(prefix).__name__}")
    if not prefix.endswith("/"):
        raise InvalidKey(f"{prefix[:80]!r} is not a prefix: it must end with '/', for example tenants/acme/")
    if not is_key(prefix[:-1]):
        raise InvalidKey(f"{prefix[:80]!r} is not a prefix: write {_SHAPE}, then '/'")
    return prefix


def outermost(prefixes: Iterable[str]) -> tuple[str, ...]:
    """The prefixes in order, each once, without those that lie in another of them; or raise `InvalidKey`."""
    kept: list[str] = []
    for prefix in sorted({check_prefix(prefix) for prefix in prefixes}):
        # What lies in a prefix sorts after it, and before all that does not.
        if not kept or not prefix.startswith(kept[-1]):
            kept.append(prefix)
    return tuple(kept)


def unit_of(key: str, lazy: Iterable[str]) -> str:
    """The unit that `key` belongs to, below one of the prefixes `lazy`: the first segment after it, `tenants/acme` for
    `tenants/acme` and for `tenants/acme/limits/max`. Empty where it lies below none, or names no segment there.

    `key` may be a prefix, too: all below `tenants/acme/` is of one unit, what is below `tenants/` is not.
    """
    for prefix in lazy:
        if key.startswith(prefix):
            end = key.find("/", len(prefix))
            return key[:end] if end >= 0 else key if len(key) > len(prefix) else ""
    return ""


def check_layer(layer: object, lazy: Iterable[str]) -> str:
    """Return `layer`, or raise `InvalidKey`: where it is no prefix, or lies within a unit of the prefixes `lazy`.

    Below `tenants/`, if that is lazy, `tenants/acme/` is a layer and `tenants/acme/keys/` is none: names of tenants are
    often put together with what a request says, and one that says `acme/keys` must not be let into acme's unit.
    """
    prefix = check_prefix(layer)
    unit = unit_of(prefix, lazy)
    if unit and prefix != f"{unit}/":
        raise InvalidKey(
            f"{prefix!r} lies within a lazy unit, so it is no layer; the whole unit is one: {unit + '/'!r}"
        )
    return prefix


def check_namespace(namespace: object) -> str:
    """Return `namespace`, or raise `SettingsError`."""
    if not isinstance(namespace, str) or len(namespace) > 128 or _NAMESPACE.match(namespace) is None:
        raise SettingsError(f"{repr(namespace)[:80]} is not a namespace: write at most 128 characters, {_SHAPE}")
    if namespace.split("/", 1)[0] == ".veltrix":
        raise SettingsError("a namespace cannot begin with .veltrix: the library keeps its bookkeeping there")
    return namespace


def check_lease_name(name: object) -> str:
    """Return `name`, or raise `SettingsError`."""
    if not isinstance(name, str) or len(name) > 128 or _LEASE_NAME.match(name) is None:
        raise SettingsError(
            f"{repr(name)[:80]} is not a lease's name: write at most 128 characters of [A-Za-z0-9._~:@-], not '.' or "
            "'..', for example nightly-report"
        )
    return name
