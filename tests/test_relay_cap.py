"""Invented tenants: whatever many names are wanted, what the servers are asked is bounded, as they count it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.support.etcd_servers import etcd
from tests.support.redis_servers import redis_server
from tests.support.waiting import wait_until
from tests.test_herd import ENTRIES, LOGGING, WANTED, WITHIN_S, Asked
from veltrix_mw import ConfigClient, Put, Snapshot, unit_filler, unit_reader
from veltrix_mw.errors import Overloaded
from veltrix_mw.stores.redis_mirror import RedisMirror
from veltrix_mw.unit_reader import UnitReader

FILLS = 100  # that the relay may make in all, as its rate is none here
DIRECT = 20  # that a worker may read of the authority in all
FILLED = "veltrix:{shop}:filled"


class Fleet:
    """A relay whose rate is used up and comes not back, workers whose is so too, and their servers."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.etcd = stack.enter_context(etcd(options=LOGGING))
        self.redis = stack.enter_context(redis_server())
        self.mirror = RedisMirror("127.0.0.1", self.redis.port, namespace="shop")
        stack.callback(self.mirror.close)
        self.relay = self.client(relay="auto", instance="the-relay")
        self.relay.write([Put("eager", 1), *(Put(f"tenants/{name}/a", 1) for name in ("held", "known", "real"))])
        wait_until(lambda: self.redis.run("EXISTS", ENTRIES), WITHIN_S, reason="the mirror to be filled")

    def client(self, **options: Any) -> ConfigClient:
        url = f"etcd://127.0.0.1:{self.etcd.members[0].port}/shop"
        mirror = f"redis://127.0.0.1:{self.redis.port}/0"
        return self._stack.enter_context(
            ConfigClient(url, mirror=mirror, lazy=("tenants/",), fetch_timeout_s=WITHIN_S, **options)
        )

    def worker(self) -> ConfigClient:
        """One that follows the mirror, and has come to where the relay is."""
        worker = self.client(relay="never")
        worker.wait_for(self.relay.view().revision, WITHIN_S)
        wait_until(
            lambda: any(tier.role == "mirror" and tier.state == "following" for tier in worker.status().tiers),
            WITHIN_S,
            reason="the mirror to be followed",
        )
        return worker

    def want(self, names: Sequence[str]) -> None:
        for at in range(0, len(names), 500):
            self.mirror.want_units(names[at : at + 500], timeout_s=WITHIN_S)

    def until_done(self, known: str) -> None:
        """The relay has come to the end of what is wanted: it announces what is there already."""
        before = self.announced(known)
        self.want([known])
        wait_until(lambda: self.announced(known) > before, WITHIN_S, reason="the last name to be announced")

    def announced(self, name: str) -> int:
        return sum(name.encode() in said[b"units"].split() for _, said in self.redis.client.xrange(FILLED))


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    for module, name, value in (
        (unit_filler, "FILLS_PER_S", 0),
        (unit_filler, "FILLS_AT_ONCE", FILLS),
        (unit_filler, "_FILLED_S", WITHIN_S),
        (unit_reader, "DIRECT_PER_S", 0),
        (unit_reader, "DIRECT_AT_ONCE", DIRECT),
    ):
        monkeypatch.setattr(module, name, value)
    with contextlib.ExitStack() as stack:
        yield Fleet(stack)


def reader(client: ConfigClient) -> UnitReader:
    made = client._views.reader
    assert made is not None
    return made


def invented(count: int, *, since: int = 0) -> list[str]:
    return [f"tenants/invented-{number}" for number in range(since, since + count)]


def test_invented_tenants_cost_the_authority_no_more_than_the_rates_and_others_are_served_on(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unit_reader, "FILLED_WITHIN_S", WITHIN_S)
    worker = fleet.worker()
    assert worker.view().fetch_many(["tenants/held/a", "tenants/known/a"]) == {
        "tenants/held/a": 1,
        "tenants/known/a": 1,
    }
    asked = Asked(fleet.etcd, fleet.redis)

    # Whoever may ask, asks for what there is not. The queue holds no more than so many.
    with caplog.at_level(logging.WARNING, logger="veltrix_mw"):
        for turn in range(3):
            fleet.want(invented(12_000, since=turn * 12_000))
            assert fleet.redis.run("LLEN", WANTED) <= 10_000
            fleet.until_done("tenants/known")
    reads = [name for names in asked.unit_reads() for name in names]
    assert len(reads) == FILLS - 2, "what was held already, and what the relay may read"
    assert all(name.startswith("tenants/invented-") for name in reads)
    assert any(record.getMessage().startswith("veltrix.fills_capped units=") for record in caplog.records)

    # What is held, and what is in the mirror, is served as ever.
    asked = Asked(fleet.etcd, fleet.redis)
    other = fleet.worker()
    assert other.view().fetch("tenants/known/a") == 1
    assert worker.view().fetch("tenants/held/a") == 1
    assert asked.unit_reads() == []
    assert reader(other).units_read == {"mirror": 1, "authority": 0, "wanted": 0}

    # And what is in neither the worker reads itself, once it has waited for the relay.
    monkeypatch.setattr(unit_reader, "FILLED_WITHIN_S", 0.3)
    assert other.view().fetch("tenants/real/a") == 1
    assert asked.unit_reads() == [["tenants/real"]]
    assert reader(other).units_read == {"mirror": 1, "authority": 1, "wanted": 1}


def test_workers_whose_clients_invent_tenants_read_no_more_than_their_own_rates_beside_the_relay(fleet: Fleet) -> None:
    workers = [fleet.worker() for _ in range(2)]
    workers[0].view().fetch("tenants/known/a")
    asked = Asked(fleet.etcd, fleet.redis)
    outcomes = []
    for turn, worker in enumerate(workers):
        names = invented(1_000, since=turn * 1_000)
        outcomes.append(reader(worker).load(names, worker.snapshot))
    refused = [sum(isinstance(each, Overloaded) for each in loaded.values()) for loaded in outcomes]
    served = [sum(isinstance(each, Snapshot) for each in loaded.values()) for loaded in outcomes]
    assert [sum(both) for both in zip(refused, served, strict=True)] == [1_000, 1_000]
    assert all(each > 0 for each in refused)
    reads = sum(len(names) for names in asked.unit_reads())
    assert reads <= FILLS + DIRECT * len(workers)
    assert sum(served) <= reads
    for worker in workers:
        assert worker.view().fetch("tenants/known/a") == 1
