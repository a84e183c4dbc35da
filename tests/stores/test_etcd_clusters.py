"""Members of two etcd clusters in one URL: one cluster alone is used; and a restored one is taken all the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stores.etcd_calls import TRANSPORTS, read, watch, write
from tests.support.etcd_servers import EtcdCluster, etcd
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until
from veltrix_mw.errors import StoreError, StoreUnavailable
from veltrix_mw.settings import Host
from veltrix_mw.stores.etcd_clusters import Clusters
from veltrix_mw.stores.etcd_members import Members

A, B, C = ("h1", 1), ("h2", 2), ("h3", 3)


@pytest.fixture
def three() -> Clusters:
    """Three members, of which the first said that it is of cluster 1, which is used."""
    clusters = Clusters((A, B, C))
    assert not clusters.is_in_question(A, "1")
    return clusters


def test_members_of_one_cluster_are_not_in_question(three: Clusters) -> None:
    assert three.unknown == [B, C]
    assert not three.is_in_question(B, "1")
    assert not three.is_in_question(C, "")  # a client that was handed in may tell nothing
    assert three.unknown == []


@pytest.mark.parametrize(
    ("host", "said", "is_foreign"),
    [
        (B, {A: "1", C: "2"}, True),  # the one in use is there
        (B, {A: "2", C: "2"}, False),  # all were restored
        (B, {C: "2"}, False),  # and so was the one that is down, as most say
        (B, {}, True),  # nobody heard of it before
        (A, {}, False),  # it was of the one in use itself
        (A, {B: "1"}, True),
    ],
)
def test_a_member_of_another_id_is_foreign_unless_the_cluster_was_restored(
    three: Clusters, host: Host, said: dict[Host, str], is_foreign: bool
) -> None:
    assert three.is_in_question(host, "2")
    assert three.is_foreign(host, "2", said) is is_foreign
    assert three.is_in_question(host, "2") is is_foreign


def test_one_member_alone_is_of_whatever_it_says() -> None:
    clusters = Clusters((A,))
    assert clusters.unknown == []
    assert not clusters.is_in_question(A, "1")
    assert not clusters.is_in_question(A, "2")


@pytest.fixture(scope="module")
def clusters() -> Iterator[tuple[EtcdCluster, EtcdCluster]]:
    with etcd() as first, etcd() as second:
        yield first, second


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_members_of_two_clusters_are_told_and_the_first_is_used(
    clusters: tuple[EtcdCluster, EtcdCluster], transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    def told(event: str) -> list[str]:
        return [record.getMessage() for record in caplog.records if record.msg == f"{event}%s"]

    first, second = clusters
    for cluster, value in ((first, "first"), (second, "second")):
        cluster.put("shop/a", value)
    (other,) = second.hosts
    proxy = Proxy(first.members[0].port)
    host = ("127.0.0.1", proxy.port)
    members = Members([host, other], TRANSPORTS[transport](None), timeout_s=0.8)
    caplog.set_level("INFO", logger="veltrix_mw")
    try:
        here = members._here()
        here.order.sort(key=lambda each: each != host)
        here.used = host
        assert read(members).kvs[0].value == b"first"
        assert told("veltrix.member_foreign") == []

        def is_told() -> bool:  # by a member that answers at once; else when it is watched again
            watch(members).close()
            return bool(told("veltrix.member_foreign"))

        wait_until(is_told, 10, reason="the other one says what it is of")
        (line,) = told("veltrix.member_foreign")
        assert f"etcd at 127.0.0.1:{other[1]} is of another cluster than 127.0.0.1:{proxy.port}" in line
        before = second.revision()
        proxy.refuse()
        for call in (read, write, watch):
            with pytest.raises(StoreError, match=r"of another cluster|fate is unknown"):
                call(members)
        assert second.revision() == before
        proxy.heal()

        def read_again() -> bytes:
            try:
                return read(members).kvs[0].value
            except StoreUnavailable:
                return b""

        assert wait_until(read_again, 10, reason="the first answers again") in {b"first", b"1"}
        assert len(told("veltrix.member_foreign")) == 1
        write(members)
        assert second.revision() == before
    finally:
        members.close()
        proxy.close()
