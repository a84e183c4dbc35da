"""`doctor` where several servers hold a namespace: sentinels, a Redis Cluster, several members of etcd."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from tests.cli.conftest import Shell
from tests.cli.test_doctor import BOUNDED, CONVERGE_S, NAMESPACE, PATIENCE_S, etcd_url, examined, refused, write
from tests.support.etcd_servers import EtcdCluster, etcd, make_certificates
from tests.support.redis_servers import (
    PRIMARY,
    Certificates,
    ClusterSet,
    Sentinel,
    SentinelSet,
    cluster_set,
    redis_server,
    sentinel_set,
)
from tests.support.waiting import wait_until
from tests.test_docs import fences
from tests.test_permissions import PAGE, commands
from veltrix_mw.stores.redis_layout import Names
from veltrix_mw.stores.redis_routes import slot_of

ENTRIES: Final = Names(NAMESPACE).entries
SLOT: Final = slot_of(ENTRIES)
QUERY: Final = f"?namespace={NAMESPACE}&timeout_s={PATIENCE_S}"
FINDING: Final = ("+sentinel|get-master-addr-by-name", "+sentinel|master")
NODE: Final = ("--cluster-enabled", "yes", *BOUNDED)


@pytest.fixture(scope="module")
def sentinels() -> Iterator[SentinelSet]:
    with sentinel_set(*BOUNDED) as servers:
        write(f"{servers.url}{QUERY}")
        yield servers


@pytest.fixture(scope="module")
def nodes() -> Iterator[ClusterSet]:
    with cluster_set(*BOUNDED) as servers:
        write(f"{servers.url}{QUERY}")
        yield servers


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdCluster]:
    """An etcd with users, each of which lacks something else."""
    with etcd(options=["--bcrypt-cost=4"]) as running:
        write(etcd_url(running))
        running.turn_auth_on(worker="pw", unprefixed="pw", unkept="pw")
        running.grant("worker", f"{NAMESPACE}/", f".veltrix/{NAMESPACE}/", access="read")
        running.grant("unprefixed", f".veltrix/{NAMESPACE}/", access="read")
        running.grant("unkept", f"{NAMESPACE}/", access="read")
        yield running


@pytest.fixture(params=["sentinel", "cluster"])
def several(request: pytest.FixtureRequest) -> SentinelSet | ClusterSet:
    """Sentinels or a cluster, whole."""
    servers: SentinelSet | ClusterSet = request.getfixturevalue(
        {"sentinel": "sentinels", "cluster": "nodes"}[request.param]
    )
    return servers


def url_of(servers: SentinelSet | ClusterSet, *, login: str = "", query: str = "", timeout_s: int = PATIENCE_S) -> str:
    return f"{servers.url.replace('://', f'://{login}')}?namespace={NAMESPACE}&timeout_s={timeout_s}&{query}".rstrip(
        "&"
    )


def over_grpc(cluster: EtcdCluster, *, login: str = "", query: str = "", timeout_s: int = PATIENCE_S) -> str:
    return etcd_url(cluster, login=login, query=f"transport=grpc&{query}".rstrip("&"), timeout_s=timeout_s)


# --- what breaks anywhere


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://{0}/mymaster/0?namespace=shop",
        "redis+cluster://{0}?namespace=shop",
        "etcd://{0}/shop?transport=grpc",
    ],
)
def test_a_wrong_port_and_a_wrong_host(shell: Shell, free_port: int, url: str) -> None:
    shell.store = url.format(f"127.0.0.1:{free_port},127.0.0.2:{free_port}")
    refused(examined(shell), "authority", "connection", f"nothing listens at 127.0.0.1:{free_port}")
    shell.store = url.format("no-such-host.invalid")
    refused(examined(shell), "authority", "name", "the name no-such-host.invalid")


def test_one_of_several_hosts_that_is_wrong_is_a_warning(
    shell: Shell, several: SentinelSet | ClusterSet, free_port: int
) -> None:
    shell.store = url_of(several).replace("://", f"://127.0.0.1:{free_port},")
    report = examined(shell)
    assert report.failed == []
    assert f"nothing listens at 127.0.0.1:{free_port}" in report.text("authority", "connection")
    assert report.state("authority", "read") == "ok"


def test_a_wrong_password_of_several_servers(shell: Shell, several: SentinelSet | ClusterSet) -> None:
    for server in several.servers:
        server.run("ACL", "SETUSER", "worker", "on", ">pw", "~*", "+@all")
    shell.store = url_of(several, login="worker:wr0ng@")
    report = examined(shell)
    refused(report, "authority", "authentication", "refused user 'worker' with that password")
    assert "wr0ng" not in report.answer.out
    shell.store = url_of(several, login="worker:pw@")
    assert examined(shell).failed == []


def test_the_documented_users_of_several_servers_lack_nothing(shell: Shell, several: SentinelSet | ClusterSet) -> None:
    of_servers, of_sentinels, of_nodes, of_waiting = (
        [shlex.split(line) for line in fence.text.splitlines()] for fence in fences(PAGE) if fence.language == "text"
    )
    base = [command for command in commands("redis-cli") if command[2].startswith("shop-")]
    finder = ""
    if isinstance(several, SentinelSet):
        for sentinel in several.sentinels:
            sentinel.run(*of_sentinels[0])
        finder = "sentinel_user=shop-finder&sentinel_password=finder-password"
    for server in several.servers:
        for command in (*base, *(of_servers if finder else of_nodes), *of_waiting):
            server.run(*command)
    for who, waits, state in (("worker", "", "warn"), ("writer", "wait_replicas=1&", "ok")):
        shell.store = url_of(several, login=f"shop-{who}:{who}-password@", query=f"{waits}{finder}")
        report = examined(shell)
        assert report.failed == []
        assert report.state("authority", "write") == state
        for check in ("service", "failover", "read"):
            assert report.state("authority", check) == "ok"
    shell.store = f"sqlite:///{shell.folder}/c.db?namespace={NAMESPACE}"
    mirror = f"{several.url.replace('://', '://shop-relay:relay-password@')}?{finder}"
    report = examined(shell, "--mirror", mirror)
    assert report.failed == [("mirror", "read")]  # an authority's keys are there
    assert report.state("mirror", "write") == "ok"


def test_no_permission_on_the_keys_of_several_servers(shell: Shell, several: SentinelSet | ClusterSet) -> None:
    for server in several.servers:
        server.run("ACL", "SETUSER", "stranger", "on", ">pw", "resetkeys", "~other:*", "+@all")
    shell.store = url_of(several, login="stranger:pw@")
    report = examined(shell)
    assert ("authority", "read") in report.failed
    assert f"ACL SETUSER stranger '%R~veltrix:{{{NAMESPACE}}}:*'" in report.text("authority", "read")


def test_full_servers(shell: Shell, several: SentinelSet | ClusterSet) -> None:
    owner = several.owner_of(ENTRIES)
    shell.store = url_of(several)
    owner.run("CONFIG", "SET", "maxmemory", "1mb")
    try:
        refused(examined(shell), "authority", "write", "out of memory: raise maxmemory")
    finally:
        owner.run("CONFIG", "SET", "maxmemory", "256mb")


def test_a_mirror_on_several_servers_that_is_an_authority(shell: Shell, several: SentinelSet | ClusterSet) -> None:
    shell.store = f"sqlite:///{shell.folder}/c.db?namespace={NAMESPACE}"
    write(shell.store)
    refused(examined(shell, "--mirror", several.url), "mirror", "read", "is an authority, not a mirror")


def test_a_wrong_ca_of_several_servers(shell: Shell, tmp_path: Path) -> None:
    ca, stranger = Certificates(tmp_path, "ours"), Certificates(tmp_path, "stranger")
    with sentinel_set(*BOUNDED, tls=(ca.ca, *ca.issue("server"))) as servers:
        shell.store = url_of(servers, query=f"ca={ca.ca}")
        assert examined(shell).failed == []
        shell.store = url_of(servers, query=f"ca={stranger.ca}")
        refused(examined(shell), "authority", "tls", f"is not signed by the CA in {stranger.ca}")
        shell.store = url_of(servers).replace("rediss+", "redis+")
        report = examined(shell)
        assert report.failed == [("authority", "service")]
        assert "rediss" in report.text("authority", "service")


def test_a_wrong_database_behind_sentinels(shell: Shell, sentinels: SentinelSet) -> None:
    shell.store = url_of(sentinels).replace("/0?", "/99?")
    refused(examined(shell), "authority", "database", "has no db 99")


# --- etcd over gRPC


def test_a_wrong_password_over_grpc(shell: Shell, guarded: EtcdCluster) -> None:
    shell.store = over_grpc(guarded, login="worker:wr0ng@")
    report = examined(shell)
    refused(report, "authority", "authentication", "refused user 'worker' with this password")
    assert "wr0ng" not in report.answer.out
    shell.store = over_grpc(guarded)
    refused(examined(shell), "authority", "authentication", "asks for a user")


def test_no_permission_over_grpc(shell: Shell, guarded: EtcdCluster) -> None:
    shell.store = over_grpc(guarded, login="unprefixed:pw@")
    refused(examined(shell), "authority", "read", "user 'unprefixed' may not read 'shop/'")
    shell.store = over_grpc(guarded, login="unkept:pw@")
    refused(examined(shell), "authority", "bookkeeping", "user 'unkept' may not read '.veltrix/shop/'")


def test_a_user_that_is_not_checked_over_grpc(shell: Shell) -> None:
    with etcd() as cluster:
        shell.store = over_grpc(cluster, login="worker:pw@")
        report = examined(shell)
        assert report.failed == []
        assert "authentication is off" in report.text("authority", "authentication")
        shell.store = over_grpc(cluster, timeout_s=1)
        cluster.pause(cluster.members[0])
        try:
            report = examined(shell)
        finally:
            cluster.resume(cluster.members[0])
        refused(report, "authority", "service", "it takes connections: is the process stopped")


def test_certificates_over_grpc(shell: Shell, tmp_path: Path) -> None:
    files, strangers = make_certificates(tmp_path / "etcd"), make_certificates(tmp_path / "strangers")
    with etcd(tls=files, options=["--client-cert-auth", "--trusted-ca-file", str(files.ca)]) as cluster:
        ours = f"&cert={files.client_cert}&key={files.client_key}"
        shell.store = over_grpc(cluster, query=f"ca={files.ca}{ours}")
        assert examined(shell).failed == []
        shell.store = over_grpc(cluster, query=f"ca={strangers.ca}{ours}")
        refused(examined(shell), "authority", "tls", f"is not signed by the CA in {strangers.ca}")
        shell.store = over_grpc(cluster, query=f"ca={files.ca}")
        refused(examined(shell), "authority", "service", "asks for a client certificate")
        shell.store = over_grpc(cluster, query=f"ca={files.ca}&cert={strangers.client_cert}&key={strangers.client_key}")
        refused(examined(shell), "authority", "service", "refused this client's certificate")
        shell.store = over_grpc(cluster).replace("etcds:", "etcd:")
        refused(examined(shell), "authority", "service", "speaks TLS only; write etcds://")


# --- sentinels


def test_sentinels_that_ask_for_a_password_are_told_by_their_parameter(shell: Shell, sentinels: SentinelSet) -> None:
    with ExitStack() as stack:
        for sentinel in sentinels.sentinels:
            sentinel.run("ACL", "SETUSER", "finder", "on", ">pw", "resetkeys", "resetchannels", "-@all", *FINDING)
            sentinel.client.ping()  # keeps a connection as it is let in now
            sentinel.run("ACL", "SETUSER", "default", "resetpass", ">s3cret")
            stack.callback(sentinel.run, "ACL", "SETUSER", "default", "nopass")
        shell.store = f"{sentinels.url}{QUERY}"
        report = examined(shell)
        refused(report, "authority", "service", "asks for a password: give ?sentinel_user= and ?sentinel_password=")
        shell.store = f"{sentinels.url}{QUERY}&sentinel_password=wr0ng"
        report = examined(shell)
        refused(report, "authority", "service", "correct ?sentinel_user= or ?sentinel_password=")
        assert "wr0ng" not in report.answer.out
        put = shell.run("put", "a", "1")
        assert put.code == 6
        assert "correct ?sentinel_user= or ?sentinel_password=" in put.err
        shell.store = f"{sentinels.url}{QUERY}&sentinel_user=finder&sentinel_password=pw"
        assert examined(shell).failed == []
        for lost in FINDING:
            for sentinel in sentinels.sentinels:
                sentinel.run("ACL", "SETUSER", "finder", "-@all", *(each for each in FINDING if each != lost))
            report = examined(shell)
            assert report.failed == [("authority", "service")]
            assert f"ACL SETUSER finder {' '.join(FINDING)}" in report.text("authority", "service")


def test_a_user_behind_sentinels_that_may_not_ask_for_the_role_is_told(shell: Shell, sentinels: SentinelSet) -> None:
    primary = sentinels.primary()
    primary.run("ACL", "SETUSER", "roleless", "on", ">pw", "~*", "+@all", "-role")
    shell.store = f"{sentinels.url}{QUERY}".replace("://", "://roleless:pw@")
    report = examined(shell)
    assert report.failed[0] == ("authority", "database")
    assert "+role" in report.text("authority", "database")


def test_a_port_of_a_sentinel_is_told_as_one(shell: Shell, sentinels: SentinelSet) -> None:
    at = f"127.0.0.1:{sentinels.sentinels[0].port}"
    for db in (0, 1):
        shell.store = f"redis://{at}/{db}{QUERY}"
        refused(examined(shell), "authority", "service", f"write redis+sentinel://{at}/NAME/0")
        assert f"write redis+sentinel://{at}/NAME/0" in shell.run("put", "a", "1").err


def test_sentinels_of_two_sets_are_told(shell: Shell, sentinels: SentinelSet) -> None:
    with redis_server(*BOUNDED) as other:
        stranger = Sentinel(other)
        try:
            shell.store = f"{sentinels.url.replace('//', f'//127.0.0.1:{stranger.port},')}{QUERY}"
            report = examined(shell)
        finally:
            stranger.close()
        text = "the sentinels do not agree where 'mymaster' is"
        refused(report, "authority", "service", text)
        assert f"127.0.0.1:{stranger.port} says 127.0.0.1:{other.port}" in report.text("authority", "service")


def test_a_failover_that_cannot_be_is_a_warning(shell: Shell) -> None:
    with redis_server(*BOUNDED) as alone:
        sentinel = Sentinel(alone)
        try:
            shell.store = f"redis+sentinel://127.0.0.1:{sentinel.port}/{PRIMARY}/0{QUERY}"
            write(shell.store)
            report = examined(shell)
        finally:
            sentinel.close()
    assert report.failed == []
    assert ("authority", "failover") in report.warned
    text = report.text("authority", "failover")
    assert "no replica is connected to the primary: start one" in text
    assert "1 sentinel alone" in text
    assert f"the quorum is 2 of 1 sentinel: redis-cli -p 26379 SENTINEL SET {PRIMARY} quorum 1" in text


def test_sentinels_that_are_away_are_counted_and_a_write_says_that_a_failover_may_be_under_way(shell: Shell) -> None:
    with sentinel_set(*BOUNDED) as servers:
        shell.store = f"{servers.url}{QUERY}"
        write(shell.store)
        well = examined(shell)
        primary = servers.primary()
        assert well.text("authority", "failover") == "1 replica can take over, by 2 of 3 sentinels"
        for sentinel in servers.sentinels[:2]:
            sentinel.kill()
        report = examined(shell)
        assert "1 of 3 sentinels at most can be reached, and a failover takes 2" in report.text("authority", "failover")
        primary.kill()
        done = shell.run("put", "a", "1")
        assert done.code == 5
        assert "a failover may be under way" in done.err


def test_a_primary_that_would_want_the_replica_that_replaces_it_is_a_warning(
    shell: Shell, several: SentinelSet | ClusterSet
) -> None:
    owner = several.owner_of(ENTRIES)
    shell.store = url_of(several)
    owner.run("CONFIG", "SET", "min-replicas-to-write", "1")
    try:
        report = examined(shell)
    finally:
        owner.run("CONFIG", "SET", "min-replicas-to-write", "0")
    assert report.failed == []
    assert "1 replica and min-replicas-to-write 1: who takes over has one less" in report.text("authority", "failover")
    for server in several.servers:
        server.run("ACL", "SETUSER", "modest", "on", ">pw", "~*", "+@all", "-config|get", "-info")
    shell.store = url_of(several, login="modest:pw@")
    assert examined(shell).state("authority", "failover") == "ok"


def test_a_primary_that_wants_replicas_says_so(shell: Shell) -> None:
    with redis_server("--min-replicas-to-write", "1", *BOUNDED) as server:
        shell.store = f"redis://127.0.0.1:{server.port}/0{QUERY}"
        refused(examined(shell), "authority", "write", "than its min-replicas-to-write: start replicas, or lower it")


def test_sentinels_that_are_stopped_are_told(shell: Shell, sentinels: SentinelSet) -> None:
    one = sentinels.sentinels[0]
    shell.store = url_of(sentinels, timeout_s=1)
    one.stop()
    try:
        report = examined(shell)
        assert report.failed == []
        assert "2 of 3 are well" in report.text("authority", "service")
        assert f"the sentinel 127.0.0.1:{one.port} did not answer in time" in report.text("authority", "service")
        for other in sentinels.sentinels[1:]:
            other.stop()
        refused(examined(shell), "authority", "service", "answers in time, and they take connections")
    finally:
        for sentinel in sentinels.sentinels:
            sentinel.cont()


# --- a cluster


def test_nodes_that_form_no_cluster_are_told_how_to(shell: Shell) -> None:
    with redis_server(*NODE) as one, redis_server(*NODE) as other:
        hosts = [f"127.0.0.1:{each.port}" for each in (one, other)]
        shell.store = f"redis+cluster://{','.join(hosts)}{QUERY}"
        refused(examined(shell), "authority", "service", f"redis-cli --cluster create {' '.join(hosts)}, with")


@pytest.mark.parametrize(
    ("lost", "text"),
    [
        (SLOT, f"no node has slot {SLOT}, where the namespace is, and 0 more of 16384"),
        (SLOT - 1, "1 slot without a node, so the cluster serves nothing"),
    ],
)
def test_slots_without_a_node_are_told(shell: Shell, nodes: ClusterSet, lost: int, text: str) -> None:
    owner = nodes.owner(SLOT)
    assert nodes.owner(lost) is owner
    shell.store = f"{nodes.url}{QUERY}"
    for server in nodes.servers:
        server.run("CLUSTER", "DELSLOTS", lost)
    try:
        wait_until(
            lambda: all(b"cluster_state:fail" in each.raw("CLUSTER", "INFO") for each in nodes.servers),
            CONVERGE_S,
            reason="the nodes know that a slot is nobody's",
        )
        report = examined(shell)
    finally:
        owner.run("CLUSTER", "ADDSLOTS", lost)
        nodes.wait_whole()
    refused(report, "authority", "service", text)
    assert "redis-cli --cluster fix 127.0.0.1:" in report.text("authority", "service")
    wait_until(lambda: examined(shell).failed == [], CONVERGE_S, reason="the cluster is whole")


def test_a_slot_that_is_half_moved_is_told(shell: Shell, nodes: ClusterSet) -> None:
    owner = nodes.owner(SLOT)
    target = nodes.another(owner)
    shell.store = f"redis+cluster://127.0.0.1:{nodes.replica_of(owner).port}{QUERY}"  # the owner is not named
    assert examined(shell).state("authority", "service") == "ok"
    nodes.begin_moving(SLOT, owner, target)
    try:
        report = examined(shell)
        one_sided = f"127.0.0.1:{owner.port} gives it to 127.0.0.1:{target.port}"
        assert ("authority", "service") in report.warned
        text = report.text("authority", "service")
        assert f"slot {SLOT}, where the namespace is, is half moved" in text
        assert one_sided in text
        assert f"127.0.0.1:{target.port} takes it from 127.0.0.1:{owner.port}" in text
        assert "redis-cli --cluster fix 127.0.0.1:" in text
    finally:
        for server in (owner, target):
            server.run("CLUSTER", "SETSLOT", SLOT, "STABLE")
    assert examined(shell).state("authority", "service") == "ok"


def test_a_user_of_a_cluster_that_may_not_ask_the_nodes_is_told(shell: Shell, nodes: ClusterSet) -> None:
    shell.store = f"{nodes.url}{QUERY}".replace("://", "://lost:pw@")
    for lacks in ("cluster|slots", "cluster|nodes"):
        for server in nodes.servers:
            server.run("ACL", "SETUSER", "lost", "on", ">pw", "~*", "+@all", f"-{lacks}")
        report = examined(shell)
        refused(report, "authority", "service", f"lacks +{lacks}")
        assert "ACL SETUSER lost +asking +cluster|slots +cluster|nodes" in report.text("authority", "service")
    for server in nodes.servers:
        server.run("ACL", "SETUSER", "lost", "+@all", "-asking")
    refused(examined(shell), "authority", "read", "redis-cli ACL SETUSER lost +asking")


def test_nodes_of_two_clusters_are_told(shell: Shell, nodes: ClusterSet) -> None:
    with redis_server(*NODE) as stranger:
        shell.store = f"{nodes.url},127.0.0.1:{stranger.port}{QUERY}"
        report = examined(shell)
        assert report.failed == []
        assert f"127.0.0.1:{stranger.port} is a node of no cluster" in report.text("authority", "service")
        stranger.run("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
        report = examined(shell)
        refused(report, "authority", "service", "are of different clusters")
        assert f"127.0.0.1:{stranger.port}" in report.text("authority", "service")
        # Alone it is a cluster, from which nobody takes over.
        shell.store = f"redis+cluster://127.0.0.1:{stranger.port}{QUERY}"
        wait_until(lambda: examined(shell).failed == [], CONVERGE_S, reason="a node alone is a cluster")
        text = examined(shell).text("authority", "failover")
        assert f"127.0.0.1:{stranger.port} has no replica that is up: redis-cli --cluster add-node HOST:PORT" in text
        assert "one primary has slots" in text


def test_servers_of_another_kind_than_the_url_says_are_told(
    shell: Shell, sentinels: SentinelSet, nodes: ClusterSet
) -> None:
    server, node = (f"127.0.0.1:{each.servers[0].port}" for each in (sentinels, nodes))
    for url, text in (
        (f"redis+cluster://{server}", "is no node of a Redis Cluster: write redis://"),
        (f"redis+sentinel://{server}/{PRIMARY}/0", "is a Redis server, not a sentinel"),
        (f"redis+sentinel://{node}/{PRIMARY}/0", "is a Redis server, not a sentinel"),
    ):
        shell.store = f"{url}{QUERY}"
        refused(examined(shell), "authority", "service", text)


def test_a_slot_of_which_some_keys_have_left_is_told(shell: Shell, nodes: ClusterSet) -> None:
    owner = nodes.owner(SLOT)
    target = nodes.another(owner)
    shell.store = f"{nodes.url}{QUERY}"
    nodes.begin_moving(SLOT, owner, target)
    try:
        nodes.move_keys(SLOT, owner, target, most=1)
        report = examined(shell)
    finally:
        nodes.move_keys(SLOT, owner, target)
        nodes.end_moving(SLOT, owner, target)
        nodes.wait_whole()
    assert "is half moved" in report.text("authority", "service")
    assert report.failed == []
    assert nodes.owner(SLOT) is target
    assert examined(shell).state("authority", "service") == "ok"


def test_a_cluster_whose_primary_has_a_replica_can_fail_over(shell: Shell, nodes: ClusterSet) -> None:
    shell.store = f"{nodes.url}{QUERY}"
    report = examined(shell)
    assert report.text("authority", "failover") == f"1 replica of 127.0.0.1:{nodes.owner(SLOT).port} can take over"


# --- etcd


@pytest.mark.parametrize("transport", ["gateway", "grpc"])
def test_members_of_two_clusters_of_etcd_are_told(shell: Shell, transport: str) -> None:
    with etcd() as one, etcd() as other:
        (at,), (there,) = ([f"{host}:{port}" for host, port in each.hosts] for each in (one, other))
        shell.store = f"etcd://{at},{there}/{NAMESPACE}?timeout_s={PATIENCE_S}&transport={transport}"
        report = examined(shell)
        refused(report, "authority", "service", "these are members of 2 different clusters")
        status = one.post("/v3/maintenance/status", {})
        assert f"{at} of cluster {int(status['header']['cluster_id']):x}; " in report.text("authority", "service")
