"""The lease as it is opened: one contract over Redis, alone, behind sentinels and in a cluster, and over etcd by both
transports and through a client that was handed in; and what cannot be opened.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import grpc
import pytest

from tests.lease_holder import Holder
from tests.support.etcd_servers import EtcdCluster, etcd
from tests.support.forking import forked
from tests.support.proxy import Proxy
from tests.support.redis_servers import RedisServer, cluster_set, redis_server, sentinel_set
from tests.support.waiting import wait_until
from veltrix_mw.errors import LeaseLost, SettingsError, StoreUnavailable
from veltrix_mw.leases import Lease, open_lease
from veltrix_mw.protocols import LeaseStore
from veltrix_mw.settings import parse_url
from veltrix_mw.stores.opening import open_leases

WITHIN_S: Final = 30.0
TTL_S: Final = 2.0  # etcd's least
LONG_S: Final = 300.0
KINDS: Final = ("redis", "redis-sentinel", "redis-cluster", "etcd-gateway", "etcd-grpc")

multithreaded_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

_names = (f"lease{number}" for number in itertools.count())


@pytest.fixture(scope="module", params=KINDS)
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    match request.param:
        case "redis":
            with redis_server() as server:
                yield f"redis://127.0.0.1:{server.port}/0?namespace=shop"
        case "redis-sentinel":
            with sentinel_set() as sentinels:
                yield f"{sentinels.url}?namespace=shop&wait_replicas=1"
        case "redis-cluster":
            with cluster_set() as cluster:
                yield f"{cluster.url}?namespace=shop"
        case kind:
            with etcd() as servers:
                yield etcd_url(servers, kind)


def etcd_url(servers: EtcdCluster, kind: str, *, port: int = 0) -> str:
    return f"etcd://127.0.0.1:{port or servers.members[0].port}/shop?transport={kind.removeprefix('etcd-')}"


@pytest.fixture
def name() -> str:
    return next(_names)


@pytest.fixture
def opened() -> Iterator[Callable[..., Lease]]:
    """Opens leases, and closes them at the end."""
    with ExitStack() as stack:

        def open_one(url: Any, name: str, **options: Any) -> Lease:
            lease = open_lease(url, name, **options)
            stack.callback(lease.close)
            return lease

        yield open_one


@pytest.fixture
def store(url: str) -> Iterator[LeaseStore]:
    """The leases that are not kept up by themselves."""
    store = open_leases(parse_url(url))
    yield store
    store.close()


# --- the contract


def test_one_holds_it_and_is_named_to_the_others_and_each_holder_has_a_larger_token(
    url: str, name: str, opened: Callable[..., Lease]
) -> None:
    one = opened(url, name, holder="one", ttl_s=LONG_S)
    other = opened(url, name, ttl_s=LONG_S)
    tokens = []
    for _ in range(2):
        assert one.try_hold()
        assert not other.try_hold()
        with pytest.raises(LeaseLost, match=rf"the lease '{name}' is held by one:\w+; try again later"):
            other.hold(timeout_s=0.3)
        tokens.append(one.token)
        one.release()
        assert other.try_hold()  # at once: its time is far from over
        tokens.append(other.token)
        other.release()
    assert tokens == sorted(set(tokens))


def test_it_is_of_its_namespace_and_its_name(url: str, name: str, opened: Callable[..., Lease]) -> None:
    elsewhere = url.replace("namespace=shop", "namespace=other").replace("/shop", "/other")
    assert elsewhere != url
    leases = [opened(url, name), opened(url, f"{name}:token"), opened(elsewhere, name)]
    assert all(lease.try_hold() for lease in leases)


def test_who_stops_loses_it_and_finds_out(url: str, name: str, opened: Callable[..., Lease]) -> None:
    other = opened(url, name, ttl_s=TTL_S)
    with Holder(url, name, ttl_s=TTL_S) as holder:
        token = int(holder.line())
        assert int(holder.ask()) == token
        assert not other.try_hold()
        holder.stop()
        other.hold(timeout_s=WITHIN_S)
        assert other.token > token
        holder.resume()
        assert holder.ask() == "lost"
        kept = other.token
    # It gave nothing up that was another's, when it ended.
    assert not opened(url, name).try_hold()
    assert other.token == kept


def test_it_is_kept_up_for_as_long_as_its_holder_lives(url: str, name: str, opened: Callable[..., Lease]) -> None:
    other = opened(url, name, ttl_s=TTL_S)
    with Holder(url, name, ttl_s=TTL_S) as holder:
        token = holder.line()
        with pytest.raises(LeaseLost, match="held by"):
            other.hold(timeout_s=2 * TTL_S)
        assert holder.ask() == token
    other.hold(timeout_s=WITHIN_S)  # kill -9
    assert other.token > int(token)


def test_of_many_processes_one_has_it_at_a_time(url: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "log"
    with ExitStack() as stack:
        takers = [stack.enter_context(Holder(url, name, ttl_s=10, times=3, file=file)) for _ in range(3)]
        assert [taker.line() for taker in takers] == ["done"] * 3
    lines = [line.split() for line in file.read_text().splitlines()]
    assert [line[0] for line in lines] == ["in", "out"] * 9
    assert all(begun[1:] == ended[1:] for begun, ended in zip(lines[::2], lines[1::2], strict=True))
    tokens = [int(line[2]) for line in lines[::2]]
    assert tokens == sorted(set(tokens))


def test_a_deposed_holder_can_neither_renew_it_nor_give_it_up(url: str, name: str, store: LeaseStore) -> None:
    first, _, _ = store.acquire(name, "first", ttl_s=1, timeout_s=WITHIN_S)
    assert first is not None
    taken = wait_until(
        lambda: store.acquire(name, "second", ttl_s=LONG_S, timeout_s=WITHIN_S)[0], WITHIN_S, reason="it runs out"
    )
    assert taken is not None
    with pytest.raises(LeaseLost, match="another's, or ran out; stop what it was held for"):
        store.renew(name, first, ttl_s=1, timeout_s=WITHIN_S)
    store.release(name, first, timeout_s=WITHIN_S)
    store.renew(name, taken, ttl_s=LONG_S, timeout_s=WITHIN_S)
    assert store.acquire(name, "third", ttl_s=1, timeout_s=WITHIN_S)[:2] == (None, "second")


def test_an_attempt_that_is_repeated_finds_its_own(url: str, name: str, store: LeaseStore) -> None:
    first, _, _ = store.acquire(name, "attempt", ttl_s=LONG_S, timeout_s=WITHIN_S)
    assert store.acquire(name, "attempt", ttl_s=LONG_S, timeout_s=WITHIN_S)[0] == first
    assert store.acquire(name, "attempt2", ttl_s=LONG_S, timeout_s=WITHIN_S)[0] is None


def test_a_holder_s_next_attempt_is_another_one(url: str, name: str, opened: Callable[..., Lease]) -> None:
    one, same = (opened(url, name, holder="worker", ttl_s=LONG_S) for _ in range(2))
    assert one.try_hold()
    assert not same.try_hold()
    first = one.token
    one.release()
    assert one.try_hold()
    assert one.token > first


def test_close_ends_who_waits(url: str, name: str, opened: Callable[..., Lease]) -> None:
    one, other = (opened(url, name, ttl_s=LONG_S) for _ in range(2))
    assert one.try_hold()
    ended: list[str] = []

    def wait() -> None:
        with pytest.raises(LeaseLost, match="was closed while it was waited for"):
            other.hold()
        ended.append("ended")

    def closed() -> list[str]:
        other.close()  # again: it may have begun to wait after that
        return ended

    waits = threading.Thread(target=wait)
    waits.start()
    wait_until(closed, WITHIN_S, reason="who waits is told")
    waits.join()
    assert not other.held
    one.close()
    assert other.try_hold()  # closed is not for good


def test_what_is_given_up_while_it_is_asked_for_is_not_held(url: str, name: str, opened: Callable[..., Lease]) -> None:
    """As a task does that was cancelled while a thread waits for it."""
    lease, other = opened(url, name, ttl_s=LONG_S), opened(url, name)

    def hold() -> None:
        with contextlib.suppress(LeaseLost):
            lease.hold()

    for _ in range(5):
        waits = threading.Thread(target=hold)
        waits.start()
        lease.close()
        waits.join(WITHIN_S)
        lease.close()
        assert not lease.held
        assert other.try_hold()
        other.release()


@multithreaded_fork
def test_a_forked_child_asks_as_anybody_else(url: str, name: str, opened: Callable[..., Lease]) -> None:
    lease = opened(url, name, ttl_s=LONG_S)
    assert lease.try_hold()
    token = lease.token

    def child() -> bool:
        own = not lease.held and not lease.try_hold()
        lease.close()
        return own

    assert forked(child)
    assert lease.token == token
    assert not opened(url, name).try_hold()
    lease.release()

    def second_child() -> bool:
        with lease:
            return lease.token > token

    assert forked(second_child)
    assert lease.try_hold()


# --- faults, on servers of their own


@dataclass
class Faulty:
    """A server of its own, and a proxy before it."""

    kind: str
    server: EtcdCluster | RedisServer
    proxy: Proxy

    @property
    def url(self) -> str:
        if isinstance(self.server, RedisServer):
            return f"redis://127.0.0.1:{self.proxy.port}/0?namespace=shop"
        return etcd_url(self.server, self.kind, port=self.proxy.port)

    @property
    def direct_url(self) -> str:
        port = self.server.port if isinstance(self.server, RedisServer) else self.server.members[0].port
        return self.url.replace(f":{self.proxy.port}/", f":{port}/")

    def restart(self, *, with_data: bool = True) -> None:
        """kill -9, and start."""
        if isinstance(self.server, RedisServer):
            self.server.restart(dump=self.server.save() if with_data else None)
            return
        (member,) = self.server.members
        self.server.kill(member)
        if not with_data:
            shutil.rmtree(member.folder / member.name)
        self.server.start()

    def pause(self) -> None:
        if isinstance(self.server, RedisServer):
            self.server.stop()
        else:
            self.server.pause(self.server.members[0])

    def resume(self) -> None:
        if isinstance(self.server, RedisServer):
            self.server.cont()
        else:
            self.server.resume(self.server.members[0])


@pytest.fixture(params=["redis", "etcd-gateway", "etcd-grpc"])
def faulty(request: pytest.FixtureRequest) -> Iterator[Faulty]:
    servers = redis_server() if request.param == "redis" else etcd()
    with servers as server:
        proxy = Proxy(server.port if isinstance(server, RedisServer) else server.members[0].port)
        yield Faulty(request.param, server, proxy)
        proxy.close()


def test_a_store_that_is_silent_ends_no_call_late(faulty: Faulty, name: str, opened: Callable[..., Lease]) -> None:
    lease = opened(faulty.url, name, ttl_s=LONG_S)
    assert lease.try_hold()
    lease.release()
    faulty.pause()
    with pytest.raises(StoreUnavailable):
        lease.try_hold()
    with pytest.raises(StoreUnavailable):
        lease.hold(timeout_s=0.2)
    lease.close()
    faulty.resume()
    # What was on its way may have been carried out: it is its own.
    lease.hold(timeout_s=WITHIN_S)


def test_who_cannot_reach_the_store_has_lost_it_before_another_has_it(
    faulty: Faulty, name: str, opened: Callable[..., Lease]
) -> None:
    cut_off, other = opened(faulty.url, name, ttl_s=TTL_S), opened(faulty.direct_url, name, ttl_s=TTL_S)
    assert cut_off.try_hold()
    token = cut_off.token
    faulty.proxy.blackhole()
    other.hold(timeout_s=WITHIN_S)
    assert not cut_off.held
    assert other.token > token
    faulty.proxy.heal()
    with pytest.raises(LeaseLost, match="is not held; stop what it was held for"):
        _ = cut_off.token
    cut_off.release()
    assert other.held


def test_a_server_that_restarts_with_its_data_keeps_it_for_its_holder(
    faulty: Faulty, name: str, opened: Callable[..., Lease]
) -> None:
    lease = opened(faulty.url, name, ttl_s=3.0)
    assert lease.try_hold()
    token = lease.token
    faulty.restart()
    other = opened(faulty.direct_url, name)
    with pytest.raises(LeaseLost, match="held by"):
        other.hold(timeout_s=4.0)  # longer than it lasts without a renewal
    assert lease.token == token


def test_a_server_that_restarts_without_its_data_loses_it_and_gives_out_a_larger_token(
    faulty: Faulty, name: str, opened: Callable[..., Lease]
) -> None:
    lease = opened(faulty.url, name, ttl_s=3.0)
    assert lease.try_hold()
    token = lease.token
    faulty.restart(with_data=False)
    wait_until(lambda: not lease.held, WITHIN_S, reason="its holder finds out")
    lease.hold(timeout_s=WITHIN_S)
    assert lease.token > token


# --- what cannot be opened

URL: Final = "etcd://127.0.0.1:1/shop"


@pytest.mark.parametrize("bad", ["", "a/b", ".", "..", "a b", "a\n", "a{b}", "x" * 129, "é", None, 7])
def test_a_name_is_one_segment(bad: Any) -> None:
    with pytest.raises(SettingsError, match="is not a lease's name: write at most 128 characters"):
        open_lease(URL, bad)


@pytest.mark.parametrize("bad", ["", "a\nb", "x" * 129, 7])
def test_a_holder_is_a_line_of_text(bad: Any) -> None:
    with pytest.raises(SettingsError, match="holder is a printable str of at most 128 characters"):
        open_lease(URL, "report", holder=bad)


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), 90_000, "5", True, None])
def test_its_time_is_of_seconds(bad: Any) -> None:
    with pytest.raises(SettingsError, match="ttl_s is a positive number of seconds, at most 86400"):
        open_lease(URL, "report", ttl_s=bad)


@pytest.mark.parametrize("url", ["sqlite:///config.db", "memory://shop"])
def test_a_store_of_one_machine_keeps_no_leases(url: str) -> None:
    with pytest.raises(SettingsError, match=r"held in etcd or Redis, not in \w+://; write for example etcd://"):
        open_lease(url, "report")


def test_the_url_is_found_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VELTRIX_URL", "memory://shop")
    with pytest.raises(SettingsError, match="not in memory://"):
        open_lease(None, "report")
    monkeypatch.delenv("VELTRIX_URL")
    with pytest.raises(SettingsError, match="no config store is named"):
        open_lease(None, "report")


def test_what_is_neither_a_url_nor_a_client_is_told_so() -> None:
    with pytest.raises(SettingsError, match="not with a int"):
        open_lease(5, "report")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="give it: open_lease"):
        open_lease(SimpleNamespace(channel=None, metadata=None), "report")
    with pytest.raises(SettingsError, match="names no namespace"):
        open_lease("redis://127.0.0.1:1/0", "report")


def test_nothing_is_opened_before_it_is_asked_for() -> None:
    lease = open_lease(URL, "report")
    assert (lease.name, lease.held) == ("report", False)
    lease.close()
    with pytest.raises(StoreUnavailable, match="nothing listens"):
        lease.try_hold()
    with pytest.raises(StoreUnavailable, match="nothing listens"), lease:
        pass


# --- a client that was handed in


def test_it_is_held_through_a_client_of_etcd_s_that_stays_open() -> None:
    with etcd() as servers:
        channel = grpc.insecure_channel(f"127.0.0.1:{servers.members[0].port}")
        client: Any = SimpleNamespace(channel=channel, metadata=None)
        with open_lease(client, "report", namespace="shop") as lease:
            assert lease.held
            other = open_lease(etcd_url(servers, "etcd-gateway"), "report")
            assert not other.try_hold()
        assert other.try_hold()
        other.close()
        with open_lease(client, "report", namespace="shop") as lease:  # the channel is open
            assert lease.held
        channel.close()
