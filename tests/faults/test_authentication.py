"""Users and short-lived tokens: changes go on without a gap, and a permission that was taken away is noticed."""

from __future__ import annotations

import threading
import time

import pytest

from tests.faults.rig import SLACK, TRANSPORT
from tests.support.etcd_servers import etcd
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient
from veltrix_mw.errors import AuthFailed, StoreError

pytestmark = pytest.mark.timeout(300)

GOES_ON_S = 30.0  # ten lifetimes of a token
NOTICED_S = 15.0  # a confirmation comes every five seconds, and may be put off twice


def test_three_second_tokens_leave_no_gap_and_a_revoked_permission_is_noticed() -> None:
    with etcd(3, options=["--auth-token", "simple", "--auth-token-ttl", "3"]) as cluster:
        cluster.put("shop/checkout/max_items", "0")
        cluster.turn_auth_on(worker="secret-1", writer="secret-2")
        cluster.grant("worker", "shop/", ".veltrix/shop/", access="read")
        cluster.grant("writer", "shop/", ".veltrix/shop/")
        hosts = ",".join(f"{host}:{port}" for host, port in cluster.hosts)
        writer = ConfigClient(f"etcd://writer:secret-2@{hosts}/shop?transport={TRANSPORT}")
        worker = ConfigClient(f"etcd://worker:secret-1@{hosts}/shop?transport={TRANSPORT}", relay="never")
        seen: list[int] = []
        came = threading.Condition()

        def note(_changes: object, snapshot: object) -> None:
            with came:
                seen.append(snapshot["checkout/max_items"])  # type: ignore[index]
                came.notify_all()

        with writer, worker:
            worker.wait_ready(10)
            worker.subscribe("checkout/", note)
            begun_s, number = time.monotonic(), 0
            while time.monotonic() - begun_s < GOES_ON_S:
                number += 1
                sent_s = time.monotonic()
                revision = writer.put("checkout/max_items", number)
                worker.wait_for(revision, timeout_s=2 * SLACK)
                assert not worker.status().stale
                with came:
                    assert came.wait_for(lambda: bool(seen) and seen[-1] == number, 2 * SLACK), (number, seen[-3:])  # noqa: B023
                    came.wait_for(lambda: False, max(0.0, 0.2 - (time.monotonic() - sent_s)))
            assert seen == list(range(1, number + 1)), "each change was seen, in order"
            assert worker.status().tiers[0].error == ""

            cluster.ctl("role", "revoke-permission", "--prefix=true", "worker", "shop/")
            wait_until(
                lambda: isinstance(_trouble(worker), AuthFailed),
                NOTICED_S * SLACK,
                reason="the worker says that it may not",
            )
            assert worker.snapshot["checkout/max_items"] == number, "what was known is still served"
            error = worker.status().tiers[0].error
            assert "permission" in error, error
            assert "secret" not in error
            with pytest.raises(AuthFailed):
                worker.read(["checkout/max_items"])

            # Given back, it is followed again, without a restart.
            cluster.grant("worker", "shop/", access="read")
            worker.wait_for(writer.put("checkout/max_items", -1), timeout_s=NOTICED_S * SLACK)


def _trouble(client: ConfigClient) -> StoreError | None:
    error = client._follower.replica.error if client._follower else None
    return error if client.status().tiers[0].error else None
