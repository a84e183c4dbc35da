"""Lazy units by the mirror: filled once by the relay for all who want them, kept current, and never a mix."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.support.etcd_servers import EtcdCluster, etcd
from tests.support.redis_servers import RedisServer, SentinelSet, cluster_set, redis_server, sentinel_set
from tests.support.waiting import wait_until
from veltrix_mw import MISSING, ConfigClient, Delete, Put, unit_reader
from veltrix_mw.coalesce.unit_cache import UnitCache
from veltrix_mw.lazy import LazyUnits, Unit
from veltrix_mw.protocols import Filled, FoundUnits, MirroredUnit, MirrorState, Position, RawUnit
from veltrix_mw.replica import Publication
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.stores.memory import MemoryStore
from veltrix_mw.stores.redis_routes import slot_of
from veltrix_mw.unit_reader import UnitReader
from veltrix_mw.validation import Schemas

WITHIN_S = 30.0
LAZY = ("tenants/", "users/")
UNIT = "veltrix:{shop}:unit:"


@pytest.fixture(scope="module")
def _redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def redis(_redis: RedisServer) -> RedisServer:
    _redis.run("FLUSHALL")
    return _redis


@pytest.fixture(scope="module")
def _etcd() -> Iterator[EtcdCluster]:
    with etcd() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay is waited for, however busy the machine is: what is read from where must not hang on that."""
    monkeypatch.setattr(unit_reader, "FILLED_WITHIN_S", WITHIN_S)


Open = Callable[..., ConfigClient]


@pytest.fixture
def connect(_etcd: EtcdCluster, redis: RedisServer) -> Iterator[Open]:
    """Clients of one namespace, etcd with a mirror; all but the first that asks to be are no relay."""
    _etcd.ctl("del", "shop/", "--prefix")
    with contextlib.ExitStack() as stack:

        def connect(**options: Any) -> ConfigClient:
            url = f"etcd://127.0.0.1:{_etcd.members[0].port}/shop"
            mirror = f"redis://127.0.0.1:{redis.port}/0"
            options = {"mirror": mirror, "lazy": LAZY, "relay": "never", "fetch_timeout_s": 2 * WITHIN_S, **options}
            client = stack.enter_context(ConfigClient(url, **options))
            client.wait_ready(WITHIN_S)
            if options["mirror"] and options["relay"] == "never":
                wait_until(lambda: follows_mirror(client), WITHIN_S, reason="the mirror to be followed")
            return client

        yield connect


@pytest.fixture
def relay(connect: Open) -> ConfigClient:
    client = connect(relay="auto", instance="the-relay")
    client.put("eager", 1)
    wait_until(lambda: follows_mirror(client), WITHIN_S, reason="the mirror to be filled")
    return client


def follows_mirror(client: ConfigClient) -> bool:
    return any(tier.role == "mirror" and tier.state == "following" for tier in client.status().tiers)


def reader(client: ConfigClient) -> UnitReader:
    made = client._views.reader
    assert made is not None
    return made


def units_read(*clients: ConfigClient) -> dict[str, int]:
    return {
        where: sum(reader(client).units_read[where] for client in clients) for where in reader(clients[0]).units_read
    }


def filled(client: ConfigClient) -> int:
    assert client._relay is not None
    assert client._relay._filler is not None
    return client._relay._filler.filled


def test_the_relay_reads_a_wanted_unit_once_for_all_workers(relay: ConfigClient, connect: Open) -> None:
    relay.write([Put("tenants/acme/name", "Acme"), Put("tenants/acme/limits/max", 5), Put("tenants/beta/name", "Beta")])
    workers = [connect() for _ in range(3)]
    for worker in workers:
        assert worker.view().fetch("tenants/acme/limits/max") == 5
        assert worker.view().fetch("tenants/none/x", None) is None
    assert filled(relay) == 2
    assert units_read(*workers) == {"mirror": 6, "authority": 0, "wanted": 2}
    told = [worker.status().lazy for worker in (relay, *workers)]
    assert [lazy.filled for lazy in told if lazy] == [2, 0, 0, 0]
    assert [lazy.held for lazy in told if lazy] == [0, 2, 2, 2]
    relay.close()
    assert relay.status().lazy.filled == 2  # type: ignore[union-attr]  # also when it leads no more


def test_an_absent_unit_leaves_the_mirror_sooner_than_one_that_is_there(
    relay: ConfigClient, connect: Open, redis: RedisServer
) -> None:
    relay.put("tenants/acme/name", "Acme")
    connect().view().fetch_many(["tenants/acme/name", "tenants/none/name"])
    left_ms = {key.rpartition(b":")[2]: redis.run("PTTL", key) for key in redis.run("KEYS", "*:unit:*")}
    assert left_ms.keys() == {b"tenants/acme", b"tenants/none"}
    assert 0 < left_ms[b"tenants/none"] < left_ms[b"tenants/acme"] / 50


def test_what_was_filled_stays_current_and_whole(relay: ConfigClient, connect: Open, redis: RedisServer) -> None:
    relay.write([Put("tenants/acme/a", 1), Put("tenants/acme/b", 1)])
    first = connect()
    assert first.view().fetch("tenants/acme/a") == 1
    relay.write([Put("tenants/acme/a", 2), Delete("tenants/acme/b"), Put("eager", 2)])
    revision = relay.write([Put("tenants/acme", 3), Put("tenants/acme.x", 4)])
    late = connect()
    late.wait_for(revision, WITHIN_S)
    assert late.view().fetch_many(["tenants/acme", "tenants/acme/a", "tenants/acme/b"]) == {
        "tenants/acme": 3,
        "tenants/acme/a": 2,
    }
    assert units_read(late)["authority"] == 0
    assert filled(relay) == 1
    first.wait_for(revision, WITHIN_S)
    assert first.view().fetch("tenants/acme/a") == 2
    assert units_read(first) == {"mirror": 1, "authority": 0, "wanted": 1}
    assert redis.run("HLEN", f"{UNIT}tenants/acme") == 3
    assert 0 < redis.run("PTTL", f"{UNIT}tenants/acme") < 4_000_000


def test_an_absent_unit_that_is_written_is_there(relay: ConfigClient, connect: Open) -> None:
    worker = connect()
    assert worker.view().fetch("tenants/new/x", None) is None
    worker.wait_for(relay.put("tenants/new/x", 1), WITHIN_S)
    assert worker.view().fetch("tenants/new/x") == 1
    assert connect().view().fetch("tenants/new/x") == 1
    assert filled(relay) == 1


@pytest.mark.parametrize("how", ["evicted", "flushed", "damaged"])
def test_a_unit_that_the_mirror_lost_is_filled_again(
    how: str, relay: ConfigClient, connect: Open, redis: RedisServer
) -> None:
    relay.put("tenants/acme/a", 1)
    assert connect().view().fetch("tenants/acme/a") == 1
    if how == "evicted":
        redis.run("DEL", f"{UNIT}tenants/acme")
    elif how == "flushed":
        redis.run("FLUSHALL")
    else:
        redis.run("DEL", "veltrix:{shop}:entries")  # its unit is of a fill that nobody knows any more
        relay.put("tenants/acme/a", 2)
    wait_until(lambda: relay.mirror_state().position.revision > 0, WITHIN_S, reason="the mirror to be filled")
    late = connect()
    late.wait_for(relay.put("eager", 3), WITHIN_S)
    assert late.view().fetch("tenants/acme/a") == (2 if how == "damaged" else 1)
    assert units_read(late) == {"mirror": 1, "authority": 0, "wanted": 1}


def test_without_a_relay_the_authority_is_read_at_once_and_nothing_is_filled(
    relay: ConfigClient, connect: Open, redis: RedisServer
) -> None:
    relay.put("tenants/acme/a", 1)
    worker = connect()
    worker.wait_for(relay.view().revision, WITHIN_S)
    relay.close()
    wait_until(lambda: not redis.run("EXISTS", "veltrix:{shop}:lease"), WITHIN_S, reason="the lease to be given up")
    assert worker.view().fetch("tenants/acme/a") == 1
    assert units_read(worker) == {"mirror": 0, "authority": 1, "wanted": 0}
    assert not redis.run("EXISTS", f"{UNIT}tenants/acme")


def test_a_relay_that_does_not_fill_is_waited_for_only_so_long(
    relay: ConfigClient, connect: Open, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_reader, "FILLED_WITHIN_S", 0.3)
    relay.put("tenants/acme/a", 1)
    worker = connect()
    assert relay._relay is not None
    assert relay._relay._filler is not None
    relay._relay._filler.stop(WITHIN_S)  # as one that hangs there
    assert worker.view().fetch("tenants/acme/a") == 1
    assert units_read(worker) == {"mirror": 0, "authority": 1, "wanted": 1}
    assert redis.run("LRANGE", "veltrix:{shop}:wanted", 0, -1) == [b"tenants/acme"]
    assert 0 < redis.run("PTTL", "veltrix:{shop}:wanted") <= 5_000


class BusyMirror:
    """One whose relay has not come to any unit yet."""

    def __init__(self) -> None:
        self.on_filled: Filled | None = None
        self.looked: list[str] = []
        self.held: dict[str, MirroredUnit] = {}
        self.mirror_origin = "redis"

    def find_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> FoundUnits:
        self.looked += names
        found = {name: self.held[name] for name in names if name in self.held}
        return FoundUnits(MirrorState(position, lazy=LAZY, relay="the-relay"), found)

    def want_units(self, names: Sequence[str], *, timeout_s: float) -> None:
        pass


def test_a_relay_that_fills_others_is_waited_for_a_while_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_reader, "FILLED_WITHIN_S", 0.3)
    now_s, mirror = [100.0], BusyMirror()
    units, position = LazyUnits(LAZY, Schemas({}), UnitCache()), Position("one", 1)
    units.take(Publication(Snapshot(revision=1, incarnation="one", origin="redis"), None, (), position))
    reader = UnitReader(MemoryStore(lazy=LAZY), units, mirrored=mirror, clock=lambda: now_s[0])
    assert mirror.on_filled is not None
    first = reader._read(["tenants/a", "tenants/b"])
    assert [each.until_s for each in first.values()] == pytest.approx([100.3, 100.3])
    for filled_at_s, until_s in ((100.25, 100.55), (100.5, 100.8), (100.75, 101.0)):
        now_s[0] = filled_at_s
        mirror.on_filled(["tenants/other"])
        now_s[0] = filled_at_s + 0.1
        assert reader._read(["tenants/a"])["tenants/a"].until_s == pytest.approx(until_s)
    assert mirror.looked == ["tenants/a", "tenants/b"]
    assert reader.units_read["authority"] == 0
    now_s[0] = 101.0  # and no longer, whatever else it fills
    mirror.on_filled(["tenants/other"])
    reader._read(["tenants/a"])
    wait_until(lambda: reader.units_read["authority"] == 1, WITHIN_S, reason="the authority to be asked")
    reader.close(timeout_s=WITHIN_S)


def test_looks_at_the_mirror_wait_for_company_only_while_fills_are_awaited_and_by_what_those_take() -> None:
    now_s, mirror = [100.0], BusyMirror()
    units, position = LazyUnits(LAZY, Schemas({}), UnitCache()), Position("one", 1)
    units.take(Publication(Snapshot(revision=1, incarnation="one", origin="redis"), None, (), position))
    reader = UnitReader(MemoryStore(lazy=LAZY), units, mirrored=mirror, clock=lambda: now_s[0])
    assert reader._pause_s() == 0
    reader._read(["tenants/a"])
    assert reader._pause_s() == unit_reader.PAUSE_MOST_S  # as nobody knows yet how long fills take
    now_s[0] += 0.04
    mirror.held["tenants/a"] = MirroredUnit(RawUnit(()), 1, 1)
    assert isinstance(reader._read(["tenants/a"])["tenants/a"], Unit)
    assert reader._pause_s() == 0
    reader._read(["tenants/b"])
    assert reader._pause_s() == pytest.approx(0.01)
    reader.close(timeout_s=WITHIN_S)


class HeldStore(MemoryStore):
    """Answers for units once it is let go."""

    def __init__(self) -> None:
        super().__init__(lazy=LAZY)
        self.asked, self.let_go = threading.Event(), threading.Event()

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> dict[str, RawUnit]:
        self.asked.set()
        assert self.let_go.wait(WITHIN_S)
        return {name: RawUnit(()) for name in names}


def test_what_the_authority_brings_when_nobody_waits_any_more_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_reader, "FILLED_WITHIN_S", 0.3)
    now_s, store = [100.0], HeldStore()
    units, position = LazyUnits(LAZY, Schemas({}), UnitCache()), Position("one", 1)
    units.take(Publication(Snapshot(revision=1, incarnation="one", origin="redis"), None, (), position))
    reader = UnitReader(store, units, mirrored=BusyMirror(), clock=lambda: now_s[0])
    reader._read(["tenants/a"])
    now_s[0] = 100.4
    reader._read(["tenants/a"])
    assert store.asked.wait(WITHIN_S)
    now_s[0] = 200.0
    reader._read(["tenants/b"])
    assert reader._awaited.keys() == {"tenants/b"}
    brought = reader._brought
    store.let_go.set()
    reader.close(timeout_s=WITHIN_S)  # it waits for that, and begins with others
    assert units.held == 1, "what came late is held all the same"
    assert brought == {}


def test_a_worker_that_may_only_read_the_mirror_and_want(
    relay: ConfigClient, connect: Open, redis: RedisServer
) -> None:
    reading = ["+get", "+time", "+exists", "+hmget", "+hscan", "+xrange", "+xread", "+xrevrange", "+hgetall"]
    asking = ["%RW~veltrix:{shop}:wanted", "+rpush", "+ltrim", "+pexpire"]
    for name, rules in (("asker", asking), ("reader", [])):
        redis.run("ACL", "SETUSER", name, "on", ">pw", "resetkeys", "-@all", "%R~veltrix:{shop}:*", *reading, *rules)
    relay.put("tenants/acme/a", 1)
    asker, mere = (
        connect(mirror=f"redis://{name}:pw@127.0.0.1:{redis.port}/0", relay="auto") for name in ("asker", "reader")
    )
    for worker in (asker, mere):
        wait_until(lambda worker=worker: follows_mirror(worker), WITHIN_S, reason="the mirror to be followed")
    assert mere.view().fetch("tenants/acme/a") == 1
    assert units_read(mere) == {"mirror": 0, "authority": 1, "wanted": 0}
    assert asker.view().fetch("tenants/acme/a") == 1
    assert units_read(asker) == {"mirror": 1, "authority": 0, "wanted": 1}
    assert mere.view().fetch("tenants/acme/a") == 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
def test_units_come_by_a_mirror_of_several_servers_also_after_another_one_took_over(connect: Open, kind: str) -> None:
    with sentinel_set() if kind == "sentinel" else cluster_set() as servers, contextlib.ExitStack() as stack:
        relay = connect(mirror=servers.url, relay="auto", instance="the-relay")
        relay.write([Put("eager", 1), *(Put(f"tenants/t{number}/a", number) for number in range(50))])
        wait_until(lambda: follows_mirror(relay), WITHIN_S, reason="the mirror to be filled")
        worker = connect(mirror=servers.url)
        stack.callback(lambda: [client.close() for client in (worker, relay)])  # before their servers
        worker.wait_for(relay.view().revision, WITHIN_S)
        assert worker.view().fetch("tenants/t0/a") == 0
        assert units_read(worker) == {"mirror": 1, "authority": 0, "wanted": 1}

        entries = "veltrix:{shop}:entries"
        old = servers.owner_of(entries)
        if isinstance(servers, SentinelSet):
            old.kill()
            new = servers.wait_replaced(old)
        else:
            new = servers.another(old)
            servers.move(slot_of(entries), old, new)
        worker.wait_for(relay.put("eager", 2), WITHIN_S)
        units = iter(range(1, 50))

        def comes_by_mirror() -> bool:
            before, number = units_read(worker)["mirror"], next(units)
            assert worker.view().fetch(f"tenants/t{number}/a") == number
            return units_read(worker)["mirror"] > before and bool(new.run("EXISTS", f"{UNIT}tenants/t{number}"))

        # The relay may be on its way to the new one yet: then a unit is read from the authority.
        wait_until(comes_by_mirror, WITHIN_S, reason="a unit to come by the new one", interval_s=0.5)


def test_names_that_anybody_may_want_harm_nobody(relay: ConfigClient, connect: Open, redis: RedisServer) -> None:
    redis.run("RPUSH", "veltrix:{shop}:wanted", "../x", "tenants/", "eager", "tenants/a/b", b"\xff\xfe", "", "users/1")
    wait_until(lambda: redis.run("EXISTS", f"{UNIT}users/1"), WITHIN_S, reason="the one unit among them to be filled")
    assert redis.run("KEYS", f"{UNIT}*") == [f"{UNIT}users/1".encode()]
    assert connect().view().fetch("users/1", None) is None


def test_a_worker_with_more_lazy_prefixes_reads_those_from_the_authority(relay: ConfigClient, connect: Open) -> None:
    relay.put("more/acme/a", 1)
    worker = connect(lazy=(*LAZY, "more/"))
    worker.wait_for(relay.view().revision, WITHIN_S)
    assert worker.view().fetch("more/acme/a") == 1
    assert units_read(worker) == {"mirror": 0, "authority": 1, "wanted": 0}
    worker.wait_for(relay.put("more/acme/a", 2), WITHIN_S)
    assert worker.view().fetch("more/acme/a") == 2


def test_in_a_storm_of_writes_and_reads_each_view_reads_its_own_revision(
    relay: ConfigClient, connect: Open, redis: RedisServer
) -> None:
    units = [f"tenants/{name}" for name in "abc"] + ["users/1"]
    keys = [f"{unit}/x" for unit in units] + [f"{unit}/y" for unit in units] + units
    history: dict[int, dict[str, Any]] = {}
    written = threading.Event()
    ends_s = time.monotonic() + 5
    faults: list[str] = []
    checked: list[int] = []
    # All revisions are this writer's own, one after the other; what a view reads is judged once it has ended.
    seen: list[tuple[int, str, dict[str, Any]]] = []

    def write() -> None:
        chance, state = random.Random(1), dict[str, Any]()
        while time.monotonic() < ends_s:
            changes: dict[str, Any] = {key: chance.random() for key in chance.sample(keys, 2)}
            gone = chance.choice(keys)
            if gone in state and gone not in changes:
                changes[gone] = MISSING
            changes["eager"] = chance.random()
            revision = relay.write(
                [Delete(key) if value is MISSING else Put(key, value) for key, value in changes.items()]
            )
            state = {key: value for key, value in {**state, **changes}.items() if value is not MISSING}
            history[revision] = state
            written.set()

    def read(client: ConfigClient, seed: int) -> None:
        chance, cache = random.Random(seed), client._views.units
        assert cache is not None
        try:
            while time.monotonic() < ends_s:
                view = client.view()
                if chance.random() < 0.3:
                    cache._cache.clear()
                if chance.random() < 0.1:
                    redis.run("DEL", f"{UNIT}{chance.choice(units)}")
                for unit in chance.sample(units, 2):
                    mine = [key for key in keys if key == unit or key.startswith(f"{unit}/")]
                    seen.append((view.revision, unit, dict(view.fetch_many(mine))))
        except Exception as exc:
            faults.append(repr(exc))

    threads = [threading.Thread(target=write)]
    workers = [connect() for _ in range(2)]
    threads[0].start()
    assert written.wait(WITHIN_S)
    for worker in workers:
        worker.wait_for(min(history), WITHIN_S)
    threads += [threading.Thread(target=read, args=(worker, seed)) for seed, worker in enumerate([*workers, *workers])]
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S)
    assert not faults
    for revision, unit, found in seen:
        if revision in history:
            of_unit = {k: v for k, v in history[revision].items() if k == unit or k.startswith(f"{unit}/")}
            assert found == of_unit, (revision, unit)
            checked.append(revision)
    read_from = units_read(*workers)
    assert len(checked) > 100
    assert read_from["mirror"] > 100, read_from
    assert filled(relay) > 20
