"""Leases: one holder in the fleet for a piece of work, held in etcd or Redis.

Owns what a lease can be opened with. Knows neither how one is kept up (`coalesce.lease`) nor what it looks like in a
store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from veltrix_mw.coalesce.lease import TTL_S, Lease
from veltrix_mw.errors import SettingsError
from veltrix_mw.keys import check_lease_name, check_namespace
from veltrix_mw.settings import find_url, parse_url
from veltrix_mw.stores.opening import adopt_leases, open_leases

if TYPE_CHECKING:
    from veltrix_mw.protocols import LeaseStore
    from veltrix_mw.stores.etcd_adopted import EtcdClient

__all__ = ["Lease", "open_lease"]

_MAX_TTL_S: Final = 86_400.0  # a day: nobody does the work for as long once its holder has died
_MAX_HOLDER: Final = 128


def open_lease(
    url: str | EtcdClient | None,
    name: str,
    *,
    namespace: str | None = None,
    holder: str | None = None,
    ttl_s: float = TTL_S,
) -> Lease:
    """A lease in the store of `url`; nothing is connected or asked for before it is held.

    Args:
        url: `etcd://h1,h2,h3/shop`, or a Redis in any topology, `redis://h1/0?namespace=shop`; or a client of etcd's
            that has a `channel` and `metadata`, as `etcd3.client(...)`, which stays yours to close. None for
            `$VELTRIX_URL`.
        name: what it is a lease of, `nightly-report`: up to 128 characters of `[A-Za-z0-9._~:@-]`. Whoever opens the
            same name in the same namespace stands for the same lease.
        namespace: where the URL names none: that of a mirror, or of a client that is handed in.
        holder: who holds it, as others and the store are told; by default host and process.
        ttl_s: seconds for which it is held once its holder can no longer renew it, which it does three times in that
            time; up to a day. etcd counts in whole seconds, and makes it 2 at least.

    Raises:
        SettingsError: The URL, the namespace, the name, `holder` or `ttl_s` is wrong, or there is no URL; the driver is
            not installed; the URL is of a store that keeps no leases.
    """
    check_lease_name(name)
    if holder is not None and not (isinstance(holder, str) and 0 < len(holder) <= _MAX_HOLDER and holder.isprintable()):
        raise SettingsError(f"holder is a printable str of at most {_MAX_HOLDER} characters, not {repr(holder)[:80]}")
    if not isinstance(ttl_s, (int, float)) or isinstance(ttl_s, bool) or not 0 < ttl_s <= _MAX_TTL_S:
        raise SettingsError(f"ttl_s is a positive number of seconds, at most {_MAX_TTL_S:.0f}, not {ttl_s!r}")
    return Lease(_store(url, namespace), name, holder=holder, ttl_s=ttl_s)


def _store(url: str | EtcdClient | None, namespace: str | None) -> LeaseStore:
    if url is None or isinstance(url, str):
        return open_leases(parse_url(find_url(url), namespace=namespace))
    if hasattr(url, "channel") and hasattr(url, "metadata"):
        if namespace is None:
            raise SettingsError('a client names no namespace; give it: open_lease(client, name, namespace="shop")')
        return adopt_leases(url, namespace=check_namespace(namespace))
    raise SettingsError(
        "a lease is opened with a URL such as etcd://h1:2379,h2:2379,h3:2379/shop, or with a client of etcd's that has "
        f"a channel and metadata, as etcd3.client(); not with a {type(url).__name__}"
    )
