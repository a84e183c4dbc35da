"""Leases in etcd: a key each, that ends with a lease of etcd's own, and the fencing token that was given out last.

Owns what is asked of etcd for a lease and what its answers prove. Knows nothing of what it is held for, nor of who
keeps it up.

A lease of etcd's ends by the clock of etcd's leader; a new leader lets each last its whole time again. So it may last
longer than was asked for, and never ends earlier.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Final

from veltrix_mw.errors import LeaseLost, StoreError, StoreUnavailable
from veltrix_mw.protocols import Lease
from veltrix_mw.settings import Host
from veltrix_mw.stores.etcd_members import Members, Transport
from veltrix_mw.stores.etcd_messages import (
    GRANT_LEASE,
    KEEP_LEASE,
    TRANSACT,
    Compare,
    KeepLease,
    KeyValue,
    LeaseAsked,
    Operation,
    Range,
    Transaction,
)
from veltrix_mw.stores.etcd_space import lease_key, token_key

__all__ = ["EtcdLeases"]

_MICROSECONDS: Final = 1_000_000


class EtcdLeases:
    """A namespace's leases in one etcd cluster: `LeaseStore`.

    One holder at a time, and a token larger than any before it. It is at least the clock, in microseconds: an etcd that
    was restored from a backup lost the last tokens, and must not give out one that somebody still holds.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        transport: Transport,
        *,
        namespace: str,
        user: str | None = None,
        password: str | None = None,
        timeout_s: float = 2.0,
        login: str | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Name the members; nothing is opened. As `EtcdStore`."""
        self._namespace = namespace
        self._members = Members(
            hosts,
            transport,
            user=user,
            password=password,
            timeout_s=timeout_s,
            namespace=namespace,
            remedy=_remedy(namespace),
            **({} if login is None else {"login": login}),
        )
        self._wall = wall

    def acquire(self, name: str, holder: str, *, ttl_s: float, timeout_s: float) -> tuple[Lease | None, str, float]:
        deadline_s = time.monotonic() + timeout_s
        lease, token = lease_key(self._namespace, name), token_key(self._namespace, name)
        look = [Operation.range(Range(lease)), Operation.range(Range(token))]
        asked, granted, given = Transaction(look), 0, 0
        while True:
            # Sent twice it does no harm: the second finds what the first one wrote.
            answer = self._members.call(TRANSACT, asked, deadline_s=deadline_s)
            if granted and answer.succeeded:
                return Lease(holder, given), holder, ttl_s
            held, last = (found.kvs[0] if found.kvs else KeyValue() for found in answer.ranges)
            if held.value:
                number, _, by = held.value.decode(errors="replace").partition(" ")
                if by != holder:
                    return None, by, ttl_s
                if self._keep(held.lease, deadline_s):
                    return Lease(holder, int(number)), holder, ttl_s
            else:
                given = max(self._token(last.value, name), int(self._wall() * _MICROSECONDS)) + 1
                # Once it is known to be free: each attempt of those who wait would be a write.
                granted = granted or self._granted(ttl_s, deadline_s)
                put = [
                    Operation.put(lease, f"{given} {holder}".encode(), lease=granted),
                    Operation.put(token, b"%d" % given),
                ]
                asked = Transaction(put, [Compare.at(lease, 0), Compare.at(token, last.mod_revision)], look)
            if time.monotonic() >= deadline_s:
                raise StoreUnavailable(f"the lease {name!r} came and went until the deadline; try again")

    def renew(self, name: str, lease: Lease, *, ttl_s: float, timeout_s: float) -> None:  # noqa: ARG002  # as granted
        deadline_s = time.monotonic() + timeout_s
        asked = Transaction([Operation.range(Range(lease_key(self._namespace, name)))])
        # The key first: it may be deleted by hand, and the lease of etcd's go on.
        (found,) = self._members.call(TRANSACT, asked, deadline_s=deadline_s).ranges
        held = found.kvs[0] if found.kvs else KeyValue()
        if held.value != _held_as(lease) or not self._keep(held.lease, deadline_s):
            raise LeaseLost(f"the lease {name!r} is another's, or ran out; stop what it was held for")

    def release(self, name: str, lease: Lease, *, timeout_s: float) -> None:
        key = lease_key(self._namespace, name)
        # The lease of etcd's is left to end by itself: nothing hangs on it any more.
        asked = Transaction([Operation.delete(key)], [Compare.holds(key, _held_as(lease))])
        self._members.call(TRANSACT, asked, deadline_s=time.monotonic() + timeout_s)

    def close(self) -> None:
        self._members.close()

    # ---

    def _granted(self, ttl_s: float, deadline_s: float) -> int:
        """The number of a new lease of etcd's, which counts in whole seconds."""
        return self._members.call(GRANT_LEASE, LeaseAsked(math.ceil(ttl_s)), deadline_s=deadline_s).lease

    def _keep(self, lease: int, deadline_s: float) -> bool:
        """Let etcd's lease of that number last its whole time again; whether there is one."""
        return self._members.call(KEEP_LEASE, KeepLease(lease), deadline_s=deadline_s).ttl > 0

    def _token(self, stored: bytes, name: str) -> int:
        if stored and not stored.isdigit():
            key = token_key(self._namespace, name).decode()
            raise StoreError(f"{key} in etcd holds no fencing token, so it is not this library's; delete it")
        return int(stored or b"0")


def _held_as(lease: Lease) -> bytes:
    """The lease as it stands in etcd."""
    return f"{lease.token} {lease.holder}".encode()


def _remedy(namespace: str) -> str:
    keys = " and ".join(f"'{key(namespace, '').decode()}'" for key in (lease_key, token_key))
    return f"grant its role the leases: etcdctl role grant-permission ROLE --prefix=true readwrite {keys}"
