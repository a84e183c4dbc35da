"""etcd over gRPC: what is gRPC's own, as its channels, its threads across a fork, and clusters without the gateway."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.stores.contract import in_a_fork
from tests.stores.etcd_calls import WITHIN_S, Generators, MakeMembers, read, receive, watch, write
from tests.support.etcd_servers import EtcdCluster, etcd, make_certificates
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until
from veltrix_mw.errors import AuthFailed, StoreUnavailable
from veltrix_mw.stores import etcd_grpc
from veltrix_mw.stores.etcd_grpc import Grpc
from veltrix_mw.stores.etcd_members import Late, Members
from veltrix_mw.stores.etcd_messages import WatchCreate
from veltrix_mw.stores.tls import Tls


@pytest.fixture(scope="module")
def server() -> Iterator[EtcdCluster]:
    with etcd() as cluster:
        yield cluster


@pytest.fixture
def members() -> Iterator[MakeMembers]:
    made: list[Members] = []

    def members(hosts: Sequence[tuple[str, int]], *, tls: Tls | None = None, **options: Any) -> Members:
        made.append(Members(hosts, Grpc(tls), **options))
        return made[-1]

    yield members
    for each in made:
        each.close()


# --- clusters that the gateway does not serve


def test_a_cluster_whose_gateway_is_off_is_read_written_and_watched(members: MakeMembers) -> None:
    with etcd(options=["--enable-grpc-gateway=false"]) as off:
        to = members(off.hosts)
        revision = write(to)
        assert read(to).kvs[0].mod_revision == revision
        with contextlib.closing(watch(to, start=revision)) as stream:
            assert receive(stream)[0].events[0].kv.mod_revision == revision


def test_a_certificate_with_a_common_name_is_taken_while_etcd_has_users(members: MakeMembers, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path, client_subject="/CN=shop-worker")
    options = ["--client-cert-auth", "--trusted-ca-file", str(certificates.ca)]
    tls = Tls(str(certificates.ca), str(certificates.client_cert), str(certificates.client_key))
    with etcd(tls=certificates, options=options) as strict:
        strict.turn_auth_on(**{"shop-worker": "secret-1", "other": "secret-2"})
        strict.grant("shop-worker", "shop/")
        strict.grant("other", "theirs/")
        # The certificate is the user: etcd goes by its name where no token is given.
        to = members(strict.hosts, tls=tls)
        revision = write(to)
        assert read(to).kvs[0].mod_revision == revision
        with contextlib.closing(watch(to, start=revision)) as stream:
            assert receive(stream)
        with pytest.raises(AuthFailed, match="does not permit"):
            read(to, b"theirs/a")
        # With a user and a password, it is that user.
        assert write(members(strict.hosts, tls=tls, user="other", password="secret-2"), b"theirs/a")


# --- members that do not answer


@pytest.fixture
def proxy(server: EtcdCluster) -> Iterator[Proxy]:
    proxy = Proxy(server.members[0].port)
    yield proxy
    proxy.close()


def prefer(to: Members, host: tuple[str, int]) -> None:
    here = to._here()
    here.order.sort(key=lambda each: each != host)
    here.used = host


def test_a_write_to_a_member_that_takes_connections_and_says_nothing_goes_to_the_next(
    members: MakeMembers, server: EtcdCluster, proxy: Proxy
) -> None:
    """HTTP/2 begins with a greeting: where it does not come, the write was not sent."""
    to = members([("127.0.0.1", proxy.port), *server.hosts], timeout_s=5)
    prefer(to, ("127.0.0.1", proxy.port))
    proxy.blackhole()
    assert write(to) == server.revision()


def test_a_member_that_says_nothing_costs_its_timeout_and_no_more(members: MakeMembers) -> None:
    begun_s = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        for call in (read, write, watch):
            with pytest.raises(StoreUnavailable, match="did not answer in time"):
                call(members([mute.getsockname()], timeout_s=0.2))
    assert time.monotonic() - begun_s < WITHIN_S


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-OpenSSH_9.2\r\n", b"-ERR unknown command 'PRI'\r\n", b"HTTP/1.1 400 X\r\n\r\n"]
)
def test_what_is_no_etcd_is_told_from_one(members: MakeMembers, said: bytes) -> None:
    done = threading.Event()

    def serve(listening: socket.socket) -> None:
        while not done.is_set():
            connection, _ = listening.accept()
            with contextlib.closing(connection):
                connection.recv(1000)
                connection.sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = threading.Thread(target=serve, args=(listening,))
        serving.start()
        try:
            with pytest.raises(StoreUnavailable, match=r"is no etcd; name its client port \(2379"):
                read(members([listening.getsockname()], timeout_s=0.2))
        finally:
            done.set()
            socket.create_connection(listening.getsockname()).close()
            serving.join(WITHIN_S)


def test_a_watch_whose_connection_is_half_open_ends_by_itself(members: MakeMembers, proxy: Proxy) -> None:
    """By gRPC's pings: nobody makes a call that could fail."""
    to = members([("127.0.0.1", proxy.port)])
    with contextlib.closing(watch(to, b"shop/quiet")) as stream:
        proxy.blackhole()
        with pytest.raises(StoreUnavailable, match="ended the watch"):
            stream.receive(time.monotonic() + 20)


# --- streams


def test_a_stream_that_nobody_reads_is_held_back_and_loses_nothing(
    members: MakeMembers, server: EtcdCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_grpc, "_MAX_WAITING_BYTES", 100_000)
    to = members(server.hosts)
    first = write(to, b"shop/held", b"")
    with contextlib.closing(watch(to, b"shop/held", start=first)) as stream:
        receive(stream)  # from here on each write is a message
        revisions = [write(to, b"shop/held", b"x" * 50_000) for _ in range(40)]
        held = stream._stream
        assert isinstance(held, etcd_grpc.GrpcStream)
        wait_until(lambda: sum(map(len, held._waiting)) > 100_000, WITHIN_S, reason="the stream is full")
        assert sum(map(len, held._waiting)) < 300_000
        seen: list[int] = []
        while seen[-1:] != revisions[-1:]:
            seen += [event.kv.mod_revision for message in receive(stream) for event in message.events]
        assert seen == revisions


def test_closing_a_stream_that_is_full_ends_its_reader(
    members: MakeMembers, server: EtcdCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_grpc, "_MAX_WAITING_BYTES", 10)
    to = members(server.hosts)
    first = write(to, b"shop/full", b"x" * 100)
    stream = watch(to, b"shop/full", start=first)
    held = stream._stream
    assert isinstance(held, etcd_grpc.GrpcStream)
    wait_until(lambda: held._waiting, WITHIN_S, reason="something waits")
    stream.close()
    wait_until(lambda: not readers(), WITHIN_S, reason="the reader has ended")


def readers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "veltrix-etcd-watch"]


def test_where_interceptors_make_generators_of_streams_a_late_member_and_a_watch_are_borne(
    members: MakeMembers, server: EtcdCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = grpc.insecure_channel
    monkeypatch.setattr(grpc, "insecure_channel", lambda *of: grpc.intercept_channel(bare(*of), Generators()))
    to = members(server.hosts)
    assert isinstance(to._transport, Grpc)
    to._transport._late_at_s[server.hosts[0]] = time.monotonic()  # as after one late answer
    revision = write(to, b"shop/generated")
    assert read(to, b"shop/generated").kvs[0].mod_revision == revision
    stream = watch(to, b"shop/generated", start=revision)
    assert receive(stream)
    stream.close()
    wait_until(lambda: not readers(), WITHIN_S, reason="the reader has ended with its channel")


def test_a_message_that_is_none_ends_the_watch(
    members: MakeMembers, server: EtcdCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = members(server.hosts)
    with contextlib.closing(watch(to, b"shop/broken")) as stream:
        monkeypatch.setattr(etcd_grpc, "decode", lambda raw, kind: (_ for _ in ()).throw(ValueError("cut off")))
        server.put("shop/broken", "1")
        with pytest.raises(StoreUnavailable, match="ended the watch"):
            stream.receive(time.monotonic() + WITHIN_S)


class Said(grpc.RpcError):
    """A failure as a server words it, which comes by chance alone."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._said = code, details

    def code(self) -> grpc.StatusCode:
        return self._said[0]

    def details(self) -> str:
        return self._said[1]


@pytest.mark.parametrize("details", ["context deadline exceeded", "context canceled"])
def test_a_deadline_that_etcd_saw_first_is_one(details: str) -> None:
    assert isinstance(etcd_grpc.meaning(Said(grpc.StatusCode.UNKNOWN, details), ("h", 1)), Late)
    other = etcd_grpc.meaning(Said(grpc.StatusCode.UNKNOWN, "other"), ("h", 1))
    assert "failed the call (UNKNOWN)" in str(other)


# --- forks


def test_no_thread_of_grpcs_is_there_when_the_process_forks(members: MakeMembers, server: EtcdCluster) -> None:
    to = members(server.hosts)
    first = write(to)
    stream = watch(to, start=first + 1)
    assert etcd_grpc._has_threads()
    seen: list[tuple[bool, int]] = []

    def child() -> None:
        assert (etcd_grpc._has_threads(), etcd_grpc._open) == (False, set())
        write(to)
        with contextlib.closing(watch(to, start=first + 1)) as own:
            assert receive(own)
        to.close()

    for _ in range(5):
        in_a_fork(child)
        seen.append((etcd_grpc._has_threads(), len(etcd_grpc._open)))
        write(to)
    assert seen == [(False, 0)] * 5
    assert stream.is_left
    assert stream.receive(time.monotonic()) == [], "whoever reads it opens it anew, and is told nothing"
    stream.close()


def test_nor_where_the_last_channel_was_closed_a_moment_ago(members: MakeMembers, server: EtcdCluster) -> None:
    to = members(server.hosts)

    def child() -> None:
        assert not etcd_grpc._has_threads()
        write(to)
        to.close()

    for _ in range(10):
        write(to)
        to._transport.drop(server.hosts[0])  # as after a call that failed
        in_a_fork(child)


def test_a_fork_beside_somebody_elses_channel_is_not_held_up(members: MakeMembers, server: EtcdCluster) -> None:
    import grpc

    theirs = grpc.insecure_channel(f"127.0.0.1:{server.members[0].port}")
    try:
        grpc.channel_ready_future(theirs).result(WITHIN_S)
        to = members(server.hosts)
        write(to)
        begun_s = time.monotonic()
        in_a_fork(lambda: None)
        assert time.monotonic() - begun_s < WITHIN_S
        assert write(to)
    finally:
        theirs.close()


def test_what_a_fork_without_hooks_left_is_neither_used_nor_destroyed(
    members: MakeMembers, server: EtcdCluster
) -> None:
    to = members(server.hosts)
    write(to)
    transport = to._transport
    assert isinstance(transport, Grpc)
    (channel,) = transport.pool.idle
    transport.pool._kept.pid = channel._pid = os.getpid() + 1  # as a child sees it
    assert write(to)
    assert channel in etcd_grpc._inherited
    assert channel not in transport.pool.idle
    channel._pid = os.getpid()
    channel.close()
    etcd_grpc._inherited.remove(channel)
    gc.collect()


def test_a_create_is_asked_for_each_watch(members: MakeMembers, server: EtcdCluster) -> None:
    to = members(server.hosts)
    creates = [WatchCreate(b"shop/%d" % number, start_revision=1, watch_id=number) for number in (1, 2, 3)]
    with contextlib.closing(to.watch(creates, deadline_s=time.monotonic() + WITHIN_S)) as stream:
        for number in (1, 2, 3):
            write(to, b"shop/%d" % number)
        ids: list[int] = []
        while len(ids) < 3:
            ids += [message.watch_id for message in receive(stream)]
        assert sorted(ids) == [1, 2, 3]
