"""What a client says of its tiers, in the log and in its status: a file as the authority, and Redis as its mirror."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from tests.support.redis_servers import RedisServer, redis_server
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient

WITHIN_S = 30.0


@pytest.fixture(scope="module")
def _server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def redis(_server: RedisServer) -> RedisServer:
    """A Redis that is up and holds nothing."""
    _server.run("FLUSHALL")
    return _server


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store that one key was written to."""
    url = f"sqlite:///{tmp_path}/c.db"
    with ConfigClient(url) as client:
        client.put("k", 1)
    return url


def mirror_url(server: RedisServer) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


def told(caplog: pytest.LogCaptureFixture, event: str) -> list[tuple[str, str]]:
    """The level and the text of each record of that event."""
    return [(one.levelname, one.getMessage()) for one in list(caplog.records) if one.getMessage().startswith(event)]


def follows(client: ConfigClient, role: str) -> bool:
    return any(tier.role == role and tier.state == "following" for tier in client.status().tiers)


def test_a_mirror_that_never_worked_is_told_once_and_its_coming_is_no_warning(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "veltrix_mw")
    with redis_server() as server:
        server.kill()
        with ConfigClient(url, mirror=mirror_url(server)) as client:
            client.wait_ready(WITHIN_S)
            wait_until(lambda: follows(client, "authority"), WITHIN_S, reason="the authority to be followed")
            ((level, text),) = told(caplog, "veltrix.failover")
            assert level == "WARNING"
            assert "the mirror is not followed, and the authority is: " in text
            assert str(server.port) in text
            server.start()
            wait_until(lambda: follows(client, "mirror"), WITHIN_S, reason="the mirror to be followed")
    _, (level, text) = told(caplog, "veltrix.failover")
    assert (level, "the mirror is well, and followed from here on" in text) == ("INFO", True)


def test_a_mirror_that_is_empty_at_a_start_is_no_warning(
    url: str, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "veltrix_mw")
    with ConfigClient(url, mirror=mirror_url(redis)) as client:  # which stands for election, and fills it
        client.put("k", 1)
        client.wait_ready(WITHIN_S)
        wait_until(lambda: follows(client, "mirror"), WITHIN_S, reason="the mirror to be followed")
    (first, text), *others = told(caplog, "veltrix.failover")
    assert "the mirror is not followed, and the authority is: it is empty" in text
    assert {level for level, _ in ((first, text), *others)} == {"INFO"}


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_a_namespace_that_nobody_wrote_to_is_told_and_is_ready_all_the_same(
    kind: str, url: str, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    store = url if kind == "sqlite" else mirror_url(redis)
    with ConfigClient(store, namespace="shop") as client:
        client.put("k", 1)
        client.wait_for(1, WITHIN_S)
        assert client.status().unwritten == client.unwritten() == ""
    caplog.clear()  # it was empty, too, until the write
    with ConfigClient(store, namespace="shpo") as client:
        client.wait_ready(WITHIN_S)
        status = client.status()
        assert status.ready
        assert "nothing was ever written to the namespace 'shpo' at " in status.unwritten
        assert "check the namespace; the first write creates it" in status.unwritten
        assert status.unwritten == status.as_dict()["unwritten"] == client.unwritten()
        client.wait_for(client.put("k", 1), WITHIN_S)
        assert client.status().unwritten == ""
    assert told(caplog, "veltrix.unwritten") == [("WARNING", f"veltrix.unwritten reason={status.unwritten!r}")]


def test_a_memory_store_is_empty_at_first_and_nothing_is_said_of_it(caplog: pytest.LogCaptureFixture) -> None:
    with ConfigClient("memory://") as client:
        client.wait_ready(WITHIN_S)
        assert client.status().unwritten
    assert told(caplog, "veltrix.unwritten") == []


def test_the_authority_beside_a_mirror_is_known_to_hold_what_was_mirrored(url: str, redis: RedisServer) -> None:
    with (
        ConfigClient(url, mirror=mirror_url(redis), instance="relay") as relay,
        ConfigClient(url, mirror=mirror_url(redis), relay="never") as worker,
    ):
        wait_until(lambda: follows(worker, "mirror"), WITHIN_S, reason="the mirror to be followed")
        worker.wait_for(relay.put("k", 2), WITHIN_S)
        authority, mirror = worker.status().tiers
        assert (authority.role, authority.state, authority.revision, authority.lag) == ("authority", "standby", 2, 0)
        assert (mirror.role, mirror.state, mirror.revision) == ("mirror", "following", 2)


def relay_held(reader: InMemoryMetricReader) -> list[float]:
    """The points of the gauge of that name."""
    data = reader.get_metrics_data()
    return [
        point.value  # type: ignore[union-attr]
        for of_resource in (data.resource_metrics if data else ())
        for of_scope in of_resource.scope_metrics
        for metric in of_scope.metrics
        if metric.name == "veltrix.relay.held"
        for point in metric.data.data_points
    ]


def test_a_gauge_tells_whether_a_relay_is_seen_and_nothing_where_there_is_no_mirror(
    url: str, redis: RedisServer
) -> None:
    reader, of_leader, of_lone = InMemoryMetricReader(), InMemoryMetricReader(), InMemoryMetricReader()

    def provider(of: InMemoryMetricReader) -> MeterProvider:
        return MeterProvider([of], shutdown_on_exit=False)

    with (
        ConfigClient(url, mirror=mirror_url(redis), relay="never", meter_provider=provider(reader)) as worker,
        ConfigClient(url, meter_provider=provider(of_lone)) as lone,
    ):
        for client in (worker, lone):
            client.wait_ready(WITHIN_S)
        assert relay_held(reader) == [0]
        with ConfigClient(url, mirror=mirror_url(redis), meter_provider=provider(of_leader)):
            wait_until(lambda: relay_held(of_leader) == [1], WITHIN_S, reason="the relay to know that it leads")
            wait_until(lambda: relay_held(reader) == [1], WITHIN_S, reason="the worker to see the relay")
        wait_until(lambda: relay_held(reader) == [0], WITHIN_S, reason="the worker to miss the relay")
        assert relay_held(of_lone) == []
