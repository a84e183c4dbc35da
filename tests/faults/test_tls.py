"""TLS on real servers that ask for a certificate: users from the environment, and files that are replaced meanwhile.

Nobody waits for a certificate to run out: one that ran out yesterday takes the place of the good one, and every
connection is cut, so that all are made anew with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.support import etcd_servers
from tests.support.etcd_servers import EtcdCluster, etcd
from tests.support.redis_servers import (
    Certificates,
    ClusterSet,
    RedisServer,
    SentinelSet,
    cluster_set,
    redis_server,
    sentinel_set,
)
from tests.support.waiting import wait_until
from veltrix_mw import AuthFailed, ConfigClient
from veltrix_mw.errors import StoreError

pytestmark = pytest.mark.timeout(300)

WITHIN_S: Final = 30.0
NAMELESS: Final = "/O=veltrix"  # etcd's gateway takes no common name of a client while it has users


@dataclass
class Rotation:
    """Two CAs of which the servers believe either, the files of a client, and what may take their place."""

    folder: Path

    def __post_init__(self) -> None:
        self.old, self.new = Certificates(self.folder, "old-ca"), Certificates(self.folder, "new-ca")
        self.both = self.folder / "both.pem"
        self.both.write_bytes(self.old.ca.read_bytes() + self.new.ca.read_bytes())
        self.server = self.old.issue("server")
        self.good = self.old.issue("good", subject=NAMELESS)
        self.expired = self.old.issue("expired", subject=NAMELESS, days=-1)
        self.fresh = self.new.issue("fresh", subject=NAMELESS)
        # What the URLs name: a certificate and its key in one file, which is replaced in one step.
        self.ca, self.client = self.folder / "ca.pem", self.folder / "client.pem"
        self.trust(self.old.ca)
        self.show(self.good)

    def trust(self, ca: Path) -> None:
        _replace(self.ca, ca.read_bytes())

    def show(self, issued: tuple[Path, Path]) -> None:
        _replace(self.client, b"".join(each.read_bytes() for each in issued))

    @property
    def query(self) -> str:
        return f"user_env=SHOP_USER&password_env=SHOP_PASSWORD&ca={self.ca}&cert={self.client}&timeout_s=5"


def _replace(file: Path, content: bytes) -> None:
    beside = file.with_suffix(".next")
    beside.write_bytes(content)
    os.replace(beside, file)


@pytest.fixture
def rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rotation:
    monkeypatch.setenv("SHOP_USER", "shop")
    monkeypatch.setenv("SHOP_PASSWORD", "secret-1")
    return Rotation(tmp_path)


@contextmanager
def secured_etcd(rotation: Rotation) -> Iterator[EtcdCluster]:
    """An etcd that asks for a certificate, and for a user."""
    files = etcd_servers.Certificates(rotation.both, *rotation.server, *rotation.good)
    options = ["--client-cert-auth", "--trusted-ca-file", str(rotation.both), "--bcrypt-cost=4"]
    with etcd(options=options, tls=files) as cluster:
        cluster.put("shop/k", "1")
        cluster.turn_auth_on(shop="secret-1")
        cluster.grant("shop", "shop/", ".veltrix/shop/")
        yield cluster


ASKING: Final = ("--tls-auth-clients", "yes")
USER: Final = ("ACL", "SETUSER", "shop", "on", ">secret-1", "~*", "+@all")


@contextmanager
def secured_redis(rotation: Rotation) -> Iterator[RedisServer]:
    """A Redis that asks for a certificate, and for a user."""
    with redis_server(*ASKING, tls=(rotation.both, *rotation.server)) as server:
        server.run(*USER)
        server.run("ACL", "SETUSER", "default", "nocommands", "+acl", "+client", "+config")
        yield server


@contextmanager
def secured_set(rotation: Rotation, kind: str) -> Iterator[SentinelSet | ClusterSet]:
    """Several that ask for a certificate. `default` stays on: the servers come by it to each other."""
    of_kind = sentinel_set if kind == "sentinel" else cluster_set
    with of_kind(*ASKING, tls=(rotation.both, *rotation.server)) as made:
        for server in made.servers:
            server.run(*USER)
        yield made


def each_of(made: RedisServer | SentinelSet | ClusterSet) -> list[RedisServer]:
    """Whoever a client may be connected to."""
    if isinstance(made, RedisServer):
        return [made]
    return [*made.servers, *(made.sentinels if isinstance(made, SentinelSet) else ())]


def etcd_url(cluster: EtcdCluster, query: str) -> str:
    return f"etcds://127.0.0.1:{cluster.members[0].port}/shop?{query}"


def redis_url(server: RedisServer, query: str) -> str:
    return f"rediss://127.0.0.1:{server.port}/0?{query}"


def url_of(server: EtcdCluster | RedisServer, query: str, way: str) -> str:
    if isinstance(server, RedisServer):
        return redis_url(server, query)
    return etcd_url(server, f"{query}&transport={way}")


def cut(cluster: EtcdCluster) -> None:
    """End every connection to it."""
    (member,) = cluster.members
    cluster.kill(member)
    cluster.start(member)


def troubles(client: ConfigClient) -> str:
    return "; ".join(tier.error for tier in client.status().tiers if tier.error)


@pytest.mark.parametrize("way", ["gateway", "grpc", "redis"])
def test_a_certificate_and_a_user_of_the_environment_are_asked_for_and_taken(rotation: Rotation, way: str) -> None:
    secured = secured_redis(rotation) if way == "redis" else secured_etcd(rotation)
    with secured as server:

        def opened(query: str) -> ConfigClient:
            return ConfigClient(url_of(server, query, way), namespace="shop")

        with opened(rotation.query) as client:
            client.wait_for(client.put("k", 2), timeout_s=WITHIN_S)
            assert client.snapshot["k"] == 2
            assert "secret-1" not in repr(client.status())
        for wrong, said in (
            (rotation.query.replace(f"&cert={rotation.client}", ""), "asks for a client certificate"),
            (rotation.query.replace("SHOP_PASSWORD", "SHOP_USER"), "refused user 'shop' with th"),
        ):
            refused = opened(wrong)
            with pytest.raises(AuthFailed, match=said):
                refused.read(["k"])
            refused.close()


@pytest.mark.parametrize("way", ["gateway", "grpc", "redis"])
def test_another_ca_is_believed_from_the_next_connection_on(rotation: Rotation, way: str) -> None:
    secured = secured_redis(rotation) if way == "redis" else secured_etcd(rotation)
    with secured as server:
        client = ConfigClient(url_of(server, rotation.query, way), namespace="shop")
        revision = client.put("k", 2)
        rotation.trust(rotation.new.ca)
        assert client.read(["k"])["k"].mod_revision == revision, "a connection that is open stays"
        client.close()
        with pytest.raises(StoreError, match="is not signed by"):
            client.read(["k"])
        rotation.trust(rotation.both)
        assert client.read(["k"])["k"].mod_revision == revision
        client.close()


@pytest.mark.parametrize("way", ["gateway", "grpc"])
def test_a_worker_of_etcd_goes_on_with_the_certificate_that_took_the_place_of_an_expired_one(
    rotation: Rotation, way: str
) -> None:
    with secured_etcd(rotation) as cluster, ConfigClient(url_of(cluster, rotation.query, way)) as worker:
        worker.wait_ready(WITHIN_S)
        cluster.put("shop/k", "2")
        wait_until(lambda: worker.snapshot["k"] == 2, WITHIN_S, reason="the worker follows")
        rotation.show(rotation.expired)
        cut(cluster)
        wait_until(lambda: "certificate" in troubles(worker), WITHIN_S, reason="the expired one is refused")
        cluster.put("shop/k", "3")
        assert worker.snapshot["k"] == 2, "what was known is still served"
        rotation.show(rotation.fresh)
        wait_until(lambda: worker.snapshot["k"] == 3, WITHIN_S, reason="the fresh one is shown without a restart")
        assert troubles(worker) == ""


@pytest.mark.parametrize("kind", ["one", "sentinel", "cluster"])
def test_relay_and_workers_go_on_with_the_certificate_that_took_the_place_of_an_expired_one(
    rotation: Rotation, kind: str
) -> None:
    secured = secured_redis(rotation) if kind == "one" else secured_set(rotation, kind)
    with secured_etcd(rotation) as cluster, secured as servers:
        url, mirror = etcd_url(cluster, rotation.query), f"{servers.url}?{rotation.query}"
        relay = ConfigClient(url, mirror=mirror, instance="the-relay")
        worker = ConfigClient(url, mirror=mirror, relay="never")
        with relay, worker:

            def is_served(value: int) -> bool:
                followed = [tier.name for tier in worker.status().tiers if tier.state == "following"]
                return worker.snapshot.get("k") == value and followed == ["redis"]

            wait_until(lambda: is_served(1), WITHIN_S, reason="the worker follows the mirror")
            rotation.show(rotation.expired)
            for server in each_of(servers):
                server.run("CLIENT", "KILL", "TYPE", "normal")
            cut(cluster)
            for each in (relay, worker):
                wait_until(
                    lambda: "certificate" in troubles(each),  # noqa: B023
                    WITHIN_S,
                    reason="the expired one is refused",
                )
            cluster.put("shop/k", "2")
            assert worker.snapshot["k"] == 1
            rotation.show(rotation.fresh)
            wait_until(lambda: is_served(2), WITHIN_S, reason="the relay feeds the mirror, and the worker follows it")
            assert worker.status().relay == "the-relay"
            cluster.put("shop/k", "3")
            wait_until(lambda: is_served(3), WITHIN_S, reason="changes go through the mirror")
            assert troubles(worker) == ""
