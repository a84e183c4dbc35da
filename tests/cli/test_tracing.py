"""`trace`, and the tree that it draws."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from tests.cli.conftest import Shell
from tests.support.etcd_servers import etcd
from tests.support.redis_servers import RedisServer
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient
from veltrix_mw.cli.trace_tree import FinishedSpan, lines, roots, shown_time

Put = Callable[[str, Any], int]

PARTS = ["start", "first_request", "next_request"]


def span(
    name: str, span_id: str, parent_id: str = "", *, start_us: int = 0, end_us: int = 1, links: list[str] | None = None
) -> FinishedSpan:
    linked = [("t", other) for other in links or []]
    return FinishedSpan(name, "internal", "t", span_id, parent_id, 1000 * start_us, 1000 * end_us, {}, linked)


def names(spans: list[Any]) -> list[Any]:
    """Each span's name, with those below it."""
    return [(each["name"], names(each["children"])) if each["children"] else each["name"] for each in spans]


def without_times(text: str) -> list[str]:
    return re.sub(r"\+?\d[\d.]* (µs|ms|s)\b", "TIME", text).splitlines()


def test_each_read_of_both_requests_is_a_line_below_the_request(shell: Shell, put: Put) -> None:
    put("checkout/max_items", 80)
    put("checkout/fast", True)
    assert without_times(shell.ok("trace", "checkout/max_items", "nope")) == [
        "start",
        "  veltrix.refresh  TIME  list, from sqlite, revision 2",
        "first request",
        "  GET /  TIME  from sqlite, revision 2, 2 look-ups, TIME together",
        "  ├─ veltrix.lookup  TIME (TIME)  checkout/max_items, hit",
        "  └─ veltrix.lookup  TIME (TIME)  nope, miss",
        "next request",
        "  GET /  TIME  from sqlite, revision 2, 2 look-ups, TIME together",
        "  ├─ veltrix.lookup  TIME (TIME)  checkout/max_items, hit",
        "  └─ veltrix.lookup  TIME (TIME)  nope, miss",
    ]


def test_without_keys_the_first_five_are_read(shell: Shell, put: Put) -> None:
    for number in range(7):
        put(f"k/{number}", number)
    first = shell.run("trace", "--json").json["first_request"]
    assert [read["attributes"]["veltrix.key"] for read in first[0]["children"]] == [
        f"k/{number}" for number in range(5)
    ]


def test_lazy_units_and_layers_are_fetched_in_the_first_request_alone(shell: Shell, put: Put) -> None:
    put("limit", 1)
    put("tenants/acme/limit", 2)
    put("tenants/other/limit", 3)
    put("users/1/name", "x")
    lazy = ("--lazy", "tenants/", "--lazy", "users/")
    shown = shell.run("trace", *lazy, "--layer", "tenants/acme/", "limit", "users/1/name", "--json").json
    assert list(shown) == PARTS
    assert names(shown["first_request"]) == [("GET /", ["veltrix.fetch", "veltrix.lookup", "veltrix.lookup"])]
    assert shown["first_request"][0]["children"][0]["attributes"]["veltrix.unit_count"] == 2
    assert names(shown["next_request"]) == [("GET /", ["veltrix.lookup", "veltrix.lookup"])]


def test_where_there_is_nothing_to_read_by_itself_it_asks_for_keys(shell: Shell, put: Put) -> None:
    put("tenants/acme/limit", 2)
    done = shell.run("trace", "--lazy", "tenants/")
    assert (done.code, done.out) == (2, "")
    assert "name keys" in done.err
    assert shell.run("trace", "--lazy", "tenants/", "tenants/acme/limit").code == 0


def test_a_mirror_that_is_away_and_an_empty_namespace_are_warned_of(shell: Shell, put: Put, redis: RedisServer) -> None:
    put("k", 1)
    away = shell.run("trace", "--mirror", "redis://127.0.0.1:9/0", "k")
    assert (away.code, "127.0.0.1:9" in away.err) == (0, True)
    empty = shell.run("trace", "--url", f"{redis.url}?namespace=typo", "k")
    assert (empty.code, "typo" in empty.err) == (0, True)


def test_no_value_is_in_it(shell: Shell, put: Put) -> None:
    put("k", "planted-value")
    assert "planted-value" not in shell.ok("trace", "k") + shell.ok("trace", "k", "--json")


def test_calls_to_etcd_and_redis_are_in_it(shell: Shell, redis: RedisServer) -> None:
    with ExitStack() as stack:
        host, port = stack.enter_context(etcd()).hosts[0]
        url = f"etcd://{host}:{port}/shop"
        relay = stack.enter_context(ConfigClient(url, mirror=redis.url, lazy=("tenants/",)))
        relay.wait_for(relay.put("limit", 1))
        relay.put("tenants/acme/limit", 2)
        wait_until(lambda: relay.status().tiers[-1].state == "following", 30, reason="the mirror is fed")
        asked = ("--url", url, "--mirror", redis.url, "--lazy", "tenants/")
        shown = shell.run("trace", *asked, "tenants/acme/limit", "limit", "--json").json
    first = shown["first_request"][0]["children"]
    assert first[0]["name"] == "veltrix.fetch"
    assert first[0]["attributes"]["veltrix.origin"] == "redis"
    calls = [call for call in first[0]["children"] if call["kind"] == "client"]
    assert {call["attributes"]["db.system.name"] for call in calls} == {"redis"}
    assert [refresh["name"] for refresh in shown["start"]][:1] == ["veltrix.refresh"]


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--layer", "no slash"], 4, "tenants/acme/"),
        (["--lazy", "tenants/", "tenants//x"], 4, "a key is one as"),
    ],
)
def test_what_is_no_layer_or_key_is_told(shell: Shell, put: Put, arguments: list[str], code: int, named: str) -> None:
    put("k", 1)
    done = shell.run("trace", *arguments)
    assert (done.code, done.out) == (code, "")
    assert named in done.err


def test_a_store_that_is_away_and_an_sdk_that_is_switched_off_are_told(
    shell: Shell, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = shell.run("trace", "--url", "redis://127.0.0.1:9/0?namespace=shop")
    assert away.code == 5
    assert "127.0.0.1:9" in away.err
    put("k", 1)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    off = shell.run("trace")
    assert off.code == 2
    assert "OTEL_SDK_DISABLED" in off.err


def test_without_the_sdk_it_says_what_to_install(shell: Shell, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put("k", 1)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    done = shell.run("trace")
    assert done.code == 2
    assert 'pip install "veltrix-mw[trace]"' in done.err


def test_a_tree_has_branches_offsets_and_links() -> None:
    spans = [
        span("root", "1", end_us=1500),
        span("a", "2", "1", start_us=10, end_us=20),
        span("b", "3", "2", start_us=12, end_us=15),
        span("c", "4", "1", start_us=30, end_us=2_000_030, links=["2", "elsewhere"]),
        span("other", "5", "unknown"),
    ]
    assert [root.name for root in roots(spans)] == ["root", "other"]
    drawn = [(line.branches, line.name, line.took, line.after, line.details) for line in lines(spans[0], spans)]
    assert drawn == [
        ("", "root", "1.5 ms", "", ""),
        ("├─ ", "a", "10 µs", "+10 µs", ""),
        ("│  └─ ", "b", "3 µs", "+12 µs", ""),
        ("└─ ", "c", "2.00 s", "+30 µs", "links to a, links to a span of trace t"),
    ]


@pytest.mark.parametrize(
    ("time_ns", "shown"),
    [(400, "0 µs"), (999_499, "999 µs"), (999_500, "1.0 ms"), (12_340_000, "12.3 ms"), (999_950_000, "1.00 s")],
)
def test_times_read_well(time_ns: int, shown: str) -> None:
    assert shown_time(time_ns) == shown
