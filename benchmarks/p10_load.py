"""P10: what the authority is asked as the fleet grows, with a mirror: watches that are open, and reads a second.

Counted by etcd itself (`/metrics`). A worker here is a client in a process that holds ten of them: to etcd and Redis
each is a worker of its own, and 200 Pythons would not fit on two cores.
"""

from __future__ import annotations

import math
import os
import signal
import time

from benchmarks.harness import QUICK, Figure
from benchmarks.servers import Servers, forked, servers
from veltrix_mw import ConfigClient

FLEETS = (1, 10, 50) if QUICK else (1, 10, 50, 200)
WINDOW_S = 12.0 if QUICK else 30.0
"""More than two confirmations of the relay, which are up to 5 s apart."""

_A_PROCESS = 10


def measure() -> list[Figure]:
    loads = [_load(count) for count in FLEETS]
    figures = []
    for number, what in enumerate(("open watches", "reads a second")):
        for count, load in list(zip(FLEETS, loads, strict=True))[1:]:
            ratio = load[number] / loads[0][number]
            # The relay asks every 4 to 5 s: two windows may differ by one question.
            bar = (1.0 if number == 0 else 1.35) if count == FLEETS[-1] else None
            note = f"against one worker: {load[number]:.2f} and {loads[0][number]:.2f}"
            figures.append(
                Figure("P10 authority", f"{what}, {count} workers", ratio, (ratio, ratio), bar=bar, note=note)
            )
    return figures


def _load(workers: int) -> tuple[float, float]:
    with servers() as found:
        with ConfigClient(found.url) as client:
            client.put("tick", 0)
        with forked(1, lambda _pipe: _relay(found)):
            state = ConfigClient(found.url, mirror=found.mirror, relay="never").mirror_state
            while not ((known := state()) and known.position.incarnation):
                time.sleep(0.05)
            processes = math.ceil(workers / _A_PROCESS)
            with forked(processes, lambda pipe: _workers(pipe, found, min(workers, _A_PROCESS))) as pipe:
                for _ in range(processes):
                    os.read(pipe, 1)
                before, begun_s = found.metrics(), time.monotonic()
                time.sleep(WINDOW_S)
                after, took_s = found.metrics(), time.monotonic() - begun_s
    return after["etcd_debugging_mvcc_watcher_total"], (_reads(after) - _reads(before)) / took_s


def _reads(metrics: dict[str, float]) -> float:
    return sum(
        value
        for name, value in metrics.items()
        if name.startswith("grpc_server_started_total") and ('"Range"' in name or '"Txn"' in name)
    )


def _relay(found: Servers) -> None:
    ConfigClient(found.url, mirror=found.mirror, telemetry="off").start()
    signal.pause()


def _workers(pipe: int, found: Servers, count: int) -> None:
    clients = [ConfigClient(found.url, mirror=found.mirror, relay="never", telemetry="off") for _ in range(count)]
    for client in clients:
        client.start()
    for client in clients:
        client.wait_ready(60)
        while client.status().tiers[-1].state != "following":
            time.sleep(0.05)
    os.write(pipe, b".")
    signal.pause()
