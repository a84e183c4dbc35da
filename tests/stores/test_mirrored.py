"""An authority and its mirror as one store: the contract over both, with a relay that feeds the mirror.

The stores here wait after each write until the mirror has it: the contract asks for what was just written, and what a
worker reads from a mirror is a moment behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.stores.contract import WITHIN_S, Harness, SharedStoreContract, entries, here, put
from tests.stores.test_etcd import EtcdHarness, Servers
from tests.stores.test_sqlite import SqliteHarness
from tests.support.redis_servers import RedisServer, RedisSet, redis_server
from tests.support.waiting import wait_until
from veltrix_mw.errors import Compacted, StoreError, StoreUnavailable
from veltrix_mw.protocols import (
    Batch,
    ChangeRecord,
    Confirmation,
    Listing,
    Moved,
    Position,
    RawOperation,
    Restored,
    Store,
    Watch,
)
from veltrix_mw.relay import Relay
from veltrix_mw.relay_thread import RelayThread
from veltrix_mw.settings import parse_url
from veltrix_mw.stores.etcd import EtcdStore
from veltrix_mw.stores.mirrored import MirroredStore
from veltrix_mw.stores.opening import open_mirror
from veltrix_mw.stores.redis_layout import Names
from veltrix_mw.stores.redis_mirror import RedisMirror
from veltrix_mw.stores.sqlite import SqliteStore
from veltrix_mw.stores.tiers import Tier


class CaughtUp(MirroredStore):
    """A mirrored store whose mirror has what was written, before anything is asked of it."""

    def catch_up(self) -> None:
        newest = self.authority.list(timeout_s=WITHIN_S).position
        if newest.incarnation:
            wait_until(lambda: self._mirrors(newest), WITHIN_S, reason=f"the mirror of {newest}")

    def _mirrors(self, newest: Position) -> bool:
        held = self.mirror.state(timeout_s=WITHIN_S).position
        return held.incarnation == newest.incarnation and held.revision >= newest.revision

    def commit(self, operations: Sequence[RawOperation], record: ChangeRecord, *, timeout_s: float) -> int:
        revision = super().commit(operations, record, timeout_s=timeout_s)
        self.catch_up()
        return revision

    def list(self, *, timeout_s: float) -> Listing:
        listing = wait_until(lambda: self._list(timeout_s), WITHIN_S, reason="the mirror to be listed")
        assert listing is not None
        return listing

    def _list(self, timeout_s: float) -> Listing | None:
        """None where another thread's watch came past what the mirror was listed at: a follower asks again."""
        self.catch_up()
        try:
            return super().list(timeout_s=timeout_s)
        except StoreUnavailable as exc:
            if "behind" not in str(exc) and "went back" not in str(exc):  # before it was listed, or after
                raise
            return None

    def confirm(self, position: Position, *, timeout_s: float) -> Confirmation:
        self.catch_up()
        return super().confirm(position, timeout_s=timeout_s)

    def watch(self, position: Position, *, timeout_s: float) -> Watch:
        return Moving(self, position, timeout_s)

    def opened(self, position: Position, timeout_s: float) -> Watch:
        return super().watch(position, timeout_s=timeout_s)

    def renew_incarnation(self, known: str, *, timeout_s: float) -> str:
        renewed = super().renew_incarnation(known, timeout_s=timeout_s)
        self.catch_up()
        return renewed


class Moving:
    """A watch that goes on where another tier is followed from, as a replica does."""

    def __init__(self, store: CaughtUp, position: Position, timeout_s: float) -> None:
        self._store = store
        self._position = position
        self._watch = store.opened(position, timeout_s)
        self._closed = False

    def next(self, timeout_s: float) -> Sequence[Batch]:
        while True:
            try:
                batches = self._watch.next(timeout_s)
            except Moved:
                assert not self._closed
                self._watch.close()
                if self._position.incarnation:
                    self._watch = self._store.opened(self._position, WITHIN_S)
                else:  # a mirror does not reach back to before it was filled: a replica would list
                    self._watch = self._store.authority.watch(self._position, timeout_s=WITHIN_S)
                continue
            if batches:
                self._position = batches[-1].position
            return batches

    def close(self) -> None:
        self._closed = True
        self._watch.close()


def open_on_etcd(*, mirror: str, **options: Any) -> CaughtUp:
    """For a job's process: its hosts came as JSON."""
    hosts = [(host, port) for host, port in options.pop("hosts")]
    return CaughtUp(EtcdStore(hosts, **options), open_mirror(parse_url(mirror, namespace=options["namespace"])))


def open_on_sqlite(*, mirror: str, **options: Any) -> CaughtUp:
    return CaughtUp(SqliteStore(**options), open_mirror(parse_url(mirror, namespace=options["namespace"])))


class MirroredHarness(Harness):
    """An authority's harness and a Redis beside it, with a relay for each namespace."""

    keeps_records: bool
    opening: str

    def __init__(self, authority: Any, redis: RedisSet) -> None:
        self._relays: dict[str, tuple[RelayThread, Store, RedisMirror]] = {}
        self._authority = authority
        self._redis = redis
        super().__init__()
        self.namespace = authority.namespace

    def spec(self, **options: Any) -> dict[str, Any]:
        spec = self._authority.spec(**options)
        return {
            "store": f"tests.stores.test_mirrored:{self.opening}",
            "options": {"mirror": self._redis.url, **spec["options"]},
        }

    def make(self, **options: Any) -> CaughtUp:
        lazy = tuple(options.get("lazy", ()))
        if self.namespace not in self._relays:
            self._feed(lazy)
        return CaughtUp(self._authority.make(**options), self._mirror())

    def counts_by_prefix(self, store: Store) -> bool:
        # The relay here leaves nothing out, and a mirror has one count. On a machine that stalls, the mirror may be
        # late enough to have been left for the authority, which counts for itself.
        assert isinstance(store, CaughtUp)
        return store.tiers.current is Tier.AUTHORITY

    def _mirror(self) -> RedisMirror:
        return open_mirror(parse_url(self._redis.url, namespace=self.namespace))

    def _feed(self, lazy: tuple[str, ...]) -> None:
        authority, mirror = self._authority.make(lazy=lazy), self._mirror()
        relay = RelayThread(authority, mirror, instance="relay", relay=Relay(lazy=lazy, confirm_interval_s=0.2))
        relay.start()
        self._relays[self.namespace] = relay, authority, mirror

    def renamed(self) -> None:
        self._authority.renamed()
        self.namespace = self._authority.namespace

    def forget(self, oldest: int) -> None:
        self._authority.forget(oldest)
        changes = Names(self.namespace).changes
        self._redis.owner_of(changes).run("XTRIM", changes, "MINID", f"{oldest}-0")

    def close(self) -> None:
        super().close()
        for relay, _, _ in self._relays.values():
            relay.stop(0)
        for relay, authority, mirror in self._relays.values():
            relay.stop(WITHIN_S)
            authority.close()
            mirror.close()
        self._authority.close()


class EtcdAndRedis(MirroredHarness):
    keeps_records = False
    opening = "open_on_etcd"


class SqliteAndRedis(MirroredHarness):
    keeps_records = True
    opening = "open_on_sqlite"


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(scope="module")
def etcds() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.close()


class MirroredContract(SharedStoreContract):
    """The contract, where only an authority can tell that a history is another one."""

    @pytest.mark.parametrize("other", ["incarnation", "revision", "fingerprint"])
    def test_a_position_of_another_history_is_refused(self, written: Store, other: str) -> None:
        now = here(written)
        position = {
            "incarnation": Position("0123456789abcdef", now.revision, now.fingerprint),
            "revision": Position(now.incarnation, now.revision + 1, now.fingerprint),
            "fingerprint": Position(now.incarnation, now.revision, now.fingerprint[::-1] + "0"),
        }[other]
        with pytest.raises(StoreError) as caught:
            written.watch(position, timeout_s=WITHIN_S)
        assert not isinstance(caught.value, Restored)  # a mirror that is behind looks the same

    def test_renewing_the_incarnation_is_a_compare_and_set(
        self, harness: Harness, written: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        before, kept = here(written), entries(written)
        watch = watching(written, before)
        assert written.renew_incarnation("not-the-one", timeout_s=WITHIN_S) == before.incarnation
        renewed = written.renew_incarnation(before.incarnation, timeout_s=WITHIN_S)
        assert renewed != before.incarnation
        assert harness.open().renew_incarnation(before.incarnation, timeout_s=WITHIN_S) == renewed
        assert (here(written).incarnation, here(written).revision, entries(written)) == (renewed, before.revision, kept)
        with pytest.raises(Compacted):
            self._until_it_ends(watch)

    @staticmethod
    def _until_it_ends(watch: Watch) -> None:
        deadline_s = time.monotonic() + WITHIN_S
        while time.monotonic() < deadline_s:
            watch.next(1.0)

    def test_it_is_followed_through_the_mirror(self, written: Store) -> None:
        assert isinstance(written, MirroredStore)
        put(written, "a", b"9")
        fresh = here(written)
        listing = written.list(timeout_s=WITHIN_S)
        assert (listing.position, listing.origin) == (fresh, "redis")
        assert written.tiers.current is Tier.MIRROR


class TestEtcdAndRedis(MirroredContract):
    """The contract over etcd, mirrored in Redis."""

    @pytest.fixture
    def harness(self, redis: RedisServer, etcds: Servers) -> Iterator[MirroredHarness]:
        redis.run("FLUSHALL")
        harness = EtcdAndRedis(EtcdHarness(etcds), redis)
        yield harness
        harness.close()


class TestSqliteAndRedis(MirroredContract):
    """The contract over SQLite, mirrored in Redis."""

    @pytest.fixture
    def harness(self, redis: RedisServer, tmp_path: Path) -> Iterator[MirroredHarness]:
        redis.run("FLUSHALL")
        authority = SqliteHarness(tmp_path)
        neighbour = SqliteStore(authority.path, namespace="neighbour")
        put(neighbour, "theirs", b"1")  # so that there is a file, with nothing of ours in it
        neighbour.close()
        harness = SqliteAndRedis(authority, redis)
        yield harness
        harness.close()
