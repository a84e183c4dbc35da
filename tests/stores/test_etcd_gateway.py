"""The way to etcd over its JSON gateway: what is said in HTTP, and what servers that lie may say."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.stores.contract import in_a_fork
from tests.stores.etcd_calls import WITHIN_S, MakeMembers, read, watch, write
from tests.support.etcd_servers import EtcdCluster, etcd
from veltrix_mw.errors import AuthFailed, Compacted, InvalidValue, Overloaded, StoreError, StoreUnavailable
from veltrix_mw.stores import etcd_stream
from veltrix_mw.stores.etcd_gateway import Gateway
from veltrix_mw.stores.etcd_members import FutureRevision, Members
from veltrix_mw.stores.etcd_messages import KEEP_LEASE, KeepLease


@pytest.fixture(scope="module")
def server() -> Iterator[EtcdCluster]:
    with etcd() as cluster:
        yield cluster


@pytest.fixture
def members() -> Iterator[MakeMembers]:
    made: list[Members] = []

    def members(hosts: Sequence[tuple[str, int]], **options: Any) -> Members:
        made.append(Members(hosts, Gateway(), **options))
        return made[-1]

    yield members
    for each in made:
        each.close()


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


def test_a_server_that_never_answers_costs_its_timeout_and_no_more(members: MakeMembers, liar: MakeLiar) -> None:
    begun_s = time.monotonic()
    with pytest.raises(StoreUnavailable, match="did not answer in time"):
        read(members([liar(None).host], timeout_s=0.3), within_s=600)
    assert time.monotonic() - begun_s < WITHIN_S
    with pytest.raises(StoreUnavailable, match="did not answer in time"):
        read(members([liar(None).host], timeout_s=600), within_s=0.3)
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
def test_what_is_no_etcd_is_told_from_one(members: MakeMembers, liar: MakeLiar, said: bytes) -> None:
    with pytest.raises(StoreUnavailable, match="is no etcd") as caught:
        read(members([liar(said).host], timeout_s=0.2))
    assert "2379" in str(caught.value)


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (answer(b""), StoreUnavailable, "ended the stream without an answer"),
        (answer({"error": {"message": "etcdserver: permission denied"}}), AuthFailed, "grant it"),
        (answer({"result": {"TTL": []}}), StoreUnavailable, "is no etcd"),
    ],
)
def test_a_stream_of_one_message_that_has_none_is_told(
    members: MakeMembers, liar: MakeLiar, said: bytes, error: type[StoreError], words: str
) -> None:
    with pytest.raises(error, match=words):
        members([liar(said).host], timeout_s=0.2).call(KEEP_LEASE, KeepLease(7), deadline_s=time.monotonic() + WITHIN_S)


def test_a_gateway_that_is_off_is_named_with_the_option(members: MakeMembers) -> None:
    with etcd(options=["--enable-grpc-gateway=false"]) as off:
        for call in (read, write, watch):
            with pytest.raises(StoreUnavailable, match="--enable-grpc-gateway=true"):
                call(members(off.hosts))


def test_the_peer_port_is_told_from_a_gateway_that_is_off(members: MakeMembers, server: EtcdCluster) -> None:
    for call in (read, write, watch):
        with pytest.raises(StoreUnavailable, match=r"is etcd's peer port, .*; name the client port \(2379"):
            call(members([("127.0.0.1", server.members[0].peer_port)]))


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
    members: MakeMembers, liar: MakeLiar, message: str, error: type[Exception], words: str, shape: dict[str, Any]
) -> None:
    said = answer({name: message if value == 0 else value for name, value in shape.items()}, 400)
    with pytest.raises(error, match=words):
        read(members([liar(said).host], timeout_s=0.2))


def test_a_read_goes_on_where_a_member_hangs(members: MakeMembers, server: EtcdCluster, liar: MakeLiar) -> None:
    hanging = liar(None)
    to = members([hanging.host, *server.hosts], timeout_s=5)
    to._here().order = [hanging.host, *server.hosts]
    to._here().used = hanging.host
    read(to)
    assert len(hanging.requests) == 1
    read(to)
    assert len(hanging.requests) == 1, "it was left"


@pytest.mark.parametrize("said", [None, b"", b"HTTP/1.1 200 OK\r\nContent-Le", answer({"message": "timed out"}, 504)])
def test_a_write_that_may_have_run_is_never_sent_again(
    members: MakeMembers, server: EtcdCluster, liar: MakeLiar, said: bytes | None
) -> None:
    lying = liar(said)
    to = members([lying.host, *server.hosts], timeout_s=0.5)
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
    members: MakeMembers, server: EtcdCluster, liar: MakeLiar
) -> None:
    lonely = liar(answer({"message": "etcdserver: no leader", "code": 14}, 503))
    to = members([lonely.host, *server.hosts], timeout_s=5)
    to._here().order = [lonely.host, *server.hosts]
    to._here().used = lonely.host
    assert write(to) == server.revision()
    assert len(lonely.requests) == 1
    assert b"Grpc-Metadata-hasleader: true\r\n" in lonely.requests[0]


def test_a_watch_whose_server_ends_raises_also_where_it_ends_in_good_order(
    members: MakeMembers, liar: MakeLiar
) -> None:
    created = b'{"result":{"header":{"revision":"5"},"watch_id":"1","created":true}}\n'
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(created), created)
    ending = liar(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
    with (
        contextlib.closing(watch(members([ending.host]))) as stream,
        pytest.raises(StoreUnavailable, match="ended the watch"),
    ):
        stream.receive(time.monotonic() + WITHIN_S)


def test_a_child_has_connections_of_its_own(server: EtcdCluster) -> None:
    gateway = Gateway()
    to = Members(server.hosts, gateway)
    write(to)
    ours = set(gateway.pool.idle)
    assert ours

    def child() -> None:
        assert not (ours & etcd_stream._open)
        write(to)
        assert not (ours & set(gateway.pool.idle))
        to.close()

    in_a_fork(child)
    assert write(to)
    assert ours <= etcd_stream._open, "the parent goes on with its own"
    to.close()


def test_an_error_names_the_member_and_never_the_password(members: MakeMembers, liar: MakeLiar) -> None:
    silent = liar(None)
    with pytest.raises(StoreError) as caught:
        read(members([silent.host], user="writer", password="secret-1", timeout_s=0.2))
    text = str(caught.value) + repr(caught.value.__cause__)
    assert f"127.0.0.1:{silent.host[1]}" in text
    assert "secret-1" not in text
