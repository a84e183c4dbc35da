"""Redis is emptied, evicts, loses its tail or comes back with old data, and two processes believe to be its relay.

No key leaves a snapshot wrongly, nothing moves back, and the mirror ends up equal to etcd: the relay refills it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.faults.rig import NAMESPACE, SLACK, Rig, rig
from tests.support.waiting import wait_until
from veltrix_mw.digest import digest_of
from veltrix_mw.errors import Compacted, LeaseLost
from veltrix_mw.protocols import Lease
from veltrix_mw.settings import parse_url
from veltrix_mw.stores.opening import open_mirror

pytestmark = pytest.mark.timeout(300)

CONVERGED_S = 5.0
TAKEOVER_S = 7.0
ENTRIES, CHANGES, LEASE, TOKEN = (
    f"veltrix:{{{NAMESPACE}}}:{name}" for name in ("entries", "changes", "lease", "token")
)


@pytest.fixture(scope="module")
def made() -> Iterator[Rig]:
    with rig(members=1) as it:
        # What is never deleted must never be missed, by anybody.
        it.writer.write({f"kept/{number}": str(number) for number in range(50)})
        it.steady()
        yield it
        it.publications()
        for pid, published in it.checker.publications.items():
            first = next(index for index, each in enumerate(published) if each.count >= 50)
            least = min(each.count for each in published[first:])
            assert least >= 50, f"{pid} missed keys that were never deleted: {least} entries"


def _mirror_equals_etcd(made: Rig, bound_s: float) -> None:
    """With nothing written, the mirror holds what etcd holds: by a reader of its own, and by the entries in Redis."""
    mirror = open_mirror(parse_url(f"redis://127.0.0.1:{made.redis.port}/0", namespace=NAMESPACE))  # type: ignore[union-attr]
    with made.writer.paused():
        truth = made.writer.truth()

        def held() -> Any:
            try:
                listing = mirror.list(timeout_s=2)
            except Exception as error:
                return repr(error)
            return sum(digest_of(key, at) for key, _, at in listing.entries) % (1 << 64), len(listing.entries)

        try:
            wait_until(lambda: held() == truth, bound_s * SLACK, reason="the mirror holds what etcd holds")
        finally:
            told = held()
            mirror.close()
        assert told == truth


def _flush(made: Rig) -> None:
    made.redis.run("FLUSHALL")  # type: ignore[union-attr]


def _delete(*names: str) -> Callable[[Rig], None]:
    def delete(made: Rig) -> None:
        assert made.redis is not None
        made.redis.run("DEL", *names)

    return delete


def _trim(made: Rig) -> None:
    made.redis.run("XTRIM", CHANGES, "MAXLEN", "0")  # type: ignore[union-attr]


def _restart_empty(made: Rig) -> None:
    made.redis.restart()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("damage", "bound_s"),
    [
        pytest.param(_flush, CONVERGED_S, id="FLUSHALL"),
        pytest.param(_delete(ENTRIES), CONVERGED_S, id="the entries are gone"),
        pytest.param(_delete(CHANGES), CONVERGED_S, id="the stream is gone"),
        pytest.param(_delete(TOKEN), CONVERGED_S, id="the token is gone"),
        pytest.param(_delete(LEASE), CONVERGED_S, id="the lease is gone"),
        pytest.param(_delete(LEASE, TOKEN, CHANGES), CONVERGED_S, id="all but the entries are gone"),
        pytest.param(_trim, CONVERGED_S, id="the stream is trimmed"),
        pytest.param(_restart_empty, TAKEOVER_S, id="restarted empty"),
    ],
)
def test_damage_to_the_mirror_is_mended_and_no_key_is_missed(
    made: Rig, damage: Callable[[Rig], None], bound_s: float
) -> None:
    damage(made)
    begun_s = time.monotonic()
    made.caught_up_s(made.writer.first_after(begun_s).revision, bound_s * SLACK)
    made.equal_within(bound_s)
    _mirror_equals_etcd(made, bound_s)
    made.steady()


def test_a_dump_of_yesterday_is_not_taken_for_the_truth(made: Rig) -> None:
    assert made.redis is not None
    dump = made.redis.save()
    for number in range(50):
        made.writer.write({f"kept/{number}": str(number + 1_000)})
    made.equal_within(CONVERGED_S)
    made.redis.restart(dump=dump)
    begun_s = time.monotonic()
    made.caught_up_s(made.writer.first_after(begun_s).revision, TAKEOVER_S * SLACK)
    made.equal_within(TAKEOVER_S)
    _mirror_equals_etcd(made, TAKEOVER_S)
    made.steady()


def test_eviction_of_any_key_is_no_deletion(made: Rig) -> None:
    """`maxmemory` with `allkeys-random`, and others' data that pushes ours out again and again."""
    assert made.redis is not None
    redis = made.redis.client
    used = redis.info("memory")["used_memory"]
    evicted = redis.info("stats")["evicted_keys"]
    lost: set[str] = set()
    try:
        redis.config_set("maxmemory-policy", "allkeys-random")
        redis.config_set("maxmemory", used + 512 * 1024)
        number = 0

        def pushed_out() -> bool:
            nonlocal number
            for _ in range(20):
                number += 1
                redis.set(f"other:{number % 40}", b"x" * 30_000)
            lost.update(name for name in (ENTRIES, CHANGES, LEASE, TOKEN) if not redis.exists(name))
            return len(lost) >= 3

        wait_until(pushed_out, 60, reason="three of our keys were evicted")
        assert redis.info("stats")["evicted_keys"] > evicted
        begun_s = time.monotonic()
        made.caught_up_s(made.writer.first_after(begun_s).revision, 12 * SLACK)
    finally:
        redis.config_set("maxmemory", 0)
        redis.config_set("maxmemory-policy", "noeviction")
    made.equal_within(TAKEOVER_S)
    _mirror_equals_etcd(made, TAKEOVER_S)
    made.steady()


def test_of_two_relays_the_deposed_one_cannot_write(made: Rig) -> None:
    """The relay freezes, another is elected, and the first one wakes and believes that it still leads."""
    first = made.relay()
    first.signal(signal.SIGSTOP)
    try:
        second = wait_until(
            lambda: (holder := made.holder()) not in {"", first.name} and holder,
            TAKEOVER_S * SLACK,
            reason="a successor",
        )
    finally:
        first.signal(signal.SIGCONT)
    begun_s = time.monotonic()
    made.caught_up_s(made.writer.first_after(begun_s).revision, TAKEOVER_S * SLACK)
    wait_until(lambda: "veltrix.relay_deposed" in first.log, TAKEOVER_S * SLACK, reason="the first one notices")
    assert made.holder() == second
    made.equal_within(CONVERGED_S)
    _mirror_equals_etcd(made, CONVERGED_S)


def test_writes_of_a_relay_without_the_lease_change_nothing(made: Rig) -> None:
    """With an old token, and with a token of its own invention: also when Redis has lost lease and token."""
    assert made.redis is not None
    mirror = open_mirror(parse_url(f"redis://127.0.0.1:{made.redis.port}/0", namespace=NAMESPACE))
    made.relay()
    state = mirror.state(timeout_s=2)
    listing = mirror.list(timeout_s=2)
    tried: list[Callable[[Lease], Any]] = [
        lambda lease: mirror.fill(lease, listing, digest=0, lazy=(), timeout_s=2),
        lambda lease: mirror.prove(lease, state.position, asked_at_us=0, timeout_s=2),
        lambda lease: mirror.keep(lease, ttl_s=5, timeout_s=2),
    ]
    for lease in (Lease("relay-9", 1), Lease(state.relay, 1), Lease("relay-9", 10**9)):
        for attempt in tried:
            with pytest.raises((LeaseLost, Compacted)):
                attempt(lease)
    assert mirror.state(timeout_s=2).position.revision >= state.position.revision
    mirror.close()
    _mirror_equals_etcd(made, CONVERGED_S)
