"""P4: a herd on one cold lazy unit, 2,000 readers in 8 processes, half of them threads and half of them tasks.

The authority is 60 ms away, by a proxy that holds back what passes; Redis is near, and in a run of its own as far. The
rivals keep what they read of etcd in Redis: naive read-through, dogpile.cache and cashews with their locks. Beside them
stand one fetch, and what waking that many readers costs by itself. Counted by the servers: reads of the unit at etcd,
and the reads from sockets at Redis, which are the calls that it served.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import redis
import redis.asyncio
import urllib3

from benchmarks.harness import QUICK, Figure
from benchmarks.servers import Delayed, Servers, delayed, forked, servers
from veltrix_mw import ConfigClient, Put

PROCESSES = 8
READERS = 250  # in each
ROUNDS = 3 if QUICK else 7
AWAY_S = 0.06
VALUE = 500
_LONG_S = 3.0  # who takes longer has one round: the others would wait for it for minutes

_TRIPS = ("time", "rpush", "eval", "evalsha", "xread")
"""Of ours each round trip to Redis has one of these: a look, a wish, a taking, a fill, the watch."""

_UNIT = "tenants/un"
_MARKER = base64.b64encode(b"shop/" + _UNIT.encode())  # fifteen bytes: what begins so in JSON begins so

Read = Callable[..., Any]  # of a key; ours of several
Aread = Callable[..., Awaitable[Any]]
Rival = Callable[[Servers, asyncio.AbstractEventLoop], tuple[Read, Aread]]


@dataclass(frozen=True, slots=True)
class Herd:
    """What came of one: seconds until each reader had its value, and what that cost the servers."""

    took_s: list[float]
    authority_reads: int
    calls: int  # to Redis, with those of whoever follows it all the time
    unit_reads: int  # in Redis, by workers

    @property
    def p99_s(self) -> float:
        return statistics.quantiles(self.took_s, n=100, method="inclusive")[98]


def measure() -> list[Figure]:
    rivals = {"naive read-through": _naive, "dogpile.cache": _dogpile, "cashews": _cashews}
    with servers() as real, delayed(real.etcd, AWAY_S / 2, marker=_MARKER) as etcd:
        found = replace(real, etcd=etcd.port)
        fetch_s = statistics.median(_timed_fetch(found) for _ in range(5))
        with contextlib.ExitStack() as stack:
            fleets = {"ours": _Fleet(stack, real, found, etcd, _ours, relay=True)}
            fleets |= {name: _Fleet(stack, real, found, etcd, rival) for name, rival in rivals.items()}
            fleets["waking alone"] = _Fleet(stack, real, found, etcd, _waking)
            herds = _in_turn(fleets)
            many = {f"{PROCESSES} processes": [fleets["ours"].distinct() for _ in range(ROUNDS)]}
    with (
        servers() as real,
        delayed(real.etcd, AWAY_S / 2, marker=_MARKER) as etcd,
        contextlib.ExitStack() as stack,
    ):
        fleet = _Fleet(stack, real, replace(real, etcd=etcd.port), etcd, _ours, relay=True, processes=1)
        many["one process"] = [fleet.distinct() for _ in range(ROUNDS)]
    with (
        servers() as real,
        delayed(real.etcd, AWAY_S / 2, marker=_MARKER) as etcd,
        delayed(real.redis, AWAY_S / 2) as mirror,
        contextlib.ExitStack() as stack,
    ):
        far = replace(real, etcd=etcd.port, redis=mirror.port)
        fleet = _Fleet(stack, real, far, etcd, _ours, relay=True)
        herds |= _in_turn({"ours, Redis as far": fleet})
        many[f"{PROCESSES} processes, Redis as far"] = [fleet.distinct() for _ in range(ROUNDS)]
    return [*_readers(herds, fetch_s), *_counts(herds), *_distinct(many)]


def _readers(herds: dict[str, list[Herd]], fetch_s: float) -> Iterator[Figure]:
    waking_s = statistics.median(herd.p99_s for herd in herds["waking alone"])
    for name, of_name in herds.items():
        ratio = [herd.p99_s / fetch_s for herd in of_name]
        p50_s = statistics.median(statistics.median(herd.took_s) for herd in of_name)
        p99_s = statistics.median(herd.p99_s for herd in of_name)
        yield Figure(
            "P4 herd",
            f"p99 of readers, {name}",
            statistics.median(ratio),
            _quartiles(ratio),
            bar=max(3.0, 1.5 * waking_s / fetch_s) if name.startswith("ours") else None,
            note=f"against one fetch: {1000 * p99_s:.0f} and {1000 * fetch_s:.0f} ms; p50 {1000 * p50_s:.0f} ms",
            extra={"p99_s": [herd.p99_s for herd in of_name]},
        )


def _counts(herds: dict[str, list[Herd]]) -> Iterator[Figure]:
    for name, of_name in herds.items():
        if name == "waking alone":
            continue
        is_ours = name.startswith("ours")
        reads = [herd.authority_reads for herd in of_name]
        calls = statistics.median(herd.calls for herd in of_name)
        note = f"the most in a round, by 2,000 readers; Redis served {calls:.0f} calls"
        yield Figure("P4 herd", f"authority reads, {name}", *_spread(reads), bar=1.0 if is_ours else None, note=note)
        if is_ours:
            units = _spread([herd.unit_reads / PROCESSES for herd in of_name])
            yield Figure("P4 herd", f"mirror reads a process, {name}", *units, bar=2.0, note="the most in a round")


def _distinct(many: dict[str, list[tuple[int, int]]]) -> Iterator[Figure]:
    units = PROCESSES * READERS
    for name, of_name in many.items():
        for what, counts, bar in (
            ("authority calls a unit", [calls / units for calls, _ in of_name], 1 / 50),
            ("backend calls a unit", [sum(both) / units for both in of_name], 1 / 20),
        ):
            note = f"the most in a round; of 2,000 distinct cold units at once: {units * max(counts):.0f}"
            yield Figure("P4 distinct", f"{what}, {name}", *_spread(counts), bar=bar, note=note)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return low, high


def _spread(counts: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The most of all rounds, with the fewest and the most: one herd that cost more would be one too many."""
    return max(counts), (min(counts), max(counts))


def _in_turn(fleets: dict[str, _Fleet]) -> dict[str, list[Herd]]:
    herds: dict[str, list[Herd]] = {name: [] for name in fleets}
    for fleet in fleets.values():
        fleet.herd()  # every connection is open
    names = list(fleets)
    for number in range(ROUNDS):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if not herds[name] or herds[name][-1].p99_s < _LONG_S:
                herds[name].append(fleets[name].herd())
    return herds


# --- a fleet


class _Fleet:
    """Processes of one rival."""

    _units = 0  # that were read by any

    def __init__(
        self,
        stack: contextlib.ExitStack,
        real: Servers,
        found: Servers,
        etcd: Delayed,
        rival: Rival,
        *,
        relay: bool = False,
        processes: int = PROCESSES,
    ) -> None:
        self._real, self._found, self._etcd, self._has_relay = real, found, etcd, relay
        self._redis = redis.Redis(port=real.redis)
        if relay:
            with ConfigClient(real.url) as client:
                client.put("tick", 0)
            stack.enter_context(forked(1, lambda _pipe: _relay(found)))
            while not self._redis.exists("veltrix:{shop}:entries"):
                time.sleep(0.05)
        self._members = [_Member(stack, found, rival) for _ in range(processes)]

    def herd(self) -> Herd:
        """All readers want one unit that nobody has read."""
        [unit] = self._written(1)
        before = self._costs()
        took_s = self._run([[[f"{unit}/limit"]] * READERS for _ in self._members])
        after = self._costs()
        units = after.unit_reads - before.unit_reads
        return Herd(took_s, after.reads - before.reads, after.calls - before.calls - 1, units)

    def distinct(self) -> tuple[int, int]:
        """Each reader wants others, 2,000 in all; the calls to etcd and to Redis."""
        units = [f"{unit}/limit" for unit in self._written(PROCESSES * READERS)]
        wanted = [units[at :: len(self._members) * READERS] for at in range(len(self._members) * READERS)]
        before = self._costs()
        self._run([wanted[at :: len(self._members)] for at in range(len(self._members))])
        after = self._costs()
        return after.requests - before.requests, after.trips - before.trips

    def _written(self, count: int) -> list[str]:
        units = [f"{_UNIT}-{_Fleet._units + number}" for number in range(count)]
        _Fleet._units += count
        last = 0
        with ConfigClient(self._real.url) as client:
            for at in range(0, count, 100):
                last = client.write([Put(f"{unit}/limit", VALUE) for unit in units[at : at + 100]])
        if self._has_relay:
            # Every worker has come to that revision: what it reads is a unit that changed long ago.
            for member in self._members:
                member.wait_for(last)
        return units

    def _run(self, wanted: Sequence[Sequence[Sequence[str]]]) -> list[float]:
        for member, keys in zip(self._members, wanted, strict=True):
            member.line_up(keys)
        for member in self._members:
            member.wait()
        go_s = time.monotonic()
        for member in self._members:
            member.go()
        return [at_s - go_s for member in self._members for at_s in member.answers()]

    def _costs(self) -> _Costs:
        stats: Any = self._redis.info("everything")
        ran = {name: stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in (*_TRIPS, "hgetall")}
        requests = sum(
            value
            for name, value in self._real.metrics().items()
            if name.startswith("grpc_server_started_total") and ('"Range"' in name or '"Txn"' in name)
        )
        return _Costs(
            self._etcd.marked,
            stats["total_reads_processed"],
            ran["hgetall"],  # the relay does not
            int(requests),
            sum(ran[name] for name in _TRIPS),
        )


@dataclass(frozen=True, slots=True)
class _Costs:
    """What the servers have counted: `calls` and `trips` at Redis, `requests` at etcd, `reads` of units on the way."""

    reads: int
    calls: int
    unit_reads: int
    requests: int
    trips: int


class _Member:
    """One of its processes, as the one that measures knows it."""

    def __init__(self, stack: contextlib.ExitStack, found: Servers, rival: Rival) -> None:
        theirs, mine = os.pipe()
        self._orders = stack.enter_context(os.fdopen(mine, "w"))
        said = stack.enter_context(forked(1, lambda pipe: _serve(theirs, pipe, found, rival)))
        os.close(theirs)
        self._said = os.fdopen(os.dup(said))
        stack.callback(self._said.close)
        self.wait()

    def line_up(self, wanted: Sequence[Sequence[str]]) -> None:
        self._order({"wanted": wanted})

    def wait_for(self, revision: int) -> None:
        self._order({"revision": revision})
        self.wait()

    def wait(self) -> None:
        assert self._said.readline() == '"ready"\n'

    def go(self) -> None:
        self._order("go")

    def answers(self) -> list[float]:
        took: list[float] = json.loads(self._said.readline())
        return took

    def _order(self, what: Any) -> None:
        self._orders.write(json.dumps(what) + "\n")
        self._orders.flush()


def _serve(orders: int, pipe: int, found: Servers, rival: Rival) -> None:
    """A process of a fleet: its readers line up, go, and tell when they had their values."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    read, aread = rival(found, loop)

    def tell(what: Any) -> None:
        os.write(pipe, (json.dumps(what) + "\n").encode())

    tell("ready")
    with os.fdopen(orders) as lines:
        for line in lines:
            order = json.loads(line)
            if "revision" in order:
                read.__self__.wait_for(order["revision"], 60)  # type: ignore[attr-defined]
                tell("ready")
                continue
            run = _lined_up(order["wanted"], read, aread, loop)
            tell("ready")
            lines.readline()
            tell(run())


def _lined_up(
    wanted: Sequence[Sequence[str]], read: Read, aread: Aread, loop: asyncio.AbstractEventLoop
) -> Callable[[], list[float]]:
    done_s: list[float] = []
    threads, tasks = wanted[::2], wanted[1::2]
    at_line = threading.Barrier(len(threads) + 1)
    go, may_go = threading.Event(), asyncio.Event()

    def reader(keys: Sequence[str]) -> None:
        at_line.wait()
        go.wait()
        value = read(*keys)
        done_s.append(time.monotonic())
        assert value == VALUE

    async def areader(keys: Sequence[str]) -> None:
        await may_go.wait()
        value = await aread(*keys)
        done_s.append(time.monotonic())
        assert value == VALUE

    async def all_of_them() -> None:
        await asyncio.gather(*map(areader, tasks))

    started = [threading.Thread(target=reader, args=(keys,)) for keys in threads]
    for thread in started:
        thread.start()
    reading = asyncio.run_coroutine_threadsafe(all_of_them(), loop)
    at_line.wait()

    def run() -> list[float]:
        loop.call_soon_threadsafe(may_go.set)
        go.set()
        reading.result()
        for thread in started:
            thread.join()
        assert len(done_s) == len(wanted)
        return done_s

    return run


# --- ours


def _relay(found: Servers) -> None:
    ConfigClient(found.url, mirror=found.mirror, lazy=("tenants/",), telemetry="off").start()
    signal.pause()


class _Ours:
    def __init__(self, found: Servers) -> None:
        self._client = ConfigClient(
            found.url, mirror=found.mirror, lazy=("tenants/",), relay="never", fetch_timeout_s=60, telemetry="off"
        )
        self._client.start()
        self._client.wait_ready(60)
        while self._client.status().tiers[-1].state != "following":
            time.sleep(0.05)
        self.wait_for = self._client.wait_for

    def read(self, *keys: str) -> Any:
        return self._only(self._client.view().fetch_many(keys))

    async def aread(self, *keys: str) -> Any:
        return self._only(await self._client.view().afetch_many(keys))

    def _only(self, found: Mapping[str, Any]) -> Any:
        """The value that they all have."""
        [value] = set(found.values())
        return value


def _ours(found: Servers, _loop: asyncio.AbstractEventLoop) -> tuple[Read, Aread]:
    made = _Ours(found)
    return made.read, made.aread


# --- rivals


def _waking(_found: Servers, _loop: asyncio.AbstractEventLoop) -> tuple[Read, Aread]:
    async def aread(_key: str) -> Any:
        return VALUE

    return lambda _key: VALUE, aread


def _naive(found: Servers, _loop: asyncio.AbstractEventLoop) -> tuple[Read, Aread]:
    etcd = _Etcd(found.etcd)
    cache = redis.Redis(port=found.redis, max_connections=READERS)
    acache = redis.asyncio.Redis(port=found.redis, max_connections=READERS)

    def read(key: str) -> Any:
        held = cache.get(f"naive:{key}")
        if held is None:
            held = etcd.read(key)
            cache.set(f"naive:{key}", held, ex=60)
        return json.loads(held)

    async def aread(key: str) -> Any:
        held = await acache.get(f"naive:{key}")
        if held is None:
            held = await etcd.aread(key)
            await acache.set(f"naive:{key}", held, ex=60)
        return json.loads(held)

    return read, aread


def _dogpile(found: Servers, loop: asyncio.AbstractEventLoop) -> tuple[Read, Aread]:
    """It knows threads alone: tasks have it called in one each."""
    from dogpile.cache import make_region

    etcd = _Etcd(found.etcd)
    arguments = {
        "port": found.redis,
        "distributed_lock": True,
        "thread_local_lock": False,
        "connection_kwargs": {"max_connections": READERS},
    }
    region = make_region().configure("dogpile.cache.redis", expiration_time=60, arguments=arguments)
    threads = ThreadPoolExecutor(READERS)

    def read(key: str) -> Any:
        return region.get_or_create(f"dogpile:{key}", lambda: json.loads(etcd.read(key)))

    async def aread(key: str) -> Any:
        return await loop.run_in_executor(threads, read, key)

    return read, aread


def _cashews(found: Servers, loop: asyncio.AbstractEventLoop) -> tuple[Read, Aread]:
    """It knows tasks alone: threads have it called on the process's loop."""
    from cashews import Cache

    etcd, cache = _Etcd(found.etcd), Cache()
    cache.setup(f"redis://127.0.0.1:{found.redis}/0", max_connections=READERS)

    @cache(ttl=60, key="cashews:{key}", lock=True)
    async def aread(key: str) -> Any:
        return json.loads(await etcd.aread(key))

    def read(key: str) -> Any:
        return asyncio.run_coroutine_threadsafe(aread(key), loop).result()

    return read, aread


# --- reads of etcd, as any program makes them


class _Etcd:
    """Reads through connections that are kept, as many as there are readers; a connection that is reset is replaced."""

    def __init__(self, port: int) -> None:
        self._port = port
        again = urllib3.Retry(total=10, allowed_methods=None)
        self._pool = urllib3.HTTPConnectionPool("127.0.0.1", port, maxsize=READERS, retries=again)
        self._kept: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    def read(self, key: str) -> bytes:
        return _value(self._pool.request("POST", "/v3/kv/range", body=_asked(key)).data)

    async def aread(self, key: str) -> bytes:
        while True:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                kept = self._kept.pop() if self._kept else await asyncio.open_connection("127.0.0.1", self._port)
                value = await self._aread(*kept, _asked(key))
                self._kept.append(kept)
                return value

    async def _aread(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> bytes:
        writer.write(b"POST /v3/kv/range HTTP/1.1\r\nHost: etcd\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        return _value(await reader.readexactly(length))


def _timed_fetch(found: Servers) -> float:
    with ConfigClient(found.url) as client:
        client.put(f"{_UNIT}/limit", VALUE)
    etcd = _Etcd(found.etcd)
    etcd.read(f"{_UNIT}/limit")  # the connection is open
    begun_s = time.monotonic()
    etcd.read(f"{_UNIT}/limit")
    return time.monotonic() - begun_s


def _asked(key: str) -> bytes:
    return json.dumps({"key": base64.b64encode(f"shop/{key}".encode()).decode()}).encode()


def _value(answer: bytes) -> bytes:
    return base64.b64decode(json.loads(answer)["kvs"][0]["value"])
