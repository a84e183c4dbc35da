"""Settings: where config comes from, read from arguments, URL and environment.

Owns what a URL may say; opens nothing and imports no store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from veltrix_mw.errors import SettingsError
from veltrix_mw.keys import check_namespace

__all__ = ["DEFAULT_NAMESPACE", "StoreUrl", "find_url", "parse_url"]

DEFAULT_NAMESPACE: Final = "default"
"""The namespace of an embedded store (one application a file) that names none."""

_COMMON: Final = frozenset({"namespace"})
_OPTIONS: Final[Mapping[str, frozenset[str]]] = {
    "memory": _COMMON | {"keep_revisions", "keep_bytes"},
    "sqlite": _COMMON | {"timeout_s", "keep_revisions", "keep_bytes"},
}
_EXAMPLES: Final[Mapping[str, str]] = {"memory": "memory://shop", "sqlite": "sqlite:///config.db"}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_NUMBER: Final = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?|\.[0-9]{1,18}")  # 18 digits: whole numbers fit into 64 bits
_LATER: Final = frozenset({"etcd", "etcds", "redis", "rediss"})
_FLOATS: Final = frozenset({"timeout_s"})
_WHOLE: Final = frozenset({"keep_revisions", "keep_bytes"})


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """One store's URL, taken apart and checked.

    `name` is the path of a file (absolute) or the name of a shared in-memory store; `options` are the numbers that
    the query gave, with their units in their names.
    """

    scheme: str
    name: str
    namespace: str
    options: Mapping[str, float | int] = field(default_factory=dict)


def find_url(url: str | None, *, environ: Mapping[str, str] | None = None) -> str:
    """`url`, else `$VELTRIX_URL`; raises `SettingsError` that shows the embedded form when there is neither."""
    environ = os.environ if environ is None else environ
    found = url or environ.get("VELTRIX_URL")
    if not found:
        raise SettingsError(
            "no config store is named: pass a URL or set VELTRIX_URL, "
            "for example sqlite:///config.db (embedded: a file beside the app, no server)"
        )
    return found


def parse_url(url: str, *, namespace: str | None = None) -> StoreUrl:
    """Take a URL apart. Raises `SettingsError` that says what is wrong and how to write it; opens nothing.

    `namespace`, if given, must not contradict the URL's own.
    """
    if not isinstance(url, str):
        raise SettingsError(f"a config URL is a str, not {type(url).__name__}")
    url = url.strip()  # a file or a variable often ends in a newline
    parts = _split(url)
    if parts is None:
        raise SettingsError("the config URL cannot be parsed; write for example sqlite:///config.db")
    scheme = parts.scheme
    if scheme not in _OPTIONS:
        raise SettingsError(_unknown_scheme(scheme))
    if not url[len(scheme) :].startswith("://"):
        raise SettingsError(f"{scheme}: is followed by //, for example {_EXAMPLES[scheme]}")
    if "#" in url:
        raise SettingsError(f"the {scheme}:// URL has a '#'; write %23 for one in a name")
    query = _query(scheme, parts)
    named = query.pop("namespace", None)
    if named is not None and namespace is not None and named != namespace:
        raise SettingsError(f"the URL names the namespace {named!r}, the argument {namespace!r}; keep one")
    options = {name: _number(scheme, name, text) for name, text in query.items()}
    if namespace is None:
        namespace = DEFAULT_NAMESPACE if named is None else named
    return StoreUrl(scheme, _name(parts), check_namespace(namespace), options)


def _split(url: str) -> SplitResult | None:
    """The parts of a URL; None for what is none. The parser's errors quote the host, secrets and all."""
    if _CONTROL.search(url):
        return None  # the parser would drop some of them in silence
    try:
        return urlsplit(url)
    except ValueError:
        return None


def _unknown_scheme(scheme: str) -> str:
    known = ", ".join(f"{name}://" for name in sorted(_OPTIONS))
    if not scheme:
        return f"a config URL begins with one of {known}, for example sqlite:///config.db"
    if scheme.split("+", maxsplit=1)[0] in _LATER:
        return f"{scheme}:// comes with the next release; this one knows {known}"
    close = get_close_matches(scheme, _OPTIONS, n=1)
    hint = f"; did you mean {close[0]}://?" if close else ""
    return f"{scheme!r} is not a store that this version knows ({known}){hint}"


def _query(scheme: str, parts: SplitResult) -> dict[str, str]:
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    query = dict(pairs)
    if len(query) != len(pairs):
        raise SettingsError(f"an option stands twice in the {scheme}:// URL; keep one of them")
    allowed = _OPTIONS[scheme]
    for name in query:
        if name not in allowed:
            close = get_close_matches(name, allowed, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(sorted(allowed))}"
            raise SettingsError(f"a {scheme}:// URL has no option {name!r}; {hint}")
    return query


def _number(scheme: str, name: str, text: str) -> float | int:
    fractional = name in _FLOATS
    # Not what int() and float() take: they know `1_0` and the digits of every script.
    well_formed = _NUMBER.fullmatch(text) is not None and (fractional or "." not in text)
    number = (float(text) if fractional else int(text)) if well_formed else 0
    if number <= 0:
        kind = "a positive number of seconds" if fractional else "a positive whole number"
        raise SettingsError(f"{name} in the {scheme}:// URL must be {kind}")
    return number


def _name(parts: SplitResult) -> str:
    if parts.scheme == "memory":
        if parts.path not in {"", "/"}:
            raise SettingsError("a memory:// URL takes a name and no path, for example memory://shop")
        if "@" in parts.netloc:
            raise SettingsError("a memory:// URL takes a name and no user, for example memory://shop")
        return _decoded(parts.netloc)
    if parts.netloc:
        meant = "sqlite:///config.db" if "@" in parts.netloc else f"sqlite:///{parts.netloc}{parts.path}"
        raise SettingsError(
            f"sqlite:// needs three slashes and a path: {meant} is relative to the working directory, "
            "sqlite:////srv/shop/config.db absolute"
        )
    path = _decoded(parts.path[1:])
    if not path:
        raise SettingsError("a sqlite:/// URL names a file, for example sqlite:///config.db")
    if path == ":memory:":
        raise SettingsError("a sqlite:/// URL names a file; for a store in this process's memory write memory://")
    return str(Path(path).absolute())


def _decoded(text: str) -> str:
    """A name without its percent-encoding."""
    try:
        name = unquote(text, errors="strict")
    except UnicodeDecodeError:
        name = "\0"
    if "\0" in name:
        raise SettingsError("the name in the config URL is percent-encoded UTF-8 without NUL, for example my%20shop")
    return name
