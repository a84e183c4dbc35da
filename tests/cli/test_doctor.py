"""`doctor` on real servers: where all is well, and on each broken set-up, which has a line of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Answer, Shell
from tests.support import etcd_servers
from tests.support.etcd_servers import EtcdCluster, etcd, make_certificates
from tests.support.redis_servers import Certificates, RedisServer, SentinelSet, cluster_set, redis_server, sentinel_set
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient
from veltrix_mw.diagnosis import diagnose
from veltrix_mw.stores import etcd3_package
from veltrix_mw.stores.etcd_members import Members
from veltrix_mw.stores.etcd_probe import known_faults

Put = Callable[[str, Any], int]

NAMESPACE = "shop"
BASE = "veltrix:{shop}:"
BOUNDED = ("--maxmemory", "256mb")
CONVERGE_S = 30.0
PATIENCE_S = 5  # a server on a busy machine takes its time to look at a password


@dataclass(frozen=True)
class Report:
    """What `doctor --json` said."""

    answer: Answer
    checks: dict[tuple[str, str], tuple[str, str]]

    def state(self, part: str, check: str) -> str:
        return self.checks[part, check][0]

    def text(self, part: str, check: str) -> str:
        return self.checks[part, check][1]

    @property
    def failed(self) -> list[tuple[str, str]]:
        return [name for name, (state, _) in self.checks.items() if state == "fail"]

    @property
    def warned(self) -> list[tuple[str, str]]:
        return [name for name, (state, _) in self.checks.items() if state == "warn"]


def examined(shell: Shell, *arguments: str) -> Report:
    """The report; its exit code is what its checks are."""
    done = shell.run("doctor", "--json", *arguments)
    assert done.code in {0, 1}, done
    assert done.err == ""
    answer = done.json
    checks = {(each["part"], each["check"]): (each["state"], each["text"]) for each in answer["checks"]}
    assert len(checks) == len(answer["checks"])
    report = Report(done, checks)
    assert answer["well"] == (done.code == 0) == (not report.failed)
    assert not any("fault of its own" in text for _, text in checks.values()), checks
    return report


def etcd_url(cluster: EtcdCluster, *, login: str = "", query: str = "", timeout_s: int = PATIENCE_S) -> str:
    hosts = ",".join(f"{host}:{port}" for host, port in cluster.hosts)
    scheme = "etcds" if cluster.tls else "etcd"
    return f"{scheme}://{login}{hosts}/{NAMESPACE}?timeout_s={timeout_s}&{query}".removesuffix("&")


def redis_url(
    server: RedisServer,
    *,
    login: str = "",
    db: int = 0,
    query: str = f"namespace={NAMESPACE}",
    timeout_s: int = PATIENCE_S,
) -> str:
    return f"redis://{login}127.0.0.1:{server.port}/{db}?timeout_s={timeout_s}&{query}".removesuffix("&")


def mirror_url(server: RedisServer, *, login: str = "", db: int = 0) -> str:
    return redis_url(server, login=login, db=db, query="")


def write(url: str) -> int:
    client = ConfigClient(url, mirror="")
    try:
        return client.put("checkout/max_items", 50)
    finally:
        client.close()


@contextmanager
def fed(shell: Shell, mirror: str, *arguments: str) -> Iterator[None]:
    """The mirror of the shell's store, while a relay feeds it, and has proved it."""
    with shell.running("--mirror", mirror, "relay", "--instance", "feeder", *arguments) as relay:
        relay.until("elected")
        wait_until(
            lambda: examined(shell, "--mirror", mirror).state("mirror", "freshness") == "ok",
            CONVERGE_S,
            reason="the mirror is fed",
        )
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    """An etcd that holds a namespace; nobody stops it or changes its users."""
    with etcd() as running:
        write(etcd_url(running))
        yield running


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdCluster]:
    """An etcd with users, each of which may do something else."""
    with etcd(options=["--bcrypt-cost=4"]) as running:  # the least: passwords are quickly looked at
        write(etcd_url(running))
        running.turn_auth_on(worker="pw", writer="pw", unprefixed="pw", unkept="pw")
        running.grant("worker", "shop/", ".veltrix/shop/", access="read")
        running.grant("writer", "shop/", ".veltrix/shop/")
        running.grant("unprefixed", ".veltrix/shop/", access="read")
        running.grant("unkept", "shop/", access="read")
        yield running


# Several servers of Redis


@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
def test_several_servers_of_redis_are_looked_at_where_the_namespace_is(shell: Shell, kind: str) -> None:
    with sentinel_set(*BOUNDED) if kind == "sentinel" else cluster_set(*BOUNDED) as servers:
        query = f"?namespace={NAMESPACE}&timeout_s={PATIENCE_S}"
        shell.store = f"{servers.url}{query}"
        write(shell.store)
        report = examined(shell)
        assert (report.failed, report.warned) == ([], [("authority", "persistence")])
        primary = servers.owner_of(f"veltrix:{{{NAMESPACE}}}:entries")
        what = "primary 'mymaster' of the sentinels" if kind == "sentinel" else "cluster's primary for the namespace"
        assert report.text("authority", "service") == f"Redis answers at 127.0.0.1:{primary.port}, the {what}"
        assert "1 key" in report.text("authority", "read")
        shell.store = f"sqlite:///{shell.folder}/c.db?namespace={NAMESPACE}"
        write(shell.store)
        report = examined(shell, "--mirror", servers.url)
        refused(report, "mirror", "read", "is an authority, not a mirror")
        if isinstance(servers, SentinelSet):
            shell.store = f"{servers.url.replace('mymaster', 'other')}{query}"
            refused(examined(shell), "authority", "service", "knows no primary of that name")
            for server in servers.servers:
                server.kill()
            shell.store = f"{servers.url}{query}"
            refused(examined(shell), "authority", "service", f"127.0.0.1:{primary.port}")


# All is well


def test_a_file_that_is_well(shell: Shell, put: Put) -> None:
    put("k", 1)
    before = {file.name: file.read_bytes() for file in shell.folder.iterdir()}
    report = examined(shell)
    assert {file.name: file.read_bytes() for file in shell.folder.iterdir()} == before
    assert (report.failed, report.warned) == ([], [])
    assert [check for _, check in report.checks] == ["url", "file", "read", "write", "round trip"]
    assert "1 key" in report.text("authority", "read")


def test_a_file_that_is_not_there_yet_is_a_warning_and_is_not_made(shell: Shell) -> None:
    report = examined(shell)
    assert report.answer.code == 0
    assert report.warned == [("authority", "file")]
    assert list(shell.folder.iterdir()) == []
    shell.store = f"sqlite:///{shell.folder}/nowhere/c.db"
    assert examined(shell).failed == [("authority", "file")]


def test_an_empty_file_is_told_as_one_and_left_so(shell: Shell) -> None:
    file = shell.folder / "empty.db"
    file.touch()
    shell.store = f"sqlite:///{file}"
    report = examined(shell)
    assert report.failed == []
    assert report.warned == [("authority", "read")]
    assert report.text("authority", "file") == f"{file} is there"
    assert f"{file} is an empty file" in report.text("authority", "read")
    assert "the empty file can be filled" in report.text("authority", "write")
    assert [each.name for each in shell.folder.iterdir()] == ["empty.db"]
    assert file.stat().st_size == 0


def test_a_redis_that_is_well_and_untouched(shell: Shell) -> None:
    with redis_server("--appendonly", "yes", *BOUNDED) as server:
        shell.store = redis_url(server)
        write(shell.store)
        before = server.run("DEBUG", "DIGEST")
        report = examined(shell)
        assert (report.failed, report.warned) == ([], [])
        assert set(dict.fromkeys(state for state, _ in report.checks.values())) == {"ok"}
        assert report.state("authority", "write") == "ok"
        assert report.text("authority", "stream").startswith("1 change, from revision 1 to 1")
        assert server.run("DEBUG", "DIGEST") == before
        assert sorted(server.run("KEYS", "*")) == [f"{BASE}{name}".encode() for name in ("changes", "entries", "keys")]


def test_a_redis_that_holds_nothing_is_left_empty(shell: Shell, redis: RedisServer) -> None:
    shell.store = redis_url(redis)
    report = examined(shell)
    assert report.answer.code == 0
    assert "nothing was written yet" in report.text("authority", "read")
    assert redis.run("KEYS", "*") == []


def test_an_etcd_that_is_well_and_untouched(shell: Shell, cluster: EtcdCluster) -> None:
    shell.store = etcd_url(cluster)
    before = cluster.revision()
    report = examined(shell)
    assert report.failed == []
    assert set(report.warned) <= {("authority", "version")}
    assert [check for _, check in report.checks] == [
        "url", "name", "connection", "tls", "service", "quorum", "authentication", "read", "bookkeeping", "write",
        "version", "clock", "round trip",
    ]  # fmt: skip
    assert {state for state, _ in report.checks.values()} <= {"ok", "warn"}
    assert cluster.revision() == before
    assert "veltrix-doctor" not in cluster.ctl("get", "--prefix", "", "--keys-only")


def test_etcd_with_a_mirror_that_is_well(shell: Shell, cluster: EtcdCluster, redis: RedisServer) -> None:
    shell.store = etcd_url(cluster)
    with fed(shell, mirror_url(redis)):
        report = examined(shell, "--mirror", mirror_url(redis))
    assert report.failed == []
    assert set(report.warned) <= {("authority", "version")}
    mirror = [check for part, check in report.checks if part == "mirror"]
    assert mirror[:2] == ["url", "namespace"]
    assert mirror[-5:] == ["stream", "freshness", "coverage", "relay", "agreement"]
    assert report.text("mirror", "relay") == "feeder feeds it"
    assert {report.state("mirror", check) for check in mirror} == {"ok"}


def test_an_etcd_that_only_others_wrote_agrees_with_its_mirror(shell: Shell, redis: RedisServer) -> None:
    with etcd() as plain:
        plain.put("shop/a", "1")
        plain.put("shop/no key of ours", "1")
        shell.store = etcd_url(plain)
        with fed(shell, mirror_url(redis)):
            report = examined(shell, "--mirror", mirror_url(redis))
        assert report.failed == []
        assert report.state("mirror", "agreement") == "ok"
        assert "no incarnation yet" in report.text("authority", "bookkeeping")


def test_the_servers_of_known_watch_faults_are_named(shell: Shell, cluster: EtcdCluster) -> None:
    shell.store = etcd_url(cluster)
    text = examined(shell).text("authority", "version")
    version = str(cluster.post("/v3/maintenance/status", {})["version"])
    assert text.partition(":")[0] == f"etcd {version}"
    assert all(fault in text for fault in known_faults(version))
    assert ("may lose changes" in text) == bool(known_faults(version))


@pytest.mark.parametrize(
    ("version", "number"),
    [("3.4.33", 1), ("3.4.34", 0), ("3.5.2", 3), ("3.5.7", 2), ("3.5.15", 1), ("3.5.16", 0), ("3.6.0", 0), ("", 0)],
)
def test_which_versions_of_etcd_have_known_faults(version: str, number: int) -> None:
    assert len(known_faults(version)) == number


def test_an_etcd_without_room_says_so(shell: Shell) -> None:
    with etcd() as full:
        shell.store = etcd_url(full)
        write(shell.store)
        full.post("/v3/maintenance/alarm", {"action": "ACTIVATE", "alarm": "NOSPACE"})
        report = examined(shell)
    refused(report, "authority", "write", "its space is used up")
    assert "NOSPACE" in report.text("authority", "version")
    assert "etcdctl alarm disarm" in report.text("authority", "version")


# Fifteen that are not


def refused(report: Report, part: str, check: str, text: str) -> None:
    """That check failed, with those words, and no other: what needs it was not made."""
    assert report.failed == [(part, check)], report.checks
    assert text in report.text(part, check)


def test_a_wrong_port(shell: Shell, free_port: int) -> None:
    for scheme, end in (("etcd", "/shop"), ("redis", "/0?namespace=shop")):
        shell.store = f"{scheme}://127.0.0.1:{free_port}{end}"
        report = examined(shell)
        refused(report, "authority", "connection", f"nothing listens at 127.0.0.1:{free_port}")
        assert report.checks["authority", "read"] == ("not made", "because of connection")
        assert report.checks["authority", "name"][0] == "ok"


def test_a_wrong_host(shell: Shell) -> None:
    for scheme, end in (("etcd", "/shop"), ("redis", "/0?namespace=shop")):
        shell.store = f"{scheme}://no-such-host.invalid{end}"
        report = examined(shell)
        refused(report, "authority", "name", "the name no-such-host.invalid")
        assert report.checks["authority", "connection"] == ("not made", "because of name")


def test_a_wrong_password(shell: Shell, guarded: EtcdCluster) -> None:
    shell.store = etcd_url(guarded, login="worker:wr0ng@")
    report = examined(shell)
    refused(report, "authority", "authentication", "refused user 'worker' with this password")
    assert report.state("authority", "quorum") == "ok"
    shell.store = etcd_url(guarded)
    refused(examined(shell), "authority", "authentication", "asks for a user")
    with redis_server("--requirepass", "s3cret") as server:
        shell.store = redis_url(server, login=":wr0ng@")
        other = examined(shell)
        refused(other, "authority", "authentication", "refused the default user with that password")
        assert other.state("authority", "service") == "ok"
        shell.store = redis_url(server)
        refused(examined(shell), "authority", "authentication", "asks for a password")
    for each in (report, other):
        assert "wr0ng" not in each.answer.out


def test_a_user_that_etcd_does_not_check_is_a_warning(shell: Shell, cluster: EtcdCluster) -> None:
    shell.store = etcd_url(cluster, login="worker:pw@")
    report = examined(shell)
    assert report.failed == []
    assert ("authority", "authentication") in report.warned
    assert "authentication is off" in report.text("authority", "authentication")


def test_a_wrong_ca(shell: Shell, tmp_path: Path) -> None:
    files = make_certificates(tmp_path / "etcd")
    strangers = make_certificates(tmp_path / "strangers")
    with etcd(tls=files) as cluster:
        shell.store = etcd_url(cluster, query=f"ca={files.ca}")
        write(shell.store)
        well = examined(shell)
        assert well.failed == []
        assert "etcd for IP Address:127.0.0.1, signed by test CA, valid until" in well.text("authority", "tls")
        assert "ends soon" in well.text("authority", "tls")
        shell.store = etcd_url(cluster, query=f"ca={strangers.ca}")
        report = examined(shell)
        refused(report, "authority", "tls", f"is not signed by the CA in {strangers.ca}")
        assert "etcd for IP Address:127.0.0.1, signed by test CA" in report.text("authority", "tls")
        assert report.checks["authority", "service"] == ("not made", "because of tls")
        shell.store = etcd_url(cluster, query=f"ca={tmp_path}/none.pem")
        refused(examined(shell), "authority", "tls", f"the CA file {tmp_path}/none.pem cannot be used")
        shell.store = etcd_url(cluster).replace("etcds:", "etcd:")
        refused(examined(shell), "authority", "service", "speaks TLS only; write etcds://")


def redis_tls_url(server: RedisServer, ca: Path) -> str:
    return redis_url(server, query=f"namespace=shop&ca={ca}").replace("redis:", "rediss:")


def test_a_wrong_ca_of_redis(shell: Shell, tmp_path: Path) -> None:
    ca, stranger = Certificates(tmp_path, "ours"), Certificates(tmp_path, "stranger")
    with redis_server(tls=(ca.ca, *ca.issue("server"))) as server:
        shell.store = redis_tls_url(server, ca.ca)
        assert examined(shell).failed == []
        shell.store = redis_tls_url(server, stranger.ca)
        refused(examined(shell), "authority", "tls", f"is not signed by the CA in {stranger.ca}")


def test_a_client_certificate_that_is_not_given_or_of_another_ca(shell: Shell, tmp_path: Path) -> None:
    ours, stranger = Certificates(tmp_path, "ours"), Certificates(tmp_path, "stranger")
    cert, key = ours.issue("client")
    others, their_key = stranger.issue("other")
    # Since TLS 1.3 a client has finished its handshake when the server minds.
    for version, check in (("TLSv1.2", "tls"), ("TLSv1.3", "service")):
        options = ("--tls-auth-clients", "yes", "--tls-protocols", version)
        with redis_server(*options, tls=(ours.ca, *ours.issue("server"))) as server:
            shell.store = f"{redis_tls_url(server, ours.ca)}&cert={cert}&key={key}"
            assert examined(shell).failed == []
            shell.store = redis_tls_url(server, ours.ca)
            refused(examined(shell), "authority", check, "asks for a client certificate")
            shell.store = f"{redis_tls_url(server, ours.ca)}&cert={others}&key={their_key}"
            refused(examined(shell), "authority", check, "give one that its CA signed")


def test_a_client_certificate_of_etcd_that_is_not_given_or_of_another_ca(shell: Shell, tmp_path: Path) -> None:
    files, strangers = make_certificates(tmp_path / "etcd"), make_certificates(tmp_path / "strangers")
    with etcd(tls=files, options=["--client-cert-auth", "--trusted-ca-file", str(files.ca)]) as cluster:
        shell.store = etcd_url(cluster, query=f"ca={files.ca}&cert={files.client_cert}&key={files.client_key}")
        assert examined(shell).failed == []
        shell.store = etcd_url(cluster, query=f"ca={files.ca}")
        refused(examined(shell), "authority", "service", "asks for a client certificate")
        shell.store = etcd_url(cluster, query=f"ca={files.ca}&cert={strangers.client_cert}&key={strangers.client_key}")
        refused(examined(shell), "authority", "service", "refused this client's certificate")


@contextmanager
def alerting(alert: int) -> Iterator[int]:
    """A server that ends each TLS handshake with this alert; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    with listening.accept()[0] as raw:
                        raw.recv(65536)
                        raw.sendall(bytes([0x15, 3, 3, 0, 2, 2, alert]))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("url", ["etcds://127.0.0.1:{}/shop", "rediss://127.0.0.1:{}/0?namespace=shop"])
def test_an_alert_that_is_not_about_certificates_is_not_told_as_one(shell: Shell, url: str) -> None:
    with alerting(70) as port:  # protocol_version
        shell.store = url.format(port)
        report = examined(shell)
        refused(report, "authority", "tls", "ended the TLS handshake (tlsv1_alert_protocol_version)")
        assert "certificate" not in report.text("authority", "tls")


def test_an_expired_certificate(shell: Shell, tmp_path: Path) -> None:
    ca = Certificates(tmp_path, "ours")
    with redis_server(tls=(ca.ca, *ca.issue("old", days=-1))) as server:
        shell.store = redis_tls_url(server, ca.ca)
        report = examined(shell)
        refused(report, "authority", "tls", "has expired: renew it on the server")
        assert "old for IP Address:127.0.0.1" in report.text("authority", "tls")
        assert "was valid until" in report.text("authority", "tls")


def test_an_expired_certificate_of_etcd(shell: Shell, tmp_path: Path) -> None:
    files = make_certificates(tmp_path / "etcd", days=-1)
    with etcd(tls=files, waits=False) as cluster:
        shell.store = etcd_url(cluster, query=f"ca={files.ca}")
        report = wait_until(
            lambda: report if (report := examined(shell)).state("authority", "connection") == "ok" else None,
            CONVERGE_S,
            reason="etcd listens",
        )
        assert report is not None
        refused(report, "authority", "tls", "has expired: renew it on the server")
        assert "was valid until" in report.text("authority", "tls")


def test_no_permission_on_the_prefix(shell: Shell, guarded: EtcdCluster) -> None:
    shell.store = etcd_url(guarded, login="unprefixed:pw@")
    report = examined(shell)
    refused(report, "authority", "read", "user 'unprefixed' may not read 'shop/': etcdctl role grant-permission")
    assert report.state("authority", "bookkeeping") == "ok"
    with redis_server() as server:
        server.run("ACL", "SETUSER", "stranger", "on", ">pw", "~other:*", "+@all")
        shell.store = redis_url(server, login="stranger:pw@")
        other = examined(shell)
        assert ("authority", "read") in other.failed
        assert f"%R~{BASE}* to read" in other.text("authority", "read")
        assert other.state("authority", "authentication") == "ok"


def test_no_permission_on_the_bookkeeping(shell: Shell, guarded: EtcdCluster, redis: RedisServer) -> None:
    shell.store = etcd_url(guarded, login="unkept:pw@")
    report = examined(shell)
    refused(report, "authority", "bookkeeping", "user 'unkept' may not read '.veltrix/shop/'")
    assert report.state("authority", "read") == "ok"
    redis.run("ACL", "SETUSER", "unleased", "on", ">pw", "resetkeys", f"%R~{BASE}entries", f"%R~{BASE}changes", "+@all")
    shell.store = etcd_url(guarded, login="worker:pw@")
    mirrored = examined(shell, "--mirror", mirror_url(redis, login="unleased:pw@"))
    refused(mirrored, "mirror", "bookkeeping", "a key pattern")
    assert mirrored.checks["mirror", "relay"] == ("not made", "because of bookkeeping")


def test_what_a_user_of_etcd_may_write(shell: Shell, guarded: EtcdCluster) -> None:
    before = guarded.revision()
    shell.store = etcd_url(guarded, login="writer:pw@")
    assert examined(shell).state("authority", "write") == "ok"
    shell.store = etcd_url(guarded, login="worker:pw@")
    report = examined(shell)
    assert report.answer.code == 0
    assert report.state("authority", "write") == "warn"
    assert "user 'worker' may not write 'shop/'" in report.text("authority", "write")
    assert guarded.revision() == before


def test_a_redis_user_that_only_reads(shell: Shell, put: Put, redis: RedisServer) -> None:
    put("k", 1)
    redis.run(
        "ACL", "SETUSER", "worker", "on", ">pw", "resetkeys", "resetchannels", "-@all", "%R~veltrix:{default}:*",
        *["+get", "+time", "+exists", "+hmget", "+hscan", "+xrange", "+xread"],
    )  # fmt: skip
    with fed(shell, mirror_url(redis)):
        report = examined(shell, "--mirror", mirror_url(redis, login="worker:pw@"))
        assert report.answer.code == 0
        assert report.warned == [("mirror", "write")]
        assert "user 'worker' may not write: right for a worker, not for a relay" in report.text("mirror", "write")
        assert report.checks["mirror", "version"][0] == "not made"
        assert "redis-cli INFO server" in report.text("mirror", "version")
        assert "not for this user to know" in report.text("mirror", "stream")
    report = examined(shell, "--mirror", mirror_url(redis, login="worker:pw@"))
    assert "this user may not write it" in report.text("mirror", "relay")


def test_a_redis_whose_writes_wait_for_replicas(shell: Shell, redis: RedisServer) -> None:
    shell.store = f"{redis_url(redis)}&wait_replicas=1&wait_timeout_s=0.1"
    refused(examined(shell), "authority", "write", "0 of the 1 replica that ?wait_replicas= asks for answer")
    redis.run("ACL", "SETUSER", "hasty", "on", ">pw", "~*", "+@all", "-wait")
    shell.store = f"{redis_url(redis, login='hasty:pw@')}&wait_replicas=1"
    refused(examined(shell), "authority", "write", "user 'hasty' may write and not wait for replicas")


def test_a_reader_of_a_redis_authority_leaves_unmade_what_info_tells(shell: Shell, redis: RedisServer) -> None:
    redis.run(
        "ACL", "SETUSER", "worker", "on", ">pw", "resetkeys", "-@all", f"%R~{BASE}*",
        *["+get", "+time", "+exists", "+hmget", "+hscan", "+xrange", "+xread"],
    )  # fmt: skip
    write(redis_url(redis))
    shell.store = redis_url(redis, login="worker:pw@")
    report = examined(shell)
    assert report.failed == []
    unmade = [check for (_, check), (state, _) in report.checks.items() if state == "not made"]
    assert unmade == ["version", "memory", "persistence"]


def test_each_check_of_etcd_asks_by_one_deadline(cluster: EtcdCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    call = Members.call

    def noted(self: Members, *arguments: Any, deadline_s: float, **options: Any) -> Any:
        asked.append(deadline_s)
        return call(self, *arguments, deadline_s=deadline_s, **options)

    monkeypatch.setattr(Members, "call", noted)
    calls = {}
    for finding in diagnose(etcd_url(cluster), mirror=""):
        calls[finding.check] = (len(asked), len(set(asked)))
        asked.clear()
    assert calls["write"] == (3, 1)
    assert calls["round trip"] == (5, 1)
    assert all(different <= 1 for _, different in calls.values())


def test_the_documented_users_of_redis_may_do_what_they_are_for(shell: Shell, redis: RedisServer) -> None:
    reading = "+get +time +exists +hmget +hscan +xrange +xread"
    writing = f"{reading} +eval +evalsha +hget +hset +hdel +type +zadd +zrem +xadd +xrevrange"
    keys = [f"~{BASE}{name}" for name in ("entries", "changes", "keys")]
    redis.run("ACL", "SETUSER", "writer", "on", ">pw", "resetkeys", "resetchannels", "-@all", *keys, *writing.split())
    shell.store = redis_url(redis, login="writer:pw@")
    report = examined(shell)
    assert report.failed == []
    assert report.state("authority", "write") == "ok"
    assert redis.run("KEYS", "*") == []


def test_a_stopped_server(shell: Shell) -> None:
    with redis_server() as server:
        shell.store = redis_url(server, timeout_s=1)
        server.stop()
        try:
            refused(examined(shell), "authority", "service", "takes connections and answers nothing within 1 s")
        finally:
            server.cont()
    with etcd() as cluster:
        shell.store = etcd_url(cluster, timeout_s=1)
        cluster.pause(cluster.members[0])
        try:
            report = examined(shell)
        finally:
            cluster.resume(cluster.members[0])
        refused(report, "authority", "service", "it takes connections: is the process stopped")


def test_a_gateway_that_is_off(shell: Shell) -> None:
    with etcd(options=["--enable-grpc-gateway=false"]) as cluster:
        shell.store = etcd_url(cluster)
        refused(examined(shell), "authority", "service", "has its gRPC gateway off")


@pytest.mark.parametrize(
    ("protobuf", "state", "words"),
    [
        ("3.20.3", "ok", "its client can be handed in"),
        ("4.25.1", "warn", "`import etcd3` raises a TypeError. This library needs no etcd3"),
        ("7.36.0", "warn", "pip install 'veltrix-mw[etcd3]'"),
    ],
)
def test_the_package_etcd3_is_told_where_it_cannot_be_imported(
    cluster: EtcdCluster, monkeypatch: pytest.MonkeyPatch, protobuf: str, state: str, words: str
) -> None:
    monkeypatch.setattr(etcd3_package, "version", {"etcd3": "0.12.0", "protobuf": protobuf}.__getitem__)
    (told,) = [finding for finding in diagnose(etcd_url(cluster), mirror="") if finding.check == "etcd3"]
    assert told.state == state
    assert words in told.text
    monkeypatch.undo()
    assert "etcd3" not in {finding.check for finding in diagnose(etcd_url(cluster), mirror="")}


@pytest.mark.parametrize("url", [None, "etc://h1/shop", "sqlite:///config.db"])
def test_the_package_etcd3_is_told_of_without_an_etcd_to_look_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VELTRIX_URL", raising=False)
    monkeypatch.setattr(etcd3_package, "version", {"etcd3": "0.12.0", "protobuf": "7.36.0"}.__getitem__)
    (told,) = [finding for finding in diagnose(url, mirror="") if finding.check == "etcd3"]
    assert (told.part, told.state) == ("authority", "warn")


def test_over_grpc_a_gateway_that_is_off_is_no_fault(shell: Shell) -> None:
    with etcd(options=["--enable-grpc-gateway=false"]) as cluster:
        cluster.put("shop/a", "1")
        shell.store = f"{etcd_url(cluster)}&transport=grpc"
        report = examined(shell)
    assert report.failed == []
    assert "answers over gRPC" in report.text("authority", "service")
    for check in ("read", "write", "clock", "round trip"):
        assert report.state("authority", check) == "ok"


def test_a_cluster_without_a_quorum(shell: Shell) -> None:
    with etcd(3) as cluster:
        shell.store = etcd_url(cluster)
        write(shell.store)
        one, *others = cluster.members
        cluster.kill(others[0])
        assert examined(shell).answer.code == 0
        assert "2 of 3 members are well" in examined(shell).text("authority", "connection")
        cluster.kill(others[1])
        report = wait_until(
            lambda: (
                report if "no member has a leader" in (report := examined(shell)).text("authority", "quorum") else None
            ),
            CONVERGE_S,
            reason=f"{one.name} knows that it is alone",
        )
        assert report is not None
        refused(report, "authority", "quorum", "1 of the 3 members named in the URL answer")
        shell.store = etcd_url(cluster, query="transport=grpc")
        refused(examined(shell), "authority", "quorum", "1 of the 3 members named in the URL answer")
        assert report.checks["authority", "read"] == ("not made", "because of quorum")


def test_a_full_redis(shell: Shell) -> None:
    with redis_server("--maxmemory-policy", "noeviction") as server:
        shell.store = redis_url(server)
        write(shell.store)
        server.run("CONFIG", "SET", "maxmemory", "1mb")
        report = examined(shell)
        refused(report, "authority", "write", "out of memory: raise maxmemory")
        assert report.state("authority", "memory") == "warn"
        assert report.state("authority", "read") == "ok"


def test_how_a_redis_keeps_its_memory(shell: Shell, redis: RedisServer) -> None:
    def told(part: str, *arguments: str) -> tuple[str, str]:
        return examined(shell, *arguments).checks[part, "memory"]

    shell.store = redis_url(redis)
    mirror = redis_url(redis, db=1)
    try:
        for policy, of_authority, of_mirror in (
            ("noeviction", "ok", "ok"),
            ("volatile-lru", "warn", "ok"),  # lazy units have an expiry, and entries have none
            ("allkeys-lru", "warn", "warn"),
        ):
            redis.run("CONFIG", "SET", "maxmemory-policy", policy)
            assert told("authority")[0] == of_authority
            assert told("mirror", "--mirror", mirror)[0] == of_mirror
        redis.run("CONFIG", "SET", "maxmemory", "0")
        for part in ("authority", "mirror"):
            state, text = told(part, "--mirror", mirror)
            assert (state, "set maxmemory" in text) == ("warn", True)
    finally:
        redis.run("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", "256mb")


def test_a_wrong_database(shell: Shell, redis: RedisServer) -> None:
    write(redis_url(redis))
    shell.store = redis_url(redis, db=99)
    report = examined(shell)
    refused(report, "authority", "database", "has no db 99")
    assert report.checks["authority", "read"] == ("not made", "because of database")
    shell.store = redis_url(redis, db=3)
    report = examined(shell)
    assert ("authority", "read") in report.warned
    assert "db 3 holds nothing of the namespace 'shop', and db 0 does" in report.text("authority", "read")


def test_a_mirror_of_another_namespace(shell: Shell, put: Put, redis: RedisServer) -> None:
    put("k", 1)
    report = examined(shell, "--mirror", redis_url(redis))
    refused(report, "mirror", "namespace", "the authority's namespace is 'default', and the mirror's URL names 'shop'")
    with fed(shell, mirror_url(redis)):
        pass
    redis.run("HSET", "veltrix:{default}:entries", "#incarnation", "another")
    report = examined(shell, "--mirror", mirror_url(redis))
    refused(report, "mirror", "agreement", "at revision 1 of incarnation another, which is of another history")
    redis.run("FLUSHALL")
    write(redis_url(redis, query="namespace=default"))
    refused(examined(shell, "--mirror", mirror_url(redis)), "mirror", "read", "is an authority, not a mirror")


def test_a_folder_that_cannot_be_written(shell: Shell, put: Put, tmp_path: Path) -> None:
    put("k", 1)
    file = tmp_path / "file"
    file.write_text("")
    refused(examined(shell, "--last-known-good", str(file)), "last-known-good", "folder", "is not a folder")
    below = examined(shell, "--last-known-good", str(file / "folder"))
    refused(below, "last-known-good", "folder", f"as {file} is not a folder")
    # Nobody makes files there, root neither.
    missing = examined(shell, "--last-known-good", "/proc/veltrix")
    refused(missing, "last-known-good", "folder", "nothing can be made in /proc")
    sealed = examined(shell, "--last-known-good", "/proc")
    refused(sealed, "last-known-good", "writable", "/proc cannot be written to")


# And more


def test_a_folder_that_is_well_says_what_it_keeps(shell: Shell, put: Put, tmp_path: Path) -> None:
    put("k", 1)
    folder = tmp_path / "state"
    missing = examined(shell, "--last-known-good", str(folder))
    assert missing.warned == [("last-known-good", "folder")]
    assert not folder.exists()
    with ConfigClient(shell.url, last_known_good=folder) as client:
        client.wait_ready()
    kept = sorted(folder.iterdir())
    report = examined(shell, "--last-known-good", str(folder))
    assert (report.failed, report.warned) == ([], [])
    assert report.text("last-known-good", "kept").startswith("revision 1, 1 key, saved ")
    assert sorted(folder.iterdir()) == kept
    shell.store = f"{shell.url}?namespace=other"
    assert "nothing is kept of the namespace 'other'" in examined(shell, "--last-known-good", str(folder)).text(
        "last-known-good", "kept"
    )


def test_a_mirror_that_nobody_feeds(shell: Shell, put: Put, redis: RedisServer) -> None:
    put("k", 1)
    report = examined(shell, "--mirror", mirror_url(redis))
    assert report.answer.code == 0
    assert "it is empty" in report.text("mirror", "freshness")
    assert "this user may write it" in report.text("mirror", "relay")
    assert redis.run("KEYS", "*") == []
    with fed(shell, mirror_url(redis)):
        pass
    put("k", 2)
    seconds, microseconds = redis.run("TIME")
    proved = (int(seconds) - 60) * 1_000_000 + int(microseconds)
    redis.run("HSET", "veltrix:{default}:entries", "#proved", proved)
    report = examined(shell, "--mirror", mirror_url(redis))
    assert report.answer.code == 0
    assert report.warned == [("mirror", "freshness"), ("mirror", "relay"), ("mirror", "agreement")]
    assert "stale" in report.text("mirror", "freshness")
    assert "1 behind the authority's 2" in report.text("mirror", "agreement")


def test_a_mirror_that_leaves_out_what_is_read(shell: Shell, put: Put, redis: RedisServer) -> None:
    put("tenants/acme/limit", 1)
    with fed(shell, mirror_url(redis), "--lazy", "tenants/"):
        report = examined(shell, "--mirror", mirror_url(redis))
        assert report.warned == [("mirror", "coverage")]
        assert "it leaves out tenants/" in report.text("mirror", "coverage")
        report = examined(shell, "--mirror", mirror_url(redis), "--lazy", "tenants/")
        assert report.warned == []


@pytest.mark.parametrize("scheme", ["sqlite", "redis", "etcd"])
def test_a_mirror_of_another_history_under_the_same_name(shell: Shell, redis: RedisServer, scheme: str) -> None:
    with ExitStack() as stack:
        if scheme == "redis":
            shell.store = redis_url(stack.enter_context(redis_server()))
        elif scheme == "etcd":
            shell.store = etcd_url(stack.enter_context(etcd()))
        else:
            shell.store = f"sqlite:///{shell.folder}/c.db"
        write(shell.store)
        write(shell.store)
        with fed(shell, mirror_url(redis)):
            assert examined(shell, "--mirror", mirror_url(redis)).state("mirror", "agreement") == "ok"
        (entries,) = (name for name in redis.run("KEYS", "*:entries"))
        fingerprint, revision = redis.run("HMGET", entries, "#mark", "#revision")
        for field, wrong in (("#mark", "another"), ("#revision", int(revision) + 1000)):
            redis.run("HSET", entries, field, wrong)
            report = examined(shell, "--mirror", mirror_url(redis))
            refused(report, "mirror", "agreement", "which is of another history")
            redis.run("HSET", entries, "#mark", fingerprint, "#revision", revision)
        assert examined(shell, "--mirror", mirror_url(redis)).state("mirror", "agreement") == "ok"


def test_a_mistyped_namespace_is_told_beside_those_that_are_there(
    shell: Shell, cluster: EtcdCluster, redis: RedisServer
) -> None:
    write(redis_url(redis))
    for url in (etcd_url(cluster), redis_url(redis)):
        shell.store = url.replace("shop", "shpo")
        report = examined(shell)
        assert ("authority", "read") in report.warned
        assert report.text("authority", "read").endswith("namespace (there: shop)")


def test_a_mirror_of_another_history_is_told_in_the_diagnosis_own_words(
    shell: Shell, put: Put, redis: RedisServer
) -> None:
    put("k", 1)
    with fed(shell, mirror_url(redis)):
        pass
    redis.run("HSET", "veltrix:{default}:entries", "#incarnation", "another")
    text = examined(shell, "--mirror", mirror_url(redis)).text("mirror", "agreement")
    assert "of another history than the authority's: it is fed from another authority" in text
    assert "list again" not in text  # what a follower would do


def test_a_mirror_that_stays_behind_is_a_warning(shell: Shell, put: Put, redis: RedisServer) -> None:
    put("k", 1)
    with fed(shell, mirror_url(redis)):
        pass
    put("k", 2)
    report = examined(shell, "--mirror", mirror_url(redis))
    assert ("mirror", "agreement") in report.warned
    assert "1 behind the authority's 2, and does not catch up" in report.text("mirror", "agreement")


def test_a_mirror_is_not_compared_with_an_authority_that_cannot_be_read(
    shell: Shell, put: Put, redis: RedisServer, free_port: int
) -> None:
    put("k", 1)
    with fed(shell, mirror_url(redis)):
        pass
    shell.store = f"etcd://127.0.0.1:{free_port}/default"
    report = examined(shell, "--mirror", mirror_url(redis))
    assert report.failed == [("authority", "connection")]
    assert report.checks["mirror", "agreement"] == ("not made", "the authority cannot be read")


def test_a_user_that_may_not_select(shell: Shell, redis: RedisServer) -> None:
    redis.run("ACL", "SETUSER", "zero", "on", ">pw", "~*", "+@all", "-select")
    shell.store = redis_url(redis, login="zero:pw@", db=1)
    refused(examined(shell), "authority", "database", "lacks +select")


def test_what_is_no_store(shell: Shell, redis: RedisServer) -> None:
    shell.store = f"etcd://127.0.0.1:{redis.port}/shop"
    assert examined(shell).failed == [("authority", "service")]
    with etcd_servers.etcd() as cluster:
        shell.store = f"redis://127.0.0.1:{cluster.members[0].port}/0?namespace=shop"
        refused(examined(shell), "authority", "service", "speaks HTTP, and is no Redis")


def test_a_url_that_cannot_be_parsed_is_a_failure_that_quotes_no_secret(shell: Shell) -> None:
    for url, text in (
        ("etcd://u:s3cret@h", "names no namespace"),
        ("etdc://u:s3cret@h/shop", "did you mean etcd"),
        ("memory://", "lives in one process"),
    ):
        shell.store = url
        report = examined(shell, "--mirror", "redis://h:s3cret@/0", "--last-known-good", str(shell.folder))
        assert report.answer.code == 1
        assert report.state("authority", "url") == "fail"
        assert text in report.text("authority", "url")
        assert report.state("mirror", "url") == "fail"
        assert report.state("last-known-good", "folder") == "not made"
        assert "s3cret" not in report.answer.out


def test_an_option_that_the_app_would_refuse_is_a_failure_of_the_url(shell: Shell, redis: RedisServer) -> None:
    shell.store = redis_url(redis, query="namespace=shop&keep_bytes=1000000")
    report = examined(shell)
    assert report.failed == [("authority", "url")]
    assert "is for a mirror" in report.text("authority", "url")


def test_lines_for_a_person_and_exit_codes(shell: Shell, put: Put, free_port: int) -> None:
    put("k", 1)
    well = shell.process("doctor")
    assert (well.code, well.err) == (0, "")
    *lines, last = well.out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 5
    assert last == "all is well, by 5 checks"
    broken = shell.process("doctor", "--url", f"redis://127.0.0.1:{free_port}/0?namespace=shop")
    assert (broken.code, broken.err) == (1, "")
    lines = broken.out.splitlines()
    assert lines[2].split()[:3] == ["fail", "authority", "connection"]
    assert lines[3].startswith("not made  authority        12 checks       because of connection: tls, service, ")
    assert lines[4:] == ["1 failure: begin with authority connection"]
    for wrong in (["--nonsense"], ["--lazy", "no prefix"]):
        assert shell.run("doctor", *wrong).code == 2
    listed = shell.run("--help").out
    assert "doctor" in listed


def test_a_warning_is_a_failure_where_that_is_asked_for(shell: Shell, put: Put) -> None:
    put("k", 1)
    shell.store = f"{shell.url}?namespace=shpo"  # mistyped, so nothing was written there
    assert "another namespace? (there: default)" in examined(shell).text("authority", "read")
    assert examined(shell).answer.code == 0
    loose, strict = shell.run("doctor"), shell.run("doctor", "--strict")
    assert (loose.code, strict.code) == (0, 1)
    assert loose.out.splitlines()[-1] == strict.out.splitlines()[-1] == "no failure, 1 warning: authority read"
    told = shell.run("doctor", "--strict", "--json")
    assert (told.code, told.json["well"]) == (1, False)
    shell.store = ""
    assert shell.run("doctor", "--strict").code == 0


@pytest.mark.parametrize("url", ["etcd://127.0.0.1:1/shop", "redis://127.0.0.1:1/0?namespace=shop"])
def test_a_driver_that_is_missing_is_a_failure_that_says_what_to_install(shell: Shell, url: str) -> None:
    driver = url.partition(":")[0].replace("etcd", "urllib3")
    code = f"import sys; sys.modules[{driver!r}] = None; from veltrix_mw.cli import main; main()"
    done = shell.process("doctor", "--url", url, command=("-c", code))
    assert (done.code, done.err) == (1, "")
    line, last = done.out.splitlines()
    assert line.startswith("fail      authority        url ")
    assert last == "1 failure: begin with authority url"
    assert f"veltrix-mw[{url.partition(':')[0]}]" in line


def test_no_store_named_is_a_failure_that_shows_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VELTRIX_URL", raising=False)
    monkeypatch.delenv("VELTRIX_MIRROR_URL", raising=False)
    (finding,) = diagnose()
    assert (finding.check, str(finding.state)) == ("url", "fail")
    assert "set VELTRIX_URL" in finding.text
