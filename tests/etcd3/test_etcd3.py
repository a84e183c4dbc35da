"""A ready client of the package `etcd3` is handed in: it is followed and written through, and stays what it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

from tests.support.etcd_servers import EtcdCluster, etcd
from veltrix_mw import ConfigClient
from veltrix_mw.errors import AuthFailed

# A protobuf of that age, and stubs that are older still.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

WITHIN_S = 10.0


@pytest.fixture(scope="module")
def server() -> Iterator[EtcdCluster]:
    with etcd() as cluster:
        yield cluster


@pytest.fixture
def etcd3() -> Any:
    # Not above: importing it warns.
    import etcd3

    return etcd3


def test_the_extra_brings_what_the_package_can_be_imported_beside(etcd3: Any) -> None:
    assert version("etcd3") == "0.12.0"
    assert version("protobuf").startswith("3.20.")


def test_a_ready_client_is_written_and_followed_through_and_stays_open(etcd3: Any, server: EtcdCluster) -> None:
    theirs = etcd3.client(port=server.members[0].port)
    with ConfigClient(theirs, namespace="shop") as client:
        client.wait_for(client.put("checkout/max_items", 50, author="ann"), timeout_s=WITHIN_S)
        assert client.view()["checkout/max_items"] == 50
        assert theirs.get("shop/checkout/max_items")[0] == b"50"
        came = threading.Event()
        client.subscribe("checkout/", lambda _changes, snapshot: snapshot["checkout/max_items"] == 80 and came.set())
        theirs.put("shop/checkout/max_items", "80")
        assert came.wait(WITHIN_S), "what the package writes is seen"
        assert [version.value for version in client.history("checkout/max_items")] == [80, 50]
        (tier,) = client.status().tiers
        assert tier.url == f"etcd://localhost:{server.members[0].port}/shop"
    assert theirs.get("shop/checkout/max_items")[0] == b"80", "it is not ours to close"
    theirs.close()


def test_its_user_is_ours_and_a_token_that_ran_out_is_told(etcd3: Any) -> None:
    with etcd() as guarded:
        guarded.turn_auth_on(worker="secret-1")
        guarded.grant("worker", "shop/", ".veltrix/shop/")
        theirs = etcd3.client(port=guarded.members[0].port, user="worker", password="secret-1")
        with ConfigClient(theirs, namespace="shop") as client:
            client.wait_for(client.put("a", 1), timeout_s=WITHIN_S)
            theirs.metadata = (("token", "gone.1"),)  # what etcd says to it is what it says to one that ran out
            with pytest.raises(AuthFailed, match="hand in a new one, or name etcd by its URL") as caught:
                client.put("a", 2)
            assert "secret-1" not in str(caught.value)
            assert client.view()["a"] == 1, "what was known is still served"
        theirs.close()
