"""Redis Sentinel and Redis Cluster: the contract over each as the authority, and as the mirror of etcd; then what is
their own: primaries that are replaced, slots that move, and who is told what.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.stores.contract import WITHIN_S, Harness, SharedStoreContract, drain, entries, here, put
from tests.stores.test_etcd import EtcdHarness, Servers
from tests.stores.test_mirrored import EtcdAndRedis, MirroredContract, MirroredHarness
from tests.support.redis_servers import (
    PRIMARY,
    ClusterSet,
    RedisServer,
    Sentinel,
    SentinelSet,
    cluster_set,
    cut_off,
    redis_server,
    sentinel_set,
)
from tests.support.waiting import wait_until
from veltrix_mw.errors import AuthFailed, StoreError, StoreNotFound, StoreUnavailable
from veltrix_mw.protocols import ChangeRecord, RawOperation
from veltrix_mw.settings import parse_url
from veltrix_mw.stores.redis import RedisStore
from veltrix_mw.stores.redis_layout import Names
from veltrix_mw.stores.redis_routes import route_of, slot_of


def open_at(*, url: str, namespace: str, **options: Any) -> RedisStore:
    return RedisStore(route_of(parse_url(url, namespace=namespace)), namespace=namespace, **options)


class TopologyHarness(Harness):
    """Servers, emptied for each test."""

    keeps_records = False

    def __init__(self, servers: SentinelSet | ClusterSet) -> None:
        super().__init__()
        self._url = servers.url

    def spec(self, **options: Any) -> dict[str, Any]:
        options = {"url": self._url, "namespace": self.namespace, **options}
        return {"store": "tests.stores.test_redis_topologies:open_at", "options": options}

    def make(self, **options: Any) -> RedisStore:
        return open_at(url=self._url, namespace=self.namespace, **options)

    def forget(self, oldest: int) -> None:
        newest = here(self.open()).revision
        put(self.open(keep_revisions=newest - oldest + 2), "forgotten", b"1")


@pytest.fixture(scope="module")
def sentinels() -> Iterator[SentinelSet]:
    with sentinel_set() as made:
        yield made


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterSet]:
    with cluster_set() as made:
        yield made


@pytest.fixture(scope="module")
def etcds() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.close()


class TestSentinel(SharedStoreContract):
    """The contract over the primary that sentinels name."""

    @pytest.fixture
    def harness(self, sentinels: SentinelSet) -> Iterator[TopologyHarness]:
        sentinels.run("FLUSHALL")
        harness = TopologyHarness(sentinels)
        yield harness
        harness.close()


class TestCluster(SharedStoreContract):
    """The contract over a cluster, where each namespace is in one slot."""

    @pytest.fixture
    def harness(self, cluster: ClusterSet) -> Iterator[TopologyHarness]:
        cluster.run("FLUSHALL")
        harness = TopologyHarness(cluster)
        yield harness
        harness.close()


class FewExamples(MirroredContract):
    """The contract over etcd and a mirror; what a model finds of those two is found over one Redis as well."""

    @settings(
        max_examples=5,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(data=st.data())
    def test_it_behaves_like_a_list_of_dicts(self, harness: Harness, data: st.DataObject) -> None:
        self.check_against_a_model(harness, data)


class TestEtcdAndSentinel(FewExamples):
    """The contract over etcd, mirrored in the primary that sentinels name."""

    @pytest.fixture
    def harness(self, sentinels: SentinelSet, etcds: Servers) -> Iterator[MirroredHarness]:
        sentinels.run("FLUSHALL")
        harness = EtcdAndRedis(EtcdHarness(etcds), sentinels)
        yield harness
        harness.close()


class TestEtcdAndCluster(FewExamples):
    """The contract over etcd, mirrored in a cluster."""

    @pytest.fixture
    def harness(self, cluster: ClusterSet, etcds: Servers) -> Iterator[MirroredHarness]:
        cluster.run("FLUSHALL")
        harness = EtcdAndRedis(EtcdHarness(etcds), cluster)
        yield harness
        harness.close()


OpenStore = Callable[..., RedisStore]
NAMES = Names("shop")
SLOT = slot_of(NAMES.entries)


@pytest.fixture
def open_store() -> Iterator[OpenStore]:
    opened: list[RedisStore] = []

    def open_store(servers: SentinelSet | ClusterSet, **options: Any) -> RedisStore:
        url = f"{servers.url}{options.pop('query', '')}"
        opened.append(open_at(url=url, namespace="shop", **{"timeout_s": 1.0, **options}))
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()


def put_until_taken(store: RedisStore, key: str, raw: bytes) -> int:
    """The revision of the first of its writes that is acknowledged."""

    def taken() -> int:
        try:
            return put(store, key, raw)
        except StoreUnavailable:
            return 0

    return wait_until(taken, 2 * WITHIN_S, reason="a write is taken")


def check_a_lost_answer(store: RedisStore, server: RedisServer) -> None:
    """A write that waits in a server which stands still is made when that goes on, and nobody is told so."""
    put(store, "a", b"1")
    server.stop()
    try:
        with pytest.raises(StoreUnavailable, match=r"did not answer .*; the write's fate is unknown: read again"):
            store.commit([RawOperation("a", b"2")], ChangeRecord(), timeout_s=1.0)
    finally:
        server.cont()
    wait_until(lambda: entries(store) == {"a": (b"2", 2)}, WITHIN_S, reason="the write to be made")


# --- Sentinel


@pytest.fixture
def whole_sentinels(sentinels: SentinelSet) -> Iterator[SentinelSet]:
    sentinels.run("FLUSHALL")
    yield sentinels
    sentinels.heal()


def test_a_primary_that_was_replaced_is_left_though_it_goes_on_as_one(
    whole_sentinels: SentinelSet, open_store: OpenStore
) -> None:
    """Its clients were idle while it was stopped: their connections are whole, and it answers all they ask."""
    servers = whole_sentinels
    store = open_store(servers)
    put(open_store(servers, wait_replicas=1), "a", b"1")
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    assert list(watch.next(0)) == []
    old = servers.primary()
    old.stop()
    try:
        new = servers.wait_replaced(old)
    finally:
        old.cont()
    assert old.raw("ROLE")[0] == b"master"
    revision = put(store, "a", b"2")
    assert new.run("HGET", NAMES.entries, "a") == b"%d 2" % revision
    assert old.run("HGET", NAMES.entries, "a") == b"1 1"
    try:
        found = drain(watch, revision)
    except StoreUnavailable:  # the watch was broken off, and is made again
        found = drain(watch, revision)
    assert [batch.position.revision for batch in found] == [revision]
    watch.close()


def test_a_watch_that_waits_on_a_stopped_primary_goes_on_at_the_new_one(
    whole_sentinels: SentinelSet, open_store: OpenStore
) -> None:
    servers, reader = whole_sentinels, open_store(whole_sentinels)
    writer = open_store(servers, wait_replicas=1)
    put(writer, "a", b"1")
    watch = reader.watch(here(reader), timeout_s=WITHIN_S)
    old = servers.primary()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(watch.next, 600)
        old.stop()
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{old.port}. did not answer within"):
            waiting.result(WITHIN_S)
    servers.wait_replaced(old)
    revision = put_until_taken(open_store(servers), "a", b"2")
    found = drain(watch, revision)
    assert [batch.position.revision for batch in found] == [revision]
    watch.close()


def test_what_a_stopped_primary_says_after_it_was_replaced_does_not_count(
    whole_sentinels: SentinelSet, open_store: OpenStore
) -> None:
    """Whoever grants it more time than the failover takes is answered all the same, when it is resumed."""
    servers, writer = whole_sentinels, open_store(whole_sentinels)
    put(open_store(servers, wait_replicas=1), "a", b"1")
    position = here(writer)
    watch = open_store(servers, timeout_s=120.0).watch(position, timeout_s=WITHIN_S)
    assert list(watch.next(0)) == []
    old = servers.primary()
    old.stop()
    with ThreadPoolExecutor(4) as pool:
        try:
            waiting = [
                pool.submit(writer.commit, [RawOperation("a", b"2")], ChangeRecord(), timeout_s=60),
                pool.submit(open_store(servers).list, timeout_s=60),
                pool.submit(open_store(servers).watch, position, timeout_s=60),
                pool.submit(watch.next, 60),
            ]
            new = servers.wait_replaced(old)
        finally:
            old.cont()
        took_over = f"127.0.0.1:{new.port}. took over while another server "
        with pytest.raises(StoreUnavailable, match=f"{took_over}made the write: .* read again before you write again"):
            waiting[0].result(WITHIN_S)
        for each in waiting[1:]:
            with pytest.raises(StoreUnavailable, match=f"{took_over}was asked, whose answer does not count; try again"):
                each.result(WITHIN_S)
    assert old.run("HGET", NAMES.entries, "a") == b"2 2"
    assert entries(writer) == {"a": (b"1", 1)}
    watch.close()


def test_a_late_write_is_acknowledged_only_if_a_sentinel_says_that_the_primary_is_the_same(
    whole_sentinels: SentinelSet, open_store: OpenStore
) -> None:
    servers, store = whole_sentinels, open_store(whole_sentinels)
    assert put(store, "a", b"1") == 1
    primary = servers.primary()
    primary.run("CLIENT", "PAUSE", 700, "ALL")  # a primary that sentinels do not miss yet
    assert put(store, "a", b"2") == 2
    for sentinel in servers.sentinels:
        sentinel.stop()
    try:
        primary.run("CLIENT", "PAUSE", 2_000, "ALL")
        with pytest.raises(StoreUnavailable, match=r"late, and nobody says in time .* read again before you write"):
            put(store, "a", b"3")
        primary.run("CLIENT", "PAUSE", 2_000, "ALL")
        assert entries(store) == {"a": (b"3", 3)}  # what is read is as good as what is known
    finally:
        for sentinel in servers.sentinels:
            sentinel.cont()


def test_a_write_whose_answer_a_primary_owes_has_an_unknown_fate(
    whole_sentinels: SentinelSet, open_store: OpenStore
) -> None:
    check_a_lost_answer(open_store(whole_sentinels), whole_sentinels.primary())


def test_a_replica_that_is_named_as_the_primary_is_not_taken(
    whole_sentinels: SentinelSet, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, store = whole_sentinels, open_store(whole_sentinels)
    replica = servers.other(servers.primary())
    monkeypatch.setattr(store._link._route, "find", lambda *_: ("127.0.0.1", replica.port))
    with pytest.raises(StoreUnavailable, match="is to be the primary, and is a replica"):
        store.list(timeout_s=WITHIN_S)


def test_who_knows_the_primary_reads_on_without_sentinels_and_writes_nothing(
    open_store: OpenStore, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[str]:
        return [record.msg for record in caplog.records if record.msg.startswith("veltrix.guides")]

    caplog.set_level("INFO", logger="veltrix_mw")
    with sentinel_set() as servers:
        store = open_store(servers)
        put(store, "a", b"1")
        for sentinel in servers.sentinels[:2]:
            sentinel.kill()
        assert entries(open_store(servers)) == {"a": (b"1", 1)}
        assert put(store, "a", b"2") == 2
        servers.sentinels[2].kill()
        store._link._route.doubt()
        caplog.clear()
        for _ in range(3):
            assert entries(store) == {"a": (b"2", 2)}
            assert store.read(["a"], None, timeout_s=WITHIN_S) == {"a": (b"2", 2)}
            store._link._route.ask_again()
        with pytest.raises(StoreNotFound, match=r"refuses connections: .*; nothing is written without .* Start them"):
            put(store, "a", b"3")
        assert entries(store) == {"a": (b"2", 2)}
        assert told() == ["veltrix.guides_failed%s"]
        with pytest.raises(StoreUnavailable, match=r"none of the sentinels \(3\) says where 'mymaster' is: .* refuses"):
            open_store(servers).list(timeout_s=WITHIN_S)
        caplog.clear()
        servers.sentinels[2].start()
        store._link._route.ask_again()
        assert put_until_taken(store, "a", b"3") == 3
        assert told() == ["veltrix.guides_answer%s"]


def test_a_write_does_not_go_to_a_primary_that_was_replaced_within_the_time_that_a_word_is_believed(
    whole_sentinels: SentinelSet, open_store: OpenStore
) -> None:
    """It is idle, was told where the primary is no two seconds ago, and that one takes writes as before."""
    servers = whole_sentinels
    stores = [open_store(servers) for _ in range(4)]
    put(open_store(servers, wait_replicas=1), "a", b"1")
    for store in stores:
        assert entries(store) == {"a": (b"1", 1)}
    at = here(stores[0])
    old = servers.primary()
    old.stop()
    try:
        new = servers.wait_replaced(old)
    finally:
        old.cont()
    assert old.raw("ROLE")[0] == b"master"
    for store in stores:
        route: Any = store._link._route
        route._ask_at_s, route._asked_s, route.believed_s = time.monotonic() + 60, -math.inf, time.monotonic() - 1.1
        assert store._link._current == ("127.0.0.1", old.port)
    revision = put(stores[0], "a", b"2")
    assert new.run("HGET", NAMES.entries, "a") == b"%d 2" % revision
    assert old.run("HGET", NAMES.entries, "a") == b"1 1"
    assert stores[1].read(["a"], None, timeout_s=WITHIN_S) == {"a": (b"2", revision)}
    # What proves a worker to be current comes from the new one, too.
    assert stores[2].confirm(at, timeout_s=WITHIN_S).revision == revision
    assert entries(stores[3]) == {"a": (b"2", revision)}


def test_a_write_hears_the_other_sentinels_where_one_does_not_know_that_the_primary_was_replaced(
    open_store: OpenStore,
) -> None:
    """As one that is cut off from the others, or that they did not tell yet: it still sees the old one as primary."""
    with sentinel_set() as servers, contextlib.ExitStack() as stack:
        for server in servers.servers:  # it may neither tell the others of itself nor hear of them
            server.run("ACL", "SETUSER", "alone", "on", ">pw", "+@all", "~*", "resetchannels")
        old = servers.primary()
        alone = Sentinel(old, f"sentinel auth-user {PRIMARY} alone", f"sentinel auth-pass {PRIMARY} pw")
        stack.callback(alone.close)
        store = open_at(url=servers.url.replace("//", f"//127.0.0.1:{alone.port},"), namespace="shop")
        stack.callback(store.close)
        put(open_store(servers, wait_replicas=1), "a", b"1")
        assert entries(store) == {"a": (b"1", 1)}
        old.stop()
        try:
            new = servers.wait_replaced(old)
        finally:
            old.cont()
        assert alone.raw("SENTINEL", "GET-MASTER-ADDR-BY-NAME", PRIMARY)[1] == b"%d" % old.port
        assert old.raw("ROLE")[0] == b"master"
        route: Any = store._link._route
        route._order.sort(key=lambda host: host != ("127.0.0.1", alone.port))
        route._ask_at_s = 0.0
        revision = put(store, "a", b"2")
        assert new.run("HGET", NAMES.entries, "a") == b"%d 2" % revision
        assert old.run("HGET", NAMES.entries, "a") == b"1 1"


@pytest.mark.parametrize("kind", ["killed", "stopped"])
def test_what_is_read_while_a_primary_is_replaced_comes_from_the_new_one(
    whole_sentinels: SentinelSet, open_store: OpenStore, kind: str
) -> None:
    servers, store = whole_sentinels, open_store(whole_sentinels)
    put(open_store(servers, wait_replicas=1), "a", b"1")
    at = here(store)
    old = servers.primary()
    (old.kill if kind == "killed" else old.stop)()
    reads: list[Callable[[], Any]] = [
        lambda: store.read(["a"], None, timeout_s=60),
        lambda: store.history("a", limit=1, timeout_s=60)[0].value,
        lambda: store.list_at(1, timeout_s=60).position,
        lambda: store.read_units(["a"], at, timeout_s=60)["a"].entries,
    ]
    with ThreadPoolExecutor(len(reads)) as pool:
        found = [each.result(60) for each in [pool.submit(read) for read in reads]]
    assert found == [{"a": (b"1", 1)}, b"1", at, (("a", b"1", 1),)]
    assert store._link._current != ("127.0.0.1", old.port)


def test_sentinels_of_two_sets_are_told_and_one_of_them_is_followed(
    whole_sentinels: SentinelSet, open_store: OpenStore, caplog: pytest.LogCaptureFixture
) -> None:
    servers = whole_sentinels
    with redis_server() as other, contextlib.ExitStack() as stack:
        stranger = Sentinel(other)
        stack.callback(stranger.close)
        mine, _, rest = servers.url.removeprefix("redis+sentinel://").partition(",")
        assert rest
        url = f"redis+sentinel://{mine},127.0.0.1:{stranger.port}/mymaster/0"
        store = open_at(url=url, namespace="shop")
        stack.callback(store.close)
        route: Any = store._link._route
        route._order = [("127.0.0.1", servers.sentinels[0].port), ("127.0.0.1", stranger.port)]
        followed = set()
        for _ in range(4):
            put(store, "a", b"1")
            followed.add(store._link._current)
            route._apart_since_s = dict.fromkeys(route._apart_since_s, -math.inf)  # as if it lasted
            route.ask_again()
        assert followed == {("127.0.0.1", servers.primary().port)}
        (told,) = [record for record in caplog.records if record.msg == "veltrix.guides_disagree%s"]
        assert told.levelname == "ERROR"
        assert f"127.0.0.1:{stranger.port} says 127.0.0.1:{other.port}" in told.getMessage()
        assert "Name the sentinels of one set alone" in told.getMessage()


def test_a_name_that_the_sentinels_do_not_know_is_said(
    sentinels: SentinelSet, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_at(url=sentinels.url.replace("mymaster", "other"), namespace="shop")
    for _ in range(2):
        with pytest.raises(StoreError, match=r"the sentinel 127\.0\.0\.1:[0-9]+ knows no primary of that name"):
            store.list(timeout_s=WITHIN_S)
    (told,) = [record.getMessage() for record in caplog.records if record.msg == "veltrix.guides_failed%s"]
    assert "knows no primary of that name: correct it in the URL" in told
    store.close()


def test_what_is_no_sentinel_is_said(sentinels: SentinelSet, open_store: OpenStore) -> None:
    url = f"redis+sentinel://127.0.0.1:{sentinels.primary().port}/mymaster"
    store = open_at(url=url, namespace="shop")
    with pytest.raises(StoreError, match=r"127.0.0.1:[0-9]+ is a Redis server, not a sentinel: name the"):
        store.list(timeout_s=WITHIN_S)
    store.close()


@pytest.mark.parametrize("waits", [False, True])
def test_a_write_that_waited_for_a_replica_outlives_the_primary_and_another_may_not(
    whole_sentinels: SentinelSet, open_store: OpenStore, waits: bool
) -> None:
    servers = whole_sentinels
    old = servers.primary()
    replica = servers.other(old)
    put(open_store(servers, wait_replicas=1), "first", b"1")
    cut_off(old, replica)
    options = {"wait_replicas": 1, "wait_timeout_s": 0.2} if waits else {}
    with pytest.raises(StoreUnavailable) if waits else contextlib.nullcontext():
        put(open_store(servers, **options), "second", b"1")
    old.kill()
    replica.cont()
    servers.wait_replaced(old)
    assert sorted(entries(open_store(servers))) == ["first"]


# --- Cluster


@pytest.fixture
def whole_cluster(cluster: ClusterSet) -> Iterator[ClusterSet]:
    cluster.run("FLUSHALL")
    yield cluster
    cluster.heal()


def test_a_slot_that_moved_is_followed_and_a_watch_goes_on(whole_cluster: ClusterSet, open_store: OpenStore) -> None:
    cluster, store = whole_cluster, open_store(whole_cluster)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    assert list(watch.next(0)) == []
    source = cluster.owner(SLOT)
    target = cluster.another(source)
    cluster.move(SLOT, source, target)
    revision = put(store, "a", b"2")
    assert target.run("HGET", NAMES.entries, "a") == b"%d 2" % revision
    assert [batch.position.revision for batch in drain(watch, revision)] == [revision]
    assert store._link._current == ("127.0.0.1", target.port)
    watch.close()


def test_a_slot_that_is_on_its_way_is_read_and_written_once_its_keys_are_together(
    whole_cluster: ClusterSet, open_store: OpenStore
) -> None:
    cluster, store = whole_cluster, open_store(whole_cluster)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    source = cluster.owner(SLOT)
    target = cluster.another(source)
    cluster.begin_moving(SLOT, source, target)
    revision = put(store, "a", b"2")
    assert source.run("HGET", NAMES.entries, "a") == b"%d 2" % revision
    source.run("MIGRATE", "127.0.0.1", target.port, NAMES.changes, 0, 10_000)
    assert entries(store) == {"a": (b"2", revision)}  # of which one key is here and the other there
    with pytest.raises(StoreUnavailable, match="its slot is being moved, and only some of its keys have left"):
        store.commit([RawOperation("a", b"3")], ChangeRecord(), timeout_s=1.0)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(put, store, "a", b"3")
        label = pool.submit(
            store.renew_incarnation, "another", timeout_s=WITHIN_S
        )  # what is not tried again as a whole
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        cluster.move_keys(SLOT, source, target)
        revision = waiting.result(WITHIN_S)
        assert label.result(WITHIN_S) == here(store).incarnation
    assert entries(store) == {"a": (b"3", revision)}
    assert source.raw("CLUSTER", "COUNTKEYSINSLOT", SLOT) == 0
    assert [batch.position.revision for batch in drain(watch, revision)] == [2, 3]
    cluster.end_moving(SLOT, source, target)
    assert put(store, "a", b"4") == 4
    assert [batch.position.revision for batch in drain(watch, 4)] == [4]
    watch.close()


def test_a_slot_is_moved_key_by_key_under_load_without_a_failed_call_or_a_step_back(
    whole_cluster: ClusterSet, open_store: OpenStore
) -> None:
    cluster, writer, reader = whole_cluster, open_store(whole_cluster), open_store(whole_cluster)
    put(writer, "a", b"0")
    watch = open_store(cluster).watch(here(reader), timeout_s=WITHIN_S)
    over = threading.Event()

    def write() -> list[int]:
        taken = []
        while not over.is_set():
            taken.append(put(writer, "a", b"%d" % len(taken)))
        return taken

    def read() -> list[int]:
        seen = []
        while not over.is_set():
            seen.append(reader.read(["a"], None, timeout_s=WITHIN_S)["a"][1])
        return seen

    with ThreadPoolExecutor(2) as pool:
        writing, reading = pool.submit(write), pool.submit(read)
        try:
            source = cluster.owner(SLOT)
            for _ in range(2):
                target = cluster.another(source)
                cluster.begin_moving(SLOT, source, target)
                while source.raw("CLUSTER", "COUNTKEYSINSLOT", SLOT):
                    cluster.move_keys(SLOT, source, target, most=1)
                    over.wait(0.05)
                cluster.end_moving(SLOT, source, target)
                source = target
        finally:
            over.set()
        taken, seen = writing.result(WITHIN_S), reading.result(WITHIN_S)
    assert taken == list(range(2, len(taken) + 2))
    assert seen == sorted(seen)
    assert [batch.position.revision for batch in drain(watch, taken[-1])] == taken
    watch.close()


def test_a_cluster_that_is_down_for_a_moment_is_waited_for(whole_cluster: ClusterSet, open_store: OpenStore) -> None:
    cluster, store = whole_cluster, open_store(whole_cluster)
    put(store, "a", b"1")
    owner = cluster.owner(SLOT)
    spare = next(slot for slot in range(16_384) if slot != SLOT and cluster.owner(slot, asked=owner) is owner)
    owner.run("CLUSTER", "DELSLOTS", spare)  # without one, it serves none
    try:
        with pytest.raises(StoreUnavailable, match="the cluster is down, or elects a primary"):
            store.commit([RawOperation("a", b"2")], ChangeRecord(), timeout_s=1.0)
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(put, store, "a", b"2"), pool.submit(store.read, ["a"], None, timeout_s=WITHIN_S)]
            with pytest.raises(TimeoutError):
                waiting[0].result(0.1)
            owner.run("CLUSTER", "ADDSLOTS", spare)
            assert waiting[0].result(WITHIN_S) == 2
            assert waiting[1].result(WITHIN_S)["a"][1] in {1, 2}
    finally:
        if cluster._find_owner(spare, owner) is None:
            owner.run("CLUSTER", "ADDSLOTS", spare)
        cluster.wait_whole()


def test_who_may_not_ask_where_a_slot_is_going_is_told_so(whole_cluster: ClusterSet, open_store: OpenStore) -> None:
    cluster = whole_cluster
    put(open_store(cluster), "a", b"1")
    for server in cluster.servers:
        server.run("ACL", "SETUSER", "barred", "on", ">pw", "~*", "+@all", "-asking")
    store = open_store(cluster, user="barred", password="pw")
    source = cluster.owner(SLOT)
    target = cluster.another(source)
    cluster.begin_moving(SLOT, source, target)
    cluster.move_keys(SLOT, source, target)
    for call in (lambda: entries(store), lambda: put(store, "a", b"2")):
        with pytest.raises(AuthFailed, match=r"lacks \+asking"):
            call()
    cluster.end_moving(SLOT, source, target)
    assert put(store, "a", b"3") == 2


def test_a_write_whose_answer_an_owner_owes_has_an_unknown_fate(
    whole_cluster: ClusterSet, open_store: OpenStore
) -> None:
    check_a_lost_answer(open_store(whole_cluster), whole_cluster.owner(SLOT))


def test_replicas_are_counted_where_a_slot_is_on_its_way_to(whole_cluster: ClusterSet, open_store: OpenStore) -> None:
    cluster = whole_cluster
    store = open_store(cluster, wait_replicas=1, wait_timeout_s=0.3)
    put(store, "a", b"1")
    source = cluster.owner(SLOT)
    target = cluster.another(source)
    cluster.begin_moving(SLOT, source, target)
    cluster.move_keys(SLOT, source, target)
    assert put(store, "a", b"2") == 2
    replica = cluster.replica_of(target)
    replica.stop()
    try:
        with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas"):
            put(store, "a", b"3")
    finally:
        replica.cont()
    cluster.end_moving(SLOT, source, target)
    cluster.wait_whole()
    assert put(store, "a", b"4") == 4


def test_an_owner_that_dies_is_replaced(whole_cluster: ClusterSet, open_store: OpenStore) -> None:
    cluster = whole_cluster
    store = open_store(cluster, wait_replicas=1)
    put(store, "a", b"1")
    watch = store.watch(here(store), timeout_s=WITHIN_S)
    old = cluster.owner(SLOT)
    old.kill()
    with pytest.raises(StoreUnavailable):
        put(store, "a", b"2")
    new = cluster.wait_replaced(old, NAMES.entries)
    late = open_store(cluster)
    assert put_until_taken(late, "a", b"2") == 2
    assert new.run("HGET", NAMES.entries, "a") == b"2 2"
    with pytest.raises(StoreUnavailable):
        watch.next(WITHIN_S)
    assert [batch.position.revision for batch in drain(watch, 2)] == [2]
    watch.close()


def test_an_owner_that_was_replaced_while_it_was_stopped_is_left(
    whole_cluster: ClusterSet, open_store: OpenStore
) -> None:
    cluster = whole_cluster
    store, waiting = open_store(cluster, wait_replicas=1), open_store(cluster)
    put(store, "a", b"1")
    watch = waiting.watch(here(waiting), timeout_s=WITHIN_S)
    old = cluster.owner(SLOT)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(watch.next, 600)
        old.stop()
        with pytest.raises(StoreUnavailable, match="did not answer within"):
            reading.result(WITHIN_S)
    cluster.wait_replaced(old, NAMES.entries)
    revision = put_until_taken(waiting, "a", b"2")
    old.cont()
    assert [batch.position.revision for batch in drain(watch, revision)] == list(range(2, revision + 1))
    assert entries(store)["a"][1] == put_until_taken(store, "a", b"3") - 1
    watch.close()


def test_what_is_no_cluster_is_said(sentinels: SentinelSet) -> None:
    store = open_at(url=f"redis+cluster://127.0.0.1:{sentinels.primary().port}", namespace="shop")
    with pytest.raises(StoreError, match="is no node of a Redis Cluster: write redis://"):
        store.list(timeout_s=WITHIN_S)
    store.close()


def test_a_cluster_is_not_taken_for_one_server(cluster: ClusterSet) -> None:
    store = open_at(url=f"redis://127.0.0.1:{cluster.another(cluster.owner(SLOT)).port}", namespace="shop")
    with pytest.raises(StoreError, match=r"is a node of a Redis Cluster, .*: write redis\+cluster://"):
        store.list(timeout_s=WITHIN_S)
    store.close()
