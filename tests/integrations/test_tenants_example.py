"""The example of many tenants: what it answers, what its page says of that, and that the page is safe to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.etcd_servers import etcd
from tests.support.serving import ROOT, Served, serve
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient

WITHIN_S: Final = 60.0
TENANTS: Final = 2_000
APP: Final = "examples.tenants_app:app"
LAZY: Final = ("tenants/", "users/")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'tenants.db'}"


@pytest.fixture
def shop(url: str) -> Iterator[Served]:
    """The app in one process, so that its figures are those of all requests; it has seeded its store."""
    with serve(APP, server="uvicorn", asgi=True, workers=1, env={"VELTRIX_URL": url}, probe="/live/figures") as served:
        with ConfigClient(url, lazy=LAZY) as client:
            client.wait_ready(WITHIN_S)
            seeded = client.snapshot.revision
        wait_until(lambda: figures(served)["revision"] >= seeded, WITHIN_S, reason="all seeds are followed")
        yield served


def figures(served: Served) -> Any:
    return served.get("/live/figures")


def shown(served: Served, region: str, tenant: str) -> tuple[Any, ...]:
    answer = served.get(f"/shop/{region}/{tenant}")
    return tuple(answer[name] for name in ("name", "max_items", "currency", "tax_percent"))


def status_of(served: Served, path: str) -> int:
    try:
        with urllib.request.urlopen(served.url + path, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code


def herd(served: Served, paths: Iterable[str]) -> set[int]:
    """The statuses of requests that are sent sixteen at a time."""
    with ThreadPoolExecutor(16) as pool:
        return set(pool.map(lambda path: status_of(served, path), paths))


def adds_up(*told: Any) -> bool:
    """Whether each request had its units loaded, once, and there were some."""
    loads = sum(sum(each["lazy"]["fetches"].values()) for each in told)
    return sum(each["requests"] for each in told) == loads > 0


def test_a_tenant_lies_over_its_region_and_that_over_the_base(shop: Served, url: str) -> None:
    assert shown(shop, "us", "t0001") == ("Shop 1", 50, "USD", 0), "all of the base"
    assert shown(shop, "eu", "t0001") == ("Shop 1", 50, "EUR", 20), "the region's over the base's"
    assert shown(shop, "uk", "t0001") == ("Shop 1", 50, "GBP", 0), "the region has no tax of its own"
    assert shown(shop, "eu", "acme") == ("Acme", 500, "EUR", 20), "the tenant's over the base's"
    assert shown(shop, "eu", "t0010") == ("Shop 10", 50, "CHF", 20), "the tenant's over the region's"
    assert shop.get("/shop/eu/acme?user=7")["discount_percent"] == 7
    assert shop.get("/shop/eu/acme?user=nobody")["discount_percent"] == 0
    read = figures(shop)["lazy"]["units_read"]
    with ConfigClient(url, lazy=LAZY) as writer:
        writer.put("tenants/acme/checkout/max_items", 5)
    wait_until(lambda: shown(shop, "eu", "acme")[1] == 5, WITHIN_S, reason="the change arrives")
    assert figures(shop)["lazy"]["units_read"] == read, "no unit is read anew for it"


def test_names_that_are_none_are_refused_and_those_of_nobody_are_absent(shop: Served) -> None:
    for path in ("/shop/eu/..", "/shop/eu/a%20b", "/shop/eu/%3Cb%3E", "/shop/../acme", "/shop/eu/acme?user=a%20b"):
        assert status_of(shop, path) == 400, path
    assert figures(shop)["requests"] == 0, "they did not reach the app"
    assert figures(shop)["lazy"]["held"] == 0
    assert status_of(shop, "/shop/eu/acme%2Ft0001") == 404, "one segment of the path names one tenant"
    assert [status_of(shop, "/shop/eu/nobody") for _ in range(2)] == [404, 404]
    told = figures(shop)
    assert told["requests"] == 2
    assert told["lazy"]["fetches"] == {"hit": 1, "miss": 0, "absent": 1, "coalesced": 0, "error": 0}, "held as absent"


def test_the_figures_add_up(shop: Served) -> None:
    paths = [f"/shop/eu/t{number:04}" for number in range(1, 21) for _ in range(6)]
    assert herd(shop, paths) == {200}
    cold = figures(shop)
    lazy = cold["lazy"]
    assert cold["requests"] == sum(lazy["fetches"].values()) == len(paths)
    assert lazy["units_read"] == {"mirror": 0, "authority": 20, "wanted": 0}, "each once, whoever asked"
    assert lazy["held"] == 20
    assert 0 < lazy["bytes"] < lazy["max_bytes"]
    assert lazy["fetches"]["miss"] > 0
    assert lazy["fetches"]["error"] == 0
    assert herd(shop, paths) == {200}
    warm = figures(shop)["lazy"]
    assert warm["fetches"] == lazy["fetches"] | {"hit": lazy["fetches"]["hit"] + len(paths)}
    assert warm["units_read"] == lazy["units_read"]
    assert cold["pid"] == figures(shop)["pid"] == shop.get("/shop/eu/acme")["pid"]


def test_wrk_asks_for_tenants_that_there_are(shop: Served) -> None:
    script = ["wrk", "-t1", "-c16", "-d1s", "-s", "examples/tenants.lua", shop.url]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "Non-2xx" not in done.stdout, done.stdout
    assert int(re.findall(r"(\d+) requests in", done.stdout)[0]) > 0
    # Those that wrk did not wait for any more are still answered.
    wait_until(lambda: adds_up(figures(shop)), WITHIN_S, reason="each request is counted")
    text = (ROOT / "examples" / "tenants.lua").read_text()
    walked = re.findall(r"^local tenants, popular, users = (\d+), (\d+), (\d+)$", text, re.MULTILINE)
    assert walked == [(str(TENANTS), "50", "200")], "all that it asks for is seeded"
    for path in (f"/shop/eu/t{TENANTS:04}?user=200", "/shop/us/t0001?user=1"):
        assert status_of(shop, path) == 200


def test_the_page_brings_all_it_needs_and_lets_nothing_else_in(shop: Served) -> None:
    def page(path: str) -> tuple[str, str]:
        with urllib.request.urlopen(f"{shop.url}/{path}", timeout=10) as answer:
            policy = answer.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
            assert "unsafe" not in policy
            return answer.headers["Content-Type"], answer.read().decode()

    kind, html = page("live")
    assert kind.startswith("text/html")
    assert not re.search(r"<style|<script>|\son\w+=|\sstyle=", html), "what the policy would not let run"
    links = [link for link in re.findall(r'(?:src|href)="([^"]*)"', html) if link != "data:,"]
    assert sorted(links) == ["live/figures", "live/live.css", "live/live.js"]
    kinds = {link: page(link)[0].partition(";")[0] for link in links if link != "live/figures"}
    assert kinds == {"live/live.css": "text/css", "live/live.js": "text/javascript"}
    script = page("live/live.js")[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|://", script)
    wanted = set(re.findall(r'\bat\("([\w-]+)"\)', script)) | {"requests-chart", "reads-chart", "requests", "reads"}
    assert wanted - set(re.findall(r'id="([\w-]+)"', html)) == set()


def test_what_the_page_is_told_is_text_whatever_the_tenants_are_called(shop: Served, url: str) -> None:
    name = "<script>alert(1)</script>"
    with ConfigClient(url, lazy=LAZY) as writer:
        writer.put("tenants/acme/name", name)
    wait_until(lambda: shown(shop, "eu", "acme")[0] == name, WITHIN_S, reason="the change arrives")
    with urllib.request.urlopen(shop.url + "/live/figures", timeout=10) as answer:
        assert answer.headers["Content-Type"] == "application/json"
    (acme, *_) = figures(shop)["latest"]
    assert (acme["tenant"], acme["region"], acme["name"]) == ("acme", "eu", name)


def test_visitors_of_a_cold_tenant_share_one_read_and_held_ones_need_no_store() -> None:
    with etcd() as cluster:
        (member,) = cluster.members
        env = {"VELTRIX_URL": f"etcd://127.0.0.1:{member.port}/shop"}
        with serve(APP, server="uvicorn", asgi=True, workers=1, env=env, probe="/live/figures") as shop:
            assert status_of(shop, "/shop/eu/acme") == 200
            cold = iter(range(1, TENANTS))

            def visited() -> tuple[Any, Any] | None:
                """The figures before and after; None where that was no herd.

                The store may have been stopped for longer than a fetch waits, or the server may have come to a request
                only after the store went on, and the unit was held by then.
                """
                before, path = figures(shop)["lazy"], f"/shop/eu/t{next(cold):04}"
                cluster.pause(member)
                try:
                    visitors = [HTTPConnection(shop.url.removeprefix("http://"), timeout=30) for _ in range(6)]
                    for visitor in visitors:
                        visitor.request("GET", path)
                    # It was sent after theirs, so it is answered while they wait.
                    assert status_of(shop, "/shop/eu/acme") == 200
                finally:
                    cluster.resume(member)
                statuses = [visitor.getresponse().status for visitor in visitors]
                for visitor in visitors:
                    visitor.close()
                after = figures(shop)["lazy"]
                late = after["fetches"]["hit"] - before["fetches"]["hit"] - 1
                return (before, after) if statuses == [200] * 6 and not late else None

            before, after = wait_until(visited, WITHIN_S, reason="all six were answered, and had waited together")
            grown = {result: count - before["fetches"][result] for result, count in after["fetches"].items()}
            assert grown == {"hit": 1, "miss": 1, "absent": 0, "coalesced": 5, "error": 0}
            assert after["units_read"]["authority"] - before["units_read"]["authority"] == 1


def test_two_workers_on_etcd_and_redis_read_through_the_mirror(mirror: str) -> None:
    with etcd() as cluster:
        env = {"VELTRIX_URL": f"etcd://127.0.0.1:{cluster.members[0].port}/shop", "VELTRIX_MIRROR_URL": mirror}
        seeded = subprocess.run(
            [sys.executable, "examples/tenants_app.py", "seed", "300"],
            cwd=ROOT,
            env={**os.environ, **env, "PYTHONPATH": os.pathsep.join(["src", "integrations"])},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert seeded.returncode == 0, seeded.stderr
        with (
            serve(APP, server="uvicorn", asgi=True, env=env, probe="/live/figures") as shop,
            ConfigClient(env["VELTRIX_URL"], lazy=LAZY) as writer,
        ):
            told: dict[int, Any] = {}

            def both() -> list[Any]:
                now = figures(shop)
                told[now["pid"]] = now
                return list(told.values())

            def follow_the_mirror() -> bool:
                writer.put("checkout/max_items", 50)  # what is served is the tier's that brought the last change
                return [now["origin"] for now in both()] == ["redis", "redis"]

            def answered(path: str) -> None:
                # Servers that stall for longer than a fetch waits are answered for with 503: try again.
                wait_until(lambda: status_of(shop, path) == 200, WITHIN_S, reason=f"{path} is answered")

            wait_until(follow_the_mirror, WITHIN_S, reason="both follow the mirror", interval_s=0.1)
            paths = [f"/shop/eu/t{number:04}" for number in range(1, 301)]
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(answered, paths))
            assert status_of(shop, "/shop/eu/t0301") == 404, "so many were seeded as were asked for"
            asked = len(paths) + 1
            wait_until(
                lambda: sum(now["requests"] for now in both()) >= asked and adds_up(*both()),
                WITHIN_S,
                reason="both told what they counted",
            )
            lazy = [now["lazy"] for now in both()]
            # How many the relay filled in time, and how many were read past it, is the load's to say.
            assert sum(each["fetches"]["miss"] for each in lazy) > 0
            assert sum(each["filled"] for each in lazy) > 0
            assert sum(each["units_read"]["mirror"] for each in lazy) > 0
            assert sum(each["units_read"][tier] for each in lazy for tier in ("mirror", "authority")) >= asked
            assert shop.stop() == 0
