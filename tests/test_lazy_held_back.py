"""What is held back of lazy units: a worker that reads one anew serves the last good value, and says what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.support.etcd_servers import etcd
from tests.support.redis_servers import redis_server
from veltrix_mw import ConfigClient, HeldBack, Snapshot, StoreUnavailable
from veltrix_mw.coalesce.unit_cache import UnitCache
from veltrix_mw.lazy import LazyUnits
from veltrix_mw.protocols import (
    ChangeRecord,
    Filled,
    FoundUnits,
    MirroredUnit,
    MirrorState,
    Position,
    RawOperation,
    RawVersion,
)
from veltrix_mw.rate import Rate
from veltrix_mw.replica import Publication
from veltrix_mw.stores.memory import MemoryStore
from veltrix_mw.unit_reader import UnitReader
from veltrix_mw.validation import Schemas

WITHIN_S = 30.0
LIMIT, ZONE = "tenants/acme/limit", "tenants/acme/zone"
SCHEMAS = {LIMIT: int}


@pytest.fixture(scope="module", params=["sqlite", "etcd", "redis"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('store')}/c.db"
    elif request.param == "redis":
        with redis_server() as redis:
            yield f"redis://127.0.0.1:{redis.port}/0?namespace=shop"
    else:
        with etcd() as cluster:
            yield f"etcd://127.0.0.1:{cluster.members[0].port}/shop"


def worker(url: str, **options: Any) -> ConfigClient:
    return ConfigClient(
        url, **{"lazy": ("tenants/",), "schemas": SCHEMAS, "fetch_timeout_s": WITHIN_S, "relay": "never", **options}
    )


def let_go(client: ConfigClient) -> None:
    """Hold no unit any more."""
    assert client._views.units is not None
    client._views.units._cache.clear()


def test_a_unit_that_is_read_anew_has_the_last_good_value_of_a_key_that_is_held_back(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with ConfigClient(url) as writer, worker(url) as client:
        writer.put(ZONE, "eu")
        client.wait_for(writer.put(LIMIT, 5), WITHIN_S)
        assert client.view().fetch(LIMIT) == 5
        wrong = writer.put(LIMIT, "many")
        client.wait_for(wrong, WITHIN_S)
        assert client.view()[LIMIT] == 5
        for _ in range(2):
            let_go(client)
            assert client.view().fetch_many([LIMIT, ZONE]) == {LIMIT: 5, ZONE: "eu"}
        assert {key: why.revision for key, why in client.status().rejected.items()} == {LIMIT: wrong}
        assert client._stats.rejections == 1
        told = [record for record in caplog.records if record.message.startswith("veltrix.rejected")]
        assert [LIMIT in record.message for record in told] == [True]
        with worker(url) as fresh:
            fresh.wait_for(wrong, WITHIN_S)
            assert fresh.view().fetch(LIMIT) == 5
            assert LIMIT in fresh.status().rejected
            fresh.wait_for(writer.put(LIMIT, 6), WITHIN_S)
            assert fresh.view()[LIMIT] == 6
            assert (fresh.status().rejected, fresh._stats.rejections) == ({}, 1)


def test_a_view_reads_the_value_that_was_good_at_its_own_revision(url: str) -> None:
    with ConfigClient(url) as writer, worker(url) as client:
        writer.put(LIMIT, 5)
        client.wait_for(writer.put(LIMIT, "many"), WITHIN_S)
        early = client.view()
        client.wait_for(writer.put(LIMIT, 7), WITHIN_S)
        client.wait_for(writer.put(LIMIT, "more"), WITHIN_S)
        late = client.view()
        assert (early.fetch(LIMIT), late.fetch(LIMIT)) == (5, 7)


def test_where_no_value_was_ever_good_there_is_the_default_or_it_is_held_back(url: str) -> None:
    with ConfigClient(url) as writer:
        revision = writer.put("tenants/beta/limit", "many")
        with worker(url, schemas={"tenants/beta/limit": int}) as client:
            client.wait_for(revision, WITHIN_S)
            with pytest.raises(HeldBack, match="int"):
                client.view().fetch("tenants/beta/limit", default=3)
        defaults = {"tenants/beta/limit": 4}
        with worker(url, schemas={"tenants/beta/limit": int}, defaults=defaults) as client:
            client.wait_for(revision, WITHIN_S)
            assert client.view().fetch("tenants/beta/limit") == 4


class ForgetfulStore(MemoryStore):
    """Keeps no history, for as long as `forgets`."""

    def __init__(self) -> None:
        super().__init__(lazy=("tenants/",))
        self.forgets = False
        self.asked: list[list[str]] = []

    def history(self, key: str, *, limit: int, timeout_s: float) -> Sequence[RawVersion]:
        if self.forgets:
            raise StoreUnavailable("it forgot")
        return super().history(key, limit=limit, timeout_s=timeout_s)

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> Any:
        self.asked.append(list(names))
        return super().read_units(names, position, timeout_s=timeout_s)

    def write(self, key: str, raw: bytes) -> int:
        return self.commit([RawOperation(key, raw)], ChangeRecord(), timeout_s=WITHIN_S)


def test_a_history_that_cannot_be_read_costs_its_key_alone(caplog: pytest.LogCaptureFixture) -> None:
    store = ForgetfulStore()
    with ConfigClient(store, fetch_timeout_s=WITHIN_S) as client:
        store.write(LIMIT, b"5")
        store.write(LIMIT, b"{")
        client.wait_for(store.write(ZONE, b'"eu"'), WITHIN_S)
        store.forgets = True
        view = client.view()
        with pytest.raises(HeldBack):
            view.fetch(LIMIT)
        assert view[ZONE] == "eu"
        assert "veltrix.history_unread" in caplog.text
        store.forgets = False
        let_go(client)
        assert client.view().fetch(LIMIT) == 5


# --- by a mirror, which keeps the newest of each key


class Mirror:
    """Holds acme as the authority left it."""

    mirror_origin = "redis"

    def __init__(self, store: MemoryStore, position: Position) -> None:
        self.on_filled: Filled | None = None
        self.unit = store.read_units(["tenants/acme"], position, timeout_s=WITHIN_S)["tenants/acme"]

    def find_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> FoundUnits:
        revision = position.revision
        units = {name: MirroredUnit(self.unit, revision, revision) for name in names if name == "tenants/acme"}
        return FoundUnits(MirrorState(position, lazy=("tenants/",), relay="the-relay"), units)

    def want_units(self, names: Sequence[str], *, timeout_s: float) -> None:
        raise AssertionError("the mirror holds it")


@pytest.fixture
def beside() -> Iterator[tuple[UnitReader, ForgetfulStore, Snapshot, LazyUnits]]:
    """A reader beside a mirror that holds a unit with a value that is wrong."""
    store, units = ForgetfulStore(), LazyUnits(("tenants/",), Schemas({}), UnitCache())
    store.write(LIMIT, b"5")
    store.write(ZONE, b'"eu"')
    store.write(LIMIT, b"{")
    position = store.list(timeout_s=WITHIN_S).position
    pinned = Snapshot(revision=position.revision, incarnation=position.incarnation, origin="redis")
    units.take(Publication(pinned, None, (), position))
    mirror = Mirror(store, position)
    store.asked.clear()
    reader = UnitReader(store, units, mirrored=mirror, timeout_s=WITHIN_S, direct_rate=Rate(0, 1))
    yield reader, store, pinned, units
    reader.close(timeout_s=WITHIN_S)


Beside = tuple[UnitReader, ForgetfulStore, Snapshot, LazyUnits]


def test_what_the_mirror_does_not_know_the_authority_remembers(beside: Beside) -> None:
    reader, store, pinned, units = beside
    assert dict(reader.load(["tenants/acme"], pinned)["tenants/acme"]) == {LIMIT: 5, ZONE: "eu"}  # type: ignore[call-overload]
    assert store.asked == [["tenants/acme"]]
    assert units.get("tenants/acme", pinned) is not None
    assert not units._readings


@pytest.mark.parametrize("fault", ["it is away", "its cap was reached"])
def test_a_unit_comes_by_the_mirror_though_the_authority_does_not_say_what_was_good(
    beside: Beside, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, store, pinned, units = beside

    def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("away")

    if fault == "it is away":
        monkeypatch.setattr(store, "read_units", away)
    else:
        assert reader._direct_rate.take()
    found = reader.load(["tenants/acme"], pinned)["tenants/acme"]
    assert isinstance(found, Snapshot)
    assert dict(found) == {ZONE: "eu"}
    assert LIMIT in found.rejected
    assert LIMIT in units.rejected
    assert store.asked == []
    assert not units._readings


def test_a_mirror_s_unit_waits_no_longer_than_a_moment_for_what_the_authority_remembers(
    beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, store, pinned, _ = beside
    now_s = [100.0]
    reader._clock = lambda: now_s[0]
    monkeypatch.setattr(reader, "_direct", _Nobody())
    first = reader._read(["tenants/acme"])["tenants/acme"]
    assert first.until_s == 101.0
    now_s[0] = 101.0
    unit = reader._read(["tenants/acme"])["tenants/acme"]
    assert dict(unit.at(pinned)) == {ZONE: "eu"}
    assert store.asked == []


class _Nobody:
    """A batcher that never answers."""

    def submit(self, *_: Any, **__: Any) -> None:
        pass

    def close(self, *, timeout_s: float) -> None:
        pass
