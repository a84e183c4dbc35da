"""What is exported of a request in each framework, beside all of OpenTelemetry's instrumentations that it may meet.

A process a framework goes through the scenes (`traced_process`); the tests state all that each of them exported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.support.etcd_servers import etcd
from tests.support.planted import PASSWORD, TENANT, secret_in
from tests.support.redis_servers import redis_server
from tests.support.serving import ROOT
from tests.telemetry.traced_process import HERD, USER

Span = dict[str, Any]

RUNS: Final = [
    *((framework, "gateway") for framework in ("asgi", "wsgi", "flask", "django", "starlette", "fastapi")),
    *((framework, store) for framework in ("flask", "starlette") for store in ("grpc", "mirrored")),
]
ROUTED: Final = {"flask": "/cold/<tenant>", "django": "cold/<str:tenant>"}  # others: /cold/{tenant}, the bare ones none
READS: Final = {"veltrix.revision", "veltrix.origin", "veltrix.stale", "veltrix.lookup.count", "veltrix.lookup.total"}


class Told:
    """What one run exported."""

    def __init__(self, framework: str, store: str, namespace: str, told: dict[str, Any], text: str) -> None:
        self.framework, self.store, self.namespace = framework, store, namespace
        self.metrics: dict[str, list[tuple[dict[str, Any], Any]]] = told.pop("metrics")
        self.lost: int | None = told.pop("lost", None)
        self.leaks: list[str] = told.pop("leaks")
        self.text = text
        self.scenes = told
        self.origin = "redis" if store == "mirrored" else "etcd"

    def statuses(self, scene: str) -> list[int]:
        found: list[int] = self.scenes[scene]["statuses"]
        return found

    def spans(self, scene: str, name: str | None = None) -> list[Span]:
        """Ours and the servers': what the instrumentation of ASGI tells of messages is left out."""
        return [
            span
            for span in self.scenes[scene]["spans"]
            if not span["name"].endswith((" http send", " http receive")) and name in {None, span["name"]}
        ]

    def servers(self, scene: str) -> list[Span]:
        return [span for span in self.spans(scene) if span["kind"] == "SERVER"]

    def below(self, scene: str, parent: Span) -> list[Span]:
        return [span for span in self.spans(scene) if span["parent"] == parent["id"]]

    def points(self, metric: str) -> dict[tuple[tuple[str, Any], ...], Any]:
        return {tuple(sorted(attributes.items())): value for attributes, value in self.metrics[metric]}


@pytest.fixture(scope="module")
def ports() -> Iterator[tuple[int, int]]:
    with etcd(options=["--bcrypt-cost=4"]) as cluster, redis_server("--requirepass", PASSWORD) as redis:
        cluster.turn_auth_on(**{USER: PASSWORD})
        cluster.grant(USER, "")
        yield cluster.hosts[0][1], redis.port


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def told(request: pytest.FixtureRequest, ports: tuple[int, int]) -> Told:
    framework, store = request.param
    namespace = f"{framework}-{store}"
    command = [sys.executable, "-m", "tests.telemetry.traced_process", framework, store, namespace, *map(str, ports)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return Told(framework, store, namespace, json.loads(done.stdout), done.stdout + done.stderr)


def cost(span: Span) -> dict[str, Any]:
    """What the span says of config, without its times and revision."""
    found = {name: value for name, value in span["attributes"].items() if name.startswith("veltrix.")}
    assert found.keys() == READS
    assert found.pop("veltrix.lookup.total") > 0
    assert found.pop("veltrix.revision") > 0
    return found


def test_a_hot_request_is_attributes_on_the_servers_span_and_nothing_else(told: Told) -> None:
    assert told.statuses("hot") == [200]
    [server] = told.spans("hot")
    assert (server["kind"], server["parent"]) == ("SERVER", None)
    assert cost(server) == {"veltrix.origin": told.origin, "veltrix.stale": False, "veltrix.lookup.count": 3}


def test_a_cold_fetch_is_the_servers_child_and_the_stores_call_the_fetchs(told: Told) -> None:
    assert told.statuses("cold") == [200]
    [server] = told.servers("cold")
    [fetch] = told.below("cold", server)
    assert (fetch["scope"], fetch["name"], fetch["kind"], fetch["status"]) == (
        "veltrix_mw", "veltrix.fetch", "INTERNAL", "UNSET",
    )  # fmt: skip
    assert fetch["attributes"] == {
        "veltrix.unit_count": 1, "veltrix.prefix": "tenants/", "veltrix.result": "miss", "veltrix.origin": told.origin,
    }  # fmt: skip
    assert fetch["links"] == []
    calls = told.below("cold", fetch)
    assert calls
    assert {(call["scope"], call["kind"], call["status"]) for call in calls} == {("veltrix_mw", "CLIENT", "UNSET")}
    systems = {call["attributes"]["db.system.name"] for call in calls}
    assert systems == {told.origin}
    if told.origin == "etcd":
        assert [call["name"] for call in calls] == [f"Txn {told.namespace}"]
    for call in calls:
        operation = call["attributes"]["db.operation.name"]
        assert call["name"] == f"{operation} {told.namespace}"
        assert {"db.namespace", "server.address", "server.port"} <= call["attributes"].keys()
    assert cost(server)["veltrix.lookup.count"] == 1
    assert len(told.spans("cold")) == 2 + len(calls), "no instrumentation of a driver tells of a call again"


def test_the_server_span_keeps_its_route(told: Told) -> None:
    [server] = told.servers("cold")
    route = None if told.framework in {"asgi", "wsgi"} else ROUTED.get(told.framework, "/cold/{tenant}")
    assert server["attributes"].get("http.route") == route


def test_of_a_herd_one_leads_and_each_other_links_to_it(told: Told) -> None:
    assert told.statuses("herd") == [200] * HERD
    servers, fetches = told.servers("herd"), told.spans("herd", "veltrix.fetch")
    assert (len(servers), len(fetches)) == (HERD, HERD)
    assert {fetch["parent"] for fetch in fetches} == {server["id"] for server in servers}, "each has its own"
    [leader] = [fetch for fetch in fetches if fetch["attributes"]["veltrix.result"] == "miss"]
    for fetch in fetches:
        if fetch is not leader:
            assert (fetch["attributes"]["veltrix.result"], fetch["links"]) == ("coalesced", [leader["id"]])
            assert told.below("herd", fetch) == []
    calls = [span for span in told.spans("herd") if span["kind"] == "CLIENT"]
    assert calls
    assert {call["parent"] for call in calls} == {leader["id"]}


def test_a_write_is_linked_to_by_what_applied_it(told: Told) -> None:
    [job], [write] = told.spans("write", "job"), told.spans("write", "veltrix.write")
    assert (write["parent"], write["kind"], write["attributes"].keys()) == (
        job["id"], "INTERNAL", {"veltrix.revision"},
    )  # fmt: skip
    calls = told.below("write", write)
    assert {(call["kind"], call["attributes"]["db.system.name"]) for call in calls} == {("CLIENT", "etcd")}
    [refresh] = [span for span in told.spans("write", "veltrix.refresh") if span["links"] == [write["id"]]]
    assert refresh["parent"] is None
    assert refresh["trace"] != write["trace"]
    assert refresh["attributes"] == {
        "veltrix.refresh.kind": "watch",
        "veltrix.origin": told.origin,
        "veltrix.revision": write["attributes"]["veltrix.revision"],
        "veltrix.changes": 1,
    }


def test_in_a_failover_the_call_is_made_again_at_another_member(told: Told) -> None:
    if told.store == "mirrored":
        assert "failover" not in told.scenes
        return
    assert told.statuses("failover") == [200]
    [server] = told.servers("failover")
    [fetch] = told.below("failover", server)
    assert (fetch["status"], fetch["attributes"]["veltrix.result"]) == ("UNSET", "miss")
    *failed, done = told.below("failover", fetch)
    assert done["status"] == "UNSET"
    assert done["attributes"]["server.port"] != told.lost
    assert {(call["status"], call["attributes"]["server.port"]) for call in failed} == {("ERROR", told.lost)}
    assert told.points("veltrix.failovers")[("veltrix.namespace", told.namespace),] >= 1


def test_a_store_that_fails_is_told_on_the_fetch_and_each_call_and_not_on_the_servers_span(told: Told) -> None:
    if told.store == "mirrored":
        assert "failing" not in told.scenes
        return
    assert told.statuses("failing") == [503]
    [server] = told.servers("failing")
    assert "error.type" not in server["attributes"] or server["attributes"]["error.type"] == "503"
    [fetch] = told.below("failing", server)
    assert (fetch["status"], fetch["events"]) == ("ERROR", ["exception"])
    assert fetch["attributes"]["veltrix.result"] == "error"
    assert fetch["attributes"]["error.type"] == "StoreUnavailable"
    calls = told.below("failing", fetch)
    assert calls
    assert {(call["kind"], call["status"], call["attributes"]["error.type"]) for call in calls} == {
        ("CLIENT", "ERROR", "StoreUnavailable")
    }


def test_what_follows_is_nobodys_child_and_tells_of_no_call(told: Told) -> None:
    requests = {"veltrix.fetch", "veltrix.write"}
    for scene in told.scenes:
        spans = told.spans(scene)
        scopes = {span["scope"] for span in spans}
        assert not {scope for scope in scopes if scope.endswith((".redis", ".urllib3", ".grpc", ".threading"))}
        by_id = {span["id"]: span for span in spans}
        for span in spans:
            if span["name"] == "veltrix.refresh":
                assert span["parent"] is None
            elif span["kind"] == "CLIENT":
                assert by_id[span["parent"]]["name"] in requests, "no call of the watch, nor of a confirmation"


def test_no_other_span_has_what_config_cost(told: Told) -> None:
    for scene in told.scenes:
        for span in told.scenes[scene]["spans"]:
            if span["kind"] != "SERVER":
                assert "veltrix.lookup.count" not in span["attributes"]


def test_the_metrics_count_what_the_spans_tell(told: Told) -> None:
    ours = [span for scene in told.scenes for span in told.spans(scene, "veltrix.fetch")]
    results = Counter(span["attributes"]["veltrix.result"] for span in ours if "veltrix.prefix" in span["attributes"])
    counted = {dict(at)["veltrix.result"]: count for at, count in told.points("veltrix.fetches").items()}
    assert {result: count for result, count in counted.items() if count} == dict(results)
    recorded = Counter[str]()
    for at, (count, total_s) in told.points("veltrix.fetch.duration").items():
        assert total_s > 0
        if dict(at)["veltrix.result"] != "hit":  # a wait for a revision
            recorded[dict(at)["veltrix.result"]] += count
    assert recorded == results
    servers = sum(len(told.servers(scene)) for scene in told.scenes)
    requests = sum(count for count, _ in told.points("veltrix.lookup.duration").values())
    assert requests == servers + 1, "and the one before the scenes"
    assert told.points("veltrix.views")[("veltrix.namespace", told.namespace),] >= requests
    assert told.points("veltrix.propagation.duration")[()][0] >= 1
    assert told.points("veltrix.refresh.duration")[()][0] >= 1


def test_no_metric_names_a_key_a_tenant_or_a_revision(told: Told) -> None:
    allowed = {
        "veltrix.namespace", "veltrix.origin", "veltrix.result", "error.type", "db.system.name", "db.operation.name",
        "db.namespace", "server.address", "server.port",
    }  # fmt: skip
    names = {name for name in told.metrics if name.startswith(("veltrix.", "db."))}
    assert {"veltrix.lookup.duration", "veltrix.fetch.duration", "db.client.operation.duration"} <= names
    for name in names:
        for attributes, _ in told.metrics[name]:
            assert attributes.keys() <= allowed


def test_no_value_password_nor_tenant_is_told(told: Told) -> None:
    assert TENANT in told.text, "the servers' own spans name the path, so what is looked for was asked for"
    assert told.leaks == []
    assert secret_in(told.text) is None
