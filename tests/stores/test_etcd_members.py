"""The members of a cluster, over each transport: which error means what, failover, users, TLS, deadlines."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.stores.contract import in_a_fork
from tests.stores.etcd_calls import (
    TRANSPORTS,
    WITHIN_S,
    MakeMembers,
    closed_port,
    is_listening,
    read,
    receive,
    tls_of,
    watch,
    write,
)
from tests.support.etcd_servers import Certificates, EtcdCluster, etcd, make_certificates
from tests.support.proxy import Proxy
from tests.support.redis_servers import redis_server
from tests.support.waiting import wait_until
from veltrix_mw.errors import AuthFailed, Compacted, InvalidValue, StoreUnavailable
from veltrix_mw.stores import dialing, etcd_grpc, etcd_stream
from veltrix_mw.stores.etcd_members import Members, WatchStream, _Here
from veltrix_mw.stores.tls import Tls


@pytest.fixture(scope="module")
def server() -> Iterator[EtcdCluster]:
    with etcd() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls_server(certificates: Certificates) -> Iterator[EtcdCluster]:
    with etcd(tls=certificates) as cluster:
        yield cluster


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


OPEN = {"gateway": etcd_stream._open, "grpc": etcd_grpc._open}


@pytest.fixture
def members(transport: str) -> Iterator[MakeMembers]:
    made: list[Members] = []

    def members(hosts: Sequence[tuple[str, int]], *, tls: Tls | None = None, **options: Any) -> Members:
        made.append(Members(hosts, TRANSPORTS[transport](tls), **options))
        return made[-1]

    yield members
    for each in made:
        each.close()


# --- what is said, and what to do


def test_where_nothing_listens_it_says_so_at_once(members: MakeMembers) -> None:
    host = closed_port()
    with pytest.raises(StoreUnavailable, match=f"nothing listens at 127.0.0.1:{host[1]}; is etcd running"):
        read(members([host], timeout_s=600))


def test_a_name_that_cannot_be_resolved_is_named(members: MakeMembers) -> None:
    with pytest.raises(StoreUnavailable, match=r"'no-such-host\.invalid' cannot be resolved"):
        read(members([("no-such-host.invalid", 2379)]))


Resolve = Callable[..., threading.Event]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolve]:
    """Lets every name have these addresses, once the event that it returns is set."""
    answering = threading.Event()

    def resolve(*addresses: tuple[str, int]) -> threading.Event:
        known = socket.getaddrinfo
        found = [each for host, port in addresses for each in known(host, port, type=socket.SOCK_STREAM)]

        def asked(name: str, port: int, *options: int) -> list[Any]:
            assert answering.wait(WITHIN_S), "a call waited for the resolver, whatever its deadline"
            return found

        monkeypatch.setattr(socket, "getaddrinfo", asked)
        return answering

    yield resolve
    answering.set()
    wait_until(
        lambda: not dialing._asking, WITHIN_S, reason="nobody asks any more: another test asks for the same name"
    )


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
def test_a_call_ends_by_its_deadline_while_the_resolver_hangs(
    members: MakeMembers, resolve: Resolve, is_tls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(("127.0.0.1", 1))
    # A number is no question to the resolver.
    scripted = socket.getaddrinfo

    def names_only(name: str, port: int, *options: int) -> list[Any]:
        if len(options) > 3:
            raise socket.gaierror(socket.EAI_NONAME, "a name")
        return list(scripted(name, port, *options))

    monkeypatch.setattr(socket, "getaddrinfo", names_only)
    to = members([("h1", 2379)], tls=Tls() if is_tls else None)
    words = "the name 'h1' was not resolved in time"
    for call in (read, write):
        with pytest.raises(StoreUnavailable, match=words):
            call(to, within_s=0.2)
    with pytest.raises(StoreUnavailable, match=words):
        watch(members([("h1", 2379)], timeout_s=0.2))


@pytest.fixture
def silent() -> Iterator[tuple[str, int]]:
    """An address that takes no connection and refuses none, as one behind a firewall: its queue is full."""
    with contextlib.ExitStack() as opened:
        listening = opened.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        host = listening.getsockname()
        while True:
            waiting = opened.enter_context(socket.socket())
            waiting.settimeout(0.1)
            try:
                waiting.connect(host)
            except TimeoutError:
                break
        yield host


def test_where_a_hosts_first_address_is_silent_the_second_serves(
    members: MakeMembers, resolve: Resolve, server: EtcdCluster, silent: tuple[str, int]
) -> None:
    resolve(silent, server.hosts[0]).set()
    revision = write(members([("h1", 2379)]))
    to = members([("h1", 2379)])
    assert read(to).kvs[0].mod_revision == revision
    with contextlib.closing(watch(to, start=revision)) as stream:
        assert receive(stream)


def test_where_a_hosts_first_address_is_silent_in_tls_the_second_serves(
    members: MakeMembers, resolve: Resolve, tls_server: EtcdCluster, certificates: Certificates
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        resolve(mute.getsockname(), tls_server.hosts[0]).set()
        assert write(members([("127.0.0.1", 2379)], tls=tls_of(certificates)))


def test_a_web_server_without_such_a_page_is_no_etcd(members: MakeMembers) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web, ThreadPoolExecutor(1) as pool:
        serving = pool.submit(web.serve_forever, 0.01)
        try:
            with pytest.raises(StoreUnavailable, match=r"is no etcd.*; name its client port"):
                read(members([("127.0.0.1", web.server_port)], timeout_s=3))
        finally:
            web.shutdown()
        serving.result(WITHIN_S)


@pytest.mark.parametrize("options", [(), ("--requirepass", "secret-1")], ids=["open", "with a password"])
def test_redis_in_place_of_etcd_is_told(members: MakeMembers, options: Sequence[str]) -> None:
    with redis_server(*options) as redis:
        for call in (read, write, watch):
            with pytest.raises(StoreUnavailable, match=r"is Redis, not etcd; name etcd's client port .* redis://"):
                call(members([("127.0.0.1", redis.port)]))


def test_a_full_database_says_how_to_make_room(members: MakeMembers) -> None:
    with etcd(options=["--quota-backend-bytes", str(4 * 1024 * 1024)]) as small:
        to = members(small.hosts)
        with pytest.raises(StoreUnavailable, match="etcdctl alarm disarm"):
            for _ in range(200):  # it looks at its size ten times a second
                write(to, value=b"x" * 1_000_000)
        assert read(to).kvs, "it can be read on"


def test_what_is_too_large_for_etcd_is_an_invalid_value(members: MakeMembers, server: EtcdCluster) -> None:
    with pytest.raises(InvalidValue, match="several revisions"):
        write(members(server.hosts), value=b"x" * 1_700_000)


# --- TLS


def test_tls_with_the_right_ca_serves_reads_writes_and_watches(
    members: MakeMembers, tls_server: EtcdCluster, certificates: Certificates
) -> None:
    to = members(tls_server.hosts, tls=tls_of(certificates))
    revision = write(to, value=b"x" * 500_000)
    assert read(to).kvs[0].mod_revision == revision
    stream = watch(to, start=revision)
    with contextlib.closing(stream):
        assert receive(stream)[0].events[0].kv.value == b"x" * 500_000
        assert stream.receive(time.monotonic()) == []


def test_a_ca_that_did_not_sign_the_certificate_is_named(
    members: MakeMembers, tls_server: EtcdCluster, tmp_path: Path
) -> None:
    other = make_certificates(tmp_path)
    with pytest.raises(StoreUnavailable, match=rf"not signed by the CA in {other.ca} \(.*\); give the file of"):
        read(members(tls_server.hosts, tls=Tls(str(other.ca))))
    with pytest.raises(StoreUnavailable, match=r"this system trusts \(.*\); give the file of the right one: ca="):
        read(members(tls_server.hosts, tls=Tls()))


def test_the_environment_of_other_clients_changes_nothing(
    members: MakeMembers,
    tls_server: EtcdCluster,
    certificates: Certificates,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = make_certificates(tmp_path)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(other.ca))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert write(members(tls_server.hosts, tls=tls_of(certificates)))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.ca))
    with pytest.raises(StoreUnavailable, match="not signed"):
        read(members(tls_server.hosts, tls=Tls(str(other.ca))))


def test_an_expired_certificate_is_told(members: MakeMembers, tmp_path: Path) -> None:
    expired = make_certificates(tmp_path, days=-1)
    with etcd(tls=expired, waits=False) as cluster, pytest.raises(StoreUnavailable, match="has expired; renew it"):
        wait_until(lambda: is_listening(cluster.hosts[0]), WITHIN_S, reason="it listens")
        read(members(cluster.hosts, tls=tls_of(expired)))


def test_a_certificate_for_other_names_is_told(
    members: MakeMembers, tls_server: EtcdCluster, certificates: Certificates
) -> None:
    with pytest.raises(StoreUnavailable, match="is for other names"):
        read(members([("localhost", tls_server.hosts[0][1])], tls=tls_of(certificates)))


def test_plain_text_to_tls_and_tls_to_plain_text_say_which_scheme(
    members: MakeMembers, server: EtcdCluster, tls_server: EtcdCluster, certificates: Certificates
) -> None:
    with pytest.raises(StoreUnavailable, match="speaks TLS only; write etcds://"):
        read(members(tls_server.hosts, timeout_s=0.5))
    with pytest.raises(StoreUnavailable, match=r"does not speak TLS .*write etcd://"):
        read(members(server.hosts, tls=tls_of(certificates)))


def test_a_client_certificate_is_asked_for_and_taken(members: MakeMembers, certificates: Certificates) -> None:
    with etcd(tls=certificates, options=["--client-cert-auth", "--trusted-ca-file", str(certificates.ca)]) as strict:
        with pytest.raises(AuthFailed, match="cert= and key="):
            read(members(strict.hosts, tls=tls_of(certificates)))
        assert write(members(strict.hosts, tls=tls_of(certificates, is_client=True)))


def test_files_that_cannot_be_used_are_named(members: MakeMembers, server: EtcdCluster, tmp_path: Path) -> None:
    with pytest.raises(AuthFailed, match=r"the CA file .*missing\.pem cannot be used"):
        read(members(server.hosts, tls=Tls(str(tmp_path / "missing.pem"))))
    with pytest.raises(AuthFailed, match=r"client certificate .*missing\.pem with the key"):
        read(members(server.hosts, tls=Tls(None, str(tmp_path / "missing.pem"))))


# --- users


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdCluster]:
    """A server with users whose tokens live for a second."""
    with etcd(options=["--auth-token-ttl", "1"]) as cluster:
        cluster.turn_auth_on(writer="secret-1")
        cluster.grant("writer", "shop/")
        yield cluster


def test_a_user_reads_writes_and_watches(members: MakeMembers, guarded: EtcdCluster) -> None:
    to = members(guarded.hosts, user="writer", password="secret-1")
    revision = write(to)
    assert read(to).kvs[0].mod_revision == revision
    with contextlib.closing(watch(to, start=revision)) as stream:
        assert receive(stream)[0].events[0].kv.mod_revision == revision


def test_a_wrong_password_is_told_and_shown_nowhere(members: MakeMembers, guarded: EtcdCluster) -> None:
    to = members(guarded.hosts, user="writer", password="not-the-secret")
    for call in (read, write, watch):
        with pytest.raises(AuthFailed, match="refused user 'writer' with this password") as caught:
            call(to)
        assert "not-the-secret" not in str(caught.value)


def test_no_user_is_told_to_give_one(members: MakeMembers, guarded: EtcdCluster) -> None:
    for call in (read, write, watch):
        with pytest.raises(AuthFailed, match="etcd://USER:PASSWORD@"):
            call(members(guarded.hosts))


def test_what_is_not_permitted_names_the_user_and_the_remedy(members: MakeMembers, guarded: EtcdCluster) -> None:
    to = members(guarded.hosts, user="writer", password="secret-1", remedy="grant this and that")
    for call in (read, write, watch):
        with pytest.raises(AuthFailed, match="user 'writer'; grant this and that"):
            call(to, b"theirs/a")


def test_a_token_that_ran_out_is_replaced_in_every_call(members: MakeMembers, guarded: EtcdCluster) -> None:
    for call in (read, write, watch):
        to = members(guarded.hosts, user="writer", password="secret-1")
        write(to)
        token = to._here().token
        assert token
        to._here().token = "gone.1"  # what the server says to it is what it says to one that ran out
        with contextlib.ExitStack() as closing:
            done = call(to)
            if isinstance(done, WatchStream):
                closing.callback(done.close)
        assert to._here().token not in {"gone.1", ""}


def test_changed_users_do_not_end_a_call(members: MakeMembers, guarded: EtcdCluster) -> None:
    to = members(guarded.hosts, user="writer", password="secret-1")
    write(to)
    guarded.ctl("role", "add", f"another{time.monotonic_ns()}")  # "revision of auth store is old"
    assert write(to)
    assert read(to).kvs


def test_a_user_that_nobody_checks_is_told_once_and_used_once_there_is_one(
    members: MakeMembers, caplog: pytest.LogCaptureFixture
) -> None:
    with etcd() as cluster:
        to = members(cluster.hosts, user="writer", password="secret-1")
        for _ in range(3):
            assert write(to)
        (told,) = [each.getMessage() for each in caplog.records if "veltrix.user_unused" in each.getMessage()]
        assert f"127.0.0.1:{cluster.members[0].port} has authentication off" in told
        assert "secret-1" not in told
        cluster.turn_auth_on(writer="secret-1")
        cluster.grant("writer", "shop/")
        with caplog.at_level("INFO", "veltrix_mw"):
            assert write(to)
        assert f"veltrix.user_checked host='127.0.0.1:{cluster.members[0].port}'" in caplog.messages
        with pytest.raises(AuthFailed, match="refused user 'writer'"):
            write(members(cluster.hosts, user="writer", password="wrong"))


# --- failover


def test_a_member_that_is_gone_is_passed_over_and_not_asked_again(members: MakeMembers, server: EtcdCluster) -> None:
    for _ in range(10):
        to = members([closed_port(), *server.hosts, closed_port()], timeout_s=5)
        assert write(to)
        assert to._here().used == server.hosts[0]


def test_a_write_goes_to_the_next_where_the_member_it_went_to_is_gone(
    members: MakeMembers, server: EtcdCluster
) -> None:
    gone = Proxy(server.members[0].port)  # another way to the same
    host = ("127.0.0.1", gone.port)
    to = members([host, *server.hosts], timeout_s=5)
    prefer(to, host)
    write(to)
    gone.close()
    before = server.revision()
    assert write(to) == before + 1
    assert to._here().used == server.hosts[0]


def prefer(to: Members, host: tuple[str, int]) -> None:
    here = to._here()
    here.order.sort(key=lambda each: each != host)
    here.used = host


@pytest.fixture
def proxy(server: EtcdCluster) -> Iterator[Proxy]:
    proxy = Proxy(server.members[0].port)
    yield proxy
    proxy.close()


def test_a_write_whose_answer_does_not_arrive_is_not_sent_again(
    members: MakeMembers, server: EtcdCluster, proxy: Proxy
) -> None:
    to = members([("127.0.0.1", proxy.port), *server.hosts], timeout_s=0.5)
    prefer(to, ("127.0.0.1", proxy.port))
    write(to)
    before = server.revision()
    proxy.blackhole(up=False)
    with pytest.raises(StoreUnavailable, match="fate is unknown: read again"):
        write(to, within_s=0.5)
    assert server.revision() == before + 1
    assert write(to) == before + 2, "the next one goes elsewhere"


def test_an_answer_that_has_begun_is_waited_for_as_long_as_the_call_has(
    members: MakeMembers, server: EtcdCluster, proxy: Proxy
) -> None:
    write(members(server.hosts), value=b"x" * 900_000)
    to = members([("127.0.0.1", proxy.port)])
    read(to, b"shop/nothing")
    proxy.bytes_per_s = 300_000
    begun_s = time.monotonic()
    assert len(read(to).kvs[0].value) == 900_000
    assert time.monotonic() - begun_s > 2.0, "it came too fast to try anything"
    with pytest.raises(StoreUnavailable, match="did not answer in time"):
        read(to, within_s=0.5)


def test_a_restarted_server_is_written_to_without_an_error(members: MakeMembers) -> None:
    with etcd() as cluster:
        to = members(cluster.hosts)
        revision = write(to)
        cluster.kill(cluster.members[0])
        cluster.start()
        assert write(to) > revision


def test_a_watch_knows_when_its_member_failed_a_call(members: MakeMembers, server: EtcdCluster) -> None:
    to = members(server.hosts)
    with contextlib.closing(watch(to)) as stream:
        assert not stream.is_left
        to._here().failed(stream.host, time.monotonic())
        assert stream.is_left


def test_members_are_tried_in_an_order_of_each_process_and_the_first_choice_comes_back_slowly() -> None:
    hosts = [("h", port) for port in range(8)]
    here = _Here(hosts)
    assert sorted(here.order) == hosts
    first, second = here.order[:2]
    assert here.round(0.0) == here.order
    here.failed(first, 0.0)
    assert here.round(50.0)[0] == second
    assert here.round(130.0)[0] == first
    here.failed(first, 130.0)
    assert here.round(131.0)[0] == second, "it failed again, and is left alone for as long again"
    here.served(first, 300.0)
    assert here.round(300.0)[0] == first


def test_closing_closes_what_is_idle_and_it_opens_anew(
    members: MakeMembers, server: EtcdCluster, transport: str
) -> None:
    opened = OPEN[transport]
    before = len(opened)
    to = members(server.hosts)
    write(to)
    assert len(opened) == before + 1
    to.close()
    to.close()
    assert len(opened) == before
    assert write(to)


# --- watches


def test_a_watch_from_a_forgotten_revision_says_from_where_on(members: MakeMembers) -> None:
    with etcd() as cluster:
        to = members(cluster.hosts)
        newest = [write(to) for _ in range(5)][-1]
        cluster.compact(newest)
        with (
            contextlib.closing(watch(to)) as stream,
            pytest.raises(Compacted, match=f"before revision {newest}"),
        ):
            receive(stream)


# --- threads and forks


def test_many_threads_share_them(members: MakeMembers, server: EtcdCluster, transport: str) -> None:
    before = len(OPEN[transport])
    to = members(server.hosts)
    with ThreadPoolExecutor(8) as pool:
        revisions = list(pool.map(lambda number: write(to, b"shop/%d" % number), range(80)))
    assert len(set(revisions)) == 80
    assert len(OPEN[transport]) - before <= 4


def test_a_child_has_a_token_of_its_own(members: MakeMembers, guarded: EtcdCluster) -> None:
    to = members(guarded.hosts, user="writer", password="secret-1")
    write(to)
    inherited = to._here()

    def child() -> None:
        assert to._here() is not inherited
        assert not to._here().token
        write(to)
        to.close()

    in_a_fork(child)
    assert write(to)
    assert to._here() is inherited


def test_a_fork_that_ran_no_hooks_is_noticed(members: MakeMembers, server: EtcdCluster) -> None:
    to = members(server.hosts)
    write(to)
    inherited = to._here()
    inherited.pid = os.getpid() + 1
    inherited.lock.acquire()  # as by a thread that the child does not have
    assert write(to)
    assert to._here() is not inherited
