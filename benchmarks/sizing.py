"""What a worker, the relay and a mirror cost beside the app: connections, memory, questions to the servers.

Run `python -m benchmarks.sizing`; docs/sizing.md shows what it prints. Counts and bytes of real servers and processes,
no times: they hold for another machine. Needs etcd and redis-server.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import redis

from benchmarks.servers import Servers, servers
from veltrix_mw import ConfigClient, Put

KEYS: Final = 10_000
VALUE_BYTES: Final = 100
REVISIONS: Final = 10_000
"""As many as a mirror's stream keeps."""

WINDOW_S: Final = 30.0
ENDS_S: Final = 120.0


def main() -> None:
    print(
        f"a namespace of {KEYS:,} keys with values of {VALUE_BYTES} bytes; nobody writes while questions are counted\n"
    )
    with servers() as found:
        fill(found)
        with child(found, "idle") as pid:
            idle = resident(pid)
        with child(found, "relay") as relay, child(found, "worker") as worker, child(found, "alone") as alone:
            for name, pid in (("worker on the mirror", worker), ("worker on etcd", alone), ("relay", relay)):
                etcd, mirror = connections(pid, found.etcd), connections(pid, found.redis)
                print(f"{name:<24} connections: {etcd} to etcd, {mirror} to Redis; {threads(pid)} threads")
            for name, pid in (("worker", worker), ("relay", relay)):
                grown = resident(pid) - idle
                print(f"{name:<24} memory: {grown / 2**20:.1f} MiB, {grown / KEYS:.0f} bytes a key")
        with child(found, "relay"):
            print_mirror(found)
            print_questions(found)


def fill(found: Servers) -> None:
    with ConfigClient(found.url) as client:
        for start in range(0, KEYS, 100):
            client.write([Put(name(number), "v" * (VALUE_BYTES - 2)) for number in range(start, start + 100)])


def name(number: int) -> str:
    return f"section-{number // 100:03}/setting-{number % 100:02}"


# --- one process each


@contextmanager
def child(found: Servers, role: str) -> Iterator[int]:
    """A process that follows, or relays, for the length of the block; its id."""
    command = [sys.executable, "-m", "benchmarks.sizing", role, found.url, found.mirror]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"the {role} did not come to follow")
            yield process.pid
        finally:
            process.kill()


def run_child(role: str, url: str, mirror: str) -> None:
    with ExitStack() as stack:
        if role == "idle":
            client = stack.enter_context(ConfigClient("memory://"))
            client.wait_for(client.put("one", 1))
        elif role == "relay":
            client = ConfigClient(url, mirror=mirror)
            client.feed(lambda _event, _fields: None)
            stack.callback(client.close)
            until(lambda: (state := client.mirror_state()) and state.relay and state.age_s < 10, "the mirror is fed")
        else:
            client = stack.enter_context(ConfigClient(url, mirror=mirror if role == "worker" else "", relay="never"))
            origin = "redis" if role == "worker" else "etcd"
            until(lambda: client.snapshot.origin == origin and len(client.snapshot) == KEYS, f"it follows {origin}")
            until(lambda: client.status().tiers[-1].state == "following", "it watches")
        time.sleep(6.0)  # past the first confirmation: what it opens, it has opened
        gc.collect()
        print("ready", flush=True)
        sys.stdin.read()


def until(true: Callable[[], Any], what: str) -> None:
    end_s = time.monotonic() + ENDS_S
    while not true():
        if time.monotonic() > end_s:
            raise RuntimeError(f"waited in vain: {what}")
        time.sleep(0.05)


def resident(pid: int) -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def connections(pid: int, port: int) -> int:
    """How many established connections to that port the process holds."""
    links = (os.readlink(f"/proc/{pid}/fd/{each}") for each in os.listdir(f"/proc/{pid}/fd"))
    own = {link[8:-1] for link in links if link.startswith("socket:[")}
    rows = (line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:])
    return sum(row[9] in own and row[3] == "01" and int(row[2].rpartition(":")[2], 16) == port for row in rows)


# --- the mirror


def print_mirror(found: Servers) -> None:
    mirror = redis.Redis(port=found.redis)
    entries, changes = "veltrix:{shop}:entries", "veltrix:{shop}:changes"
    size: Any = mirror.memory_usage(entries, samples=0)
    print(f"{'mirror, entries':<24} memory: {size / 2**20:.1f} MiB, {size / KEYS:.0f} bytes a key")
    with ConfigClient(found.url) as writer:
        for number in range(REVISIONS):
            last = writer.put(name(number % KEYS), "w" * (VALUE_BYTES - 2))
        until(lambda: int(mirror.hget(entries, "#revision") or 0) >= last, "the mirror has all revisions")
    kept: Any = mirror.xlen(changes)
    size = mirror.memory_usage(changes, samples=0)
    print(f"{'mirror, changes':<24} memory: {size / 2**20:.1f} MiB, {size / kept:.0f} bytes a revision, {kept:,} kept")


# --- what is asked while nobody writes


def print_questions(found: Servers) -> None:
    mirror = redis.Redis(port=found.redis)

    def commands() -> int:
        stats: Any = mirror.info("commandstats")
        return sum(said["calls"] for name, said in stats.items() if name not in {"cmdstat_info", "cmdstat_ping"})

    def reads() -> float:
        return sum(
            value
            for name, value in found.metrics().items()
            if name.startswith("grpc_server_handled_total") and 'grpc_code="OK"' in name and "etcdserverpb.KV" in name
        )

    def window(role: str | None, count: int) -> tuple[float, float]:
        with ExitStack() as stack:
            for _ in range(count if role else 0):
                stack.enter_context(child(found, role or ""))
            before, begun_s = (reads(), commands()), time.monotonic()
            time.sleep(WINDOW_S)
            took_s = time.monotonic() - begun_s
            after = (reads(), commands())
        return (after[0] - before[0]) / took_s, (after[1] - before[1]) / took_s

    relay = window(None, 0)
    print(f"{'relay':<24} asks: etcd {relay[0]:.1f} times a second, Redis {relay[1]:.1f} commands a second")
    for role, told in (("worker", "worker on the mirror"), ("alone", "worker on etcd")):
        both = window(role, 2)
        etcd, asked = (max(0.0, total - own) / 2 for total, own in zip(both, relay, strict=True))
        print(f"{told:<24} asks: etcd {etcd:.1f} times a second, Redis {asked:.1f} commands a second")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_child(*sys.argv[1:])
    else:
        main()
