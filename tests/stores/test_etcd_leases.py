"""Leases in etcd: what is their own, on a real server over both transports."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from tests.stores.etcd_calls import TRANSPORTS
from tests.support.etcd_servers import EtcdCluster, etcd
from veltrix_mw.errors import LeaseLost, StoreError, StoreUnavailable
from veltrix_mw.protocols import Lease
from veltrix_mw.settings import Host
from veltrix_mw.stores.etcd_leases import EtcdLeases
from veltrix_mw.stores.etcd_members import Late, Transport
from veltrix_mw.stores.etcd_messages import TRANSACT, Message, Method

WITHIN_S: Final = 10.0
LONG_S: Final = 300.0
LEASE: Final = ".veltrix/shop/lease:report"
TOKEN: Final = ".veltrix/shop/token:report"


@pytest.fixture
def cluster() -> Iterator[EtcdCluster]:
    with etcd() as cluster:
        yield cluster


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> Transport:
    return TRANSPORTS[request.param](None)


class Losing:
    """A transport whose answers to writes are lost so many times as `losing` says; the writes are carried out."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.losing = 0

    def call(self, host: Host, method: Method[Any], request: Message, **options: Any) -> Any:
        answer = self._transport.call(host, method, request, **options)
        if method is TRANSACT and getattr(request, "compare", []) and self.losing:
            self.losing -= 1
            raise Late(host)
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


Make = Callable[..., EtcdLeases]


@pytest.fixture
def make(cluster: EtcdCluster) -> Iterator[Make]:
    made: list[EtcdLeases] = []

    def leases(transport: Transport, **options: Any) -> EtcdLeases:
        made.append(EtcdLeases(cluster.hosts, transport, namespace="shop", **options))
        return made[-1]

    yield leases
    for each in made:
        each.close()


def acquire(leases: EtcdLeases, attempt: str = "one", *, ttl_s: float = LONG_S) -> Lease | None:
    return leases.acquire("report", attempt, ttl_s=ttl_s, timeout_s=WITHIN_S)[0]


def taken(leases: EtcdLeases, attempt: str = "one") -> Lease:
    lease = acquire(leases, attempt)
    assert lease is not None
    return lease


def of_etcd(cluster: EtcdCluster) -> int:
    """How many leases etcd has."""
    return int(cluster.ctl("lease", "list").split()[1])


def test_it_lies_where_the_docs_say(cluster: EtcdCluster, transport: Transport, make: Make) -> None:
    leases = make(transport)
    lease = taken(leases)
    assert cluster.ctl("get", LEASE, "--print-value-only").strip() == f"{lease.token} one"
    assert cluster.ctl("get", TOKEN, "--print-value-only").strip() == f"{lease.token}"
    leases.release("report", lease, timeout_s=WITHIN_S)
    assert cluster.ctl("get", LEASE) == ""
    assert cluster.ctl("get", TOKEN, "--print-value-only").strip() == f"{lease.token}"


def test_an_answer_that_is_lost_is_found_in_the_same_call(
    cluster: EtcdCluster, transport: Transport, make: Make
) -> None:
    losing = Losing(transport)
    leases = make(losing)
    losing.losing = 1
    lease = taken(leases)
    leases.renew("report", lease, ttl_s=LONG_S, timeout_s=WITHIN_S)
    assert acquire(leases, "two") is None


def test_an_attempt_whose_every_answer_was_lost_finds_its_own_when_it_is_repeated(
    cluster: EtcdCluster, transport: Transport, make: Make
) -> None:
    losing = Losing(transport)
    leases = make(losing, timeout_s=0.3)
    losing.losing = 1_000
    with pytest.raises(StoreUnavailable, match="did not answer in time"):
        acquire(leases)
    losing.losing = 0
    given = int(cluster.ctl("get", TOKEN, "--print-value-only"))
    assert acquire(leases, "two") is None
    assert acquire(leases) == Lease("one", given)


def test_a_key_that_was_deleted_by_hand_is_lost_although_etcd_s_lease_goes_on(
    cluster: EtcdCluster, transport: Transport, make: Make
) -> None:
    leases = make(transport)
    first = taken(leases)
    cluster.delete(LEASE)
    assert of_etcd(cluster) == 1
    with pytest.raises(LeaseLost):
        leases.renew("report", first, ttl_s=LONG_S, timeout_s=WITHIN_S)
    second = taken(leases, "two")
    with pytest.raises(LeaseLost):
        leases.renew("report", first, ttl_s=LONG_S, timeout_s=WITHIN_S)
    assert second.token > first.token


def test_a_lease_of_etcd_s_that_was_revoked_is_lost(cluster: EtcdCluster, transport: Transport, make: Make) -> None:
    leases = make(transport)
    lease = taken(leases)
    cluster.ctl("lease", "revoke", cluster.ctl("lease", "list").split()[-1])
    with pytest.raises(LeaseLost):
        leases.renew("report", lease, ttl_s=LONG_S, timeout_s=WITHIN_S)


def test_a_key_that_was_written_by_hand_hangs_on_no_lease_and_is_lost(
    cluster: EtcdCluster, transport: Transport, make: Make
) -> None:
    leases = make(transport)
    lease = taken(leases)
    cluster.put(LEASE, f"{lease.token} one")
    with pytest.raises(LeaseLost):
        leases.renew("report", lease, ttl_s=LONG_S, timeout_s=WITHIN_S)


def test_a_renewal_keeps_etcd_s_lease_up(cluster: EtcdCluster, transport: Transport, make: Make) -> None:
    leases = make(transport)
    lease = acquire(leases, ttl_s=2)
    assert lease is not None
    until_s = time.monotonic() + 4
    while time.monotonic() < until_s:
        leases.renew("report", lease, ttl_s=2, timeout_s=WITHIN_S)
        threading.Event().wait(0.2)
    assert acquire(leases, "two") is None


def test_who_waits_writes_nothing(cluster: EtcdCluster, transport: Transport, make: Make) -> None:
    leases = make(transport)
    taken(leases)
    before = cluster.revision(), of_etcd(cluster)
    for _ in range(5):
        assert acquire(leases, "two") is None
    assert (cluster.revision(), of_etcd(cluster)) == before


def test_a_backup_that_is_restored_gives_out_no_token_twice(
    cluster: EtcdCluster, transport: Transport, make: Make
) -> None:
    leases = make(transport)
    leases.release("report", taken(leases), timeout_s=WITHIN_S)
    backup = cluster.back_up()
    lost = taken(leases)
    cluster.restore(backup)
    with pytest.raises(LeaseLost):
        leases.renew("report", lost, ttl_s=LONG_S, timeout_s=WITHIN_S)
    assert taken(leases, "two").token > lost.token


def test_tokens_grow_whatever_the_clocks_say(cluster: EtcdCluster, transport: Transport, make: Make) -> None:
    tokens = []
    for now_s in (2e9, 1e9, 0.0, 3e9, 2e9):
        leases = make(transport, wall=lambda now_s=now_s: now_s)
        lease = taken(leases)
        leases.release("report", lease, timeout_s=WITHIN_S)
        tokens.append(lease.token)
    assert tokens == sorted(set(tokens))
    assert tokens[0] > 2e15


def test_of_many_who_ask_at_once_one_has_it(cluster: EtcdCluster, transport: Transport, make: Make) -> None:
    leases = make(transport)
    for turn in range(10):
        start, won = threading.Barrier(4), list[Lease]()

        def ask(number: int, start: threading.Barrier, won: list[Lease], turn: int) -> None:
            start.wait(WITHIN_S)
            lease = acquire(leases, f"{turn}-{number}")
            if lease is not None:
                won.append(lease)

        threads = [threading.Thread(target=ask, args=(number, start, won, turn)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WITHIN_S)
        (lease,) = won
        leases.release("report", lease, timeout_s=WITHIN_S)


def test_what_is_none_of_ours_is_told_and_left(cluster: EtcdCluster, transport: Transport, make: Make) -> None:
    leases = make(transport)
    cluster.put(TOKEN, "seven")
    with pytest.raises(StoreError, match=rf"{TOKEN} in etcd holds no fencing token"):
        acquire(leases)
    cluster.put(LEASE, "somebody's")
    assert acquire(leases) is None
    assert cluster.ctl("get", LEASE, "--print-value-only").strip() == "somebody's"


def test_no_lease_is_bookkeeping_of_another_namespace(cluster: EtcdCluster, transport: Transport, make: Make) -> None:
    """Namespaces may have slashes, and lie in each other."""
    leases = make(transport)
    for name in ("change", "incarnation", "lease:change"):
        lease, _, _ = leases.acquire(name, "one", ttl_s=LONG_S, timeout_s=WITHIN_S)
        assert lease is not None
    keys = cluster.ctl("get", "--prefix", "--keys-only", ".veltrix/").split()
    assert len(keys) == 6
    assert all(key.rpartition("/")[2].startswith(("lease:", "token:")) for key in keys)
