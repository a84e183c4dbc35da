"""Freshness of a client that follows a real etcd: refused once that stops, read again once it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.support.etcd_servers import EtcdCluster, etcd
from tests.support.redis_servers import redis_server
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, Freshness, Put, SettingsError, StaleRead

WITHIN_S = 60.0
LEAST_S = 7.0
LEAST_MIRRORED_S = 16.0

RULES = (
    Freshness("flags/", max_age_s=LEAST_S, on_stale="fail"),
    Freshness("copy/", max_age_s=LEAST_S, on_stale="serve"),
    Freshness("prices/", max_age_s=LEAST_S, on_stale="default"),
    Freshness("tenants/", max_age_s=LEAST_S, on_stale="fail"),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd() as made:
        yield made


@pytest.fixture
def stopped(cluster: EtcdCluster) -> Iterator[EtcdCluster]:
    """A server that a test may stop."""
    yield cluster
    cluster.resume(cluster.members[0])


def url_of(cluster: EtcdCluster) -> str:
    return f"etcd://127.0.0.1:{cluster.members[0].port}/shop"


def told(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except StaleRead:
        return "stale"


def test_a_store_that_stops_is_refused_by_prefix_and_read_again_once_it_answers(stopped: EtcdCluster) -> None:
    url, defaults = url_of(stopped), {"prices/vat": 20}
    with ConfigClient(url, lazy=("tenants/",), freshness=RULES, defaults=defaults) as client:
        stored = {"flags/stop": False, "copy/title": "Shop", "prices/vat": 19, "other": 1, "tenants/acme/limit": 500}
        client.wait_for(client.write([Put(key, value) for key, value in stored.items()]), WITHIN_S)
        old = client.view()

        def read(name: str) -> Any:
            return [told(partial(view.__getitem__, name)) for view in (old, old.renew(), client.view())]

        assert old.fetch("tenants/acme/limit") == 500
        stopped.pause(stopped.members[0])

        def refused() -> bool:
            served = told(lambda: old["flags/stop"])
            assert served in {False, "stale"}
            return served == "stale"

        wait_until(refused, WITHIN_S, reason="the flags to be refused")
        assert old.age_s > LEAST_S
        assert read("flags/stop") == ["stale"] * 3
        assert told(lambda: client.view().section("flags/")) == "stale"
        assert (read("copy/title"), read("prices/vat"), read("other")) == (["Shop"] * 3, [20] * 3, [1] * 3)
        for view in (old, client.view()):
            assert told(partial(view.fetch, "tenants/acme/limit", timeout_s=0.1)) == "stale"
        stopped.resume(stopped.members[0])
        wait_until(lambda: told(lambda: client.view()["flags/stop"]) is False, WITHIN_S, reason="it to be confirmed")
        assert client.view()["prices/vat"] == 19
        assert client.view().fetch("tenants/acme/limit") == 500


def test_less_than_what_confirmations_can_deliver_is_refused_at_the_start(cluster: EtcdCluster) -> None:
    def made(max_age_s: float, mirror: str = "") -> ConfigClient:
        rules = [Freshness("flags/", max_age_s=max_age_s, on_stale="fail")]
        return ConfigClient(url_of(cluster), mirror=mirror, freshness=rules)

    with pytest.raises(SettingsError, match="write at least max_age_s=7"):
        made(LEAST_S - 0.1)
    with redis_server() as server, pytest.raises(SettingsError, match="write at least max_age_s=16"):
        made(LEAST_MIRRORED_S - 0.1, server.url)


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_is_well_is_never_refused_by_the_least_that_is_taken(cluster: EtcdCluster, mirrored: bool) -> None:
    """Also between two confirmations: it is read all the time, for longer than any of them is good for."""
    with redis_server() as server:
        least_s = LEAST_MIRRORED_S if mirrored else LEAST_S
        rules = [Freshness("flags/", max_age_s=least_s, on_stale="fail")]
        with ConfigClient(url_of(cluster), mirror=server.url if mirrored else "", freshness=rules) as client:
            client.wait_for(client.put("flags/stop", False), WITHIN_S)
            old = client.view()
            seen = {old._snapshot._proof.at_s}

            def proved() -> bool:
                assert old["flags/stop"] is client.view()["flags/stop"] is False
                seen.add(client.snapshot._proof.at_s)
                return len(seen) > 3

            wait_until(proved, WITHIN_S, reason="it to be confirmed three times")
