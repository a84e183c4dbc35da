"""The rig: etcd, Redis, relays and served workers, joined by links that a test can break, under load and writes.

Owns the processes, the load, the writer and the links; `checker` judges what they recorded. Everything goes by the
machine's monotonic clock, which is one for all processes.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.faults.checker import Answer, Checker, Publication, Write
from tests.support.etcd_servers import EtcdCluster, Member
from tests.support.etcd_servers import etcd as etcd_cluster
from tests.support.proxy import Proxy
from tests.support.redis_servers import ClusterSet, RedisServer, RedisSet, SentinelSet, redis_server
from tests.support.serving import ROOT, Served, serve
from tests.support.waiting import wait_until
from veltrix_mw.digest import digest_of
from veltrix_mw.errors import StoreError
from veltrix_mw.protocols import ChangeRecord, Listing, RawOperation
from veltrix_mw.settings import parse_url
from veltrix_mw.stores.opening import open_store
from veltrix_mw.values import MISSING

__all__ = ["NAMESPACE", "SLACK", "Links", "Rig", "rig"]

NAMESPACE: Final = "shop"
LOCAL: Final = "127.0.0.1"

SLACK: Final = float(os.environ.get("VELTRIX_SLACK", "1.5"))
"""The promised bounds are for a machine of one's own; tests share two noisy cores, so each bound is times this."""

REQUEST_S: Final = 20.0  # longer than a test freezes a worker: a request that it has taken waits for it

TRANSPORT: Final = os.environ.get("FAULTS_OVER", "gateway")
"""What the workers and the relays speak to etcd, where a test does not say so: `gateway` or `grpc`."""

WATCHING: Final[Mapping[str, Callable[[Proxy], bool]]] = {
    "gateway": lambda proxy: proxy.carries(b"POST /v3/watch"),
    "grpc": lambda proxy: proxy.carried(b"/etcdserverpb.Watch/Watch"),
}


class Links:
    """A proxy before each member of etcd and before Redis, for one group of processes.

    There is none before sets of Redis servers, which say themselves where they are.
    """

    def __init__(self, cluster: EtcdCluster, redis: RedisSet | None, transport: str) -> None:
        self.transport = transport
        self.etcd = {member.name: Proxy(member.port) for member in cluster.members}
        self.redis = Proxy(redis.port) if isinstance(redis, RedisServer) else None
        self._url = (
            None if redis is None else redis.url if self.redis is None else f"redis://{LOCAL}:{self.redis.port}/0"
        )

    @property
    def all(self) -> list[Proxy]:
        return [*self.etcd.values(), *([] if self.redis is None else [self.redis])]

    @property
    def environment(self) -> dict[str, str]:
        hosts = ",".join(f"127.0.0.1:{proxy.port}" for proxy in self.etcd.values())
        if not self.etcd:
            return {"VELTRIX_URL": f"{self._url}?namespace={NAMESPACE}"}
        found = {"VELTRIX_URL": f"etcd://{hosts}/{NAMESPACE}?transport={self.transport}"}
        if self._url is not None:
            found["VELTRIX_MIRROR_URL"] = self._url
        return found

    def watched(self) -> str:
        """The member that a watch goes to now, through these links."""

        def found() -> str:
            return next((name for name, proxy in self.etcd.items() if WATCHING[self.transport](proxy)), "")

        return wait_until(found, 20, reason="a watch through these links")

    def heal(self) -> None:
        for each in self.all:
            each.heal()

    def close(self) -> None:
        for each in self.all:
            each.close()


@dataclass
class RelayProcess:
    """A process that stands for election."""

    name: str
    links: Links
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.apps.relaying", self.name],
                env={**os.environ, **self.links.environment, "PYTHONPATH": f"{ROOT}/src:{ROOT}"},
                cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text(errors="replace")

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Writer:
    """Writes all the time through etcd's gateway, as any program may, past the proxies; notes what was acknowledged.

    `pair/left` and `pair/right` change in one transaction and always hold the same number.
    """

    def __init__(self, cluster: EtcdCluster, *, every_s: float = 0.1) -> None:
        self._cluster = cluster
        self._every_s = every_s
        self._stopping = threading.Event()
        self._going = threading.Event()
        self._still = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._turn = 0
        self._number = 0
        self.writes: list[Write] = []
        self.failed = 0

    def start(self) -> None:
        self._going.set()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._going.set()
        if self._thread.ident is not None:
            self._thread.join(20)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block nothing is written, nor on its way."""
        if not self._going.is_set():
            yield  # whoever paused it lets it go on
            return
        self._still.clear()
        self._going.clear()
        assert self._still.wait(20), "the writer does not pause"
        try:
            yield
        finally:
            self._going.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            if not self._going.is_set():
                self._still.set()
                self._going.wait()
                continue
            try:
                self.write(self._next())
            except (OSError, http.client.HTTPException, KeyError, ValueError, StoreError):
                self.failed += 1
                self._turn += 1
            self._stopping.wait(self._every_s)

    def _next(self) -> dict[str, str | None]:
        self._number += 1
        number = self._number
        operations: dict[str, str | None] = {"pair/left": str(number), "pair/right": str(number)}
        operations[f"item/{number % 17}"] = None if number % 5 == 0 else f'"{number}"'
        return operations

    def write(self, operations: Mapping[str, str | None], *, timeout_s: float = 2.0) -> Write:
        """One transaction: values as JSON text, None to delete."""
        success = [
            {"requestDeleteRange": {"key": _b64(key)}}
            if value is None
            else {"requestPut": {"key": _b64(key), "value": base64.b64encode(value.encode()).decode()}}
            for key, value in operations.items()
        ]
        sent_s = time.monotonic()
        said = self.post("/v3/kv/txn", {"success": success}, timeout_s=timeout_s)
        write = Write(int(said["header"]["revision"]), sent_s, time.monotonic())
        self.writes.append(write)
        return write

    def post(self, path: str, payload: Any, *, timeout_s: float) -> Any:
        """One request to a member that runs: another one after each failure."""
        members = [each for each in self._cluster.members if each.process is not None]
        if not members:
            raise ConnectionRefusedError("no member runs")
        member = members[self._turn % len(members)]
        request = urllib.request.Request(
            f"http://127.0.0.1:{member.port}{path}", data=json.dumps(payload).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answered:
            return json.load(answered)

    def first_after(self, at_s: float, timeout_s: float = 30) -> Write:
        """The first write that was sent after `at_s` and acknowledged."""

        def found() -> Write | None:
            return next((each for each in self.writes[-400:] if each.sent_s >= at_s), None)

        write = wait_until(found, timeout_s, reason="etcd takes a write")
        assert write is not None
        return write

    def truth(self, revision: int = 0) -> tuple[int, int]:
        """(digest, entries) of the namespace, linearizable, by the documented rule; at a past `revision` if given."""

        def read() -> Any:
            try:
                return self.post(
                    "/v3/kv/range",
                    {"key": _b64(""), "range_end": _b64("", end=True), "revision": str(revision), "limit": "100000"},
                    timeout_s=5.0,
                )
            except urllib.error.HTTPError as error:
                with error:
                    if b"compacted" in error.read():
                        raise LookupError(f"revision {revision} is compacted") from None
                self._turn += 1
            except (OSError, http.client.HTTPException):
                self._turn += 1
            return None

        said = wait_until(read, 30, reason="etcd answers a linearizable read")
        pairs = said.get("kvs", [])
        digest = sum(
            digest_of(base64.b64decode(each["key"]).decode().removeprefix(f"{NAMESPACE}/"), int(each["mod_revision"]))
            for each in pairs
        )
        return digest % (1 << 64), len(pairs)


class StoreWriter(Writer):
    """Writes to Redis as the authority, at the servers themselves."""

    def __init__(self, url: str, *, every_s: float) -> None:
        super().__init__(EtcdCluster(Path(), []), every_s=every_s)
        self._store = open_store(parse_url(url, namespace=NAMESPACE))

    def stop(self) -> None:
        super().stop()
        self._store.close()

    def write(self, operations: Mapping[str, str | None], *, timeout_s: float = 2.0) -> Write:
        raw = [RawOperation(key, MISSING if value is None else value.encode()) for key, value in operations.items()]
        sent_s = time.monotonic()
        revision = self._store.commit(raw, ChangeRecord(), timeout_s=timeout_s)
        self.writes.append(Write(revision, sent_s, time.monotonic()))
        return self.writes[-1]

    def truth(self, revision: int = 0) -> tuple[int, int]:
        assert not revision

        def read() -> Listing | None:
            with contextlib.suppress(StoreError):
                return self._store.list(timeout_s=5.0)
            return None

        listing = wait_until(read, 30, reason="Redis is listed")
        assert listing is not None
        return sum(digest_of(key, mod) for key, _, mod in listing.entries) % (1 << 64), len(listing.entries)


def _b64(key: str, *, end: bool = False) -> str:
    prefix = NAMESPACE + ("0" if end else "/")  # "0" follows "/"
    return base64.b64encode(f"{prefix}{key}".encode()).decode()


class Load:
    """Requests all the time, each over a connection of its own, so that every worker gets some."""

    def __init__(self, served: Served, checker: Checker, *, threads: int = 3, every_s: float = 0.04) -> None:
        self._served, self._checker, self._every_s = served, checker, every_s
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, name=f"load-{n}", daemon=True) for n in range(threads)]

    def start(self) -> None:
        for each in self._threads:
            each.start()

    def stop(self) -> None:
        self._stopping.set()
        for each in self._threads:
            if each.ident is not None:
                each.join(20)

    def _run(self) -> None:
        while not self._stopping.is_set():
            sent_s = time.monotonic()
            try:
                told = self._served.get(timeout_s=REQUEST_S)
            except Exception as error:
                self._checker.failures.append(
                    f"{type(error).__name__}: {error} after {time.monotonic() - sent_s:.1f} s"
                )
            else:
                self._checker.answers.append(Answer(sent_s, time.monotonic(), told))
            self._stopping.wait(self._every_s)


@dataclass
class Rig:
    """All of it, running."""

    cluster: EtcdCluster  # of no member where Redis is the authority
    redis: RedisServer | None
    servers: SentinelSet | ClusterSet | None
    links: Links
    relays: list[RelayProcess]
    served: Served
    folder: Path
    writer: Writer
    checker: Checker
    workers: int
    _read: dict[Path, int] = field(default_factory=dict)

    # --- what the workers did

    def publications(self) -> dict[int, list[Publication]]:
        """What each worker has published so far, by pid."""
        for path in self.folder.glob("*.jsonl"):
            begin = self._read.get(path, 0)
            with path.open() as trace:
                trace.seek(begin)
                text = trace.read()
            whole = text[: text.rfind("\n") + 1]
            self._read[path] = begin + len(whole.encode())
            for line in whole.splitlines():
                self.checker.published(json.loads(line))
        return self.checker.publications

    def caught_up_s(self, revision: int, timeout_s: float, *, after_s: float = 0.0) -> float:
        """Wait until every worker has published `revision` or a later one; when the last one did.

        After `after_s`: a revision that was lost may have been published before.
        """

        def all_did() -> float:
            times = [
                next((each.t for each in published if each.revision >= revision and each.t >= after_s), None)
                for published in self.publications().values()
            ]
            return max((each for each in times if each), default=0.0) if None not in times else 0.0

        try:
            return wait_until(all_did, timeout_s, reason=f"every worker serves revision {revision}", interval_s=0.05)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None

    def equal_within(self, bound_s: float) -> float:
        """With nothing written, wait until every worker holds what etcd holds; the seconds it took, at most the bound.

        The comparison is of digests, with a linearizable list that is made after the last write.
        """
        with self.writer.paused():
            begun_s = time.monotonic()
            digest, count = self.writer.truth()

            def equal() -> bool:
                return all(published[-1].digest == digest for published in self.publications().values())

            try:
                wait_until(equal, bound_s * SLACK, reason="every worker holds what etcd holds", interval_s=0.05)
            except AssertionError as error:
                raise AssertionError(f"{error}\netcd: digest {digest}, {count} entries\n{self.told()}") from None
            return time.monotonic() - begun_s

    def told(self) -> str:
        """What is known, for a failure's message."""
        newest = "\n".join(f"  {pid}: {published[-1]}" for pid, published in self.publications().items())
        logs = "\n".join(f"-- {each.name}\n{each.log[-3000:]}" for each in self.relays)
        with contextlib.suppress(Exception):
            newest += "\n" + "\n".join(f"  {pid}: {told}" for pid, told in self.statuses().items())
        return f"now {time.monotonic():.2f}\nworkers:\n{newest}\n-- served\n{self.served.log[-6000:]}\n{logs}"

    def statuses(self) -> dict[int, dict[str, Any]]:
        """Each worker's status."""
        seen: dict[int, dict[str, Any]] = {}

        def all_told() -> bool:
            told = self.served.get("/status")
            seen[told["pid"]] = told
            return len(seen) >= self.workers

        wait_until(all_told, 30, reason="every worker tells its status")
        return seen

    def until_status(self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float, *, reason: str) -> None:
        try:
            wait_until(lambda: all(map(wanted, self.statuses().values())), timeout_s, reason=reason, interval_s=0.1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None

    def recovers_within(self, bound_s: float, fault: Callable[[], None]) -> None:
        """Do what `fault` does, to its end; then every worker serves what is written, and all are equal once healed."""
        try:
            fault()
            ended_s = time.monotonic()
            write = self.writer.first_after(ended_s)
            took_s = self.caught_up_s(write.revision, bound_s * SLACK + 1, after_s=ended_s) - ended_s
            print(f"caught up {took_s:.2f} s after, written again {write.acknowledged_s - ended_s:.2f} s after")
            assert took_s <= bound_s * SLACK, f"{took_s:.2f} s\n{self.told()}"
        finally:
            self.heal()
        self.equal_within(bound_s)
        self.steady()

    # --- who is who

    def holder(self) -> str:
        """The instance that holds the relay's lease, as Redis says."""
        lease, mirror = f"veltrix:{{{NAMESPACE}}}:lease", self.redis or self.servers
        assert mirror is not None
        held = mirror.owner_of(lease).run("GET", lease) or b""
        return next((each.name for each in self.relays if each.name.encode() in held), "")

    def relay(self) -> RelayProcess:
        """The process that is the relay."""
        name = wait_until(self.holder, 20, reason="a relay is elected", interval_s=0.05)
        return next(each for each in self.relays if each.name == name)

    def member(self, name: str) -> Member:
        return next(each for each in self.cluster.members if each.name == name)

    def steady(self) -> None:
        """Wait until all is well: a relay, and every worker on the tier of first choice, equal to etcd."""
        if self.relays:
            self.relay()
            self.until_status(
                lambda told: told["origin"] == "redis" and not told["stale"] and all(
                    tier["state"] == "following" for tier in told["tiers"] if tier["role"] == "mirror"
                ),
                30, reason="every worker follows the mirror",
            )  # fmt: skip
        else:
            self.until_status(
                lambda told: told["tiers"][0]["state"] == "following", 30, reason="every worker follows the authority"
            )
        self.equal_within(12)

    # --- life and death

    def all_down(self) -> None:
        if self.redis is not None:
            self.redis.kill()
        for member in self.cluster.members:
            if member.process is not None:
                self.cluster.kill(member)

    def heal(self) -> None:
        """Everything is up and joined again."""
        for each in (self.links, *(each.links for each in self.relays)):
            each.heal()
        for member in self.cluster.members:
            if member.process is not None:
                self.cluster.resume(member)
        dead = [member for member in self.cluster.members if member.process is None]
        if dead:
            self.cluster.start(*dead)
        if self.redis is not None:
            if self.redis._process is None:
                self.redis.start()
            self.redis.cont()
        if self.servers is not None:
            self.servers.heal()
        for relay in self.relays:
            if relay.process is None:
                relay.start()
            relay.signal(signal.SIGCONT)


@contextlib.contextmanager
def rig(
    *,
    members: int = 3,
    mirror: bool = True,
    workers: int = 4,
    relays: int = 2,
    etcd_options: Sequence[str] = (),
    redis_options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    load: bool = True,
    writes_every_s: float = 0.1,
    servers: SentinelSet | ClusterSet | None = None,
    authority_options: str = "",
    transport: str = TRANSPORT,
) -> Iterator[Rig]:
    """A rig that is steady; when the block ends, what was recorded is checked.

    `servers` are the mirror, in place of one Redis; with no `members` of etcd they are the authority, and written to
    with `authority_options` in the URL.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="veltrix-rig-")))
        cluster, redis = EtcdCluster(folder, []), None
        if members:
            cluster = stack.enter_context(etcd_cluster(members, options=etcd_options))
            cluster.ctl("put", f"{NAMESPACE}/checkout/max_items", "41")
            redis = stack.enter_context(redis_server(*redis_options)) if mirror and servers is None else None
        place = redis or servers
        links = Links(cluster, place, transport)
        stack.callback(links.close)
        standing = []
        for number in range(relays if mirror and members else 0):
            own = Links(cluster, place, transport)
            stack.callback(own.close)
            standing.append(RelayProcess(f"relay-{number}", own, folder))
            stack.callback(standing[-1].kill)
            standing[-1].start()
        served = stack.enter_context(
            serve(
                "tests.support.apps.traced:app",
                server="gunicorn",
                workers=workers,
                env={**links.environment, "TRACE_FOLDER": str(folder), **(environment or {})},
            )
        )
        checker, writer = Checker(), Writer(cluster, every_s=writes_every_s)
        if not members:
            assert servers is not None
            writer = StoreWriter(f"{servers.url}{authority_options}", every_s=writes_every_s)
            writer.write({"checkout/max_items": "41"}, timeout_s=10)
        made = Rig(cluster, redis, servers, links, standing, served, folder, writer, checker, workers)
        made.statuses()  # each worker begins to follow with its first request
        stack.callback(writer.stop)
        writer.start()
        loading = Load(served, checker)
        stack.callback(loading.stop)
        if load:
            loading.start()
        made.steady()
        yield made
        loading.stop()
        writer.stop()
        made.publications()
        checker.writes = list(writer.writes)
        checker.check(served.log)
