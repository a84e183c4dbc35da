"""The Redis store as the authority: the contract, and what is its own: the server's faults, errors, the stream."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.stores.contract import (
    WITHIN_S,
    Harness,
    SharedStoreContract,
    delete,
    drain,
    entries,
    here,
    in_a_fork,
    put,
    write,
)
from tests.support.etcd_servers import etcd
from tests.support.proxy import Proxy
from tests.support.redis_servers import Certificates, RedisServer, redis_server
from tests.support.waiting import wait_until
from veltrix_mw.errors import AuthFailed, Compacted, StoreError, StoreUnavailable
from veltrix_mw.protocols import ChangeRecord, Listing, Position, RawOperation, Restored
from veltrix_mw.stores import dialing, redis_reading
from veltrix_mw.stores.redis import RedisStore
from veltrix_mw.stores.redis_link import Connection
from veltrix_mw.stores.redis_mirror import RedisMirror
from veltrix_mw.values import MISSING

OpenStore = Callable[..., RedisStore]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


class RedisHarness(Harness):
    """A server, emptied for each test."""

    keeps_records = False

    def __init__(self, server: RedisServer) -> None:
        super().__init__()
        self._port = server.port

    def spec(self, **options: Any) -> dict[str, Any]:
        options = {"where": "127.0.0.1", "port": self._port, "namespace": self.namespace, **options}
        return {"store": "veltrix_mw.stores.redis:RedisStore", "options": options}

    def make(self, **options: Any) -> RedisStore:
        return RedisStore("127.0.0.1", self._port, namespace=self.namespace, **options)

    def forget(self, oldest: int) -> None:
        newest = here(self.open()).revision
        put(self.open(keep_revisions=newest - oldest + 2), "forgotten", b"1")


@pytest.fixture
def harness(shared_server: RedisServer) -> Iterator[RedisHarness]:
    shared_server.run("FLUSHALL")
    harness = RedisHarness(shared_server)
    yield harness
    harness.close()


class TestRedisStore(SharedStoreContract):
    """The contract over `RedisStore`."""


# --- a server of the test's own


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def open_store() -> Iterator[OpenStore]:
    opened: list[RedisStore] = []

    def open_store(server: RedisServer | int, **options: Any) -> RedisStore:
        port = server.port if isinstance(server, RedisServer) else server
        opened.append(RedisStore("127.0.0.1", port, **options))
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()


def read_in_every_way(store: RedisStore, *, timeout_s: float = WITHIN_S) -> list[Callable[[], object]]:
    return [
        lambda: store.list(timeout_s=timeout_s),
        lambda: store.list_at(0, timeout_s=timeout_s),
        lambda: store.read(["a"], None, timeout_s=timeout_s),
        lambda: store.history("a", limit=1, timeout_s=timeout_s),
        lambda: store.confirm(Position("", 0), timeout_s=timeout_s),
        lambda: store.watch(Position("", 0), timeout_s=timeout_s),
        lambda: store.renew_incarnation("", timeout_s=timeout_s),
    ]


def everything(server: RedisServer) -> dict[bytes, bytes]:
    """All keys of the server, with what they hold."""
    return {key: server.run("DUMP", key) for key in server.run("KEYS", "*")}


# --- its server loses what it had


def test_a_flushed_namespace_is_said_and_never_looks_empty(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server)
    put(store, "a", b"1")
    position = here(store)
    watch = store.watch(position, timeout_s=WITHIN_S)
    server.run("FLUSHALL")
    for call in (
        lambda: store.list(timeout_s=WITHIN_S),
        lambda: store.read(["a"], None, timeout_s=WITHIN_S),
        lambda: store.history("a", limit=1, timeout_s=WITHIN_S),
        lambda: store.confirm(position, timeout_s=WITHIN_S),
        lambda: store.watch(position, timeout_s=WITHIN_S),
        lambda: store.renew_incarnation(position.incarnation, timeout_s=WITHIN_S),
        lambda: watch.next(WITHIN_S),
        # A process that restarted knows its position from a file.
        lambda: open_store(server).confirm(position, timeout_s=WITHIN_S),
        lambda: open_store(server).watch(position, timeout_s=WITHIN_S),
    ):
        with pytest.raises(StoreUnavailable, match=r"gone from redis://.*Restore a backup"):
            call()
    watch.close()


def test_what_is_written_after_a_flush_is_another_history(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server)
    put(store, "a", b"1")
    position = here(store)
    watch = store.watch(position, timeout_s=WITHIN_S)
    server.run("FLUSHALL")
    put(store, "a", b"2")
    for call in (
        lambda: watch.next(WITHIN_S),
        lambda: store.confirm(position, timeout_s=WITHIN_S),
        lambda: store.watch(position, timeout_s=WITHIN_S),
    ):
        with pytest.raises(Restored):
            call()
    assert here(store).incarnation != position.incarnation
    assert entries(store) == {"a": (b"2", 1)}
    watch.close()


def test_entries_evicted_without_the_stream_are_gone_also_for_a_newcomer(
    server: RedisServer, open_store: OpenStore
) -> None:
    put(open_store(server), "a", b"1")
    server.run("DEL", "veltrix:{default}:entries")
    newcomer = open_store(server)
    for call in [*read_in_every_way(newcomer), lambda: put(newcomer, "a", b"2")]:
        with pytest.raises(StoreUnavailable, match="gone from"):
            call()
    server.run("DEL", "veltrix:{default}:changes")
    assert put(open_store(server), "a", b"2") == 1


def test_a_stream_evicted_without_the_entries_ends_the_history_alone(
    server: RedisServer, open_store: OpenStore
) -> None:
    store = open_store(server)
    put(store, "a", b"1")
    old = here(store)
    put(store, "a", b"2")
    position = here(store)
    watch, late = store.watch(position, timeout_s=WITHIN_S), store.watch(old, timeout_s=WITHIN_S)
    server.run("DEL", "veltrix:{default}:changes")
    assert entries(store) == {"a": (b"2", 2)}
    assert [version.revision for version in store.history("a", limit=9, timeout_s=WITHIN_S)] == [2]
    for call in (lambda: store.watch(old, timeout_s=WITHIN_S), lambda: late.next(WITHIN_S), lambda: entries(store, 1)):
        with pytest.raises(Compacted) as caught:
            call()
        assert not isinstance(caught.value, Restored)
    store.watch(position, timeout_s=WITHIN_S).close()
    revision = put(store, "a", b"3")
    assert [batch.position.revision for batch in drain(watch, revision)] == [3]
    assert store.confirm(here(store), timeout_s=WITHIN_S).revision == 3
    watch.close()
    late.close()


@pytest.mark.parametrize("later", [0, 1, 5], ids=["older", "equal", "newer"])
def test_yesterdays_dump_is_noticed(server: RedisServer, open_store: OpenStore, later: int) -> None:
    store = open_store(server)
    put(store, "a", b"1")
    dump = server.save()
    put(store, "a", b"2")
    position = here(store)
    watch = store.watch(position, timeout_s=WITHIN_S)
    server.restart(dump=dump)
    with pytest.raises(StoreUnavailable):
        watch.next(WITHIN_S)
    for turn in range(later):
        put(store, "b", b"%d" % turn)
    for call in (
        lambda: watch.next(WITHIN_S),
        lambda: store.confirm(position, timeout_s=WITHIN_S),
        lambda: store.watch(position, timeout_s=WITHIN_S),
    ):
        with pytest.raises(Restored):
            call()
    assert entries(store)["a"] == (b"1", 1)
    renewed = store.renew_incarnation(position.incarnation, timeout_s=WITHIN_S)
    assert here(store).incarnation == renewed != position.incarnation
    watch.close()


def test_another_history_put_beneath_an_open_watch_is_noticed_by_its_marks(
    server: RedisServer, open_store: OpenStore
) -> None:
    """No connection broke, the label is the same, and revisions follow each other: only the mark differs."""
    store = open_store(server)
    put(store, "a", b"1")
    saved = everything(server)
    put(store, "a", b"2")
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    assert list(watch.next(0)) == []
    pipeline = server.client.pipeline()
    for key, dump in saved.items():
        pipeline.execute_command("RESTORE", key, 0, dump, "REPLACE")
    pipeline.execute()
    for turn in range(3):
        put(store, "b", b"%d" % turn)
    with pytest.raises(Restored):
        watch.next(WITHIN_S)
    watch.close()


def test_a_revision_under_a_renewed_label_is_not_taken_for_the_next_one(
    server: RedisServer, open_store: OpenStore
) -> None:
    """Revision and mark before it are the ones that were followed: only the label says that a restore was found."""
    store = open_store(server)
    put(store, "a", b"1")
    position = here(store)
    watch = store.watch(position, timeout_s=WITHIN_S)
    store.renew_incarnation(position.incarnation, timeout_s=WITHIN_S)
    put(store, "a", b"2")
    with pytest.raises(Restored):
        watch.next(WITHIN_S)
    watch.close()


def test_a_stream_of_another_time_than_the_entries_takes_no_write(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server)
    put(store, "a", b"1")
    old = server.run("DUMP", "veltrix:{default}:entries")
    put(store, "a", b"2")
    server.run("RESTORE", "veltrix:{default}:entries", 0, old, "REPLACE")
    before = everything(server)
    with pytest.raises(StoreError, match="restore both from one backup"):
        put(store, "a", b"3")
    assert everything(server) == before


def test_entries_that_do_not_add_up_are_refused(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server)
    write(store, RawOperation("a", b"1"), RawOperation("b", b"1"))
    server.run("HDEL", "veltrix:{default}:entries", "b")
    with pytest.raises(StoreUnavailable, match="did not add up"):
        store.list(timeout_s=WITHIN_S)


# --- a server that does not answer


def test_no_server_is_said_at_once(open_store: OpenStore, free_port: int) -> None:
    store = open_store(free_port)
    for call in [*read_in_every_way(store), lambda: put(store, "a", b"1")]:
        with pytest.raises(StoreUnavailable, match=f"redis://127.0.0.1:{free_port}/0 refuses connections"):
            call()


def test_a_stopped_server_is_noticed(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server, timeout_s=0.5)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    assert list(watch.next(0)) == []
    server.stop()
    try:
        with pytest.raises(StoreUnavailable, match="did not answer within"):
            watch.next(600)
        for call in [*read_in_every_way(store, timeout_s=0.2), lambda: store.list(timeout_s=0)]:
            with pytest.raises(StoreUnavailable, match="did not answer within"):
                call()
    finally:
        server.cont()
    revision = put(store, "a", b"2")
    assert [batch.position.revision for batch in drain(watch, revision)] == [revision]
    watch.close()


def test_a_restarted_server_is_found_again_by_the_next_call(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server)
    put(store, "a", b"1")
    server.restart(dump=server.save())
    assert entries(store) == {"a": (b"1", 1)}
    server.restart(dump=server.save())
    assert put(store, "a", b"2") == 2


def test_a_server_that_is_loading_is_said(open_store: OpenStore) -> None:
    slow = ("--key-load-delay", "50000", "--loading-process-events-interval-bytes", "1024", "--rdbcompression", "no")
    with redis_server(*slow) as server:
        pipeline = server.client.pipeline()
        for number in range(400):
            pipeline.set(f"other{number}", "x" * 500)
        pipeline.execute()
        server.restart(dump=server.save(), wait=False)
        with pytest.raises(StoreUnavailable, match="still loading"):
            open_store(server).list(timeout_s=WITHIN_S)


def test_a_replica_takes_no_write(server: RedisServer, open_store: OpenStore) -> None:
    with redis_server("--replicaof", "127.0.0.1", str(server.port)) as replica:
        store = open_store(replica)
        wait_until(
            lambda: replica.run("INFO", "replication")["master_link_status"] == "up", WITHIN_S, reason="the link"
        )
        with pytest.raises(StoreUnavailable, match="is a replica"):
            put(store, "a", b"1")
        put(open_store(server), "a", b"1")
        wait_until(lambda: entries(store), WITHIN_S, reason="the replica to have it")


def test_a_write_is_acknowledged_once_enough_replicas_have_it(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server, wait_replicas=1, wait_timeout_s=0.2)
    with pytest.raises(StoreUnavailable, match=r"revision 1 was written .* only 0 of 1 replicas .* read again before"):
        put(store, "a", b"1")
    assert entries(store) == {"a": (b"1", 1)}
    with redis_server("--replicaof", "127.0.0.1", str(server.port)) as replica:
        wait_until(lambda: replica.run("EXISTS", "veltrix:{default}:entries"), WITHIN_S, reason="the replica to follow")
        slow = open_store(server, wait_replicas=1, wait_timeout_s=WITHIN_S)
        put(slow, "a", b"2")
        assert replica.run("HGET", "veltrix:{default}:entries", "a") == b"2 2"
        replica.stop()
        try:
            with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas"):
                put(store, "a", b"3")
            # The call's own deadline is the end of waiting, too.
            with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas"):
                slow.commit([RawOperation("a", b"4")], ChangeRecord(), timeout_s=0.3)
        finally:
            replica.cont()


@pytest.mark.parametrize("fault", ["stopped", "killed"])
def test_a_server_that_ends_between_a_write_and_its_replicas_is_told_with_the_revision(
    server: RedisServer, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    store = open_store(server, wait_replicas=1, wait_timeout_s=0.1)
    replicated = Connection.replicated

    def after_the_fault(connection: Connection, replicas: int, timeout_s: float) -> int:
        server.stop() if fault == "stopped" else server.kill()
        connection.end_by(time.monotonic() + 0.2)  # a write before it had more
        return replicated(connection, replicas, timeout_s)

    monkeypatch.setattr(Connection, "replicated", after_the_fault)
    try:
        with pytest.raises(StoreUnavailable, match=r"revision 1 was written at .* read again before you write again"):
            put(store, "a", b"1")
    finally:
        server.cont() if fault == "stopped" else server.start()
    assert entries(store) == ({"a": (b"1", 1)} if fault == "stopped" else {})


@pytest.mark.parametrize("fault", ["silent", "broken"])
def test_a_write_whose_answer_is_lost_says_that_its_fate_is_unknown(
    server: RedisServer, open_store: OpenStore, fault: str
) -> None:
    proxy = Proxy(server.port)
    try:
        store = open_store(proxy.port)
        put(store, "a", b"1")
        proxy.blackhole(up=False)
        with ThreadPoolExecutor(1) as pool:
            timeout_s = 0.3 if fault == "silent" else WITHIN_S
            writing = pool.submit(store.commit, [RawOperation("a", b"2")], ChangeRecord(), timeout_s=timeout_s)
            wait_until(lambda: entries(open_store(server))["a"][1] == 2, WITHIN_S, reason="the write to be made")
            if fault == "broken":
                proxy.reset()
            why = "did not answer within" if fault == "silent" else "closed the connection"
            with pytest.raises(StoreUnavailable, match=f"{why}.*; the write's fate is unknown: read again before you"):
                writing.result(WITHIN_S)
        proxy.heal()
        assert put(store, "a", b"3") == 3
    finally:
        proxy.close()


def test_a_write_that_was_never_sent_has_no_unknown_fate(server: RedisServer, open_store: OpenStore) -> None:
    proxy = Proxy(server.port)
    try:
        asking_first, store = open_store(proxy.port, wait_replicas=1), open_store(proxy.port)
        with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas"):
            asking_first.commit([RawOperation("a", b"1")], ChangeRecord(), timeout_s=0.3)
        proxy.blackhole(up=False)  # also what it asks before it writes goes unanswered
        with pytest.raises(StoreUnavailable) as silent:
            asking_first.commit([RawOperation("a", b"2")], ChangeRecord(), timeout_s=0.3)
        proxy.refuse()
        with pytest.raises(StoreUnavailable) as refused:
            put(store, "a", b"2")
        assert "unknown" not in f"{silent.value} {refused.value}"
        assert entries(open_store(server)) == {"a": (b"1", 1)}
    finally:
        proxy.close()


def test_who_may_not_wait_for_replicas_is_told_before_anything_is_written(
    server: RedisServer, open_store: OpenStore
) -> None:
    server.run("ACL", "SETUSER", "writer", "on", ">pw", *f"{WRITER} {READING} {WRITING}".split())
    with pytest.raises(AuthFailed, match=r"lacks \+wait"):
        put(open_store(server, user="writer", password="pw", wait_replicas=1), "a", b"1")
    assert everything(server) == {}


def test_a_full_server_takes_no_write_and_says_what_to_raise(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server)
    put(store, "a", b"1")
    server.run("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(StoreUnavailable, match="raise maxmemory"):
        put(store, "a", b"2")
    assert entries(store) == {"a": (b"1", 1)}
    server.run("CONFIG", "SET", "maxmemory", "0")
    assert put(store, "a", b"2") == 2


# --- what is not ours, or not as it should be


FOREIGN: dict[str, list[tuple[str, ...]]] = {
    "a string for the entries": [("SET", "veltrix:{default}:entries", "theirs")],
    "a hash without meta": [("HSET", "veltrix:{default}:entries", "theirs", "1")],
    "a list for the stream": [("RPUSH", "veltrix:{default}:changes", "theirs")],
}


@pytest.mark.parametrize("commands", FOREIGN.values(), ids=FOREIGN)
def test_another_applications_keys_are_named_and_not_touched(
    server: RedisServer, open_store: OpenStore, commands: list[tuple[str, ...]]
) -> None:
    for command in commands:
        server.run(*command)
    before, store = everything(server), open_store(server)
    for call in (lambda: put(store, "a", b"1"), lambda: store.list(timeout_s=WITHIN_S)):
        with pytest.raises(StoreError, match=r"veltrix:\{default\}:.*|gone"):
            call()
    assert everything(server) == before


@pytest.mark.parametrize("field", ["not a key!", "plain"], ids=["no key", "no revision"])
def test_a_field_that_is_not_ours_is_named_without_its_value(
    server: RedisServer, open_store: OpenStore, field: str
) -> None:
    store = open_store(server)
    put(store, "a", b"1")
    server.run("HSET", "veltrix:{default}:entries", field, "s3cret")
    before = everything(server)
    with pytest.raises(StoreError, match=f"field '{field}'.*another namespace") as caught:
        store.list(timeout_s=WITHIN_S)
    assert "s3cret" not in f"{caught.value} {caught.value.__cause__}"
    if field == "plain":
        with pytest.raises(StoreError, match="field 'plain'"):
            put(store, "plain", b"1")
    assert everything(server) == before


def test_an_index_that_is_not_ours_is_named_and_nothing_is_written(server: RedisServer, open_store: OpenStore) -> None:
    server.run("SET", "veltrix:{default}:keys", "s3cret")
    before = everything(server)
    with pytest.raises(StoreError, match=r"veltrix:\{default\}:keys, which is no sorted set, is none of ours"):
        put(open_store(server), "a", b"1")
    assert everything(server) == before


def test_a_stream_entry_that_is_not_ours_ends_the_watch(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    server.run("XADD", "veltrix:{default}:changes", "2-0", "theirs", "s3cret")
    with pytest.raises(StoreError, match="stream entry '2-0'") as caught:
        watch.next(WITHIN_S)
    assert "s3cret" not in str(caught.value)
    watch.close()


def test_a_mirror_is_no_authority(server: RedisServer, open_store: OpenStore) -> None:
    mirror = RedisMirror("127.0.0.1", server.port)
    lease, _, _ = mirror.elect("w1", ttl_s=60, timeout_s=WITHIN_S)
    assert lease is not None
    mirror.fill(lease, Listing(Position("x", 5, "m"), []), digest=0, lazy=(), timeout_s=WITHIN_S)
    mirror.close()
    store, before = open_store(server), everything(server)
    for call in [*read_in_every_way(store), lambda: put(store, "a", b"1")]:
        with pytest.raises(StoreError, match="is a mirror, fed from another authority"):
            call()
    assert everything(server) == before


def test_a_server_without_streams_is_said(open_store: OpenStore) -> None:
    with redis_server("--rename-command", "XRANGE", "", "--rename-command", "XADD", "") as server:
        store = open_store(server)
        with pytest.raises(StoreError, match=r"does not know XRANGE: streams need Redis 5 or newer"):
            store.confirm(Position("", 0), timeout_s=WITHIN_S)
        with pytest.raises(StoreError, match="Redis 5 or newer") as caught:
            put(store, "a", b'"s3cret"')
        assert "s3cret" not in f"{caught.value} {caught.value.__cause__}"


def test_a_db_that_there_is_not_is_said(server: RedisServer, open_store: OpenStore) -> None:
    with pytest.raises(StoreError, match="has no db 99"):
        open_store(server, db=99).list(timeout_s=WITHIN_S)
    store = open_store(server, db=3)
    put(store, "a", b"1")
    assert entries(open_store(server)) == {}
    assert store.info.url == f"redis://127.0.0.1:{server.port}/3"


def test_a_cluster_node_is_said(open_store: OpenStore) -> None:
    with (
        redis_server("--cluster-enabled", "yes") as server,
        pytest.raises(StoreError, match="node of a Redis Cluster"),
    ):
        open_store(server).list(timeout_s=WITHIN_S)


def test_what_is_no_redis_is_said(open_store: OpenStore) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        answered = pool.submit(answer)
        with pytest.raises(StoreError, match="is not a Redis server"):
            open_store(listening.getsockname()[1]).list(timeout_s=WITHIN_S)
        answered.result(WITHIN_S)


def test_a_call_ends_by_its_deadline_though_bytes_keep_coming(open_store: OpenStore) -> None:
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"$1000000\r\n")
                while not done.wait(0.02):
                    connection.sendall(b"x")

        def call() -> None:
            with pytest.raises(StoreUnavailable, match="did not answer within"):
                open_store(listening.getsockname()[1]).list(timeout_s=0.3)

        dripping = pool.submit(drip)
        with ThreadPoolExecutor(1) as calling:
            called = calling.submit(call)
            try:
                called.result(WITHIN_S)
            finally:
                done.set()
        dripping.result(WITHIN_S)


# --- who is let in


def test_credentials_that_are_wrong_are_said_and_never_shown(open_store: OpenStore) -> None:
    with redis_server("--requirepass", "s3cret") as server:
        assert entries(open_store(server, password="s3cret")) == {}
        for credentials, said in (
            ({}, "asks for a password"),
            ({"password": "wr0ng"}, "refused the default user with that password"),
            ({"user": "ann", "password": "wr0ng"}, "refused user 'ann' with that password"),
        ):
            store = open_store(server, **credentials)
            with pytest.raises(AuthFailed, match=said) as caught:
                store.list(timeout_s=WITHIN_S)
            shown = f"{caught.value} {caught.value.__cause__} {store.info} {store._link!r}"
            assert "wr0ng" not in shown
            assert "s3cret" not in shown


def test_a_password_where_none_is_asked_for_is_said(server: RedisServer, open_store: OpenStore) -> None:
    with pytest.raises(AuthFailed, match="leave the password out"):
        open_store(server, password="s3cret").list(timeout_s=WITHIN_S)


WRITER = "~veltrix:{default}:entries ~veltrix:{default}:changes ~veltrix:{default}:keys"
READING = "+hmget +hscan +xread +xrange +xrevrange +time +exists"
WRITING = "+eval +evalsha +hget +hset +hdel +type +zadd +zrem +xadd"


def test_the_documented_acl_of_a_writer_is_enough(server: RedisServer, open_store: OpenStore) -> None:
    server.run("ACL", "SETUSER", "writer", "on", ">pw", *f"{WRITER} {READING} {WRITING}".split())
    store = open_store(server, user="writer", password="pw")
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    write(store, RawOperation("a", MISSING), RawOperation("b", b"2"))
    assert len(drain(watch, 2)) == 1
    assert entries(store) == {"b": (b"2", 2)}
    assert entries(store, 1) == {"a": (b"1", 1)}
    assert len(store.history("a", limit=9, timeout_s=WITHIN_S)) == 2
    assert store.confirm(here(store), timeout_s=WITHIN_S).count == 1
    assert store.read(["b"], 1, timeout_s=WITHIN_S) == {}
    assert store.renew_incarnation("other", timeout_s=WITHIN_S) == here(store).incarnation
    watch.close()


def test_who_may_only_read_is_told_what_is_lacking(server: RedisServer, open_store: OpenStore) -> None:
    put(open_store(server), "a", b"1")
    server.run("ACL", "SETUSER", "reader", "on", ">pw", "%R~veltrix:{default}:*", *READING.split())
    store = open_store(server, user="reader", password="pw")
    assert entries(store) == {"a": (b"1", 1)}
    with pytest.raises(AuthFailed, match=r"the ACL of user 'reader' .* lacks \+eval"):
        put(store, "a", b"2")
    server.run("ACL", "SETUSER", "reader", *WRITING.split())
    with pytest.raises(AuthFailed, match=r"lacks a key pattern: %R~veltrix:\{default\}:\*"):
        put(store, "a", b"2")
    server.run("ACL", "SETUSER", "reader", "-hset", "~veltrix:{default}:*")
    with pytest.raises(AuthFailed, match=r"lacks (a command that a script calls|\+hset)"):  # Valkey says which
        put(store, "a", b"2")


def test_a_permission_that_is_revoked_ends_an_open_watch(server: RedisServer, open_store: OpenStore) -> None:
    server.run("ACL", "SETUSER", "reader", "on", ">pw", "%R~veltrix:{default}:*", *READING.split())
    put(open_store(server), "a", b"1")
    store = open_store(server, user="reader", password="pw")
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    server.run("ACL", "SETUSER", "reader", "-xread")
    with pytest.raises(AuthFailed, match=r"lacks \+xread"):
        watch.next(WITHIN_S)
    watch.close()


# --- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


def test_tls_is_verified(certificates: Certificates, open_store: OpenStore) -> None:
    other = Certificates(certificates.folder, "other")
    with redis_server(tls=(certificates.ca, *certificates.issue("server"))) as server:
        store = open_store(server, tls=True, ca=str(certificates.ca))
        put(store, "a", b"1")
        watch = store.watch(here(store), timeout_s=WITHIN_S)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(watch.next, 600)
            revision = put(store, "a", b"2")
            assert waiting.result(WITHIN_S)[0].position.revision == revision
            waiting = pool.submit(watch.next, 600)
            watch.close()
            with pytest.raises(StoreUnavailable, match="closed"):
                waiting.result(WITHIN_S)
        assert store.info.url == f"rediss://127.0.0.1:{server.port}/0"
        for options, said in (
            ({"ca": str(other.ca)}, "is not signed by .*other.pem"),
            ({}, "is not signed by the system's authorities"),
            ({"ca": str(certificates.folder / "none.pem")}, "none.pem cannot be used"),
        ):
            with pytest.raises(StoreError, match=said):
                open_store(server, tls=True, **options).list(timeout_s=WITHIN_S)
        with pytest.raises(StoreUnavailable, match="write rediss://"):
            open_store(server).list(timeout_s=WITHIN_S)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"days": -1}, "has expired"), ({"san": "DNS:elsewhere"}, "is for another host")],
    ids=["expired", "host"],
)
def test_a_certificate_that_is_not_good_is_said(
    certificates: Certificates, open_store: OpenStore, options: dict[str, Any], said: str
) -> None:
    with (
        redis_server(tls=(certificates.ca, *certificates.issue("bad", **options))) as server,
        pytest.raises(StoreError, match=said),
    ):
        open_store(server, tls=True, ca=str(certificates.ca)).list(timeout_s=WITHIN_S)


def test_a_client_certificate_is_asked_for_and_given(certificates: Certificates, open_store: OpenStore) -> None:
    cert, key = map(str, certificates.issue("client"))
    tls = (certificates.ca, *certificates.issue("server"))
    with redis_server("--tls-auth-clients", "yes", tls=tls) as server:
        store = open_store(server, tls=True, ca=str(certificates.ca), cert=cert, key=key)
        assert entries(store) == {}
        with pytest.raises(AuthFailed, match="asks for a client certificate"):
            open_store(server, tls=True, ca=str(certificates.ca)).list(timeout_s=WITHIN_S)


def test_etcd_in_place_of_redis_is_told(open_store: OpenStore) -> None:
    with etcd() as cluster:
        member = cluster.members[0]
        for options in ({}, {"user": "u", "password": "secret-1"}):
            with pytest.raises(StoreUnavailable, match="so does etcd's: check the port"):
                open_store(member.port, **options).list(timeout_s=WITHIN_S)
            with pytest.raises(StoreError, match="speaks HTTP, and is not a Redis server: check host and port"):
                open_store(member.peer_port, **options).list(timeout_s=WITHIN_S)
        with pytest.raises(StoreUnavailable, match=r"a port without TLS, such as etcd's, .*: check the port"):
            open_store(member.port, tls=True).list(timeout_s=WITHIN_S)


@pytest.mark.parametrize(
    "ended",
    [
        ssl.SSLZeroReturnError(6, "TLS/SSL connection has been closed (EOF)"),
        ssl.SSLEOFError(8, "EOF occurred in violation of protocol"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_however_a_tls_connection_ends_before_redis_spoke_the_port_is_named(ended: OSError) -> None:
    link = RedisStore("127.0.0.1", 6379, namespace="shop", tls=True)._link
    named = r"a port without TLS, such as etcd's, .*: check the port"
    with pytest.raises(StoreUnavailable, match=named), link.translating(1):
        raise ended


def test_a_port_without_tls_is_said(server: RedisServer, open_store: OpenStore) -> None:
    # The server takes the handshake for the beginning of a command, and waits for the rest of it.
    with pytest.raises(StoreError, match="write redis://"):
        open_store(server, tls=True).list(timeout_s=2)


# --- one revision


def test_a_listing_amid_writes_is_of_one_revision(
    server: RedisServer, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_reading, "_SCAN_COUNT", 10)
    store, keys = open_store(server), 600
    write(store, *(RawOperation(f"k{number}", b"0") for number in range(keys)))
    done = threading.Event()

    def busy() -> None:
        writer, turn = open_store(server), 0
        while not done.is_set():
            # Revision r writes k(r) and deletes or rewrites k(r + 1), so that the keyspace follows from its revision.
            revision = turn + 2
            gone = MISSING if turn % 2 == 0 else b"9"
            operations = [RawOperation(f"k{revision % keys}", b"%d" % revision)]
            if turn % 2 == 0:
                operations.append(RawOperation(f"k{(revision + 1) % keys}", gone))
            write(writer, *operations)
            turn += 1

    moved = 0
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(busy)
        try:
            for _ in range(12):
                before = here_cheaply(store)
                listing = store.list(timeout_s=WITHIN_S)
                moved += listing.position.revision > before
                assert {key: (raw, mod) for key, raw, mod in listing.entries} == _expected(
                    listing.position.revision, keys
                )
        finally:
            done.set()
        writing.result(WITHIN_S)
    assert moved


def here_cheaply(store: RedisStore) -> int:
    return store.confirm(Position("", 0), timeout_s=WITHIN_S).revision


def _expected(revision: int, keys: int) -> dict[str, tuple[bytes, int]]:
    state = {f"k{number}": (b"0", 1) for number in range(keys)}
    for made in range(2, revision + 1):
        state[f"k{made % keys}"] = (b"%d" % made, made)
        if made % 2 == 0:
            state.pop(f"k{(made + 1) % keys}", None)
    return state


# --- history and bounds


def test_the_oldest_known_version_is_told_by_what_replaced_it(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server, keep_revisions=3)
    made = [put(store, "a", b"%d" % turn) for turn in range(10)]
    versions = store.history("a", limit=99, timeout_s=WITHIN_S)
    assert [(version.revision, version.value) for version in versions] == [
        (made[turn], b"%d" % turn) for turn in (9, 8, 7, 6)
    ]
    with pytest.raises(Compacted):
        entries(store, made[-4])
    assert server.run("XLEN", "veltrix:{default}:changes") == 3


def test_history_goes_on_below_a_deletion(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server)
    put(store, "a", b"1")
    delete(store, "a")
    for turn in range(100):
        put(store, "b", b"%d" % turn)
    put(store, "a", b"2")
    delete(store, "a")
    versions = store.history("a", limit=99, timeout_s=WITHIN_S)
    assert [(version.revision, version.value) for version in versions] == [
        (104, MISSING),
        (103, b"2"),
        (2, MISSING),
        (1, b"1"),
    ]


def test_the_largest_transaction_there_may_be(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server)
    most = store.info.limits.max_operations
    assert most is not None
    watch = store.watch(Position("", 0), timeout_s=WITHIN_S)
    write(store, *(RawOperation(f"k{number}", b"%d" % number) for number in range(most)))
    write(store, *(RawOperation(f"k{number}", MISSING) for number in range(most)))
    assert [len(batch.changes) for batch in drain(watch, 2)] == [most, most]
    assert (entries(store), len(entries(store, 1))) == ({}, most)
    watch.close()


def test_eager_entries_are_counted_also_where_the_stream_does_not_reach_back(
    server: RedisServer, open_store: OpenStore
) -> None:
    writer, lazy = open_store(server, keep_revisions=2), open_store(server, lazy=("users/",))
    write(writer, RawOperation("a", b"1"), RawOperation("users/1", b"1"))
    position = here(lazy)
    assert lazy.confirm(position, timeout_s=WITHIN_S).count == 1
    put(writer, "b", b"1")
    assert lazy.confirm(here(writer), timeout_s=WITHIN_S).count == 2
    put(writer, "b", b"2")
    assert lazy.confirm(here(writer), timeout_s=WITHIN_S).count == 2
    write(writer, RawOperation("b", MISSING), RawOperation("users/2", b"1"))
    assert lazy.confirm(here(writer), timeout_s=WITHIN_S).count == 1
    for turn in range(5):
        put(writer, f"c{turn}", b"1")
    delete(writer, "users/1")
    assert lazy.confirm(here(writer), timeout_s=WITHIN_S).count == 6


# --- connections and forks


def connections(server: RedisServer) -> int:
    """How many connections the server has, but for the test's own."""
    return len(server.run("CLIENT", "LIST").splitlines()) - 1


def test_close_leaves_no_connection(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: entries(store), range(40)))
    assert 2 <= connections(server) <= 5  # the watch's, and those kept for the next call
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        watch.next(0)
    wait_until(lambda: connections(server) == 0, WITHIN_S, reason="the server to have noticed")


def sockets_to(port: int) -> int:
    """How many of this process's sockets are connected to that port."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as each:
                found += each.family == socket.AF_INET and each.getpeername()[1] == port
        except OSError:
            continue
    return found


def test_no_socket_is_inherited_by_a_fork(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    port = server.port
    assert sockets_to(port) >= 2

    def child() -> None:
        server._client = None  # the test's own
        assert sockets_to(port) <= 1
        assert entries(store) == {"a": (b"1", 1)}

    in_a_fork(child)
    assert list(watch.next(0)) == []
    assert put(store, "a", b"2") == 2
    watch.close()


def test_a_watch_goes_on_in_both_processes_after_a_fork(server: RedisServer, open_store: OpenStore) -> None:
    store = open_store(server)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    assert list(watch.next(0)) == []

    def child() -> None:
        revision = put(store, "a", b"2")
        assert len(drain(watch, revision)) == 1
        store.close()

    in_a_fork(child)
    assert len(drain(watch, 2)) == 1
    watch.close()


def test_connections_of_a_parent_that_forked_unseen_are_not_used(
    server: RedisServer, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that forks in C runs no hook: only the process id tells."""
    store = open_store(server)
    put(store, "a", b"1")
    (inherited,) = store._link._idle
    monkeypatch.setattr(store._link, "_pid", 0)
    monkeypatch.setattr(inherited, "pid", 0)
    with store._link.lock, ThreadPoolExecutor(1) as pool:  # which a thread of the parent held
        assert pool.submit(entries, store).result(WITHIN_S) == {"a": (b"1", 1)}
    assert inherited not in store._link._idle


def test_constructing_opens_nothing(free_port: int) -> None:
    store = RedisStore("127.0.0.1", free_port)
    store.close()
    assert store.info.origin == "redis"


def test_a_server_that_answered_before_is_not_taken_for_another_one_when_it_ends() -> None:
    with redis_server() as server:
        store = RedisStore("127.0.0.1", server.port, namespace="shop", timeout_s=WITHIN_S)
        try:
            watch = store.watch(store.list(timeout_s=WITHIN_S).position, timeout_s=WITHIN_S)
            server.kill()
            with pytest.raises(StoreUnavailable) as caught:
                while True:
                    watch.next(1.0)
            watch.close()
        finally:
            store.close()
    assert "TLS" not in str(caught.value)


def test_a_name_that_is_not_resolved_is_said_by_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()

    def hang(host: str, port: int, *options: int) -> list[Any]:
        if len(options) <= 3:  # not the look whether it is a number
            assert answers.wait(WITHIN_S)
        raise socket.gaierror(socket.EAI_NONAME, "a name")

    monkeypatch.setattr(dialing.socket, "getaddrinfo", hang)
    store = RedisStore("h1", 6379, namespace="shop", timeout_s=WITHIN_S)
    try:
        with pytest.raises(StoreUnavailable, match=r"the name h1 of redis://h1:6379/0 was not resolved within 0\.05 s"):
            store.list(timeout_s=0.05)
    finally:
        answers.set()
        wait_until(lambda: not dialing._asking, WITHIN_S, reason="nobody asks any more")
        store.close()
