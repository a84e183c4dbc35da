"""Servers fork: each child follows by itself, is current, and speaks on no socket that another process has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.faults.rig import SLACK, TRANSPORT
from tests.support.etcd_servers import EtcdCluster, etcd
from tests.support.redis_servers import RedisServer, redis_server
from tests.support.serving import ROOT, Server, serve
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

SERVED_S = 2.0
WORKERS = 4
MIRRORED = f"mirrored {TRANSPORT}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd(3) as made:
        made.put("shop/checkout/max_items", "0")
        yield made


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as made:
        yield made


def _environment(cluster: EtcdCluster, redis: RedisServer | None, transport: str) -> dict[str, str]:
    hosts = ",".join(f"{host}:{port}" for host, port in cluster.hosts)
    found = {"VELTRIX_URL": f"etcd://{hosts}/shop?transport={transport}"}
    if redis is not None:
        found["VELTRIX_MIRROR_URL"] = f"redis://127.0.0.1:{redis.port}/0"
    return found


def _sockets_to(ports: Sequence[int], pids: Sequence[int]) -> dict[int, set[int]]:
    """The inodes of each process's sockets that are connected to one of `ports`."""
    inodes = set()
    for table in ("tcp", "tcp6"):  # gRPC reaches IPv4 by sockets of IPv6
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if int(fields[2].partition(":")[2], 16) in ports:
                inodes.add(int(fields[9]))
    found: dict[int, set[int]] = {}
    for pid in pids:
        found[pid] = set()
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(descriptor)
            except FileNotFoundError:
                continue  # closed meanwhile
            if target.startswith("socket:["):
                found[pid].add(int(target[8:-1]))
        found[pid] &= inodes
    return found


def _children(pid: int) -> list[int]:
    """`pid`, and all that descend from it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += _children(int(child))
    return found


def _published(traces: Path, revision: int) -> set[int]:
    """Who published that revision."""
    return {int(path.stem) for path in traces.glob("*.jsonl") if f'"revision": {revision},' in path.read_text()}


def _check_sockets(cluster: EtcdCluster, redis: RedisServer | None, root: int, followers: set[int]) -> None:
    """Each follower has connections of its own, and no two processes of the tree have one in common."""
    ports = [port for _, port in cluster.hosts] + ([] if redis is None else [redis.port])
    found = _sockets_to(ports, _children(root))
    assert followers <= set(found)
    assert all(found[pid] for pid in followers), found
    for pid, sockets in found.items():
        for other, others in found.items():
            assert pid == other or not sockets & others, f"{pid} and {other} share a socket: {found}"


@pytest.mark.parametrize("tiers", [MIRRORED, "direct grpc"])
def test_a_parent_that_follows_forks_four_children(
    cluster: EtcdCluster, redis: RedisServer, tmp_path: Path, tiers: str
) -> None:
    followed, transport = tiers.split()
    mirror = redis if followed == "mirrored" else None
    first = cluster.put("shop/checkout/max_items", "1")
    log = tmp_path / "log"
    with log.open("wb") as out:
        parent = subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "tests.support.apps.forking"],
            env={**os.environ, **_environment(cluster, mirror, transport), "PYTHONPATH": f"{ROOT}/src:{ROOT}"},
            stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def told(value: object) -> set[int]:
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        return {each["pid"] for each in lines if each["value"] == value}

    def all_tell(value: object, timeout_s: float) -> set[int]:
        try:
            wait_until(lambda: len(told(value)) == WORKERS, timeout_s, reason=f"every child serves {value!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{log.read_text()}") from None
        return told(value)

    try:
        assert first
        children = all_tell(1, 30)
        for value in range(2, 6):
            cluster.put("shop/checkout/max_items", str(value))
            assert all_tell(value, SERVED_S * SLACK) == children
        _check_sockets(cluster, mirror, parent.pid, children)
        cluster.put("shop/checkout/max_items", '"end"')
        assert parent.wait(20) == 0, log.read_text()
    finally:
        for pid in _children(parent.pid)[1:] if parent.poll() is None else ():
            os.kill(pid, 9)
        parent.kill()
        parent.wait()


@pytest.mark.parametrize(
    ("server", "options", "early", "tiers"),
    [
        pytest.param("gunicorn", ("--preload",), False, MIRRORED, id="gunicorn --preload"),
        pytest.param("gunicorn", ("--preload",), True, MIRRORED, id="gunicorn --preload, followed before"),
        pytest.param(
            "gunicorn", ("--preload",), True, "direct grpc", id="gunicorn --preload, followed before over gRPC"
        ),
        pytest.param("uwsgi", ("--threads", "4"), False, MIRRORED, id="uWSGI"),
        pytest.param("uwsgi", ("--threads", "4"), True, MIRRORED, id="uWSGI, read before"),
        pytest.param("uwsgi", ("--threads", "4"), True, "direct grpc", id="uWSGI, read before over gRPC"),
    ],
)
def test_each_worker_of_a_server_that_forks_is_current(
    cluster: EtcdCluster,
    redis: RedisServer,
    tmp_path: Path,
    server: Server,
    options: Sequence[str],
    early: bool,
    tiers: str,
) -> None:
    followed, transport = tiers.split()
    mirror = redis if followed == "mirrored" else None
    cluster.put("shop/checkout/max_items", "100")
    env = {**_environment(cluster, mirror, transport), "TRACE_FOLDER": str(tmp_path), "TRACED_RELAY": "auto"}
    if early:
        env["TRACED_EARLY"] = "1"
    with serve("tests.support.apps.traced:app", server=server, workers=WORKERS, options=options, env=env) as served:
        workers = set(served.until_each_worker("value", 100, workers=WORKERS, timeout_s=60))
        for value in (101, 102):
            revision = cluster.put("shop/checkout/max_items", str(value))
            wait_until(
                lambda revision=revision: workers <= _published(tmp_path, revision),  # type: ignore[misc]
                SERVED_S * SLACK,
                reason=f"{workers} publish revision {revision}",
            )
        _check_sockets(cluster, mirror, served.process.pid, workers)
        assert "crashed" not in served.log
