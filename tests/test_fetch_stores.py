"""Fetching from real stores, and what a mirror changes about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.etcd_servers import etcd
from tests.support.redis_servers import RedisServer, redis_server
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, Delete, StoreUnavailable

WITHIN_S = 30.0
LIMIT, ZONE = "tenants/acme/limit", "tenants/acme/zone"


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "etcd", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path, redis: RedisServer) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/c.db"
        return
    if request.param == "redis":
        redis.run("FLUSHALL")
        yield f"redis://127.0.0.1:{redis.port}/0?namespace=shop"
        return
    with etcd() as cluster:
        hosts = ",".join(f"{host}:{port}" for host, port in cluster.hosts)
        yield f"etcd://{hosts}/shop"


def test_a_unit_is_fetched_and_kept_current(url: str) -> None:
    with ConfigClient(url, lazy=("tenants/",)) as client:
        client.wait_for(client.put(ZONE, "eu"), WITHIN_S)
        client.wait_for(client.put(LIMIT, 5), WITHIN_S)
        early = client.view()
        assert (early.fetch(LIMIT), early[ZONE], early.fetch("tenants/none/x", default=0)) == (5, "eu", 0)
        client.wait_for(client.put(LIMIT, 6), WITHIN_S)
        assert (client.view()[LIMIT], early[LIMIT]) == (6, 5)
        client.wait_for(client.delete(LIMIT), WITHIN_S)
        assert (LIMIT in client.view(), early[LIMIT]) == (False, 5)


def test_a_unit_that_changed_since_is_read_from_history(url: str) -> None:
    with ConfigClient(url, lazy=("tenants/",)) as client:
        client.wait_for(client.put(LIMIT, 5), WITHIN_S)
        early = client.view()
        client.wait_for(client.put(LIMIT, 6), WITHIN_S)
        assert (early.fetch(LIMIT), client.view().fetch(LIMIT)) == (5, 6)


def test_units_whose_index_was_evicted_are_not_taken_for_absent(redis: RedisServer) -> None:
    redis.run("FLUSHALL")
    with ConfigClient(f"redis://127.0.0.1:{redis.port}/0?namespace=shop", lazy=("tenants/",)) as client:
        client.wait_for(client.put(LIMIT, 5), WITHIN_S)
        redis.run("DEL", "veltrix:{shop}:keys")
        with pytest.raises(StoreUnavailable, match="the next write makes it anew"):
            client.view().fetch(LIMIT)
        client.wait_for(client.put(ZONE, "eu"), WITHIN_S)
        assert client.view().fetch_many([LIMIT, ZONE]) == {LIMIT: 5, ZONE: "eu"}
        client.wait_for(client.write([Delete(LIMIT), Delete(ZONE)]), WITHIN_S)
        assert not redis.run("EXISTS", "veltrix:{shop}:keys")
        assert client.view().fetch(LIMIT, default=0) == 0


def follows_mirror(client: ConfigClient) -> bool:
    return any(tier.role == "mirror" and tier.state == "following" for tier in client.status().tiers)


@pytest.mark.parametrize("leaves_out", [(), ("tenants/",)], ids=["mirrored whole", "left out"])
def test_a_worker_that_follows_a_mirror_keeps_its_units_current(
    tmp_path: Path, redis: RedisServer, leaves_out: tuple[str, ...]
) -> None:
    redis.run("FLUSHALL")
    url, mirror = f"sqlite:///{tmp_path}/c.db", f"redis://127.0.0.1:{redis.port}/0"
    with ConfigClient(url) as writer:
        writer.put(LIMIT, 5)
    with (
        ConfigClient(url, mirror=mirror, lazy=leaves_out) as relay,
        ConfigClient(url, mirror=mirror, lazy=("tenants/",), relay="never") as worker,
    ):
        wait_until(lambda: follows_mirror(worker), WITHIN_S, reason="the mirror to be followed")
        early = worker.view()
        assert early.fetch(LIMIT) == 5
        assert worker.view()[LIMIT] == 5  # held for as long as nothing is written
        worker.wait_for(relay.put(LIMIT, 6), WITHIN_S)
        late = worker.view()
        assert (late[LIMIT], early[LIMIT]) == (6, 5)
