"""Other people's tools: a plain `etcdctl put` is served by every worker, and `redis-cli` shows the mirror."""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import Any

import pytest

from tests.faults.rig import SLACK
from tests.support.etcd_servers import etcd
from tests.support.redis_servers import redis_server
from tests.support.serving import serve
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

SERVED_S = 2.0
APPS: list[tuple[str, str, dict[str, Any]]] = [
    ("flask_app", "gunicorn", {}),
    ("django_app", "gunicorn", {}),
    ("starlette_app", "uvicorn", {"asgi": True}),
]


def test_a_plain_etcdctl_put_is_served_by_every_worker_and_redis_cli_shows_it() -> None:
    with etcd(3) as cluster, redis_server() as redis, contextlib.ExitStack() as stack:
        cluster.ctl("put", "shop/checkout/max_items", "41")
        hosts = ",".join(f"{host}:{port}" for host, port in cluster.hosts)
        env = {
            "VELTRIX_URL": f"etcd://{hosts}/shop",
            "VELTRIX_MIRROR_URL": f"redis://127.0.0.1:{redis.port}/0",
        }
        apps = [
            stack.enter_context(serve(f"tests.support.apps.{name}:app", server=server, env=env, **more))  # type: ignore[arg-type]
            for name, server, more in APPS
        ]
        for served in apps:
            served.until_each_worker("value", 41, timeout_s=30)

        revision = cluster.put("shop/checkout/max_items", "80")
        begun_s = time.monotonic()
        waiting = {served.url: set[int]() for served in apps}
        while any(len(pids) < 2 for pids in waiting.values()):
            for served in apps:
                asked_s = time.monotonic() - begun_s
                told = served.get()
                if told["value"] == 80:
                    assert told["revision"] == revision
                    waiting[served.url].add(told["pid"])
                else:
                    assert asked_s < SERVED_S * SLACK, f"{told} {asked_s:.1f} s after the put\n{served.log}"
            assert time.monotonic() - begun_s < 60, f"only some workers were ever asked: {waiting}"

        def cli(*command: str) -> list[str]:
            done = subprocess.run(
                ["redis-cli", "-p", str(redis.port), *command], capture_output=True, text=True, check=True, timeout=30
            )
            return done.stdout.splitlines()

        # The documented layout: an entry is its revision, a space and the JSON; a change is its revision and `-0`.
        wait_until(
            lambda: cli("HGET", "veltrix:{shop}:entries", "checkout/max_items") == [f"{revision} 80"],
            SERVED_S * SLACK,
            reason="redis-cli shows the entry",
        )
        assert cli("HGET", "veltrix:{shop}:entries", "#revision") == [str(revision)]
        assert cli("HGET", "veltrix:{shop}:entries", "#count") == ["1"]
        newest = cli("XREVRANGE", "veltrix:{shop}:changes", "+", "-", "COUNT", "1")
        assert newest[0] == f"{revision}-0"
        assert newest[newest.index("+checkout/max_items") + 1] == "80"
