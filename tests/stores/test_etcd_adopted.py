"""A client of etcd's that was handed in: our calls on its channel, with its metadata, and never its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from tests.stores.contract import drain, entries, here, in_a_fork, put
from tests.stores.etcd_calls import WITHIN_S, Generators, closed_port
from tests.support.etcd_servers import EtcdCluster, etcd
from tests.support.redis_servers import redis_server
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient
from veltrix_mw.errors import AuthFailed, SettingsError, StoreError, StoreUnavailable
from veltrix_mw.protocols import Batch, Store
from veltrix_mw.stores import etcd_adopted
from veltrix_mw.stores.etcd_messages import AUTHENTICATE, Authenticate
from veltrix_mw.stores.etcd_protobuf import decode, encode
from veltrix_mw.stores.opening import adopt_store


@dataclass
class Client:
    """All that a client needs to have."""

    channel: grpc.Channel
    metadata: tuple[tuple[str, str], ...] | None = None

    def log_in(self, user: str, password: str) -> None:
        asked = encode(Authenticate(user, password))
        raw = self.channel.unary_unary(AUTHENTICATE.name)(asked, timeout=WITHIN_S)  # type: ignore[arg-type]
        self.metadata = (("token", decode(raw, AUTHENTICATE.answer).token),)


@pytest.fixture(scope="module")
def server() -> Iterator[EtcdCluster]:
    with etcd() as cluster:
        yield cluster


MakeClient = Callable[..., Client]


@pytest.fixture
def connect() -> Iterator[MakeClient]:
    made: list[Client] = []

    def connect(host: tuple[str, int]) -> Client:
        made.append(Client(grpc.insecure_channel(f"{host[0]}:{host[1]}")))
        return made[-1]

    yield connect
    for each in made:
        each.channel.close()


def test_it_is_listed_written_watched_and_confirmed_and_stays_open(connect: MakeClient, server: EtcdCluster) -> None:
    client = connect(server.hosts[0])
    store = adopt_store(client, namespace="shop")
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    revision = put(store, "a", b"2")
    assert drain(watch, revision)[-1].position == here(store)
    assert store.confirm(here(store), timeout_s=WITHIN_S).revision == revision
    assert [version.value for version in store.history("a", limit=9, timeout_s=WITHIN_S)] == [b"2", b"1"]  # type: ignore[attr-defined]
    watch.close()
    store.close()
    assert entries(adopt_store(client, namespace="shop"))["a"] == (b"2", revision)
    assert store.info.url == f"etcd://127.0.0.1:{server.members[0].port}/shop"


def test_a_config_client_follows_through_it_and_closes_nothing_of_it(connect: MakeClient, server: EtcdCluster) -> None:
    theirs = connect(server.hosts[0])
    for turn in range(2):
        with ConfigClient(theirs, namespace="adopted", relay="never") as client:
            client.wait_for(client.put("checkout/max_items", turn), timeout_s=WITHIN_S)
            assert client.view()["checkout/max_items"] == turn
            (tier,) = client.status().tiers
            assert (tier.name, tier.url) == ("etcd", f"etcd://127.0.0.1:{server.members[0].port}/adopted")


def test_with_a_mirror_it_is_the_authority(connect: MakeClient, server: EtcdCluster) -> None:
    with (
        redis_server() as redis,
        ConfigClient(
            connect(server.hosts[0]), namespace="mirrored", mirror=f"redis://127.0.0.1:{redis.port}/0"
        ) as client,
    ):
        client.wait_for(client.put("checkout/max_items", 1), timeout_s=WITHIN_S)
        wait_until(
            lambda: any(tier.role == "mirror" and tier.state == "following" for tier in client.status().tiers),
            20,
            reason="the mirror is followed",
        )
        client.wait_for(client.put("checkout/max_items", 2), timeout_s=WITHIN_S)
        assert client.view()["checkout/max_items"] == 2


def test_more_than_its_channel_takes_at_once_is_listed_in_smaller_pages(
    connect: MakeClient, server: EtcdCluster
) -> None:
    """A channel takes 4 MiB by default."""
    store = adopt_store(connect(server.hosts[0]), namespace="large")
    for number in range(40):
        put(store, f"k{number:02}", b"1" * 300_000)
    assert len(entries(store)) == 40
    keys = [f"k{number:02}" for number in range(40)]
    with pytest.raises(StoreUnavailable, match=r"grpc_options=\[\('grpc.max_receive_message_length', -1\)\]"):
        store.read(keys, None, timeout_s=WITHIN_S)


def test_lazy_units_that_are_more_than_its_channel_takes_come_in_several_answers(
    connect: MakeClient, server: EtcdCluster
) -> None:
    store = adopt_store(connect(server.hosts[0]), namespace="units", lazy=("tenants/",))
    names = [f"tenants/t{number}" for number in range(12)]
    for name in names:
        for key in range(3):
            put(store, f"{name}/k{key}", b"1" * 300_000)
    for key in range(3):
        put(store, f"{names[0]}/x{key}", b"1" * 1_000_000)
    found = store.read_units(names, here(store), timeout_s=WITHIN_S)
    assert [len(found[name].entries) for name in names] == [6] + [3] * 11


def test_a_channel_whose_interceptor_makes_generators_of_streams_is_used_and_watched(
    connect: MakeClient, server: EtcdCluster
) -> None:
    client, generators = connect(server.hosts[0]), Generators()
    client.channel = grpc.intercept_channel(grpc.intercept_channel(client.channel, generators), generators)
    store = adopt_store(client, namespace="generated")
    assert store.info.url == f"etcd://127.0.0.1:{server.members[0].port}/generated"
    first = put(store, "a", b"1")
    assert entries(store)["a"] == (b"1", first), "a call with more time than its answer needs to begin"
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    revision = put(store, "a", b"2")
    assert revision == first + 1, "nothing is written twice"
    assert drain(watch, revision)[-1].position == here(store)
    ended = threading.Event()

    def read_on() -> None:
        with pytest.raises(StoreUnavailable, match="watch again"):
            watch.next(60)
        ended.set()

    reader = threading.Thread(target=read_on)
    reader.start()
    wait_until(lambda: watch._is_reading, WITHIN_S, reason="somebody reads")  # type: ignore[attr-defined]
    watch.close()
    assert ended.wait(WITHIN_S), "closing ends who reads"
    reader.join()
    put(store, "a", b"3")
    wait_until(lambda: not stream_readers(), WITHIN_S, reason="the next message ends the stream's thread")
    assert {"/etcdserverpb.KV/Range", "/etcdserverpb.Watch/Watch"} <= {*generators.made}


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_stream_comes_to_its_end_and_the_watch_goes_on_without_a_gap(
    connect: MakeClient, server: EtcdCluster, monkeypatch: pytest.MonkeyPatch, is_wrapped: bool
) -> None:
    client = connect(server.hosts[0])
    if is_wrapped:
        client.channel = grpc.intercept_channel(client.channel, Generators())
    store = adopt_store(client, namespace="ending")
    put(store, "a", b"0")
    begun = here(store)
    most_s = etcd_adopted._STREAM_MOST_S
    monkeypatch.setattr(etcd_adopted, "_STREAM_MOST_S", 2.0)
    watch = store.watch(begun, timeout_s=WITHIN_S)
    left = store.watch(begun, timeout_s=WITHIN_S)
    left.close()  # where it cannot be cancelled, its time is its end
    monkeypatch.setattr(etcd_adopted, "_STREAM_MOST_S", most_s)
    made: list[int] = []
    seen: list[Batch] = []

    def write_and_see() -> None:
        made.extend(put(store, key, b"1") for key in "ab")
        seen.extend(drain(watch, made[-1]))

    with pytest.raises(StoreUnavailable, match="ended the watch; watch again"):
        while True:
            write_and_see()
            seen.extend(watch.next(0.1))
    watch.close()
    wait_until(lambda: not stream_readers(), WITHIN_S, reason="the streams' threads end")
    watch = store.watch(seen[-1].position if seen else begun, timeout_s=WITHIN_S)
    write_and_see()
    watch.close()
    assert [batch.position.revision for batch in seen] == made
    assert [batch.previous for batch in seen] == [begun.revision, *made[:-1]]


def stream_readers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "veltrix-etcd-watch"]


def test_its_token_is_shown_and_one_that_ran_out_is_told(connect: MakeClient) -> None:
    with etcd() as guarded:
        guarded.turn_auth_on(worker="secret-1")
        guarded.grant("worker", "shop/", ".veltrix/shop/")
        client = connect(guarded.hosts[0])
        store = adopt_store(client, namespace="shop")

        def barred(call: Callable[[], Any]) -> None:
            with pytest.raises(AuthFailed, match=r"hand in a new one, or name etcd by its URL") as caught:
                call()
            assert "secret-1" not in str(caught.value)

        barred(lambda: here(store))
        client.log_in("worker", "secret-1")
        put(store, "a", b"1")
        watch = store.watch(here(store), timeout_s=WITHIN_S)
        client.metadata = (("token", "gone.1"),)  # what etcd says to it is what it says to one that ran out
        barred(lambda: put(store, "a", b"2"))
        barred(lambda: store.watch(here(store), timeout_s=WITHIN_S))
        client.log_in("worker", "secret-1")  # read anew for each call
        revision = put(store, "a", b"3")
        assert drain(watch, revision)[-1].position.revision == revision
        watch.close()


def test_after_a_fork_the_child_is_told_what_to_do_and_the_parent_goes_on(
    connect: MakeClient, server: EtcdCluster
) -> None:
    store = adopt_store(connect(server.hosts[0]), namespace="forked")
    put(store, "a", b"1")

    def child() -> None:
        for call in (lambda: here(store), lambda: put(store, "a", b"2")):
            with pytest.raises(StoreUnavailable, match=r"made before this process was forked.*in post_fork"):
                call()
        store.close()

    in_a_fork(child)
    assert put(store, "a", b"3")


def test_a_channel_that_was_closed_says_so(connect: MakeClient, server: EtcdCluster) -> None:
    client = connect(server.hosts[0])
    store = adopt_store(client, namespace="shop")
    client.channel.close()
    for call in (lambda: here(store), lambda: store.history("a", limit=1, timeout_s=1)):  # type: ignore[attr-defined]
        with pytest.raises(StoreUnavailable, match="the etcd client that was handed in cannot be used"):
            call()


def test_a_client_that_was_closed_before_it_is_handed_in_says_so(connect: MakeClient, server: EtcdCluster) -> None:
    client = connect(server.hosts[0])
    client.channel.close()
    with pytest.raises(StoreError, match="the etcd client that was handed in cannot be used"):
        here(adopt_store(client, namespace="shop"))


def test_where_nothing_listens_it_says_so_by_the_deadline(connect: MakeClient) -> None:
    host = closed_port()
    store = adopt_store(connect(host), namespace="shop")
    begun_s = time.monotonic()
    with pytest.raises(StoreUnavailable, match=f"nothing answers at 127.0.0.1:{host[1]}; is etcd running there"):
        store.list(timeout_s=1)
    assert time.monotonic() - begun_s < WITHIN_S


def test_what_can_be_handed_in_is_told() -> None:
    class Asyncio:
        channel = object()
        metadata = None

    for wrong, words in (
        (Asyncio(), "its Asyncio|channel of the Asyncio .* is a object; .*not grpc.aio"),
        (object(), r"a client of etcd's that has a channel and metadata, as etcd3.client\(\); not object"),
        (5, "not int"),
    ):
        with pytest.raises(SettingsError, match=words):
            ConfigClient(wrong, namespace="shop")  # type: ignore[call-overload, arg-type]


def test_a_client_wants_a_namespace(connect: MakeClient) -> None:
    with pytest.raises(SettingsError, match=r'ConfigClient\(client, namespace="shop"\)'):
        ConfigClient(connect(("127.0.0.1", 1)))
    with pytest.raises((SettingsError, ValueError), match="namespace"):
        ConfigClient(connect(("127.0.0.1", 1)), namespace=".veltrix/x")


def test_it_is_a_store(connect: MakeClient) -> None:
    store = adopt_store(connect(("127.0.0.1", 1)), namespace="shop", lazy=("tenants/",))
    assert isinstance(store, Store)
    assert store.info.lazy == ("tenants/",)
    with pytest.raises(StoreError):
        store.list(timeout_s=0.2)
