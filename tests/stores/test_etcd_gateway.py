"""The way to etcd: which error means what, failover, users, TLS, deadlines. On real servers, and a few that lie."""

from __future__ import annotations

import contextlib
import json
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
from tests.support.etcd_servers import Certificates, EtcdCluster, etcd, make_certificates
from tests.support.redis_servers import redis_server
from tests.support.waiting import wait_until
from veltrix_mw.errors import AuthFailed, Compacted, InvalidValue, Overloaded, StoreError, StoreUnavailable
from veltrix_mw.stores import dialing, etcd_stream
from veltrix_mw.stores.etcd_gateway import FutureRevision, Gateway, WatchStream, _Here
from veltrix_mw.stores.etcd_messages import Operation, Range, Ranged, Transacted, Transaction, WatchCreate
from veltrix_mw.stores.tls import Tls

WITHIN_S = 10.0


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


@pytest.fixture
def gateway() -> Iterator[Callable[..., Gateway]]:
    made: list[Gateway] = []

    def gateway(hosts: Sequence[tuple[str, int]], **options: Any) -> Gateway:
        made.append(Gateway(hosts, **options))
        return made[-1]

    yield gateway
    for each in made:
        each.close()


MakeGateway = Callable[..., Gateway]


def read(gateway: Gateway, key: bytes = b"shop/a", *, within_s: float = WITHIN_S, revision: int = 0) -> Ranged:
    asked = Range(key, revision=revision)
    return gateway.call("/v3/kv/range", asked, Ranged, deadline_s=time.monotonic() + within_s)


def write(gateway: Gateway, key: bytes = b"shop/a", value: bytes = b"1", *, within_s: float = WITHIN_S) -> int:
    asked = Transaction([Operation.put(key, value)])
    deadline_s = time.monotonic() + within_s
    return gateway.call("/v3/kv/txn", asked, Transacted, deadline_s=deadline_s, once=True).header.revision


def watch(gateway: Gateway, key: bytes = b"shop/a", start: int = 1) -> WatchStream:
    return gateway.watch([WatchCreate(key, start_revision=start, watch_id=1)], deadline_s=time.monotonic() + WITHIN_S)


class Liar:
    """A server that takes a request and answers what it was told to, the last of it again and again."""

    def __init__(self, *answers: bytes | None) -> None:
        self._answers = list(answers)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.host = ("127.0.0.1", int(self._listening.getsockname()[1]))
        self.requests: list[bytes] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        held = []
        while not self._done.is_set():
            connection, _ = self._listening.accept()
            connection.settimeout(WITHIN_S)
            with contextlib.suppress(OSError):
                request = connection.recv(100_000)
                if not request.startswith(b"POST"):  # nothing, or a look whether it speaks TLS
                    connection.close()
                    continue
                self.requests.append(request)
                answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
                if answer is None:
                    held.append(connection)  # and never answer
                    continue
                connection.sendall(answer)
            connection.close()
        for connection in held:
            connection.close()

    def close(self) -> None:
        self._done.set()
        with contextlib.suppress(OSError):
            socket.create_connection(self.host).close()
        self._thread.join(WITHIN_S)
        self._listening.close()


@pytest.fixture
def liar() -> Iterator[Callable[..., Liar]]:
    made: list[Liar] = []

    def liar(*answers: bytes | None) -> Liar:
        made.append(Liar(*answers))
        return made[-1]

    yield liar
    for each in made:
        each.close()


MakeLiar = Callable[..., Liar]


def answer(body: bytes | dict[str, Any], status: int = 200) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(raw), raw)


def closed_port() -> tuple[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return "127.0.0.1", int(bound.getsockname()[1])


# --- what is said, and what to do


def test_where_nothing_listens_it_says_so_at_once(gateway: MakeGateway) -> None:
    host = closed_port()
    with pytest.raises(StoreUnavailable, match=f"nothing listens at 127.0.0.1:{host[1]}; is etcd running"):
        read(gateway([host], timeout_s=600))


def test_a_name_that_cannot_be_resolved_is_named(gateway: MakeGateway) -> None:
    with pytest.raises(StoreUnavailable, match=r"'no-such-host\.invalid' cannot be resolved"):
        read(gateway([("no-such-host.invalid", 2379)]))


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
    gateway: MakeGateway, resolve: Resolve, is_tls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(("127.0.0.1", 1))
    # A number is no question to the resolver.
    scripted = socket.getaddrinfo

    def names_only(name: str, port: int, *options: int) -> list[Any]:
        if len(options) > 3:
            raise socket.gaierror(socket.EAI_NONAME, "a name")
        return list(scripted(name, port, *options))

    monkeypatch.setattr(socket, "getaddrinfo", names_only)
    to = gateway([("h1", 2379)], tls=Tls() if is_tls else None)
    words = "the name 'h1' was not resolved in time"
    for call in (read, write):
        with pytest.raises(StoreUnavailable, match=words):
            call(to, within_s=0.2)
    with pytest.raises(StoreUnavailable, match=words):
        watch(gateway([("h1", 2379)], timeout_s=0.2))


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
    gateway: MakeGateway, resolve: Resolve, server: EtcdCluster, silent: tuple[str, int]
) -> None:
    resolve(silent, server.hosts[0]).set()
    revision = write(gateway([("h1", 2379)]))
    to = gateway([("h1", 2379)])
    assert read(to).kvs[0].mod_revision == revision
    with contextlib.closing(watch(to, start=revision)) as stream:
        assert receive(stream)


def test_where_a_hosts_first_address_is_silent_in_tls_the_second_serves(
    gateway: MakeGateway, resolve: Resolve, tls_server: EtcdCluster, certificates: Certificates
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        resolve(mute.getsockname(), tls_server.hosts[0]).set()
        assert write(gateway([("127.0.0.1", 2379)], tls=tls_of(certificates)))


def test_a_server_that_never_answers_costs_its_timeout_and_no_more(gateway: MakeGateway, liar: MakeLiar) -> None:
    begun_s = time.monotonic()
    with pytest.raises(StoreUnavailable, match="did not answer in time"):
        read(gateway([liar(None).host], timeout_s=0.3), within_s=600)
    assert time.monotonic() - begun_s < WITHIN_S
    with pytest.raises(StoreUnavailable, match="did not answer in time"):
        read(gateway([liar(None).host], timeout_s=600), within_s=0.3)
    assert time.monotonic() - begun_s < WITHIN_S


@pytest.mark.parametrize(
    "said",
    [
        answer(b"<html>welcome</html>"),
        answer(b"<html>no</html>", 502),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"-ERR unknown command 'POST'\r\n",
    ],
)
def test_what_is_no_etcd_is_told_from_one(gateway: MakeGateway, liar: MakeLiar, said: bytes) -> None:
    with pytest.raises(StoreUnavailable, match="is no etcd") as caught:
        read(gateway([liar(said).host], timeout_s=0.2))
    assert "2379" in str(caught.value)


def test_a_gateway_that_is_off_is_named_with_the_option(gateway: MakeGateway) -> None:
    with etcd(options=["--enable-grpc-gateway=false"]) as off:
        for call in (read, write, watch):
            with pytest.raises(StoreUnavailable, match="--enable-grpc-gateway=true"):
                call(gateway(off.hosts))


def test_the_peer_port_is_told_from_a_gateway_that_is_off(gateway: MakeGateway, server: EtcdCluster) -> None:
    for call in (read, write, watch):
        with pytest.raises(StoreUnavailable, match=r"is etcd's peer port, .*; name the client port \(2379"):
            call(gateway([("127.0.0.1", server.members[0].peer_port)]))


def test_a_web_server_without_such_a_page_is_no_etcd(gateway: MakeGateway) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web, ThreadPoolExecutor(1) as pool:
        serving = pool.submit(web.serve_forever, 0.01)
        try:
            with pytest.raises(StoreUnavailable, match=r"is no etcd \(HTTP status 404\); name its client port"):
                read(gateway([("127.0.0.1", web.server_port)], timeout_s=3))
        finally:
            web.shutdown()
        serving.result(WITHIN_S)


@pytest.mark.parametrize("options", [(), ("--requirepass", "secret-1")], ids=["open", "with a password"])
def test_redis_in_place_of_etcd_is_told(gateway: MakeGateway, options: Sequence[str]) -> None:
    with redis_server(*options) as redis:
        for call in (read, write, watch):
            with pytest.raises(StoreUnavailable, match=r"is Redis, not etcd; name etcd's client port .* redis://"):
                call(gateway([("127.0.0.1", redis.port)]))


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        ("etcdserver: permission denied", AuthFailed, "grant it"),
        ("etcdserver: user name is empty", AuthFailed, "give user and password"),
        ("etcdserver: mvcc: required revision has been compacted", Compacted, "list again"),
        ("etcdserver: mvcc: required revision is a future revision", FutureRevision, "no such revision yet"),
        ("etcdserver: request is too large", InvalidValue, "in several revisions"),
        ("etcdserver: too many requests", Overloaded, "later"),
        ("etcdserver: mvcc: database space exceeded", StoreUnavailable, "alarm disarm"),
        ("etcdserver: no leader", StoreUnavailable, "no leader"),
        ("etcdserver: request timed out", StoreUnavailable, "timed out"),
        ("CommonName of client sending a request against gateway will be ignored", AuthFailed, "common name"),
    ],
)
@pytest.mark.parametrize(
    "shape", [{"error": 0, "message": 0, "code": 5}, {"code": 5, "message": 0, "details": []}, {"error": 0}]
)
def test_an_error_of_etcd_says_what_to_do_whatever_its_version(
    gateway: MakeGateway, liar: MakeLiar, message: str, error: type[Exception], words: str, shape: dict[str, Any]
) -> None:
    said = answer({name: message if value == 0 else value for name, value in shape.items()}, 400)
    with pytest.raises(error, match=words):
        read(gateway([liar(said).host], timeout_s=0.2))


def test_a_full_database_says_how_to_make_room(gateway: MakeGateway) -> None:
    with etcd(options=["--quota-backend-bytes", str(4 * 1024 * 1024)]) as small:
        to = gateway(small.hosts)
        with pytest.raises(StoreUnavailable, match="etcdctl alarm disarm"):
            for _ in range(20):
                write(to, value=b"x" * 1_000_000)
        assert read(to).kvs, "it can be read on"


def test_what_is_too_large_for_etcd_is_an_invalid_value(gateway: MakeGateway, server: EtcdCluster) -> None:
    with pytest.raises(InvalidValue, match="several revisions"):
        write(gateway(server.hosts), value=b"x" * 1_700_000)


# --- TLS


def tls_of(certificates: Certificates, *, is_client: bool = False) -> Tls:
    cert, key = (str(certificates.client_cert), str(certificates.client_key)) if is_client else (None, None)
    return Tls(str(certificates.ca), cert, key)


def test_tls_with_the_right_ca_serves_reads_writes_and_watches(
    gateway: MakeGateway, tls_server: EtcdCluster, certificates: Certificates
) -> None:
    to = gateway(tls_server.hosts, tls=tls_of(certificates))
    revision = write(to, value=b"x" * 500_000)
    assert read(to).kvs[0].mod_revision == revision
    stream = watch(to, start=revision)
    with contextlib.closing(stream):
        assert receive(stream)[0].events[0].kv.value == b"x" * 500_000
        assert stream.receive(time.monotonic()) == []


def receive(stream: WatchStream) -> Any:
    messages = stream.receive(time.monotonic() + WITHIN_S)
    assert messages, "nothing came"
    return messages


def test_a_ca_that_did_not_sign_the_certificate_is_named(
    gateway: MakeGateway, tls_server: EtcdCluster, tmp_path: Path
) -> None:
    other = make_certificates(tmp_path)
    with pytest.raises(StoreUnavailable, match=rf"not signed by the CA in {other.ca} \(.*\); give the file of"):
        read(gateway(tls_server.hosts, tls=Tls(str(other.ca))))
    with pytest.raises(StoreUnavailable, match=r"this system trusts \(.*\); give the file of the right one: ca="):
        read(gateway(tls_server.hosts, tls=Tls()))


def test_the_environment_of_other_clients_changes_nothing(
    gateway: MakeGateway,
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
    assert write(gateway(tls_server.hosts, tls=tls_of(certificates)))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.ca))
    with pytest.raises(StoreUnavailable, match="not signed"):
        read(gateway(tls_server.hosts, tls=Tls(str(other.ca))))


def test_an_expired_certificate_is_told(gateway: MakeGateway, tmp_path: Path) -> None:
    expired = make_certificates(tmp_path, days=-1)
    with etcd(tls=expired, waits=False) as cluster, pytest.raises(StoreUnavailable, match="has expired; renew it"):
        wait_until(lambda: is_listening(cluster.hosts[0]), WITHIN_S, reason="it listens")
        read(gateway(cluster.hosts, tls=tls_of(expired)))


def is_listening(host: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(host, timeout=1):
        return True
    return False


def test_a_certificate_for_other_names_is_told(
    gateway: MakeGateway, tls_server: EtcdCluster, certificates: Certificates
) -> None:
    with pytest.raises(StoreUnavailable, match="is for other names"):
        read(gateway([("localhost", tls_server.hosts[0][1])], tls=tls_of(certificates)))


def test_plain_text_to_tls_and_tls_to_plain_text_say_which_scheme(
    gateway: MakeGateway, server: EtcdCluster, tls_server: EtcdCluster, certificates: Certificates
) -> None:
    with pytest.raises(StoreUnavailable, match="speaks TLS only; write etcds://"):
        read(gateway(tls_server.hosts, timeout_s=0.5))
    with pytest.raises(StoreUnavailable, match=r"does not speak TLS .*write etcd://"):
        read(gateway(server.hosts, tls=tls_of(certificates)))


def test_a_client_certificate_is_asked_for_and_taken(gateway: MakeGateway, certificates: Certificates) -> None:
    with etcd(tls=certificates, options=["--client-cert-auth", "--trusted-ca-file", str(certificates.ca)]) as strict:
        with pytest.raises(AuthFailed, match="cert= and key="):
            read(gateway(strict.hosts, tls=tls_of(certificates)))
        assert write(gateway(strict.hosts, tls=tls_of(certificates, is_client=True)))


def test_files_that_cannot_be_used_are_named(gateway: MakeGateway, server: EtcdCluster, tmp_path: Path) -> None:
    with pytest.raises(AuthFailed, match=r"the CA file .*missing\.pem cannot be used"):
        read(gateway(server.hosts, tls=Tls(str(tmp_path / "missing.pem"))))
    with pytest.raises(AuthFailed, match=r"client certificate .*missing\.pem with the key"):
        read(gateway(server.hosts, tls=Tls(None, str(tmp_path / "missing.pem"))))


# --- users


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdCluster]:
    """A server with users whose tokens live for a second."""
    with etcd(options=["--auth-token-ttl", "1"]) as cluster:
        cluster.turn_auth_on(writer="secret-1")
        cluster.grant("writer", "shop/")
        yield cluster


def test_a_user_reads_writes_and_watches(gateway: MakeGateway, guarded: EtcdCluster) -> None:
    to = gateway(guarded.hosts, user="writer", password="secret-1")
    revision = write(to)
    assert read(to).kvs[0].mod_revision == revision
    with contextlib.closing(watch(to, start=revision)) as stream:
        assert receive(stream)[0].events[0].kv.mod_revision == revision


def test_a_wrong_password_is_told_and_shown_nowhere(gateway: MakeGateway, guarded: EtcdCluster) -> None:
    to = gateway(guarded.hosts, user="writer", password="not-the-secret")
    for call in (read, write, watch):
        with pytest.raises(AuthFailed, match="refused user 'writer' with this password") as caught:
            call(to)
        assert "not-the-secret" not in str(caught.value)


def test_no_user_is_told_to_give_one(gateway: MakeGateway, guarded: EtcdCluster) -> None:
    for call in (read, write, watch):
        with pytest.raises(AuthFailed, match="etcd://USER:PASSWORD@"):
            call(gateway(guarded.hosts))


def test_what_is_not_permitted_names_the_user_and_the_remedy(gateway: MakeGateway, guarded: EtcdCluster) -> None:
    to = gateway(guarded.hosts, user="writer", password="secret-1", remedy="grant this and that")
    for call in (read, write, watch):
        with pytest.raises(AuthFailed, match="user 'writer'; grant this and that"):
            call(to, b"theirs/a")


def test_a_token_that_ran_out_is_replaced_in_every_call(gateway: MakeGateway, guarded: EtcdCluster) -> None:
    for call in (read, write, watch):
        to = gateway(guarded.hosts, user="writer", password="secret-1")
        write(to)
        token = to._here().token
        assert token
        to._here().token = "gone.1"  # what the server says to it is what it says to one that ran out
        with contextlib.ExitStack() as closing:
            done = call(to)
            if isinstance(done, WatchStream):
                closing.callback(done.close)
        assert to._here().token not in {"gone.1", ""}


def test_changed_users_do_not_end_a_call(gateway: MakeGateway, guarded: EtcdCluster) -> None:
    to = gateway(guarded.hosts, user="writer", password="secret-1")
    write(to)
    guarded.ctl("role", "add", f"another{time.monotonic_ns()}")  # "revision of auth store is old"
    assert write(to)
    assert read(to).kvs


def test_a_user_that_nobody_checks_is_told_once_and_used_once_there_is_one(
    gateway: MakeGateway, caplog: pytest.LogCaptureFixture
) -> None:
    with etcd() as cluster:
        to = gateway(cluster.hosts, user="writer", password="secret-1")
        for _ in range(3):
            assert write(to)
        (told,) = [each.getMessage() for each in caplog.records if "veltrix.user_unused" in each.getMessage()]
        assert f"127.0.0.1:{cluster.members[0].port} has authentication off" in told
        assert "secret-1" not in told
        cluster.turn_auth_on(writer="secret-1")
        cluster.grant("writer", "shop/")
        assert write(to)
        with pytest.raises(AuthFailed, match="refused user 'writer'"):
            write(gateway(cluster.hosts, user="writer", password="wrong"))


# --- failover


def test_a_member_that_is_gone_is_passed_over_and_not_asked_again(gateway: MakeGateway, server: EtcdCluster) -> None:
    for _ in range(10):
        to = gateway([closed_port(), *server.hosts, closed_port()], timeout_s=5)
        assert write(to)
        assert to._here().used == server.hosts[0]


def test_a_read_goes_on_where_a_member_hangs(gateway: MakeGateway, server: EtcdCluster, liar: MakeLiar) -> None:
    hanging = liar(None)
    to = gateway([hanging.host, *server.hosts], timeout_s=5)
    to._here().order = [hanging.host, *server.hosts]
    to._here().used = hanging.host
    read(to)
    assert len(hanging.requests) == 1
    read(to)
    assert len(hanging.requests) == 1, "it was left"


@pytest.mark.parametrize("said", [None, b"", b"HTTP/1.1 200 OK\r\nContent-Le", answer({"message": "timed out"}, 504)])
def test_a_write_that_may_have_run_is_never_sent_again(
    gateway: MakeGateway, server: EtcdCluster, liar: MakeLiar, said: bytes | None
) -> None:
    lying = liar(said)
    to = gateway([lying.host, *server.hosts], timeout_s=0.5)
    to._here().order = [lying.host, *server.hosts]
    to._here().used = lying.host
    before = server.revision()
    with pytest.raises(StoreUnavailable, match="fate is unknown: read again"):
        write(to, within_s=0.5)
    assert len(lying.requests) == 1
    assert server.revision() == before
    assert write(to) == before + 1, "the next one goes elsewhere"
    assert len(lying.requests) == 1


def test_a_write_that_a_member_without_leader_refused_goes_to_the_next(
    gateway: MakeGateway, server: EtcdCluster, liar: MakeLiar
) -> None:
    lonely = liar(answer({"message": "etcdserver: no leader", "code": 14}, 503))
    to = gateway([lonely.host, *server.hosts], timeout_s=5)
    to._here().order = [lonely.host, *server.hosts]
    to._here().used = lonely.host
    assert write(to) == server.revision()
    assert len(lonely.requests) == 1
    assert b"Grpc-Metadata-hasleader: true\r\n" in lonely.requests[0]


def test_a_restarted_server_is_written_to_without_an_error(gateway: MakeGateway) -> None:
    with etcd() as cluster:
        to = gateway(cluster.hosts)
        revision = write(to)
        cluster.kill(cluster.members[0])
        cluster.start()
        assert write(to) > revision


def test_a_watch_knows_when_its_member_failed_a_call(gateway: MakeGateway, server: EtcdCluster) -> None:
    to = gateway(server.hosts)
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


def test_closing_a_gateway_closes_what_is_idle_and_it_opens_anew(gateway: MakeGateway, server: EtcdCluster) -> None:
    before = len(etcd_stream._open)
    to = gateway(server.hosts)
    write(to)
    assert len(etcd_stream._open) == before + 1
    to.close()
    to.close()
    assert len(etcd_stream._open) == before
    assert write(to)


# --- watches


def test_a_watch_from_a_forgotten_revision_says_from_where_on(gateway: MakeGateway) -> None:
    with etcd() as cluster:
        to = gateway(cluster.hosts)
        newest = [write(to) for _ in range(5)][-1]
        cluster.compact(newest)
        with (
            contextlib.closing(watch(to)) as stream,
            pytest.raises(Compacted, match=f"before revision {newest}"),
        ):
            receive(stream)


def test_a_watch_whose_server_ends_raises_also_where_it_ends_in_good_order(
    gateway: MakeGateway, liar: MakeLiar
) -> None:
    created = b'{"result":{"header":{"revision":"5"},"watch_id":"1","created":true}}\n'
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(created), created)
    ending = liar(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
    with (
        contextlib.closing(watch(gateway([ending.host]))) as stream,
        pytest.raises(StoreUnavailable, match="ended the watch"),
    ):
        stream.receive(time.monotonic() + WITHIN_S)


# --- threads and forks


def test_many_threads_share_a_gateway(gateway: MakeGateway, server: EtcdCluster) -> None:
    to = gateway(server.hosts)
    with ThreadPoolExecutor(8) as pool:
        revisions = list(pool.map(lambda number: write(to, b"shop/%d" % number), range(80)))
    assert len(set(revisions)) == 80
    assert sum(len(idle) for idle in to._here().idle.values()) <= 4


def test_a_child_has_connections_and_a_token_of_its_own(gateway: MakeGateway, guarded: EtcdCluster) -> None:
    to = gateway(guarded.hosts, user="writer", password="secret-1")
    write(to)
    inherited = to._here()
    ours = {connection for idle in inherited.idle.values() for connection in idle}

    def child() -> None:
        assert to._here() is not inherited
        assert not (ours & etcd_stream._open)
        write(to)
        to.close()

    in_a_fork(child)
    assert write(to)
    assert to._here() is inherited
    assert ours <= etcd_stream._open, "the parent goes on with its own"


def test_a_fork_that_ran_no_hooks_is_noticed(gateway: MakeGateway, server: EtcdCluster) -> None:
    to = gateway(server.hosts)
    write(to)
    inherited = to._here()
    inherited.pid = os.getpid() + 1
    inherited.lock.acquire()  # as by a thread that the child does not have
    assert write(to)
    assert to._here() is not inherited


def test_an_error_names_the_member_and_never_the_password(gateway: MakeGateway, liar: MakeLiar) -> None:
    silent = liar(None)
    with pytest.raises(StoreError) as caught:
        read(gateway([silent.host], user="writer", password="secret-1", timeout_s=0.2))
    text = str(caught.value) + repr(caught.value.__cause__)
    assert f"127.0.0.1:{silent.host[1]}" in text
    assert "secret-1" not in text
