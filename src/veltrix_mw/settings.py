"""Settings: where config comes from, read from arguments, URL and environment.

Owns what a URL may say; opens nothing and imports no store. A URL may hold a password: what is said of a wrong one
quotes no user, password or host of it, nor anything that a badly written password could have become.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from ipaddress import IPv6Address
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from veltrix_mw.errors import SettingsError
from veltrix_mw.keys import check_namespace

__all__ = ["DEFAULT_NAMESPACE", "Host", "StoreUrl", "find_mirror_url", "find_url", "parse_url", "plain_scheme", "shown"]

Host = tuple[str, int]

DEFAULT_NAMESPACE: Final = "default"
"""The namespace of an embedded store (one application a file) that names none."""

_COMMON: Final = frozenset({"namespace"})
_LOGIN: Final = frozenset({"user", "password", "user_env", "password_env"})
_TLS: Final = frozenset({"ca", "cert", "key"})
_ETCD: Final = _LOGIN | {"timeout_s", "prefix", "values", "transport"}
_REDIS: Final = _COMMON | _LOGIN | {"timeout_s", "keep_revisions", "keep_bytes", "wait_replicas", "wait_timeout_s"}
_SENTINEL: Final = _REDIS | {f"sentinel_{name}" for name in _LOGIN}
_OPTIONS: Final[Mapping[str, frozenset[str]]] = {
    "memory": _COMMON | {"keep_revisions", "keep_bytes"},
    "sqlite": _COMMON | {"timeout_s", "keep_revisions", "keep_bytes"},
    "etcd": _ETCD,
    "etcds": _ETCD | _TLS,
    "redis": _REDIS,
    "rediss": _REDIS | _TLS,
    "redis+sentinel": _SENTINEL,
    "rediss+sentinel": _SENTINEL | _TLS,
    "redis+cluster": _REDIS,
    "rediss+cluster": _REDIS | _TLS,
}
_EXAMPLES: Final[Mapping[str, str]] = {
    "memory": "memory://shop",
    "sqlite": "sqlite:///config.db",
    "etcd": "etcd://h1:2379,h2:2379,h3:2379/shop",
    "etcds": "etcds://h1:2379,h2:2379,h3:2379/shop",
    "redis": "redis://h1:6379/0?namespace=shop",
    "rediss": "rediss://h1:6379/0?namespace=shop",
    "redis+sentinel": "redis+sentinel://s1:26379,s2:26379,s3:26379/mymaster/0?namespace=shop",
    "rediss+sentinel": "rediss+sentinel://s1:26379,s2:26379,s3:26379/mymaster/0?namespace=shop",
    "redis+cluster": "redis+cluster://h1:6379,h2:6379?namespace=shop",
    "rediss+cluster": "rediss+cluster://h1:6379,h2:6379?namespace=shop",
}
_PORTS: Final[Mapping[str, int]] = {
    "etcd": 2379,
    "etcds": 2379,
    "redis": 6379,
    "rediss": 6379,
    "redis+sentinel": 26379,
    "rediss+sentinel": 26379,
    "redis+cluster": 6379,
    "rediss+cluster": 6379,
}
_SECURE: Final[Mapping[str, str]] = {
    "etcd": "etcds",
    "redis": "rediss",
    "redis+sentinel": "rediss+sentinel",
    "redis+cluster": "rediss+cluster",
}
_SERVER: Final = re.compile(
    r"(etcds?|rediss?(?:\+(?:sentinel|cluster))?)://([^/?#]*)([^?#]*)(?:\?([^#]*))?", re.IGNORECASE
)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_NUMBER: Final = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?|\.[0-9]{1,18}")  # 18 digits: whole numbers fit into 64 bits
_HOST: Final = re.compile(
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9_][A-Za-z0-9._-]{0,252}))(?::(?P<port>[0-9]{1,5}))?"
)
_VARIABLE: Final = re.compile(r"[A-Z_][A-Z0-9_]*")
_DECIMAL: Final = re.compile(r"[0-9]{1,5}")
_PRIMARY: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")  # what Sentinel itself takes for a name
_LATER_OPTIONS: Final[Mapping[str, frozenset[str]]] = {
    "etcd": frozenset({"discover"}),
    "etcds": frozenset({"discover"}),
}
_FLOATS: Final = frozenset({"timeout_s", "wait_timeout_s"})
_WHOLE: Final = frozenset({"keep_revisions", "keep_bytes", "wait_replicas"})
_CHOICES: Final[Mapping[str, tuple[str, str]]] = {"values": ("json", "text"), "transport": ("gateway", "grpc")}
_SHOWN: Final = ("transport", "wait_replicas")  # what of the options says how a store behaves, and is no secret
_ETCD_SCHEMES: Final = frozenset({"etcd", "etcds"})
_ONE_HOST: Final = frozenset({"redis", "rediss"})
_BOOKKEEPING: Final = ".veltrix/"


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """One store's URL, taken apart and checked.

    `name` is the path of a file (absolute), the name of a shared in-memory store, or what sentinels call the primary,
    and empty for other servers; `hosts` are the servers' (host, port), of sentinels where they are asked, `db` the
    number of a Redis database. `options` are what else the query gave: numbers with their units in their names, names
    of files (absolute), `prefix`, `values`, `transport`.
    """

    scheme: str
    name: str
    namespace: str
    options: Mapping[str, float | int | str] = field(default_factory=dict)
    hosts: tuple[Host, ...] = ()
    db: int = 0
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    sentinel_user: str | None = field(default=None, repr=False)
    sentinel_password: str | None = field(default=None, repr=False)

    @property
    def tls(self) -> bool:
        """Whether its servers are spoken to over TLS."""
        return self.scheme in _SECURE.values()

    @property
    def is_redis(self) -> bool:
        """Whether it is a Redis, in whichever topology: what can be a mirror."""
        return self.scheme.startswith("redis")

    @property
    def redacted(self) -> str:
        """The URL without user and password, and of the options what says how it behaves: may be shown and logged."""
        servers = ",".join(map(shown, self.hosts))
        namespace = quote(self.namespace)
        told = [f"{name}={self.options[name]}" for name in _SHOWN if name in self.options]
        if self.scheme in _ETCD_SCHEMES:
            return f"{self.scheme}://{servers}/{namespace}{'?' if told else ''}{'&'.join(told)}"
        if self.scheme.endswith("+cluster"):
            where = servers
        elif self.hosts:
            where = f"{servers}/{self.name}/{self.db}" if self.name else f"{servers}/{self.db}"
        else:
            where = quote(os.fsencode(self.name))
        slash = "/" if self.scheme == "sqlite" else ""
        if self.hosts or self.namespace != DEFAULT_NAMESPACE:
            told.insert(0, f"namespace={namespace}")
        return f"{self.scheme}://{slash}{where}{'?' if told else ''}{'&'.join(told)}"


def shown(host: Host) -> str:
    """A host as it is written in a URL, its port with it."""
    return f"[{host[0]}]:{host[1]}" if ":" in host[0] else f"{host[0]}:{host[1]}"


def plain_scheme(scheme: str) -> str:
    """The scheme of a Redis that is as this one's, without TLS."""
    return scheme.replace("rediss", "redis", 1)


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


def find_mirror_url(url: str | None, *, environ: Mapping[str, str] | None = None) -> str | None:
    """`url`, else `$VELTRIX_MIRROR_URL`, else None: there need not be a mirror."""
    environ = os.environ if environ is None else environ
    return url or environ.get("VELTRIX_MIRROR_URL") or None


def parse_url(url: str, *, namespace: str | None = None, environ: Mapping[str, str] | None = None) -> StoreUrl:
    """Take a URL apart. Raises `SettingsError` that says what is wrong and how to write it; opens nothing.

    `namespace`, if given, must not contradict the URL's own: a mirror's URL names none, and is given the authority's.
    `environ` is where `user_env` and `password_env` look, the process's own by default.
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
        secret = " or a password" if scheme in _PORTS else ""
        raise SettingsError(f"the {scheme}:// URL has a '#'; write %23 for one in a name{secret}")
    if scheme in _PORTS:
        return _server(parts, namespace, os.environ if environ is None else environ)
    query = _query(scheme, parts)
    named = query.pop("namespace", None)
    options: dict[str, float | int | str] = {name: _number(scheme, name, text) for name, text in query.items()}
    namespace = _agreed(scheme, named, namespace)
    namespace = DEFAULT_NAMESPACE if namespace is None else namespace
    return StoreUrl(scheme, _name(parts), check_namespace(namespace), options)


def _agreed(scheme: str, named: str | None, given: str | None) -> str | None:
    """The namespace, of the one that the URL names and the one that was given beside it."""
    if named is not None and given is not None and named != given:
        raise SettingsError(
            f"the {scheme}:// URL names the namespace {named!r}, but {given!r} was given beside it, as an argument or "
            "by the authority's URL; keep one"
        )
    return named if given is None else given


def _split(url: str) -> SplitResult | None:
    """The parts of a URL; None for what is none. The parser's errors quote the host, secrets and all."""
    if _CONTROL.search(url):
        return None  # the parser would drop some of them in silence
    server = _SERVER.match(url)
    if server is not None:
        # Python's parser knows one host and, by version, refuses brackets in a list of several.
        scheme, netloc, path, query = server.groups(default="")
        return SplitResult(scheme.lower(), netloc, path, query, "")
    try:
        return urlsplit(url)
    except ValueError:
        return None


def _unknown_scheme(scheme: str) -> str:
    known = ", ".join(f"{name}://" for name in sorted(_OPTIONS))
    if not scheme:
        return f"a config URL begins with one of {known}, for example sqlite:///config.db"
    close = get_close_matches(scheme, _OPTIONS, n=1)
    hint = f"; did you mean {close[0]}://?" if close else ""
    return f"{scheme!r} is not a store that this version knows ({known}){hint}"


def _query(scheme: str, parts: SplitResult) -> dict[str, str]:
    try:
        # A plus is a plus: to take it for a space is a custom of forms, and would break passwords.
        pairs = parse_qsl(parts.query.replace("+", "%2B"), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        pairs = [("\0", "")]
    if any("\0" in text for pair in pairs for text in pair):
        raise SettingsError(f"the options in the {scheme}:// URL are percent-encoded UTF-8 without NUL")
    query = dict(pairs)
    if len(query) != len(pairs):
        raise SettingsError(f"an option stands twice in the {scheme}:// URL; keep one of them")
    allowed = _OPTIONS[scheme]
    for name in query:
        if name in _LATER_OPTIONS.get(scheme, ()):
            raise SettingsError(f"the option {name} of {scheme}:// comes with the next release; leave it out")
        if name in _TLS and scheme in _SECURE:
            raise SettingsError(f"{name} is an option of {_SECURE[scheme]}://, which speaks TLS; {scheme}:// does not")
        if name == "namespace" and scheme in _ETCD_SCHEMES:
            raise SettingsError(f"the namespace of an {scheme}:// URL is its path: {_EXAMPLES[scheme]}")
        if name not in allowed:
            close = get_close_matches(name, allowed, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(sorted(allowed))}"
            article = "an" if scheme in _ETCD_SCHEMES else "a"
            raise SettingsError(f"{article} {scheme}:// URL has no option {name!r}; {hint}")
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


def _decoded(text: str, what: str = "name", example: str = ", for example my%20shop") -> str:
    """A name, or `what`, without its percent-encoding."""
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError:
        decoded = "\0"
    if "\0" in decoded:
        raise SettingsError(f"the {what} in the config URL is percent-encoded UTF-8 without NUL{example}")
    return decoded


# Servers


def _server(parts: SplitResult, given: str | None, environ: Mapping[str, str]) -> StoreUrl:
    scheme = parts.scheme
    if "@" in parts.path or "@" in parts.query:
        # Else half of a password with a slash in it would be taken, and quoted, as a namespace or an option.
        raise SettingsError(
            f"the {scheme}:// URL has an '@' behind its hosts; write %40 for one in a name, "
            "and in a password %2F for '/' and %3F for '?'"
        )
    login, _, servers = parts.netloc.rpartition("@")
    hosts = tuple(_host(scheme, text) for text in servers.split(","))
    if len(set(hosts)) != len(hosts):
        raise SettingsError(f"a host stands twice in the {scheme}:// URL; keep one of them")
    query = _query(scheme, parts)
    user, password = _login(scheme, login, query, environ)
    path = _decoded(parts.path.removeprefix("/").removesuffix("/"))
    name, db = "", 0
    if scheme in _ETCD_SCHEMES:
        named = path or None
    else:
        named = query.pop("namespace", None)
        name, db = _place(scheme, path)
        if len(hosts) > 1 and scheme in _ONE_HOST:
            plus = f"{scheme}+sentinel:// and {scheme}+cluster:// name several"
            raise SettingsError(f"a {scheme}:// URL names one host, for example {_EXAMPLES[scheme]}; {plus}")
    of_sentinels = _sentinels_login(scheme, query, environ)
    namespace = _agreed(scheme, named, given)
    if namespace is None:
        raise SettingsError(f"the {scheme}:// URL names no namespace, which has no default: {_EXAMPLES[scheme]}")
    options = {name: _option(scheme, name, text) for name, text in query.items()}
    if "key" in options and "cert" not in options:
        raise SettingsError(f"key in the {scheme}:// URL wants cert too, the certificate that it belongs to")
    if "wait_timeout_s" in options and "wait_replicas" not in options:
        raise SettingsError(
            f"wait_timeout_s in the {scheme}:// URL wants wait_replicas too, how many replicas a write waits for"
        )
    return StoreUrl(scheme, name, check_namespace(namespace), options, hosts, db, user, password, *of_sentinels)


def _place(scheme: str, path: str) -> tuple[str, int]:
    """What the path says: how sentinels call the primary, and the number of the database."""
    if scheme.endswith("+sentinel"):
        name, _, number = path.partition("/")
        if _PRIMARY.fullmatch(name) is None:
            raise SettingsError(
                f"the path of a {scheme}:// URL is what the sentinels call the primary, then the number of a database: "
                f"{_EXAMPLES[scheme]}"
            )
        return name, _database(scheme, number)
    db = _database(scheme, path)
    if db and scheme.endswith("+cluster"):
        raise SettingsError(f"a Redis Cluster has one database, 0: leave the path out, {_EXAMPLES[scheme]}")
    return "", db


def _database(scheme: str, path: str) -> int:
    if not path:
        return 0
    if _DECIMAL.fullmatch(path) is None:
        last = "end of the path" if scheme.endswith("+sentinel") else "path"
        raise SettingsError(f"the {last} of a {scheme}:// URL is the number of a database: {_EXAMPLES[scheme]}")
    return int(path)


def _host(scheme: str, text: str) -> tuple[str, int]:
    """One of the hosts, with its port. What is wrong with it is said without it: it may be half of a password."""
    if not text:
        raise SettingsError(f"a host is missing in the {scheme}:// URL; write for example {_EXAMPLES[scheme]}")
    found = _HOST.fullmatch(text)
    port = int(found["port"] or _PORTS[scheme]) if found else 0
    if found is None or not 0 < port < 65536 or (found["ipv6"] and not _is_ipv6(found["ipv6"])):
        raise SettingsError(
            f"a host in the {scheme}:// URL is no HOST or HOST:PORT; write for example {_EXAMPLES[scheme]}, "
            "an IPv6 address in brackets, and in a password %40 for '@', %2F for '/', %3F for '?'"
        )
    return (found["ipv6"] or found["name"]).lower(), port


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _login(
    scheme: str, written: str, query: dict[str, str], environ: Mapping[str, str]
) -> tuple[str | None, str | None]:
    """User and password, each from before the hosts, from the query, or from the environment. Taken out of `query`."""
    user, _, password = written.partition(":")
    user = _credential(scheme, "user", user, query, environ)
    password = _credential(scheme, "password", password, query, environ)
    if user and not password:
        raise SettingsError(
            f"the {scheme}:// URL gives a user without a password; add it behind the user, as USER:PASSWORD@, "
            "or name its environment variable: ?password_env=NAME"
        )
    if password and not user and scheme in _ETCD_SCHEMES:
        raise SettingsError(f"the {scheme}:// URL gives a password without a user; etcd wants both: USER:PASSWORD@")
    return user or None, password or None


def _sentinels_login(scheme: str, query: dict[str, str], environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    """User and password for the sentinels. Taken out of `query`."""
    user = _credential(scheme, "sentinel_user", "", query, environ)
    password = _credential(scheme, "sentinel_password", "", query, environ)
    if user and not password:
        raise SettingsError(
            f"the {scheme}:// URL gives a sentinel_user without a password; add ?sentinel_password_env=NAME"
        )
    return user or None, password or None


def _credential(scheme: str, name: str, written: str, query: dict[str, str], environ: Mapping[str, str]) -> str:
    found = [_decoded(written, name, ""), query.pop(name, "")]
    variable = query.pop(f"{name}_env", None)
    if variable is not None:
        value = environ.get(variable, "").rstrip("\r\n")  # secrets that were files end in a newline
        if not value:
            # What does not look like a variable's name may be the secret itself.
            called = variable if _VARIABLE.fullmatch(variable) else "an environment variable"
            raise SettingsError(f"{name}_env in the {scheme}:// URL names {called}, which is not set or empty")
        found.append(value)
    given = [text for text in found if text]
    if len(given) > 1:
        raise SettingsError(f"the {scheme}:// URL gives the {name} twice; keep one of them")
    return given[0] if given else ""


def _option(scheme: str, name: str, text: str) -> float | int | str:
    if name in _FLOATS or name in _WHOLE:
        return _number(scheme, name, text)
    if name in _CHOICES and text not in _CHOICES[name]:
        raise SettingsError(f"{name} in the {scheme}:// URL is {' or '.join(_CHOICES[name])}")
    if not text:
        raise SettingsError(f"{name} in the {scheme}:// URL is empty; leave it out")
    if name in _TLS:
        return str(Path(text).absolute())
    if name == "prefix" and (text.startswith(_BOOKKEEPING) or _BOOKKEEPING.startswith(text)):
        raise SettingsError(f"prefix in the {scheme}:// URL cannot hold .veltrix/: the library's bookkeeping is there")
    return text
