"""Opening: from a URL to the store, the mirror, the leases or the probe that it names.

Owns which scheme is which store, and imports a backend only when its scheme is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from veltrix_mw.errors import SettingsError
from veltrix_mw.protocols import LeaseStore, Store
from veltrix_mw.settings import StoreUrl

if TYPE_CHECKING:
    from veltrix_mw.stores.etcd_adopted import EtcdClient
    from veltrix_mw.stores.etcd_probe import EtcdProbe
    from veltrix_mw.stores.redis_mirror import RedisMirror
    from veltrix_mw.stores.redis_probe import RedisProbe
    from veltrix_mw.stores.sqlite_probe import SqliteProbe

__all__ = [
    "adopt_leases",
    "adopt_store",
    "open_leases",
    "open_mirror",
    "open_mirror_probe",
    "open_probe",
    "open_store",
]


def open_store(url: StoreUrl, *, lazy: Sequence[str] = ()) -> Store:
    """The store of `url`; nothing is connected or read before its first call.

    `lazy` are the prefixes that it leaves out wherever it lists, watches or counts. Raises `SettingsError` where the
    scheme's driver is not installed, or an option is a mirror's.
    """
    options: dict[str, Any] = dict(url.options)
    match url.scheme:
        case "memory":
            from veltrix_mw.stores.memory import MemoryStore

            return MemoryStore(name=url.name, namespace=url.namespace, lazy=lazy, **options)
        case "sqlite":
            from veltrix_mw.stores.sqlite import SqliteStore

            return SqliteStore(url.name, namespace=url.namespace, lazy=lazy, **options)
        case "etcd" | "etcds":
            from veltrix_mw.stores.etcd import EtcdStore

            with _driver(url, "grpc" if options.get("transport") == "grpc" else "urllib3"):
                return EtcdStore(url.hosts, **_server(url), lazy=lazy, **options)
        case _ if url.is_redis:
            with _driver(url, "redis"):
                from veltrix_mw.stores.redis import RedisStore
            from veltrix_mw.stores.redis_routes import route_of

            if "keep_bytes" in options:
                raise SettingsError(
                    f"keep_bytes in a {url.scheme}:// URL is for a mirror; an authority takes keep_revisions"
                )
            return RedisStore(route_of(url), db=url.db, **_server(url), lazy=lazy, **options)
        case _:
            raise AssertionError(f"parse_url let {url.scheme} pass")


def adopt_store(client: EtcdClient, *, namespace: str, lazy: Sequence[str] = ()) -> Store:
    """A store over a client of etcd's that the caller made, and closes. Raises `SettingsError`."""
    from veltrix_mw.stores.etcd import EtcdStore
    from veltrix_mw.stores.etcd_adopted import LOGIN, Adopted

    adopted = Adopted(client)
    return EtcdStore(
        [adopted.host], namespace=namespace, tls=adopted.is_secure, lazy=lazy, transport=adopted, login=LOGIN
    )


def open_leases(url: StoreUrl) -> LeaseStore:
    """The leases of `url`; nothing is connected or read before its first call.

    Options that say how the store's entries are kept say nothing of leases, so that one URL will do for both. Raises
    `SettingsError` where the scheme's driver is not installed, or it keeps no leases.
    """
    options = url.options
    login: dict[str, Any] = {"user": url.user, "password": url.password}
    files: dict[str, Any] = {name: options.get(name) for name in ("ca", "cert", "key")}
    if url.is_redis:
        with _driver(url, "redis"):
            from veltrix_mw.stores.redis_leases import RedisLeases
            from veltrix_mw.stores.redis_link import RedisLink
        from veltrix_mw.stores.redis_routes import route_of

        link = RedisLink(route_of(url), db=url.db, namespace=url.namespace, tls=url.tls, **login, **files)
        waits: dict[str, Any] = {each: options[each] for each in ("wait_replicas", "wait_timeout_s") if each in options}
        return RedisLeases(link, url.namespace, **waits)
    if url.scheme not in {"etcd", "etcds"}:
        raise SettingsError(
            f"a lease is held in etcd or Redis, not in {url.scheme}://; write for example "
            "etcd://h1:2379,h2:2379,h3:2379/shop or redis://h1:6379/0?namespace=shop"
        )
    from veltrix_mw.stores.etcd_leases import EtcdLeases
    from veltrix_mw.stores.etcd_transports import make_transport
    from veltrix_mw.stores.tls import Tls

    is_grpc = options.get("transport") == "grpc"
    with _driver(url, "grpc" if is_grpc else "urllib3"):
        transport = make_transport("grpc" if is_grpc else "gateway", Tls(**files) if url.tls else None)
    timeout: dict[str, Any] = {"timeout_s": options["timeout_s"]} if "timeout_s" in options else {}
    return EtcdLeases(url.hosts, transport, namespace=url.namespace, **login, **timeout)


def adopt_leases(client: EtcdClient, *, namespace: str) -> LeaseStore:
    """Leases over a client of etcd's that the caller made, and closes. Raises `SettingsError`."""
    from veltrix_mw.stores.etcd_adopted import LOGIN, Adopted
    from veltrix_mw.stores.etcd_leases import EtcdLeases

    adopted = Adopted(client)
    return EtcdLeases([adopted.host], adopted, namespace=namespace, login=LOGIN)


def open_mirror(url: StoreUrl) -> RedisMirror:
    """The mirror of `url`; nothing is connected or read before its first call. Raises `SettingsError`."""
    if not url.is_redis:
        raise SettingsError(f"a mirror is a Redis, for example redis://h4:6379/0; not {url.scheme}://")
    with _driver(url, "redis"):
        from veltrix_mw.stores.redis_mirror import RedisMirror
    from veltrix_mw.stores.redis_routes import route_of

    options: dict[str, Any] = dict(url.options)
    if "wait_replicas" in options:
        raise SettingsError(
            f"wait_replicas in a {url.scheme}:// URL is for an authority: what a mirror loses the relay brings again"
        )
    return RedisMirror(route_of(url), db=url.db, **_server(url), **options)


def open_probe(url: StoreUrl, *, lazy: Sequence[str] = (), timeout_s: float) -> EtcdProbe | RedisProbe | SqliteProbe:
    """What looks for faults between here and the authority of `url`; nothing is connected before its first check.

    `lazy` are the prefixes that are read a unit at a time, which not every store needs anything for.
    Raises `SettingsError` as `open_store`. There is none for `memory://`, which is in this process.
    """
    match url.scheme:
        case "sqlite":
            from veltrix_mw.stores.sqlite_probe import SqliteProbe

            return SqliteProbe(url)
        case "etcd" | "etcds":
            from veltrix_mw.stores.etcd_probe import EtcdProbe

            return EtcdProbe(url, timeout_s=timeout_s)
        case _ if url.is_redis:
            with _driver(url, "redis"):
                from veltrix_mw.stores.redis_probe import RedisProbe

            return RedisProbe(url, role="authority", lazy=lazy, timeout_s=timeout_s)
        case _:
            raise AssertionError(f"there is no probe for {url.scheme}")


def open_mirror_probe(url: StoreUrl, *, lazy: Sequence[str], timeout_s: float) -> RedisProbe:
    """What looks for faults between here and the mirror of `url`, read with these `lazy` prefixes."""
    with _driver(url, "redis"):
        from veltrix_mw.stores.redis_probe import RedisProbe

    return RedisProbe(url, role="mirror", lazy=lazy, timeout_s=timeout_s)


def _server(url: StoreUrl) -> dict[str, Any]:
    return {"namespace": url.namespace, "tls": url.tls, "user": url.user, "password": url.password}


_EXTRAS: Final = {"redis": "redis", "urllib3": "etcd", "grpc": "grpc"}


@contextmanager
def _driver(url: StoreUrl, name: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] != name:
            raise
        extra = _EXTRAS[name]
        raise SettingsError(f"{url.scheme}:// needs the driver {name}: pip install 'veltrix-mw[{extra}]'") from exc
