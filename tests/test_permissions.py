"""The users of docs/permissions.md, made on real servers by the commands of that page: what each can do, and what not.

A permission that is missing fails here, and so does one that nothing needs.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import redis

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
from tests.test_docs import fences
from veltrix_mw import AuthFailed, ConfigClient, Delete, LeaseLost, Put, StoreError
from veltrix_mw.leases import open_lease
from veltrix_mw.stores.etcd import EtcdStore
from veltrix_mw.stores.redis_routes import slot_of

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "permissions.md"
WAIT_S: Final = 20.0


def commands(tool: str) -> list[list[str]]:
    """The page's commands for `etcdctl` or `redis-cli`, in order, without the name."""
    found = [
        shlex.split(line[2:])
        for fence in fences(PAGE)
        if fence.language == "console"
        for line in fence.text.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    ]
    return [words[1:] for words in found if words[0] == tool]


@pytest.fixture(scope="module")
def etcd_users() -> Iterator[EtcdCluster]:
    # A password is checked as cheaply as it can be: with etcd's default it takes a busy machine seconds.
    with etcd(options=["--bcrypt-cost", "4"]) as cluster:
        cluster.ctl("put", "other/secret", "1")
        for command in commands("etcdctl"):
            cluster.ctl(*command)
        cluster.user, cluster.password = "root", "root-password"
        yield cluster


@pytest.fixture
def redis_users() -> Iterator[RedisServer]:
    with redis_server() as server:
        server.run("SET", "veltrix:{other}:entries", "1")
        for command in commands("redis-cli"):
            words = ["redis-cli", "-p", str(server.port), *command]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            assert done.stdout.strip() == "OK", done.stdout + done.stderr
        yield server


def etcd_url(cluster: EtcdCluster, who: str, *, namespace: str = "shop") -> str:
    return f"etcd://shop-{who}:{who}-password@127.0.0.1:{cluster.members[0].port}/{namespace}"


def redis_url(server: RedisServer, who: str, *, query: str = "") -> str:
    return f"redis://shop-{who}:{who}-password@127.0.0.1:{server.port}/0{query}"


def as_user(server: RedisServer, user: str, password: str) -> redis.Redis:
    return redis.Redis("127.0.0.1", server.port, username=user, password=password, socket_timeout=WAIT_S)


def granted(user: str) -> set[str]:
    """The commands that the page grants a user of Redis."""
    words = [word for command in commands("redis-cli") if user in command for word in command]
    assert words
    return {word[1:] for word in words if re.fullmatch(r"\+[a-z]+", word)}


def used(server: RedisServer) -> set[str]:
    with as_user(server, "admin", "admin-password") as admin:
        stats: Any = admin.execute_command("INFO", "commandstats")
    return {name.removeprefix("cmdstat_") for name, said in stats.items() if said["calls"] > said["rejected_calls"]}


# --- etcd


def test_a_writer_writes_its_namespace_and_no_other(etcd_users: EtcdCluster) -> None:
    with ConfigClient(etcd_url(etcd_users, "writer")) as writer:
        first = writer.put("checkout/max_items", 50, reason="first")
        writer.write([Put("checkout/max_items", 80), Put("checkout/title", "Sale")])
        writer.write([Delete("checkout/title")])
        writer.wait_for(writer.rollback(first))
        assert writer.view()["checkout/max_items"] == 50
        assert [version.value for version in writer.history("checkout/max_items")][-1] == 50
    with ConfigClient(etcd_url(etcd_users, "writer", namespace="other")) as other:
        with pytest.raises(AuthFailed, match="grant"):
            other.put("secret", 2)
        with pytest.raises(AuthFailed, match="grant"):
            other.list()


@pytest.mark.parametrize("who", ["worker", "relay"])
def test_workers_and_relays_change_nothing_in_etcd(etcd_users: EtcdCluster, who: str) -> None:
    user = f"shop-{who}:{who}-password"
    for key in ("shop/checkout/max_items", ".veltrix/shop/change", "other/secret"):
        with pytest.raises(AssertionError, match="permission denied"):
            etcd_users.ctl("put", key, "1", user=user)
        with pytest.raises(AssertionError, match="permission denied"):
            etcd_users.ctl("del", key, user=user)
    with pytest.raises(AssertionError, match="permission denied"):
        etcd_users.ctl("get", "--prefix", "other/", user=user)
    with ConfigClient(etcd_url(etcd_users, who)) as client, pytest.raises(AuthFailed, match="grant"):
        client.put("checkout/max_items", 1)


def test_the_relay_may_replace_the_incarnation_and_a_worker_may_not(etcd_users: EtcdCluster) -> None:
    with ConfigClient(etcd_url(etcd_users, "writer")) as writer:
        writer.put("checkout/max_items", 50)
    hosts = etcd_users.hosts
    relay = EtcdStore(hosts, namespace="shop", user="shop-relay", password="relay-password")
    worker = EtcdStore(hosts, namespace="shop", user="shop-worker", password="worker-password")
    known = relay.list(timeout_s=WAIT_S).position.incarnation
    with pytest.raises(AuthFailed, match="grant"):
        worker.renew_incarnation(known, timeout_s=WAIT_S)
    assert relay.renew_incarnation(known, timeout_s=WAIT_S) != known
    relay.close()
    worker.close()


# --- Redis as the mirror


def test_a_relay_feeds_the_mirror_and_a_worker_follows_it_and_each_command_is_needed(
    etcd_users: EtcdCluster, redis_users: RedisServer
) -> None:
    def clients(who: str, **options: Any) -> ConfigClient:
        # So few bytes that the relay drops what it wrote before, for which it needs a command more.
        mirror = redis_url(redis_users, who, query="?keep_bytes=1")
        return ConfigClient(etcd_url(etcd_users, who), mirror=mirror, lazy=("tenants/",), **options)

    # The worker stands for election too, in vain.
    with ConfigClient(etcd_url(etcd_users, "writer")) as writer, clients("worker") as worker:
        writer.write([Put("checkout/max_items", 50), Put("checkout/title", "Sale"), Put("tenants/acme/name", "Acme")])
        wait_until(lambda: "nobody may write" in worker.status().relay_missing, WAIT_S, reason="the worker is barred")
        worker.wait_ready(timeout_s=WAIT_S)
        assert worker.status().origin == "etcd"
        with clients("relay") as relay, clients("relay") as standby:
            both = {relay.instance, standby.instance}
            wait_until(lambda: worker.status().relay in both, WAIT_S, reason="one of the two is the relay")
            wait_until(lambda: _state_of_mirror(worker) == "following", WAIT_S, reason="the worker is on the mirror")
            worker.wait_for(writer.put("checkout/max_items", 80), timeout_s=WAIT_S)
            worker.wait_for(writer.delete("checkout/title"), timeout_s=WAIT_S)
            assert dict(worker.snapshot) == {"checkout/max_items": 80}
            assert worker.snapshot.origin == "redis"
            assert worker.view().fetch("tenants/acme/name") == "Acme"
            assert worker._views.reader is not None
            assert worker._views.reader.units_read == {"mirror": 1, "authority": 0, "wanted": 1}
            with clients("worker", relay="never") as late:
                late.wait_ready(timeout_s=WAIT_S)
                assert late.snapshot.origin == "redis"
    assert granted("shop-worker") | granted("shop-relay") <= used(redis_users)


def _state_of_mirror(client: ConfigClient) -> str:
    return next(tier.state for tier in client.status().tiers if tier.role == "mirror")


def test_a_worker_goes_to_etcd_when_the_mirror_is_gone(etcd_users: EtcdCluster, redis_users: RedisServer) -> None:
    mirror = redis_url(redis_users, "worker")
    with (
        ConfigClient(etcd_url(etcd_users, "relay"), mirror=redis_url(redis_users, "relay")),
        ConfigClient(etcd_url(etcd_users, "worker"), mirror=mirror, relay="never") as worker,
        ConfigClient(etcd_url(etcd_users, "writer")) as writer,
    ):
        worker.wait_for(writer.put("checkout/max_items", 10), timeout_s=WAIT_S)
        wait_until(lambda: _state_of_mirror(worker) == "following", WAIT_S, reason="the worker is on the mirror")
        redis_users.kill()
        worker.wait_for(writer.put("checkout/max_items", 20), timeout_s=WAIT_S)
        assert (worker.view()["checkout/max_items"], worker.snapshot.origin) == (20, "etcd")


@pytest.mark.parametrize("who", ["worker", "relay", "writer"])
def test_nobody_touches_other_keys_or_the_server(redis_users: RedisServer, who: str) -> None:
    mine, other = "veltrix:{shop}:entries", "veltrix:{other}:entries"
    refused = [("KEYS", "*"), ("FLUSHALL",), ("FLUSHDB",), ("CONFIG", "GET", "*"), ("SCRIPT", "FLUSH"), ("ACL", "LIST"),
               ("GET", other), ("HSET", other, "k", "v"), ("DEL", other), ("SCAN", "0"), ("MONITOR",)]  # fmt: skip
    if who == "worker":
        refused += [("HSET", mine, "k", "v"), ("DEL", mine), ("SET", "veltrix:{shop}:lease", "1"), ("EVAL", "", "0"),
                    ("XADD", "veltrix:{shop}:changes", "*", "k", "v")]  # fmt: skip
    with as_user(redis_users, f"shop-{who}", f"{who}-password") as client:
        for command in refused:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
        if who != "worker":
            with pytest.raises(redis.exceptions.ResponseError):
                client.execute_command("EVAL", "return redis.call('HSET', KEYS[1], 'k', 'v')", "1", other)
    with as_user(redis_users, "admin", "admin-password") as admin:
        assert admin.get(other) == b"1"


# --- Redis as the authority


def test_a_writer_writes_redis_as_the_authority_and_a_worker_follows_it(redis_users: RedisServer) -> None:
    shop = "?namespace=shop"
    with (
        ConfigClient(redis_url(redis_users, "writer", query=shop)) as writer,
        ConfigClient(redis_url(redis_users, "worker", query=shop)) as worker,
    ):
        first = writer.put("checkout/max_items", 50)
        writer.write([Put("checkout/max_items", 80), Put("checkout/title", "Sale")])
        writer.put("checkout/max_items", 90, expected=2)
        worker.wait_for(writer.rollback(first), timeout_s=WAIT_S)
        assert dict(worker.snapshot) == {"checkout/max_items": 50}
        assert worker.history("checkout/max_items")[-1].value == 50
        writer.delete("checkout/max_items")
        with pytest.raises(AuthFailed, match="ACL"):
            worker.put("checkout/max_items", 1)
    assert granted("shop-writer") <= used(redis_users) | granted("shop-worker")


def test_a_worker_reads_lazy_units_of_redis_as_the_authority_with_what_the_page_names(redis_users: RedisServer) -> None:
    page = PAGE.read_text()
    (named,) = re.findall(r"with lazy prefixes\n`([^`]+)` beside it", page)
    options = {"url": redis_url(redis_users, "worker", query="?namespace=shop"), "lazy": ("tenants/",)}
    with ConfigClient(redis_url(redis_users, "writer", query="?namespace=shop")) as writer:
        writer.write([Put("tenants/acme/limit", 5)])
    with ConfigClient(**options) as worker, pytest.raises(AuthFailed, match="zrangebylex"):
        worker.wait_ready()
        worker.view().fetch("tenants/acme/limit")
    redis_users.run("ACL", "SETUSER", "shop-worker", *named.split())
    with ConfigClient(**options) as worker:
        worker.wait_ready()
        assert worker.view().fetch("tenants/acme/limit") == 5


# --- leases


def test_a_holder_holds_leases_and_reads_no_entry(etcd_users: EtcdCluster, redis_users: RedisServer) -> None:
    for url in (etcd_url(etcd_users, "holder"), redis_url(redis_users, "holder", query="?namespace=shop")):
        with open_lease(url, "nightly-report", ttl_s=0.6) as lease:
            token = lease.token
            other = open_lease(url, "nightly-report")
            with pytest.raises(LeaseLost):
                other.hold(timeout_s=1.0)
            assert lease.token == token
        assert other.try_hold()
        other.close()
        with ConfigClient(url) as client, pytest.raises(AuthFailed):
            client.list()
    assert granted("shop-holder") <= used(redis_users)


def test_who_may_hold_no_lease_is_told_what_to_grant(etcd_users: EtcdCluster, redis_users: RedisServer) -> None:
    with (
        open_lease(etcd_url(etcd_users, "writer"), "nightly-report"),
        pytest.raises(AuthFailed, match=r"readwrite '.veltrix/shop/lease:' and '.veltrix/shop/token:'"),
        open_lease(etcd_url(etcd_users, "worker"), "another"),
    ):
        pass
    for who in ("worker", "writer"):
        lease = open_lease(redis_url(redis_users, who, query="?namespace=shop"), "nightly-report")
        with pytest.raises(AuthFailed, match="the ACL of user"), lease:
            pass


# --- Redis of several servers, over TLS


Set = SentinelSet | ClusterSet


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["sentinel", "cluster"])
def users_of_several(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[Set]:
    """Sentinels or a cluster, with the page's users. `default` stays on: the servers come by it to each other."""
    tls = (certificates.ca, *certificates.issue("server"))
    of_servers, of_sentinels, of_nodes, of_waiting = (
        [shlex.split(line) for line in fence.text.splitlines()] for fence in fences(PAGE) if fence.language == "text"
    )
    base = [command for command in commands("redis-cli") if command[2].startswith("shop-")]
    with sentinel_set(tls=tls) if request.param == "sentinel" else cluster_set(tls=tls) as made:
        further = of_servers if isinstance(made, SentinelSet) else of_nodes
        for server in made.servers:
            for command in (*base, *further, *of_waiting):
                server.run(*command)
        if isinstance(made, SentinelSet):
            for sentinel in made.sentinels:
                for command in of_sentinels:
                    sentinel.run(*command)
        yield made


def _url_of_several(made: Set, who: str, ca: Path) -> str:
    finder = "&sentinel_user=shop-finder&sentinel_password=finder-password" if isinstance(made, SentinelSet) else ""
    waits = "&wait_replicas=1" if who == "writer" else ""
    login = f"{made.url.replace('://', f'://shop-{who}:{who}-password@')}?namespace=shop&ca={ca}"
    return f"{login}{finder}{waits}"


def test_users_of_several_servers_need_what_the_page_grants_them(
    users_of_several: Set, certificates: Certificates
) -> None:
    made, entries = users_of_several, "veltrix:{shop}:entries"
    with (
        ConfigClient(_url_of_several(made, "writer", certificates.ca)) as writer,
        ConfigClient(_url_of_several(made, "worker", certificates.ca)) as worker,
    ):
        worker.wait_for(writer.put("checkout/max_items", 50), timeout_s=WAIT_S)
        if isinstance(made, ClusterSet):
            slot, source = slot_of(entries), made.owner_of(entries)
            target = made.another(source)
            made.begin_moving(slot, source, target)
            made.move_keys(slot, source, target)
            worker.wait_for(writer.put("checkout/max_items", 60), timeout_s=WAIT_S)
            made.end_moving(slot, source, target)
        worker.wait_for(writer.put("checkout/max_items", 80), timeout_s=WAIT_S)
        assert dict(worker.snapshot) == {"checkout/max_items": 80}
        with pytest.raises(AuthFailed, match="ACL"):
            worker.put("checkout/max_items", 1)
    ran = {name for server in made.servers for name in _ran(server)}
    assert {
        "wait",
        *(["role"] if isinstance(made, SentinelSet) else ["asking", "cluster|slots", "cluster|nodes"]),
    } <= ran
    for command in ("get-master-addr-by-name", "master") if isinstance(made, SentinelSet) else ():
        for sentinel in made.sentinels:
            sentinel.run("ACL", "SETUSER", "shop-finder", f"-sentinel|{command}")
        with (
            ConfigClient(_url_of_several(made, "worker", certificates.ca)) as late,
            pytest.raises(AuthFailed, match=rf"the ACL of user 'shop-finder' .* lacks \+sentinel\|{command}\."),
        ):
            late.list()
        for sentinel in made.sentinels:
            sentinel.run("ACL", "SETUSER", "shop-finder", f"+sentinel|{command}")


def test_a_relay_of_several_servers_feeds_and_fills_a_mirror_there(
    etcd_users: EtcdCluster, users_of_several: Set, certificates: Certificates
) -> None:
    made, entries = users_of_several, "veltrix:{shop}:entries"

    def clients(who: str, **options: Any) -> ConfigClient:
        mirror = f"{_url_of_several(made, who, certificates.ca)}&keep_bytes=1"
        return ConfigClient(etcd_url(etcd_users, who), mirror=mirror, lazy=("tenants/",), **options)

    def is_well(worker: ConfigClient) -> bool:
        return worker.status().relay == "the-relay" and _state_of_mirror(worker) == "following"

    names = [f"tenants/{name}/name" for name in ("acme", "beta")]
    with (
        ConfigClient(etcd_url(etcd_users, "writer")) as writer,
        clients("relay", instance="the-relay"),
        clients("worker") as worker,
    ):
        writer.write([Put("checkout/max_items", 50), *(Put(name, "x") for name in names)])
        wait_until(lambda: is_well(worker), WAIT_S, reason="the worker is on the mirror, which the relay feeds")
        worker.wait_for(writer.put("checkout/max_items", 80), timeout_s=WAIT_S)
        assert worker._views.reader is not None
        assert worker.view().fetch(names[0]) == "x"
        assert worker._views.reader.units_read == {"mirror": 1, "authority": 0, "wanted": 1}
        if isinstance(made, ClusterSet):
            slot, source = slot_of(entries), made.owner_of(entries)
            target = made.another(source)
            made.begin_moving(slot, source, target)
            made.move_keys(slot, source, target)
            writer.put("checkout/max_items", 90)
            wait_until(
                lambda: (worker.snapshot["checkout/max_items"], worker.snapshot.origin) == (90, "redis"),
                WAIT_S,
                reason="the relay feeds, and the worker follows, where the slot is going",
            )
            made.end_moving(slot, source, target)
        worker.wait_for(writer.put("checkout/max_items", 100), timeout_s=WAIT_S)
        wait_until(lambda: is_well(worker), WAIT_S, reason="the worker is on the mirror still, or again")
        assert worker.view().fetch(names[1]) == "x"
        assert dict(worker.snapshot) == {"checkout/max_items": 100}
        owner, units = made.owner_of(entries), [f"veltrix:{{shop}}:unit:tenants/{name}" for name in ("acme", "beta")]
        wait_until(lambda: owner.run("EXISTS", *units) == 2, WAIT_S, reason="both units are filled")


def _ran(server: RedisServer) -> set[str]:
    stats: Any = server.run("INFO", "commandstats")
    return {name.removeprefix("cmdstat_") for name in stats}


def test_who_is_no_user_of_the_sentinels_is_told_so(certificates: Certificates) -> None:
    tls = (certificates.ca, *certificates.issue("server"))
    with sentinel_set(tls=tls) as made:
        for login in ("sentinel_password=wr0ng", "sentinel_user=shop-finder&sentinel_password=wr0ng"):
            url = f"{made.url}?namespace=shop&ca={certificates.ca}&{login}"
            with ConfigClient(url) as client, pytest.raises(AuthFailed, match="the sentinel 127") as caught:
                client.list()
            assert "wr0ng" not in str(caught.value)
        with (
            ConfigClient(f"{made.url}?namespace=shop") as client,
            pytest.raises(StoreError, match="is not signed by the system's authorities"),
        ):
            client.list()


# --- neither


def test_without_a_user_nobody_is_let_in(etcd_users: EtcdCluster, redis_users: RedisServer) -> None:
    with ConfigClient(f"etcd://127.0.0.1:{etcd_users.members[0].port}/shop") as client, pytest.raises(AuthFailed):
        client.list()
    with ConfigClient(f"redis://127.0.0.1:{redis_users.port}/0?namespace=shop") as client, pytest.raises(AuthFailed):
        client.list()


def test_the_page_shows_no_command_that_is_not_tried() -> None:
    assert {words[0] for words in commands("etcdctl")} == {"user", "role", "auth"}
    assert {words[0] for words in commands("redis-cli")} == {"ACL"}
