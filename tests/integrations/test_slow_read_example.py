"""The example of a slow read: the spans it emits, and the picture that is drawn from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from scripts.trace_picture import bars_of, picture
from tests.support.etcd_servers import etcd
from tests.support.serving import ROOT


def span(span_id: str, name: str, kind: str, begin_ms: int, end_ms: int, parent: str | None, *links: str) -> Any:
    return {
        "name": name,
        "kind": f"SpanKind.{kind}",
        "context": {"span_id": span_id},
        "parent_id": parent,
        "start_time": f"2026-01-01T00:00:00.{begin_ms:03}000Z",
        "end_time": f"2026-01-01T00:00:00.{end_ms:03}000Z",
        "attributes": {"veltrix.result": "coalesced" if links else "miss"} if "fetch" in name else {},
        "links": [{"context": {"span_id": link}} for link in links],
    }


def took_s(span: Any) -> float:
    begun, ended = (datetime.fromisoformat(span[name]) for name in ("start_time", "end_time"))
    return (ended - begun).total_seconds()


def drawn(svg: str) -> tuple[list[str], list[str], int]:
    """The bars by kind with their titles, and the number of arrows."""
    page = ET.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    bars = [rect for rect in page.iter(f"{space}rect") if rect.get("class") != "page"]
    titles = [str(bar.findtext(f"{space}title")) for bar in bars]
    arrows = [path for path in page.iter(f"{space}path") if path.get("class") == "link"]
    return [str(bar.get("class")) for bar in bars], titles, len(arrows)


def test_a_row_for_each_span_and_an_arrow_for_each_link() -> None:
    spans = [
        span("f2", "veltrix.fetch", "INTERNAL", 5, 50, "r2", "f1"),
        span("c", "Range <shop>", "CLIENT", 10, 40, "f1"),
        span("f1", "veltrix.fetch", "INTERNAL", 1, 48, "r1"),
        span("r2", "GET /", "SERVER", 4, 52, None),
        span("r1", "GET /", "SERVER", 0, 50, None),
    ]
    requests = bars_of(spans)
    assert [[(bar.span_id, bar.depth, bar.kind) for bar in bars] for bars in requests] == [
        [("r1", 0, "server"), ("f1", 1, "leader"), ("c", 2, "client")],
        [("r2", 0, "server"), ("f2", 1, "follower")],
    ]
    kinds, titles, arrows = drawn(picture(requests))
    assert kinds == ["server", "leader", "client", "server", "follower"]
    assert titles[2] == "Range <shop>: 30.0 ms"
    assert arrows == 1


def test_the_page_has_the_picture_of_a_herd() -> None:
    kinds, _, arrows = drawn((ROOT / "docs/_static/herd.svg").read_text())
    assert (kinds.count("leader"), kinds.count("follower"), arrows) == (1, 7, 7)


@pytest.mark.timeout(60)
def test_one_of_the_herd_leads_and_all_that_wait_link_to_it(tmp_path: Path) -> None:
    path = tmp_path / "herd.jsonl"
    with etcd() as cluster:
        host, port = cluster.hosts[0]
        environ = os.environ | {"VELTRIX_URL": f"etcd://{host}:{port}/shop"}
        command = [sys.executable, str(ROOT / "examples/slow_read.py"), str(path)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    spans = [json.loads(line) for line in path.read_text().splitlines()]
    fetches = [each for each in spans if each["name"] == "veltrix.fetch"]
    [leader] = [each for each in fetches if each["attributes"]["veltrix.result"] == "miss"]
    for each in fetches:  # on a loaded machine some come when it is over: what they want is held
        led_by = [link["context"]["span_id"] for link in each["links"]]
        assert led_by == ([] if each is leader else [leader["context"]["span_id"]])
    calls = [each for each in spans if each["parent_id"] == leader["context"]["span_id"]]
    assert [call["name"] for call in calls] == ["Txn shop", "Range shop"]
    requests = [each for each in spans if each["kind"] == "SpanKind.SERVER"]
    assert len(requests) == 8
    waited_s = next(
        each["attributes"]["veltrix.lookup.total"]
        for each in requests
        if each["context"]["span_id"] == leader["parent_id"]
    )
    assert f"request: {1000 * waited_s:.0f} ms for config" in done.stdout
    assert waited_s >= sum(took_s(call) for call in calls), "the wait is in it"
    kinds, _, arrows = drawn(picture(bars_of(spans)))
    followers = len(fetches) - 1
    assert sorted(kinds) == sorted(["server"] * 8 + ["leader", "client", "client"] + ["follower"] * followers)
    assert arrows == followers
