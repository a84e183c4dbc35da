"""P5: from a write until every worker of a fleet serves it, against the raw chain that any such design needs.

The raw chain: a watch on etcd, an XADD by one process, an XREAD in each worker. Without a mirror: a raw watch on etcd
in each worker. Both fleets stand beside each other and are written to in turn.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import signal
import statistics
import struct
import time
from collections.abc import Callable, Iterator

import redis
import urllib3

from benchmarks.harness import QUICK, Figure, ratios
from benchmarks.servers import Servers, forked, servers
from veltrix_mw import ConfigClient

WORKERS = 20 if QUICK else 100
WATCHERS = 10 if QUICK else 20
"""Without a mirror: each worker is a watch of its own on etcd."""

ROUNDS = 3 if QUICK else 7
WRITES = 20 if QUICK else 50
_SEEN = struct.Struct("=qd")  # the number that was written, and the monotonic time at which a worker had it


def measure() -> list[Figure]:
    with servers() as found:
        mirrored = _compared(found, WORKERS, _ours_mirrored, _raw_chain)
    with servers() as found:
        direct = _compared(found, WATCHERS, _ours_direct, _raw_watches)
    return [
        *_figures(f"{WORKERS} workers, etcd + Redis", mirrored, "the raw chain"),
        *_figures(f"{WATCHERS} workers, etcd alone", direct, "raw watches"),
    ]


def _figures(name: str, samples: dict[str, list[float]], against: str) -> list[Figure]:
    found = ratios(samples, "raw")
    medians = {rival: 1000 * statistics.median(values) for rival, values in samples.items()}
    both = f"{medians['ours']:.0f} and {medians['raw']:.0f} ms"
    note = f"p99 until the last worker serves a write, against {against}: {both}"
    return [
        Figure("P5 propagation", f"{name} (A/A control)", *found["raw again"], note=f"against {against}"),
        Figure("P5 propagation", name, *found["ours"], bar=2.0, note=note, extra={"p99_s": samples}),
    ]


Fleet = Callable[[Servers, int], "contextlib.AbstractContextManager[tuple[int, Callable[[int], None]]]"]


def _compared(found: Servers, count: int, ours: Fleet, raw: Fleet) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {"raw": [], "ours": [], "raw again": []}
    with raw(found, count) as one, ours(found, count) as other:
        fleets = {"raw": one, "ours": other, "raw again": one}
        for pipe, write in fleets.values():
            _p99(pipe, write, count, 5)  # everybody is awake, and every connection open
        for number in range(ROUNDS):
            names = list(fleets)
            for name in names[number % 3 :] + names[: number % 3]:
                samples[name].append(_p99(*fleets[name], count, WRITES))
    return samples


_number = 0


def _p99(pipe: int, write: Callable[[int], None], count: int, writes: int) -> float:
    """Seconds from a write to its last arrival, over some writes with pauses that nothing is in step with."""
    global _number
    took = []
    for _ in range(writes):
        time.sleep(random.uniform(0.02, 0.06))
        _number += 1
        begun_s = time.monotonic()
        write(_number)
        seen = 0
        last_s = begun_s
        while seen < count:
            number, at_s = _SEEN.unpack(os.read(pipe, _SEEN.size))
            if number == _number:
                seen, last_s = seen + 1, max(last_s, at_s)
        took.append(last_s - begun_s)
    return statistics.quantiles(took, n=100, method="inclusive")[98]


def _putter(port: int, key: str) -> Callable[[int], None]:
    pool = urllib3.HTTPConnectionPool("127.0.0.1", port)

    def write(number: int) -> None:
        body = {"key": _b64(key), "value": _b64(str(number))}
        assert pool.request("POST", "/v3/kv/put", json=body).status == 200

    return write


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _say(pipe: int, number: int) -> None:
    os.write(pipe, _SEEN.pack(number, time.monotonic()))  # less than PIPE_BUF: never torn


# Ours


@contextlib.contextmanager
def _ours_mirrored(found: Servers, count: int) -> Iterator[tuple[int, Callable[[int], None]]]:
    with ConfigClient(found.url) as client:
        client.put("tick", 0)

    def relay(_pipe: int) -> None:
        ConfigClient(found.url, mirror=found.mirror, telemetry="off").start()
        signal.pause()

    with forked(1, relay):
        state = ConfigClient(found.url, mirror=found.mirror, relay="never").mirror_state
        while not ((known := state()) and known.position.incarnation):
            time.sleep(0.05)
        with forked(count, lambda pipe: _follow(pipe, found.url, found.mirror)) as pipe:
            yield pipe, _written(found)


@contextlib.contextmanager
def _ours_direct(found: Servers, count: int) -> Iterator[tuple[int, Callable[[int], None]]]:
    with ConfigClient(found.url) as client:
        client.put("tick", 0)
    with forked(count, lambda pipe: _follow(pipe, found.url, None)) as pipe:
        yield pipe, _written(found)


def _written(found: Servers) -> Callable[[int], None]:
    """As `veltrix put` does: one transaction, with the record of the change."""
    client = ConfigClient(found.url)

    def write(number: int) -> None:
        client.put("tick", number)

    return write


def _follow(pipe: int, url: str, mirror: str | None) -> None:
    client = ConfigClient(url, mirror=mirror, relay="never", telemetry="off")
    with client:
        client.wait_ready(60)
        if mirror is not None:
            while client.status().tiers[-1].state != "following":
                time.sleep(0.05)
        client.subscribe("", lambda _changes, snapshot: _say(pipe, snapshot["tick"]))
        signal.pause()


# Raw


@contextlib.contextmanager
def _raw_chain(found: Servers, count: int) -> Iterator[tuple[int, Callable[[int], None]]]:
    def bridge(_pipe: int) -> None:
        stream = redis.Redis(port=found.redis)
        for number in _watched(found.etcd):
            stream.xadd("raw", {"tick": number})

    def read(pipe: int) -> None:
        stream, last = redis.Redis(port=found.redis), b"$"
        while True:
            for _, entries in stream.xread({"raw": last}, block=1000) or ():
                for last, fields in entries:  # noqa: B007  # where the next read goes on
                    _say(pipe, json.loads(fields[b"tick"]))

    with forked(1, bridge), forked(count, read) as pipe:
        time.sleep(1.0)  # until the watch is open: XREAD from `$` tells nobody
        yield pipe, _putter(found.etcd, "raw")


@contextlib.contextmanager
def _raw_watches(found: Servers, count: int) -> Iterator[tuple[int, Callable[[int], None]]]:
    def read(pipe: int) -> None:
        for number in _watched(found.etcd):
            _say(pipe, number)

    with forked(count, read) as pipe:
        time.sleep(2.0)  # until every watch is open
        yield pipe, _putter(found.etcd, "raw")


def _watched(port: int) -> Iterator[int]:
    pool = urllib3.HTTPConnectionPool("127.0.0.1", port)
    body = json.dumps({"create_request": {"key": _b64("raw")}})
    answer = pool.request("POST", "/v3/watch", body=body, preload_content=False)
    for line in _lines(answer):
        for event in json.loads(line)["result"].get("events", ()):
            yield json.loads(base64.b64decode(event["kv"]["value"]))


def _lines(answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    rest = b""
    for part in answer.stream(amt=None):
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
