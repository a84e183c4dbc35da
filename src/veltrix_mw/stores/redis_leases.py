"""Leases in Redis: a key each, that ends by itself, and the fencing token that was given out last.

Owns what a lease looks like there. Knows nothing of what it is held for, nor of who keeps it up.
"""

from __future__ import annotations

from veltrix_mw.errors import LeaseLost
from veltrix_mw.protocols import Lease
from veltrix_mw.stores.redis_layout import GRANT, RENEW_LEASE, RESIGN, Names, held_as, milliseconds
from veltrix_mw.stores.redis_link import RedisLink

__all__ = ["RedisLeases"]


class RedisLeases:
    """A namespace's leases in one Redis: `LeaseStore`.

    One holder at a time, and a token larger than any before it, as long as Redis keeps what it acknowledged: a failover
    that loses it lets two hold the lease for a moment, and whoever is written to must go by the token.
    """

    def __init__(self, link: RedisLink, namespace: str) -> None:
        self._link = link
        self._names = Names(namespace)

    def acquire(self, name: str, holder: str, *, ttl_s: float, timeout_s: float) -> tuple[Lease | None, str, float]:
        names = self._names
        with self._link.session(timeout_s) as connection:
            said, *rest = connection.run(
                GRANT, (names.lease_of(name), names.token_of(name)), (holder, milliseconds(ttl_s))
            )
        if said == b"held":
            return None, rest[0].partition(b" ")[2].decode(errors="replace"), int(rest[1]) / 1000
        return Lease(holder, int(rest[0])), holder, ttl_s

    def renew(self, name: str, lease: Lease, *, ttl_s: float, timeout_s: float) -> None:
        with self._link.session(timeout_s) as connection:
            (said,) = connection.run(RENEW_LEASE, (self._names.lease_of(name),), (held_as(lease), milliseconds(ttl_s)))
        if said != b"ok":
            raise LeaseLost(f"the lease {name!r} is another's, or ran out; stop what it was held for")

    def release(self, name: str, lease: Lease, *, timeout_s: float) -> None:
        with self._link.session(timeout_s) as connection:
            connection.run(RESIGN, (self._names.lease_of(name),), (held_as(lease),))
