"""Leases in Redis: a key each, that ends by itself, and the fencing token that was given out last.

Owns what a lease looks like there. Knows nothing of what it is held for, nor of who keeps it up.
"""

from __future__ import annotations

import time

from veltrix_mw.errors import LeaseLost, StoreUnavailable
from veltrix_mw.protocols import Lease
from veltrix_mw.stores.redis_layout import GRANT, RENEW_LEASE, RESIGN, Names, held_as, milliseconds
from veltrix_mw.stores.redis_link import WAIT_TIMEOUT_S, Connection, RedisLink

__all__ = ["RedisLeases"]


class RedisLeases:
    """A namespace's leases in one Redis: `LeaseStore`.

    One holder at a time, and a token larger than any before it, as long as Redis keeps what it acknowledged: a failover
    that loses it lets two hold the lease for a moment, and whoever is written to must go by the token.
    """

    def __init__(
        self, link: RedisLink, namespace: str, *, wait_replicas: int = 0, wait_timeout_s: float = WAIT_TIMEOUT_S
    ) -> None:
        """A lease is granted, and renewed, once `wait_replicas` replicas know it; waited for up to `wait_timeout_s`."""
        self._link = link
        self._names = Names(namespace)
        self._wait_replicas = wait_replicas
        self._wait_timeout_s = wait_timeout_s

    def acquire(self, name: str, holder: str, *, ttl_s: float, timeout_s: float) -> tuple[Lease | None, str, float]:
        names, ends_s = self._names, time.monotonic() + timeout_s
        with self._link.session(timeout_s, writes=True) as connection:
            said, *rest = connection.run(
                GRANT, (names.lease_of(name), names.token_of(name)), (holder, milliseconds(ttl_s))
            )
            if said == b"held":
                return None, rest[0].partition(b" ")[2].decode(errors="replace"), int(rest[1]) / 1000
            self._await_replicas(connection, name, ends_s)
        return Lease(holder, int(rest[0])), holder, ttl_s

    def renew(self, name: str, lease: Lease, *, ttl_s: float, timeout_s: float) -> None:
        ends_s = time.monotonic() + timeout_s
        with self._link.session(timeout_s, writes=True) as connection:
            (said,) = connection.run(RENEW_LEASE, (self._names.lease_of(name),), (held_as(lease), milliseconds(ttl_s)))
            if said == b"ok":
                self._await_replicas(connection, name, ends_s)
                return
        raise LeaseLost(f"the lease {name!r} is another's, or ran out; stop what it was held for")

    def release(self, name: str, lease: Lease, *, timeout_s: float) -> None:
        with self._link.session(timeout_s) as connection:
            connection.run(RESIGN, (self._names.lease_of(name),), (held_as(lease),))

    def close(self) -> None:
        self._link.close()

    def _await_replicas(self, connection: Connection, name: str, ends_s: float) -> None:
        wanted = self._wait_replicas
        if not wanted:
            return
        # Half of what is left is for the answer: Redis looks whether the time is over now and then, not at once.
        found = connection.replicated(wanted, min(self._wait_timeout_s, max(0.001, (ends_s - time.monotonic()) / 2)))
        if found < wanted:
            raise StoreUnavailable(
                f"only {found} of {wanted} replicas know of the lease {name!r} at {self._link.url}, and a failover may "
                "lose it; try again"
            )
