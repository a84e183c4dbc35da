"""What an SDK is told of real stores: whose child each call is, what links to what, and what is not told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from tests.support.etcd_servers import EtcdCluster, etcd
from tests.support.redis_servers import RedisServer, redis_server
from tests.support.sdk import Sdk
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, RevisionTimeout, StoreUnavailable
from veltrix_mw.stores.memory import MemoryStore

WITHIN_S = 30.0
LIMIT = "tenants/acme/limit"


@pytest.fixture
def sdk() -> Iterator[Sdk]:
    made = Sdk()
    yield made
    made.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


Start = Callable[..., ConfigClient]


@pytest.fixture
def start(sdk: Sdk) -> Iterator[Start]:
    clients: list[ConfigClient] = []

    def start(url: Any, **options: Any) -> ConfigClient:
        providers = {"tracer_provider": sdk.tracer_provider, "meter_provider": sdk.meter_provider}
        client = ConfigClient(url, **providers, **options)  # type: ignore[arg-type]
        clients.append(client)
        client.start()
        client.wait_ready(WITHIN_S)
        return client

    yield start
    for client in clients:
        client.close()


def url_of(cluster: EtcdCluster, namespace: str) -> str:
    return f"etcd://{','.join(f'{host}:{port}' for host, port in cluster.hosts)}/{namespace}"


def children(sdk: Sdk, parent: ReadableSpan) -> list[ReadableSpan]:
    return [span for span in sdk.spans() if span.parent == parent.get_span_context()]


def fetches(sdk: Sdk) -> list[ReadableSpan]:
    return [span for span in sdk.spans("veltrix.fetch") if "veltrix.unit_count" in (span.attributes or {})]


def call(system: str, operation: str, namespace: str, address: tuple[str, int], **more: Any) -> dict[str, Any]:
    return {
        "db.system.name": system, "db.operation.name": operation, "db.namespace": namespace,
        "server.address": address[0], "server.port": address[1], **more,
    }  # fmt: skip


def test_a_cold_fetch_is_the_requests_child_and_the_calls_are_the_fetchs(
    sdk: Sdk, start: Start, cluster: EtcdCluster
) -> None:
    client = start(url_of(cluster, "cold"), lazy=("tenants/",))
    client.wait_for(client.put(LIMIT, 5), WITHIN_S)
    sdk.exporter.clear()
    with sdk.app.start_as_current_span("GET /") as request:
        assert client.view().fetch(LIMIT) == 5
    (fetch,) = fetches(sdk)
    assert (fetch.parent, fetch.kind, fetch.links) == (request.get_span_context(), SpanKind.INTERNAL, ())
    assert fetch.attributes == {
        "veltrix.unit_count": 1, "veltrix.prefix": "tenants/", "veltrix.result": "miss", "veltrix.origin": "etcd",
    }  # fmt: skip
    calls = children(sdk, fetch)
    assert [(span.name, span.kind, span.links) for span in calls] == [("Txn cold", SpanKind.CLIENT, ())]
    assert calls[0].attributes == call("etcd", "Txn", "cold", cluster.hosts[0])
    assert client.view().fetch("tenants/none/limit", default=0) == 0
    assert fetches(sdk)[-1].attributes["veltrix.result"] == "absent"  # type: ignore[index]


def test_of_a_herd_one_leads_and_each_other_links_to_it(sdk: Sdk, start: Start, cluster: EtcdCluster) -> None:
    client = start(url_of(cluster, "herd"), lazy=("tenants/",), fetch_timeout_s=WITHIN_S)
    client.wait_for(client.put(LIMIT, 5), WITHIN_S)
    sdk.exporter.clear()
    (member,) = cluster.members

    async def herd() -> list[object]:
        view = client.view()
        tasks = [asyncio.create_task(view.renew().afetch(LIMIT)) for _ in range(50)]
        # Each runs without a break from the start of its span to where it waits.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cluster.resume(member)
        return await asyncio.gather(*tasks)

    cluster.pause(member)
    try:
        with sdk.app.start_as_current_span("crawl"):
            assert asyncio.run(herd()) == [5] * 50
    finally:
        cluster.resume(member)
    leaders = [span for span in fetches(sdk) if span.attributes["veltrix.result"] == "miss"]  # type: ignore[index]
    followers = [span for span in fetches(sdk) if span.attributes["veltrix.result"] == "coalesced"]  # type: ignore[index]
    assert (len(leaders), len(followers)) == (1, 49)
    led = leaders[0].get_span_context()
    assert all([link.context for link in span.links] == [led] for span in followers)
    assert {span.attributes["veltrix.origin"] for span in followers} == {"etcd"}  # type: ignore[index]
    calls = [span for span in sdk.spans() if span.kind is SpanKind.CLIENT]
    assert calls
    assert all(span.parent == led for span in calls)


def test_a_batch_is_the_child_of_one_fetch_and_linked_to_the_others(
    sdk: Sdk, start: Start, cluster: EtcdCluster
) -> None:
    client = start(url_of(cluster, "batch"), lazy=("tenants/",), fetch_timeout_s=WITHIN_S)
    client.wait_for(client.put(LIMIT, 5), WITHIN_S)
    sdk.exporter.clear()
    (member,) = cluster.members

    async def two_while_another_is_called_for() -> None:
        view = client.view()
        first = asyncio.create_task(view.renew().afetch("tenants/first/x", None))
        reader = client._views.reader
        assert reader is not None
        while not reader._batcher._calling:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(view.renew().afetch(f"tenants/{name}/x", None)) for name in "ab"]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cluster.resume(member)
        await asyncio.gather(first, *others)

    cluster.pause(member)
    try:
        asyncio.run(two_while_another_is_called_for())
    finally:
        cluster.resume(member)
    linked = [span for span in sdk.spans() if span.kind is SpanKind.CLIENT and span.links]
    spans = {span.get_span_context().span_id: span for span in fetches(sdk)}
    assert len(spans) == 3
    for span in linked:
        assert span.parent is not None
        assert {span.parent.span_id, *(link.context.span_id for link in span.links)} < set(spans)
    assert linked


def test_a_fetch_that_fails_says_so_and_so_does_each_call(sdk: Sdk, start: Start) -> None:
    with etcd() as own:
        client = start(url_of(own, "gone"), lazy=("tenants/",), fetch_timeout_s=1.0)
        client.wait_for(client.put("a", 1), WITHIN_S)
        sdk.exporter.clear()
        own.kill(own.members[0])
        with pytest.raises(StoreUnavailable):
            client.view().fetch(LIMIT)
    (fetch,) = fetches(sdk)
    assert (fetch.status.status_code, fetch.attributes["veltrix.result"]) == (StatusCode.ERROR, "error")  # type: ignore[index]
    assert fetch.attributes["error.type"] == "StoreUnavailable"  # type: ignore[index]
    calls = children(sdk, fetch)
    assert calls
    assert {(span.status.status_code, span.attributes["error.type"]) for span in calls} == {  # type: ignore[index]
        (StatusCode.ERROR, "StoreUnavailable")
    }
    durations = sdk.points("db.client.operation.duration")
    assert any(("error.type", "StoreUnavailable") in attributes for attributes in durations)


def test_a_write_leads_to_each_process_that_took_it(sdk: Sdk, start: Start, cluster: EtcdCluster) -> None:
    client = start(url_of(cluster, "write"))
    with sdk.app.start_as_current_span("POST /") as request:
        client.wait_for(client.put("a", 1), WITHIN_S)
    written = sdk.span("veltrix.write")
    assert written.parent == request.get_span_context()
    assert {(span.name, span.kind) for span in children(sdk, written)} >= {("Txn write", SpanKind.CLIENT)}

    def taken() -> list[ReadableSpan]:
        return [span for span in sdk.spans("veltrix.refresh") if span.links]

    (took,) = wait_until(taken, WITHIN_S, reason="the refresh that took the write ends")
    assert [(link.context.trace_id, link.context.span_id) for link in took.links] == [
        (written.get_span_context().trace_id, written.get_span_context().span_id)
    ]
    assert took.parent is None


def test_a_wait_for_a_revision_is_told_and_no_wait_is_not(sdk: Sdk, start: Start) -> None:
    client = start(MemoryStore())
    client.wait_for(client.put("a", 1), WITHIN_S)
    sdk.exporter.clear()
    client.wait_for(1, WITHIN_S)
    assert sdk.spans("veltrix.fetch") == []
    with pytest.raises(RevisionTimeout):
        client.wait_for(2, 0.01)
    waited = sdk.span("veltrix.fetch")
    assert waited.attributes == {
        "veltrix.revision": 2, "veltrix.result": "error", "error.type": "RevisionTimeout",
    }  # fmt: skip


def test_with_a_mirror_it_is_told_which_tier_brought_what(
    sdk: Sdk, start: Start, cluster: EtcdCluster, redis: RedisServer
) -> None:
    client = start(url_of(cluster, "mirrored"), mirror=redis.url, lazy=("tenants/",))
    client.wait_for(client.put(LIMIT, 5), WITHIN_S)

    def follows_the_mirror() -> bool:
        return any(tier.role == "mirror" and tier.state == "following" for tier in client.status().tiers)

    wait_until(follows_the_mirror, WITHIN_S, reason="the mirror is followed")
    assert client.view().fetch(LIMIT) == 5
    (fetch,) = fetches(sdk)
    assert fetch.attributes["veltrix.origin"] == "redis"  # type: ignore[index]
    calls = children(sdk, fetch)
    assert {span.attributes["db.system.name"] for span in calls} == {"redis"}  # type: ignore[index]
    assert {span.attributes["server.port"] for span in calls} == {redis.port}  # type: ignore[index]
    assert all(span.name == f"{span.attributes['db.operation.name']} mirrored" for span in calls)  # type: ignore[index]
    told = {dict(attributes)["db.system.name"] for attributes in sdk.points("db.client.operation.duration")}
    assert told == {"etcd", "redis"}


def test_following_has_no_span_of_a_call_that_nobody_waits_for(
    sdk: Sdk, start: Start, cluster: EtcdCluster, redis: RedisServer
) -> None:
    client = start(url_of(cluster, "quiet"), mirror=redis.url)

    def confirmed() -> bool:
        return sum(count for count, _ in sdk.points("db.client.operation.duration").values()) >= 20

    wait_until(confirmed, WITHIN_S, reason="there were calls in the background")
    assert client.status().ready
    spans = {span.get_span_context().span_id: span for span in sdk.spans()}
    orphans = [span.name for span in spans.values() if span.kind is SpanKind.CLIENT and span.parent is None]
    assert orphans == []
    assert {span.name for span in spans.values() if span.parent is None} <= {"veltrix.refresh"}


def test_a_failover_is_counted(sdk: Sdk, start: Start) -> None:
    with etcd(3) as cluster:
        client = start(url_of(cluster, "moved"))
        before = client._stats.failovers  # a cluster that has just begun may have a member that is not ready
        (used,) = [each for each in cluster.members if each.host == client._authority._members._here().used]  # type: ignore[attr-defined]
        cluster.kill(used)

        def counted() -> bool:
            return bool(sdk.points("veltrix.failovers")[("veltrix.namespace", "moved"),] > before)

        wait_until(counted, WITHIN_S, reason="calls go to another member, and that is counted")


def test_drivers_instrumentations_are_told_to_keep_still(start: Start) -> None:
    told: set[object] = set()

    class Listening(MemoryStore):
        def confirm(self, *arguments: Any, **options: Any) -> Any:
            told.add(otel_context.get_value("suppress_instrumentation"))
            return super().confirm(*arguments, **options)

        def commit(self, *arguments: Any, **options: Any) -> Any:
            told.add(otel_context.get_value("suppress_instrumentation"))
            return super().commit(*arguments, **options)

    client = start(Listening())
    client.put("a", 1)
    wait_until(lambda: told, WITHIN_S, reason="a call was made")
    assert told == {True}
    assert otel_context.get_value("suppress_instrumentation") is None
