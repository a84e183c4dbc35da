"""The etcd store: the contract, and what is its own, on real servers."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
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
    put,
    units,
    write,
)
from tests.support.etcd_servers import EtcdCluster, Member, etcd
from veltrix_mw.errors import AuthFailed, Compacted, StoreError, StoreUnavailable
from veltrix_mw.protocols import Batch, ChangeRecord, Position, RawChange, RawOperation, Restored
from veltrix_mw.stores.etcd import EtcdStore, Ignored
from veltrix_mw.stores.etcd_watch import EtcdWatch
from veltrix_mw.values import MISSING

_names = (f"test{number}" for number in itertools.count())


class Servers:
    """One server after another, for tests that may forget its history: that goes for the whole server."""

    def __init__(self) -> None:
        self._running = contextlib.ExitStack()
        self._current: EtcdCluster | None = None

    def current(self) -> EtcdCluster:
        """One whose history is whole."""
        if self._current is None:
            self._current = self._running.enter_context(etcd())
        return self._current

    def compact(self, revision: int) -> None:
        self.current().compact(revision)
        self._current = None

    def close_old(self) -> None:
        if self._current is None:
            self._running.close()

    def close(self) -> None:
        self._running.close()


class EtcdHarness(Harness):
    """A namespace on the server that is there; on a fresh one where the last test forgot history."""

    keeps_records = False
    pushes = True

    def __init__(self, servers: Servers, transport: str = "gateway") -> None:
        super().__init__()
        self._transport = transport
        self._servers = servers
        self.renamed()

    def spec(self, **options: Any) -> dict[str, Any]:
        named = {"hosts": self.server.hosts, "namespace": self.namespace, "transport": self._transport}
        options = {**named, **options}
        return {"store": "veltrix_mw.stores.etcd:EtcdStore", "options": options}

    def make(self, **options: Any) -> EtcdStore:
        return EtcdStore(**self.spec(**options)["options"])

    def renamed(self) -> None:
        self.namespace = next(_names)
        self._servers.close_old()
        self.server = self._servers.current()

    def forget(self, oldest: int) -> None:
        assert self.server is self._servers.current()
        self._servers.compact(oldest)


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture
def transport() -> str:
    """What the stores speak; `test_etcd_over_grpc` has the other one."""
    return "gateway"


@pytest.fixture
def harness(servers: Servers, transport: str) -> Iterator[EtcdHarness]:
    harness = EtcdHarness(servers, transport)
    yield harness
    harness.close()


class TestEtcdStore(SharedStoreContract):
    """The contract over `EtcdStore`."""


# --- servers and stores of the tests below


@pytest.fixture(scope="module")
def shared() -> Iterator[EtcdCluster]:
    """One server for all tests that leave its history alone."""
    with etcd() as cluster:
        yield cluster


@pytest.fixture
def server() -> Iterator[EtcdCluster]:
    """A server of the test's own."""
    with etcd() as cluster:
        yield cluster


@pytest.fixture
def name() -> str:
    """A namespace of the test's own."""
    return next(_names)


@pytest.fixture
def open_store(transport: str) -> Iterator[Callable[..., EtcdStore]]:
    opened: list[EtcdStore] = []

    def open_store(server: EtcdCluster, namespace: str, **options: Any) -> EtcdStore:
        opened.append(EtcdStore(server.hosts, namespace=namespace, transport=transport, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()


OpenStore = Callable[..., EtcdStore]


def watch_from(store: EtcdStore, position: Position) -> EtcdWatch:
    return store.watch(position, timeout_s=WITHIN_S)


def one(watch: EtcdWatch, revision: int) -> Batch:
    (batch,) = drain(watch, revision)
    return batch


def quiet(watch: EtcdWatch) -> bool:
    return not list(watch.next(0.3))


def raw_put(server: EtcdCluster, *pairs: tuple[str, bytes]) -> int:
    """One transaction of someone else's program; returns its revision."""
    puts = [
        {"request_put": {"key": base64.b64encode(key.encode()).decode(), "value": base64.b64encode(raw).decode()}}
        for key, raw in pairs
    ]
    return int(server.post("/v3/kv/txn", {"success": puts})["header"]["revision"])


# --- beside plain etcdctl


def test_what_etcdctl_puts_and_deletes_is_seen_by_list_watch_and_confirm(
    shared: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    store = open_store(shared, name)
    first = put(store, "checkout/max_items", b"50")
    watch = watch_from(store, here(store))
    made = shared.put(f"{name}/checkout/max_items", "80")
    batch = one(watch, made)
    assert (batch.previous, batch.changes) == (first, (RawChange("checkout/max_items", b"80"),))
    assert batch.record == ChangeRecord()
    assert batch.position == here(store) == here(open_store(shared, name))
    assert store.confirm(batch.position, timeout_s=WITHIN_S).revision == made
    gone = shared.delete(f"{name}/checkout/max_items")
    batch = one(watch, gone)
    assert batch.changes == (RawChange("checkout/max_items", MISSING),)
    assert (entries(store), here(store)) == ({}, batch.position)
    assert (store.confirm(batch.position, timeout_s=WITHIN_S).revision, quiet(watch)) == (gone, True)


def test_a_deletion_by_etcdctl_that_left_no_trace_is_remembered_by_who_followed_it(
    shared: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    store = open_store(shared, name)
    put(store, "a", b"1")
    old = here(store)
    put(store, "b", b"1")
    watch = watch_from(store, here(store))
    gone = one(watch, shared.delete(f"{name}/b")).position
    put(open_store(shared, next(_names)), "elsewhere", b"1")
    assert here(store) == gone
    # Another process that starts at that position (from its disk, or a mirror) asks about it, then lists.
    other = open_store(shared, name)
    assert other.confirm(gone, timeout_s=WITHIN_S).revision == gone.revision
    assert here(other) == gone
    later = put(other, "c", b"1")
    assert one(watch, later).previous == gone.revision
    assert here(store).revision == here(other).revision == later
    assert [batch.position.revision for batch in drain(watch_from(other, old), later)][-2:] == [gone.revision, later]


def test_a_batch_has_the_position_that_a_listing_of_its_revision_has(
    shared: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    store = open_store(shared, name)
    put(store, "a", b"1")
    watch = watch_from(store, here(store))
    made = []
    for turn in range(40):
        if turn % 3:
            made.append(put(store, f"k{turn % 5}", b"%d" % turn))
        else:
            made.append(raw_put(shared, *((f"{name}/k{n}", b"%d" % turn) for n in range(turn % 4 + 1))))
    batches = drain(watch, made[-1])
    assert [batch.position.revision for batch in batches] == made
    reader = open_store(shared, name)
    for batch in batches:
        assert reader.list_at(batch.position.revision, timeout_s=WITHIN_S).position == batch.position
    for batch in batches[::7]:
        assert drain(watch_from(reader, batch.position), made[-1])[-1] == batches[-1] or batch == batches[-1]


def test_a_namespace_that_only_etcdctl_wrote_has_a_derived_label_and_reading_writes_nothing(
    shared: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    revision = shared.put(f"{name}/a", "1")
    store = open_store(shared, name)
    position = here(store)
    assert (position.revision, position.incarnation[-1]) == (revision, "?")
    watch = watch_from(store, position)
    again = one(watch, shared.put(f"{name}/a", "2")).position
    assert again.incarnation == position.incarnation
    assert store.confirm(again, timeout_s=WITHIN_S).incarnation == position.incarnation
    assert store.history("a", limit=9, timeout_s=WITHIN_S)[1].value == b"1"
    assert shared.revision() == again.revision, "nothing was written by reading"
    # The first write of ours brings the label: whoever followed without one lists again.
    label = one(watch, put(store, "b", b"1")).position.incarnation
    assert label == here(store).incarnation != position.incarnation
    for call in (store.watch, store.confirm):
        with pytest.raises(Compacted) as caught:
            call(again, timeout_s=WITHIN_S)
        assert not isinstance(caught.value, Restored)


@pytest.mark.parametrize("known", ["", "123?"])
def test_an_incarnation_is_minted_where_none_is_stored(
    shared: EtcdCluster, name: str, open_store: OpenStore, known: str
) -> None:
    shared.put(f"{name}/a", "1")
    store = open_store(shared, name)
    minted = store.renew_incarnation(known, timeout_s=WITHIN_S)
    assert here(store).incarnation == minted
    assert store.renew_incarnation(known, timeout_s=WITHIN_S) == minted, "one is stored now"


def test_who_took_over_at_a_deletion_by_etcdctl_is_not_ahead_once_that_is_compacted(
    server: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    """As a relay that begins where the mirror stands, or a worker that leaves the mirror: neither saw it itself."""
    store = open_store(server, name)
    put(store, "kept", b"1")
    put(store, "gone", b"1")
    gone = one(watch_from(store, here(store)), server.delete(f"{name}/gone")).position
    server.put("another/namespace", "1")
    server.compact(server.revision())
    taken_over = open_store(server, name)
    taken_over.watch(gone, timeout_s=WITHIN_S).close()
    assert here(taken_over) == gone
    assert set(entries(taken_over)) == {"kept"}


def test_a_label_that_someone_deleted_is_noticed_and_minted_anew(
    shared: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    store = open_store(shared, name)
    put(store, "a", b"1")
    position = here(store)
    watch = watch_from(store, position)
    shared.delete(f".veltrix/{name}/incarnation")
    with pytest.raises(Restored):
        drain(watch, position.revision + 100)
    renewed = store.renew_incarnation(position.incarnation, timeout_s=WITHIN_S)
    assert here(store).incarnation == renewed != position.incarnation


def test_a_label_that_was_renewed_more_than_once_since_the_last_change_is_followed(
    shared: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    store = open_store(shared, name)
    put(store, "a", b"1")
    for _ in range(3):
        store.renew_incarnation(here(store).incarnation, timeout_s=WITHIN_S)
    watch = watch_from(store, here(store))
    assert quiet(watch)
    batch = one(watch, put(store, "a", b"2"))
    assert batch.position == here(store)


def test_a_position_without_a_mark_is_listed_anew_and_no_restore(
    shared: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    store = open_store(shared, name)
    put(store, "a", b"1")
    position = here(store)
    with pytest.raises(Compacted) as caught:
        watch_from(store, Position(position.incarnation, position.revision))
    assert not isinstance(caught.value, Restored)


def test_many_keys_are_read_at_one_revision(
    shared: EtcdCluster, name: str, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = open_store(shared, name), open_store(shared, name)
    keys = [f"k{number:03}" for number in range(250)]
    for start in range(0, 250, 100):
        write(store, *(RawOperation(key, b"1") for key in keys[start : start + 100]))
    before = entries(store)
    asked = store._ranges

    def then_written(*given: Any) -> Any:
        answer = asked(*given)
        put(other, keys[-1], b"2")
        return answer

    monkeypatch.setattr(store, "_ranges", then_written)
    assert store.read(keys, None, timeout_s=WITHIN_S) == before


def test_writers_at_once_agree_on_one_label(shared: EtcdCluster, name: str, open_store: OpenStore) -> None:
    stores = [open_store(shared, name) for _ in range(2)]
    put(stores[0], "a", b"1")
    shared.delete(f".veltrix/{name}/incarnation")
    put(stores[1], "a", b"2")
    assert here(stores[0]).incarnation == here(stores[1]).incarnation
    assert here(stores[0]).incarnation[-1] != "?"


# --- data that is there already


def test_values_that_are_no_json_are_handed_on_as_they_are_or_as_strings(
    shared: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    stored = {
        "a": b"80",
        "b": b"blue",
        "c": b'"b"',
        "d": b"NaN",
        "e": 'gr\u00fcn "x"'.encode(),
        "f": b"\xff\xfe",
        "g": b"",
    }
    revision = raw_put(shared, *((f"{name}/{key}", raw) for key, raw in stored.items()))
    plain, text = open_store(shared, name), open_store(shared, name, values="text")
    assert {key: raw for key, (raw, _) in entries(plain).items()} == stored
    as_text = {
        **stored,
        "b": b'"blue"',
        "d": b'"NaN"',
        "e": json.dumps('gr\u00fcn "x"', ensure_ascii=False).encode(),
        "g": b'""',
    }
    assert {key: raw for key, (raw, _) in entries(text).items()} == as_text
    (batch,) = drain(watch_from(text, Position("", 0)), revision)[-1:]
    assert {change.key: change.value for change in batch.changes} == as_text
    assert text.read(["b"], None, timeout_s=WITHIN_S) == {"b": (b'"blue"', revision)}
    assert text.history("b", limit=1, timeout_s=WITHIN_S)[0].value == b'"blue"'
    assert batch.position == here(text) == here(plain), "the mark is that of what is stored"


def test_a_prefix_stands_in_place_of_the_namespace(shared: EtcdCluster, name: str, open_store: OpenStore) -> None:
    shared.put(f"/config/{name}/a", "1")
    shared.put(f"{name}/not-here", "1")
    store = open_store(shared, name, prefix=f"/config/{name}/")
    put(store, "b", b"2")
    assert set(entries(store)) == {"a", "b"}
    assert shared.ctl("get", f"/config/{name}/b", "--print-value-only") == "2\n"
    assert store.info.namespace == name


def test_keys_of_other_shapes_are_ignored_counted_and_left_alone(
    shared: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    store = open_store(shared, name, lazy=("tenants/",))
    put(store, "a", b"1")
    others = [f"{name}/", f"{name}//x", f"{name}/sp ace", f"{name}/\u00e4", f"{name}/x/", f"{name}/../y"]
    raw_put(shared, *((other, b"theirs") for other in others))
    raw_put(shared, (f"{name}/tenants/also theirs", b"1"))
    listing = store.list(timeout_s=WITHIN_S)
    assert ([key for key, _, _ in listing.entries], listing.ignored) == (["a"], len(others))
    assert store.ignored.count == len(others)
    assert len(store.ignored.examples) == 5
    assert f"{name}/sp ace" in store.ignored.examples
    assert store.confirm(listing.position, timeout_s=WITHIN_S).count == 1
    # A revision of theirs alone is none of ours.
    watch = watch_from(store, listing.position)
    raw_put(shared, (others[0], b"again"))
    raw_put(shared, *((f"{name}/more of them {n}", b"1") for n in range(30)))
    confirmed = store.confirm(listing.position, timeout_s=WITHIN_S)
    assert (confirmed.revision, confirmed.count) == (listing.position.revision, 1)
    assert quiet(watch)
    shared.delete(others[1])
    assert quiet(watch)
    assert store.confirm(listing.position, timeout_s=WITHIN_S).count == 1
    assert store.ignored.count == len(others) - 1 + 30
    batch = one(watch, put(store, "b", b"1"))
    assert [change.key for change in batch.changes] == ["b"]
    # Who never listed counts right, too.
    fresh = open_store(shared, name, lazy=("tenants/",))
    assert fresh.confirm(batch.position, timeout_s=WITHIN_S).count == 2
    assert EtcdStore(shared.hosts, namespace=name).ignored == Ignored()


def test_a_lazy_key_written_by_etcdctl_moves_the_position(
    shared: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    store = open_store(shared, name, lazy=("tenants/",))
    put(store, "a", b"1")
    watch = watch_from(store, here(store))
    revision = shared.put(f"{name}/tenants/acme", "1")
    batch = one(watch, revision)
    assert batch.changes == ()
    fresh = open_store(shared, name, lazy=("tenants/",))
    assert here(fresh) == batch.position == here(store)
    assert fresh.confirm(batch.position, timeout_s=WITHIN_S).count == 1


def test_the_bookkeeping_lies_outside_the_namespace(shared: EtcdCluster, name: str, open_store: OpenStore) -> None:
    store = open_store(shared, name)
    write(store, RawOperation("a", b'"secret"'), record=ChangeRecord("ann", "sale", 1.5))
    assert shared.ctl("get", f"{name}/", "--prefix", "--keys-only").split() == [f"{name}/a"]
    kept = shared.ctl("get", f".veltrix/{name}/", "--prefix").split("\n")
    assert [f".veltrix/{name}/change", f".veltrix/{name}/incarnation"] == kept[0:4:2]
    assert {**json.loads(kept[1]), "mark": ""} == {
        "mark": "", "author": "ann", "reason": "sale", "time_s": 1.5, "traceparent": "",
    }  # fmt: skip
    assert "secret" not in kept[1]


# --- compaction


def test_a_deletion_at_the_revision_of_a_compaction_is_not_lost(server: EtcdCluster, open_store: OpenStore) -> None:
    store = open_store(server, "shop")
    put(store, "a", b"1")
    put(store, "b", b"1")
    position = here(store)
    gone = server.delete("shop/b")
    server.compact(gone)
    # etcd 3.4 neither brings the deletion nor says that it is compacted.
    for each in (store, open_store(server, "shop")):
        with pytest.raises(Compacted):
            watch_from(each, position)
    assert set(entries(store)) == {"a"}
    assert store.confirm(here(store), timeout_s=WITHIN_S).count == 1


def test_nor_where_the_compaction_comes_while_the_watch_is_opened(
    server: EtcdCluster, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(server, "shop")
    put(store, "a", b"1")
    position = here(store)
    opened = store._members.watch

    def compacted_just_before(*given: Any, **options: Any) -> Any:
        server.compact(server.delete("shop/a"))
        return opened(*given, **options)

    monkeypatch.setattr(store._members, "watch", compacted_just_before)
    with pytest.raises(Compacted):
        watch_from(store, position)


def test_a_quiet_namespace_is_followed_through_compactions_for_others(
    server: EtcdCluster, open_store: OpenStore
) -> None:
    store, other = open_store(server, "shop"), open_store(server, "other")
    put(store, "a", b"1")
    position = here(store)
    for turn in range(3):
        busy = [put(other, "x", b"%d" % turn) for _ in range(5)][-1]
        server.compact(busy - 2)
        with pytest.raises(Compacted):
            watch_from(store, position)
        assert here(store) == position
        watch = watch_from(store, position)
        assert quiet(watch)
        watch.close()
        server.compact(busy)
        # Nothing newer was found up to here: from there on it can be followed.
        watch = watch_from(store, position)
        revision = put(store, "a", b"%d" % turn)
        batch = one(watch, revision)
        assert batch.previous == position.revision
        position = batch.position
        watch.close()
    confirmed = store.confirm(position, timeout_s=WITHIN_S)
    assert confirmed.revision == position.revision


def test_an_empty_namespace_on_an_old_server_can_be_followed(server: EtcdCluster, open_store: OpenStore) -> None:
    server.compact([put(open_store(server, "other"), "x", b"1") for _ in range(5)][-1])
    store = open_store(server, "shop")
    with pytest.raises(Compacted):
        watch_from(store, Position("", 0))
    position = here(store)
    assert position == Position("", 0)
    watch = watch_from(store, position)
    batch = one(watch, put(store, "a", b"1"))
    assert (batch.previous, batch.position) == (0, here(store))


def test_units_of_a_quiet_namespace_are_read_through_compactions_for_others(
    server: EtcdCluster, open_store: OpenStore
) -> None:
    store = open_store(server, "shop", lazy=("tenants/",))
    put(store, "tenants/acme", b"1")
    position = here(store)
    server.compact([put(open_store(server, "other"), "x", b"1") for _ in range(5)][-1])
    # One that has just listed knows how far that reaches, another one asks.
    for reader in (store, open_store(server, "shop", lazy=("tenants/",))):
        assert units(reader, "tenants/acme", at=position) == {
            "tenants/acme": [("tenants/acme", b"1", position.revision)]
        }
    put(store, "a", b"1")
    with pytest.raises(Compacted):
        units(open_store(server, "shop", lazy=("tenants/",)), "tenants/acme", at=position)


def test_units_leave_out_keys_of_other_shapes_and_know_values_that_are_text(
    shared: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    raw_put(shared, (f"{name}/tenants/acme/sp ace", b"theirs"), (f"{name}/tenants/acme/zone", b"eu"))
    store = open_store(shared, name, lazy=("tenants/",), values="text")
    (entry,) = units(store, "tenants/acme")["tenants/acme"]
    assert entry[:2] == ("tenants/acme/zone", b'"eu"')


def test_history_reaches_over_a_compaction_to_the_value_that_was(server: EtcdCluster, open_store: OpenStore) -> None:
    store = open_store(server, "shop")
    old = put(store, "k", b"1")
    put(store, "gone", b"1")
    deleted = delete(store, "gone")
    oldest = put(store, "other", b"1")
    new = write(store, RawOperation("k", b"2"), record=ChangeRecord("ann"))
    foreign = server.put("shop/k", "3")
    server.compact(oldest)
    found = store.history("k", limit=9, timeout_s=WITHIN_S)
    assert [(v.value, v.revision, v.record.author) for v in found] == [
        (b"3", foreign, ""), (b"2", new, "ann"), (b"1", old, ""),
    ]  # fmt: skip
    assert store.history("gone", limit=9, timeout_s=WITHIN_S) == []
    assert deleted < oldest
    delete(store, "k")
    assert [v.value for v in store.history("k", limit=9, timeout_s=WITHIN_S)] == [MISSING, b"3", b"2", b"1"]


# --- a backup


def test_a_restore_is_noticed_by_list_watch_and_confirm(server: EtcdCluster, open_store: OpenStore) -> None:
    store = open_store(server, "shop")
    put(store, "a", b"1")
    backup = server.back_up()
    for turn in range(5):
        put(store, "a", b"%d" % turn)
    position = here(store)
    frozen = open_store(server, "shop")  # has seen nothing
    watch = watch_from(store, position)
    for _ in range(2):
        server.restore(backup)
        with pytest.raises(StoreError):
            watch.next(WITHIN_S)
        for each in (store, frozen):
            with pytest.raises(Restored):
                watch_from(each, position)
            with pytest.raises(Restored):
                each.confirm(position, timeout_s=WITHIN_S)
        assert here(store).revision < position.revision
        assert here(store).incarnation == position.incarnation, "the backup brought it back"
        renewed = store.renew_incarnation(position.incarnation, timeout_s=WITHIN_S)
        assert here(store).incarnation == renewed
        put(store, "a", b"9")
        position, backup = here(store), server.back_up()
        put(store, "a", b"10")
        position = here(store)
        watch = watch_from(store, position)


@pytest.mark.parametrize("is_foreign", [False, True], ids=["ours", "etcdctl"])
def test_a_restore_is_noticed_by_a_frozen_worker_though_more_was_written_since(
    server: EtcdCluster, open_store: OpenStore, is_foreign: bool
) -> None:
    def change(store: EtcdStore, value: bytes) -> int:
        return server.put("shop/a", value.decode()) if is_foreign else put(store, "a", value)

    store = open_store(server, "shop")
    put(store, "a", b"1")
    backup = server.back_up()
    for turn in range(3):
        change(store, b"1%d" % turn)
    position = here(store)
    server.restore(backup)
    other = open_store(server, "shop")
    while change(other, b"2") < position.revision:
        pass
    thawed = open_store(server, "shop")
    with pytest.raises(Restored):
        thawed.confirm(position, timeout_s=WITHIN_S)
    with pytest.raises(Restored):
        watch_from(thawed, position)
    for _ in range(5):
        change(other, b"3")
    with pytest.raises(Restored):
        thawed.confirm(position, timeout_s=WITHIN_S)
    assert here(thawed).revision > position.revision
    with pytest.raises(Restored):
        watch_from(store, position)


def test_a_listing_after_a_restore_does_not_go_by_what_was_followed_before(
    server: EtcdCluster, open_store: OpenStore
) -> None:
    store, other = open_store(server, "shop"), open_store(server, "other")
    put(store, "a", b"1")
    backup = server.back_up()
    put(store, "a", b"2")
    position = here(store)
    server.restore(backup)
    # As after a long sleep: nothing that the cluster says of itself is lower than it was.
    while put(other, "x", b"1") <= position.revision:
        pass
    with pytest.raises(Restored):
        watch_from(store, position)
    # Who may only read cannot rename the history, and still must not be told that it is the old one.
    assert here(store).revision < position.revision
    watch_from(store, here(store)).close()


def test_a_restore_that_spared_the_namespace_is_told_once(server: EtcdCluster, open_store: OpenStore) -> None:
    store, other = open_store(server, "shop"), open_store(server, "other")
    put(store, "a", b"1")
    position = here(store)
    backup = server.back_up()
    for _ in range(5):
        put(other, "x", b"1")
    store.confirm(position, timeout_s=WITHIN_S)
    server.restore(backup)
    with pytest.raises(Restored, match="older state"):
        store.confirm(position, timeout_s=WITHIN_S)
    assert store.confirm(position, timeout_s=WITHIN_S).revision == position.revision
    watch = watch_from(store, position)
    assert one(watch, put(store, "a", b"2")).previous == position.revision


# --- large transactions


def test_a_revision_larger_than_any_message_comes_whole(open_store: OpenStore) -> None:
    large = ["--max-request-bytes", "30000000", "--max-txn-ops", "1000"]
    with etcd(options=large) as server:
        store = open_store(server, "shop")
        put(store, "a", b"1")
        start = here(store)
        watch = watch_from(store, start)
        pairs = [(f"shop/k{n:03}", b'"' + b"%03d" % n * 5_000 + b'"') for n in range(400)]
        revision = raw_put(server, *pairs)
        expected = [(key.removeprefix("shop/"), raw) for key, raw in pairs]
        batch = one(watch, revision)
        assert [(change.key, change.value) for change in batch.changes] == expected
        assert batch.position == here(store)
        # The same in fragments: a server with etcd's own limits cuts it.
        server.kill(server.members[0])
        server.options = []
        server.start()
        watch = watch_from(store, start)
        again = one(watch, revision)
        assert again == batch
        assert {key: raw for key, (raw, _) in entries(store).items() if key != "a"} == dict(expected)


def test_the_largest_transaction_that_the_limits_allow_is_taken(
    shared: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    store = open_store(shared, "n" * 120 + name)
    limits = store.info.limits
    assert limits.max_operations is not None
    assert limits.max_transaction_bytes is not None
    keys = [f"{n:03}/" + "k" * 500 for n in range(limits.max_operations)]
    each = (limits.max_transaction_bytes - sum(map(len, keys))) // len(keys)
    record = ChangeRecord("a" * 200, "r" * 1000, 1.0, "t" * 60)
    operations = [RawOperation(key, b'"' + b"x" * (each - 2) + b'"', 0) for key in keys]
    revision = write(store, *operations, record=record)
    assert len(entries(store)) == limits.max_operations
    watch = watch_from(store, Position("", 0))
    assert len(drain(watch, revision)[-1].changes) == limits.max_operations
    put(store, "large", b'"' + b"x" * (limits.max_value_bytes - 2) + b'"')


# --- users


def test_tokens_that_run_out_leave_no_gap(open_store: OpenStore) -> None:
    with etcd(options=["--auth-token-ttl", "1"]) as server:
        server.turn_auth_on(worker="secret-1")
        server.grant("worker", "shop/", ".veltrix/shop/")
        user = {"user": "worker", "password": "secret-1"}
        store, writer = open_store(server, "shop", **user), open_store(server, "shop", **user)
        put(writer, "a", b"0")
        position = here(store)
        watch = watch_from(store, position)
        tokens, made, seen = set(), [], []
        for _ in range(2):
            made.append(put(writer, "a", b"%d" % len(made)))
            seen += drain(watch, made[-1])
            seen += watch.next(2.5)  # long enough for a token to run out: etcd looks once a second
            store.confirm(seen[-1].position, timeout_s=WITHIN_S)
            tokens.add(store._members._here().token)
        assert [batch.position.revision for batch in seen] == made
        assert len(tokens) > 1, "no token ran out: nothing was tried"


def test_a_permission_that_was_taken_away_is_noticed_by_confirm_and_watch(open_store: OpenStore) -> None:
    with etcd() as server:
        server.turn_auth_on(worker="secret-1")
        server.grant("worker", "shop/", ".veltrix/shop/")
        store = open_store(server, "shop", user="worker", password="secret-1", renew_watch_s=0.2)
        put(store, "a", b"0")
        position = here(store)
        watch = watch_from(store, position)
        assert quiet(watch)
        server.ctl("user", "revoke-role", "worker", "worker")
        with pytest.raises(AuthFailed, match=r"shop/.*\.veltrix/shop/"):
            store.confirm(position, timeout_s=WITHIN_S)
        with pytest.raises(AuthFailed, match="etcdctl role grant-permission"):
            drain(watch, position.revision + 1)


def test_a_worker_with_read_permission_follows_and_is_told_that_it_may_not_write(open_store: OpenStore) -> None:
    with etcd() as server:
        server.turn_auth_on(worker="secret-1", writer="secret-2")
        server.grant("worker", "shop/", ".veltrix/shop/", access="read")
        server.grant("writer", "shop/", ".veltrix/shop/")
        writer = open_store(server, "shop", user="writer", password="secret-2")
        worker = open_store(server, "shop", user="worker", password="secret-1")
        put(writer, "a", b"0")
        watch = watch_from(worker, here(worker))
        batch = one(watch, put(writer, "a", b"1"))
        assert worker.confirm(batch.position, timeout_s=WITHIN_S).count == 1
        assert worker.history("a", limit=9, timeout_s=WITHIN_S)[0].value == b"1"
        for attempt in (lambda: put(worker, "a", b"2"), lambda: worker.renew_incarnation("x", timeout_s=WITHIN_S)):
            with pytest.raises(AuthFailed, match="readwrite to write"):
                attempt()


def test_a_watch_that_is_opened_anew_goes_on_without_a_gap(
    shared: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    store = open_store(shared, name)
    put(store, "a", b"0")
    watch = watch_from(store, here(store))
    begun, made, seen = [watch._stream], [], []
    for number in range(30):
        made.append(put(store, "a", b"%d" % number))
        # Now, or while it waits for the change. No oftener, as by a short time of its own: where etcd takes longer to
        # answer than that, nothing would ever come.
        watch._renew_at_s = time.monotonic() + number % 2 / 1000
        seen += drain(watch, made[-1])
        begun += [] if watch._stream is begun[-1] else [watch._stream]
    assert [batch.position.revision for batch in seen] == made
    assert len(begun) > 15, "it was opened anew each time that it was due"


def test_that_a_position_is_in_the_history_is_told_without_a_count_of_the_namespace(
    shared: EtcdCluster, name: str, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(shared, name)
    put(store, "a", b"0")
    old = here(store)
    put(store, "a", b"1")
    now = here(store)
    asked: list[Any] = []
    ranges = store._ranges
    monkeypatch.setattr(store, "_ranges", lambda found, by_s: asked.extend(found) or ranges(found, by_s))
    for position in (old, now):
        store.recognize(position, timeout_s=WITHIN_S)
    assert len(asked) == 4
    assert not any(each.range_end for each in asked), "keys one by one"
    for other in (
        Position("0123456789abcdef", now.revision, now.fingerprint),
        Position(now.incarnation, now.revision + 1_000, now.fingerprint),
        Position(now.incarnation, now.revision, now.fingerprint[::-1] + "0"),
    ):
        with pytest.raises(Restored):
            store.recognize(other, timeout_s=WITHIN_S)
    shared.compact(now.revision)
    with pytest.raises(Compacted):
        store.recognize(old, timeout_s=WITHIN_S)
    store.recognize(now, timeout_s=WITHIN_S)


# --- members that fail


@pytest.fixture(scope="module")
def three() -> Iterator[EtcdCluster]:
    # Half of etcd's own times: an election is over, and a lost leader noticed, in half the time.
    with etcd(3, options=["--heartbeat-interval", "50", "--election-timeout", "500"]) as cluster:
        yield cluster


def whole(cluster: EtcdCluster) -> None:
    """Start what a test killed."""
    gone = [member for member in cluster.members if member.process is None]
    if gone:
        cluster.spawn(*gone)
    for member in cluster.members:
        cluster.wait_healthy(member)


def prefer(store: EtcdStore, member: Member) -> None:
    """Have the store use this member until it fails."""
    here = store._members._here()
    here.order.sort(key=lambda host: host != member.host)
    here.used = member.host


class Following:
    """What a follower does, in short: watch on where it stood, whatever happens."""

    def __init__(self, store: EtcdStore) -> None:
        self._store = store
        self.position = here(store)
        self.seen: list[Batch] = []
        self._watch: EtcdWatch | None = None
        self.reopened = 0

    def until(self, revision: int) -> None:
        deadline_s = time.monotonic() + 30
        while self.position.revision < revision:
            assert time.monotonic() < deadline_s, f"revision {revision} did not come"
            try:
                if self._watch is None:
                    self.reopened += 1
                    self._watch = watch_from(self._store, self.position)
                for batch in self._watch.next(0.5):
                    assert batch.previous == self.position.revision
                    self.position = batch.position
                    self.seen.append(batch)
                self._store.confirm(self.position, timeout_s=2)
            except StoreUnavailable:
                self._watch = None


def surely(store: EtcdStore, value: bytes) -> int:
    """A write that is tried until it is acknowledged."""
    deadline_s = time.monotonic() + 30
    while True:
        try:
            return store.commit([RawOperation("a", value)], ChangeRecord(), timeout_s=2)
        except StoreUnavailable:
            assert time.monotonic() < deadline_s


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_a_leader_that_dies_or_hangs_is_left_and_nothing_is_lost(
    three: EtcdCluster, name: str, open_store: OpenStore, fault: str
) -> None:
    whole(three)
    leader = three.leader()
    store, writer = open_store(three, name), open_store(three, name)
    put(writer, "a", b"0")
    for each in (store, writer):
        prefer(each, leader)
    following = Following(store)
    made = [put(writer, "a", b"%d" % turn) for turn in range(3)]
    following.until(made[-1])
    getattr(three, fault)(leader)
    try:
        made += [surely(writer, b"%d" % turn) for turn in range(3)]
        following.until(made[-1])
        revisions = [batch.position.revision for batch in following.seen]
        assert {*made} <= {*revisions}
        assert store._members._here().used != leader.host
        assert here(store) == following.position
    finally:
        if fault == "pause":
            three.resume(leader)


def test_a_watch_leaves_a_member_that_hangs_once_a_confirmation_found_out(
    three: EtcdCluster, name: str, open_store: OpenStore
) -> None:
    whole(three)
    store = open_store(three, name)
    put(store, "a", b"0")
    watch = watch_from(store, here(store))
    position = one(watch, put(store, "a", b"1")).position
    assert watch._stream is not None
    hanging = next(member for member in three.members if member.host == watch._stream.host)
    three.pause(hanging)
    try:
        deadline_s = time.monotonic() + 30
        while True:
            with contextlib.suppress(StoreUnavailable):
                store.confirm(position, timeout_s=2)
                break
            assert time.monotonic() < deadline_s
        revision = surely(store, b"2")
        assert drain(watch, revision)[0].previous == position.revision
        assert watch._stream.host != hanging.host
    finally:
        three.resume(hanging)


def test_a_member_that_lost_its_leader_is_left(three: EtcdCluster, name: str, open_store: OpenStore) -> None:
    whole(three)
    store = open_store(three, name)
    put(store, "a", b"0")
    position = here(store)
    alone, *others = three.members
    prefer(store, alone)
    watch = watch_from(store, position)
    assert watch._stream is not None
    assert watch._stream.host == alone.host
    for member in others:
        three.kill(member)
    try:
        with pytest.raises(StoreUnavailable):
            drain(watch, position.revision + 1)
        with pytest.raises(StoreUnavailable):
            store.confirm(position, timeout_s=1)
        with pytest.raises(StoreUnavailable):
            store.commit([RawOperation("a", b"1")], ChangeRecord(), timeout_s=1)
    finally:
        whole(three)
    assert surely(store, b"2") > position.revision


# --- what it says of itself


def test_its_url_names_the_members_and_no_secret() -> None:
    store = EtcdStore([("h1", 2379), ("::1", 2380)], namespace="shop", tls=True, user="u", password="secret-1")
    assert (store.info.origin, store.info.url) == ("etcd", "etcds://h1:2379,[::1]:2380/shop")
    assert EtcdStore(namespace="shop").info.url == "etcd://127.0.0.1:2379/shop"
    assert "secret-1" not in repr(store) + repr(store.info) + repr(vars(store._members._here()))
