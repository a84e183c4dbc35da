"""The Redis mirror on a real server: what its relay may write, and what workers read of it."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.stores.contract import WITHIN_S, drain, in_a_fork, replay
from tests.support.redis_servers import RedisServer, redis_server
from tests.support.waiting import wait_until
from veltrix_mw.digest import digest_of
from veltrix_mw.errors import AuthFailed, Compacted, LeaseLost, StoreError, StoreUnavailable
from veltrix_mw.protocols import (
    Batch,
    ChangeRecord,
    Lease,
    Listing,
    Mirror,
    Position,
    RawChange,
    RawOperation,
    Restored,
)
from veltrix_mw.stores import redis_mirror, redis_reading
from veltrix_mw.stores.redis import RedisStore
from veltrix_mw.stores.redis_layout import MAX_CHANGES
from veltrix_mw.stores.redis_mirror import RedisMirror
from veltrix_mw.values import MISSING, Missing

ENTRIES = "veltrix:{default}:entries"
CHANGES = "veltrix:{default}:changes"
LEASE = "veltrix:{default}:lease"
TTL_S = 600.0  # no lease ends by itself, however slow the machine, unless a test lets it

State = dict[str, tuple[bytes, int]]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """A server that others had before: emptied, and as it is by default."""
    shared_server.run("FLUSHALL")
    return shared_server


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server that the test may kill, stop or fill."""
    with redis_server() as server:
        yield server


OpenMirror = Callable[..., RedisMirror]


@pytest.fixture
def open_mirror() -> Iterator[OpenMirror]:
    opened: list[RedisMirror] = []

    def open_mirror(server: RedisServer, **options: Any) -> RedisMirror:
        opened.append(RedisMirror("127.0.0.1", server.port, **options))
        return opened[-1]

    yield open_mirror
    for mirror in opened:
        mirror.close()


class Authority:
    """An authority as its relay sees it: revisions with gaps between them, as etcd's have."""

    def __init__(self, incarnation: str = "one") -> None:
        self.incarnation = incarnation
        self.position = Position("", 0)
        self.state: State = {}

    def write(self, changes: dict[str, bytes | Missing], *, author: str = "") -> Batch:
        previous = self.position.revision
        revision = previous + 3
        self.position = Position(self.incarnation, revision, f"mark{revision}-{os.urandom(2).hex()}")
        made = tuple(RawChange(key, value) for key, value in sorted(changes.items()))
        batch = Batch(self.position, previous, made, ChangeRecord(author=author))
        self.state = replay_loosely(self.state, batch)
        return batch

    @property
    def digest(self) -> int:
        return sum(digest_of(key, revision) for key, (_, revision) in self.state.items()) % 2**64

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.state), self.digest

    @property
    def listing(self) -> Listing:
        return Listing(self.position, [(key, *entry) for key, entry in sorted(self.state.items())])


def replay_loosely(state: State, batch: Batch) -> State:
    state = dict(state)
    for change in batch.changes:
        state.pop(change.key, None)
        if not isinstance(change.value, Missing):
            state[change.key] = (change.value, batch.position.revision)
    return state


class Relay:
    """A mirror, the authority it is fed from, and the lease."""

    def __init__(self, mirror: RedisMirror, authority: Authority, holder: str = "w1") -> None:
        self.mirror = mirror
        self.authority = authority
        self.lease = elected(mirror, holder)

    def fill(self, *, lazy: Sequence[str] = ()) -> None:
        authority = self.authority
        self.mirror.fill(self.lease, authority.listing, digest=authority.digest, lazy=lazy, timeout_s=WITHIN_S)

    def write(self, changes: dict[str, bytes | Missing], **options: Any) -> Batch:
        batch = self.authority.write(changes, **options)
        self.append(batch)
        return batch

    def append(self, *batches: Batch, counts: Sequence[tuple[int, int]] | None = None) -> None:
        given = [self.authority.counts] * len(batches) if counts is None else counts
        self.mirror.append(self.lease, batches, counts=given, timeout_s=WITHIN_S)


def elected(mirror: RedisMirror, holder: str, *, ttl_s: float = TTL_S) -> Lease:
    lease, who, _ = mirror.elect(holder, ttl_s=ttl_s, timeout_s=WITHIN_S)
    assert lease is not None, f"{who} has it"
    return lease


@pytest.fixture
def relay(server: RedisServer, open_mirror: OpenMirror) -> Relay:
    """A relay that filled the mirror with three entries."""
    return filled(open_mirror(server))


def filled(mirror: RedisMirror) -> Relay:
    authority = Authority()
    authority.write({"a": b"1", "b": b"2", "c": b"3"})
    relay = Relay(mirror, authority)
    relay.fill()
    return relay


def listed(mirror: RedisMirror) -> State:
    return {key: (raw, revision) for key, raw, revision in mirror.list(timeout_s=WITHIN_S).entries}


def everything(server: RedisServer) -> dict[bytes, bytes]:
    return {key: server.run("DUMP", key) for key in server.run("KEYS", "*")}


def stream(server: RedisServer) -> list[list[bytes]]:
    """The fields and values of each stream entry."""
    return [[word for pair in fields.items() for word in pair] for _, fields in server.client.xrange(CHANGES)]


def written_in_every_way(relay: Relay) -> list[Callable[[], object]]:
    """Every call that takes a lease, but for `resign`."""
    mirror, lease, authority = relay.mirror, relay.lease, relay.authority
    batch = Batch(Position("one", 99, "m"), authority.position.revision, (RawChange("a", b"9"),))
    return [
        lambda: mirror.keep(lease, ttl_s=TTL_S, timeout_s=WITHIN_S),
        lambda: mirror.fill(lease, authority.listing, digest=authority.digest, lazy=(), timeout_s=WITHIN_S),
        lambda: mirror.append(lease, [batch], counts=[(1, 1)], timeout_s=WITHIN_S),
        lambda: mirror.prove(lease, authority.position, asked_at_us=1, timeout_s=WITHIN_S),
    ]


# --- filled and read


def test_it_is_a_mirror(relay: Relay) -> None:
    assert isinstance(relay.mirror, Mirror)
    assert relay.mirror.info.origin == "redis"


def test_what_was_filled_is_what_is_read(relay: Relay) -> None:
    mirror, authority = relay.mirror, relay.authority
    listing = mirror.list(timeout_s=WITHIN_S)
    assert (listing.position, listing.entries, listing.origin) == (
        authority.position,
        authority.listing.entries,
        "redis",
    )
    state = mirror.state(timeout_s=WITHIN_S)
    assert (state.position, state.count, state.digest) == (authority.position, 3, authority.digest)
    assert (state.relay, state.lazy, state.age_s) == ("w1", (), math.inf)
    assert mirror.revisions(timeout_s=WITHIN_S) == (
        authority.position,
        {key: revision for key, (_, revision) in authority.state.items()},
    )


def test_values_are_copied_byte_for_byte_and_never_decoded(relay: Relay) -> None:
    odd = {"a": b"\xff\x00 not json \r\n", "b": b"", "c": b" " * 5, "d": b"x" * 700_000}
    relay.write(dict(odd))
    assert {key: raw for key, (raw, _) in listed(relay.mirror).items()} == odd
    relay.fill()
    assert {key: raw for key, (raw, _) in listed(relay.mirror).items()} == odd


def test_a_fill_replaces_all_there_was(relay: Relay, server: RedisServer) -> None:
    authority = relay.authority
    relay.write({"a": b"4"})
    authority.write({"a": MISSING, "d": b"4"})
    relay.fill(lazy=("tenants/", "users/"))
    ((entry_id, fields),) = server.run("XRANGE", CHANGES, "-", "+")
    assert (entry_id, fields[b"relist"]) == (f"{authority.position.revision}-0".encode(), b"1")
    assert listed(relay.mirror) == authority.state
    assert relay.mirror.state(timeout_s=WITHIN_S).lazy == ("tenants/", "users/")
    assert relay.mirror.list(timeout_s=WITHIN_S).lazy == ("tenants/", "users/")


def test_each_revision_says_what_it_leaves_out_also_to_who_followed_before_the_fill(relay: Relay) -> None:
    relay.write({"a": b"4"})
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    try:
        relay.fill(lazy=("tenants/", "users/"))
        relay.write({})
        batches: list[Batch] = []
        wait_until(lambda: batches.extend(watch.next(0.1)) or batches, WITHIN_S, reason="the revision after the fill")
    finally:
        watch.close()
    assert [batch.lazy for batch in batches] == [("tenants/", "users/")]


def test_a_large_fill_is_sent_in_pieces_and_leaves_nothing_behind(
    relay: Relay, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_mirror, "_CHUNK_FIELDS", 7)
    relay.authority.write({f"k/{number}": b"%d" % number for number in range(500)})
    relay.fill()
    assert listed(relay.mirror) == relay.authority.state
    assert {bytes(key) for key in server.run("KEYS", "*")} == {
        f"veltrix:{{default}}:{name}".encode() for name in ("entries", "changes", "lease", "token")
    }


def test_a_mirror_of_an_authority_that_nobody_wrote_to_is_filled_too(
    server: RedisServer, open_mirror: OpenMirror
) -> None:
    relay = Relay(open_mirror(server), Authority())
    relay.fill()
    listing = relay.mirror.list(timeout_s=WITHIN_S)
    assert (listing.position, list(listing.entries)) == (Position("", 0), [])


# --- revisions that follow


def test_revisions_follow_in_order_with_their_records_and_marks(relay: Relay) -> None:
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    state = dict(relay.authority.state)
    made = [
        relay.write({"a": b"9", "d": b"4"}, author="ann"),
        relay.write({"b": MISSING}, author="bob"),
        relay.write({}),
    ]
    batches = drain(watch, made[-1].position.revision)
    assert [(each.position, each.previous, each.changes, each.record) for each in batches] == [
        (each.position, each.previous, each.changes, each.record) for each in made
    ]
    assert {batch.origin for batch in batches} == {"redis"}
    for batch in batches:
        state = replay(state, batch)
    assert state == relay.authority.state == listed(relay.mirror)
    watch.close()


def test_many_revisions_are_added_in_one_call(relay: Relay) -> None:
    start, counts, batches = relay.authority.position, [], []
    for turn in range(600):
        batches.append(relay.authority.write({f"k{turn % 7}": b"%d" % turn}))
        counts.append(relay.authority.counts)
    relay.append(*batches, counts=counts)
    assert listed(relay.mirror) == relay.authority.state
    watch = relay.mirror.watch(start, timeout_s=WITHIN_S)
    assert len(drain(watch, batches[-1].position.revision)) == 600
    watch.close()


def test_a_revision_that_does_not_follow_is_refused_with_those_after_it(relay: Relay) -> None:
    first = relay.authority.write({"a": b"4"})
    counts = relay.authority.counts
    state = relay.authority.state
    relay.authority.write({"a": b"5"})  # lost on its way
    later = [relay.authority.write({"a": b"%d" % turn}) for turn in (6, 7)]
    with pytest.raises(Compacted, match="fill it"):
        relay.append(first, *later, counts=[counts] * 3)
    assert relay.mirror.state(timeout_s=WITHIN_S).position == first.position
    assert listed(relay.mirror) == state


@pytest.mark.parametrize("other", ["again", "incarnation"])
def test_a_revision_of_elsewhere_is_refused(relay: Relay, server: RedisServer, other: str) -> None:
    batch = relay.write({"a": b"4"})
    before = everything(server)
    if other == "incarnation":
        position = Position("another", batch.position.revision + 3, "m")
        batch = Batch(position, batch.position.revision, (RawChange("a", b"5"),))
    with pytest.raises(Compacted, match="fill it"):
        relay.append(batch)
    assert everything(server) == before


def test_a_revision_too_large_for_the_stream_is_listed(relay: Relay) -> None:
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    large: dict[str, bytes | Missing] = {f"k{number}": b"%d" % number for number in range(MAX_CHANGES + 500)}
    relay.write(large)
    with pytest.raises(Compacted, match="list again"):
        watch.next(WITHIN_S)
    assert listed(relay.mirror) == relay.authority.state
    batch = relay.write(dict.fromkeys(large, MISSING))
    assert listed(relay.mirror) == relay.authority.state
    relay.mirror.watch(batch.position, timeout_s=WITHIN_S).close()
    watch.close()


def test_the_largest_revision_that_the_stream_holds(relay: Relay) -> None:
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    batch = relay.write({f"k{number:05}": b"1" for number in range(MAX_CHANGES)})
    assert drain(watch, batch.position.revision)[0].changes == batch.changes
    watch.close()


def test_the_stream_is_bounded(server: RedisServer, open_mirror: OpenMirror) -> None:
    relay = filled(open_mirror(server, keep_revisions=100))
    start = relay.authority.position
    made = [relay.authority.write({"a": b"%d" % turn}) for turn in range(500)]
    relay.append(*made)
    assert 100 <= server.run("XLEN", CHANGES) < 500
    with pytest.raises(Compacted):
        relay.mirror.watch(start, timeout_s=WITHIN_S)


def test_the_stream_is_bounded_in_bytes(server: RedisServer, open_mirror: OpenMirror) -> None:
    relay = filled(open_mirror(server, keep_bytes=100_000))
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    start = relay.authority.position
    for turn in range(300):
        relay.write({"small": b"%d" % turn})  # what is small goes with what is large
    for turn in range(20):
        relay.write({"a": b'"%s"' % (b"x" * 9_000), "b": b"%d" % turn})
    held = sum(len(word) for entry in stream(server) for word in entry)
    assert 80_000 < held <= 100_000
    assert len(stream(server)) == held // 9_000
    with pytest.raises(Compacted, match="list again"):
        relay.mirror.watch(start, timeout_s=WITHIN_S)
    with pytest.raises(Compacted, match="list again"):
        while True:
            watch.next(WITHIN_S)
    assert listed(relay.mirror) == relay.authority.state
    relay.write({"a": b"1"})
    assert len(stream(server)) == held // 9_000 + 1  # there is room again


def test_the_newest_revision_is_kept_however_large_it_is(server: RedisServer, open_mirror: OpenMirror) -> None:
    relay = filled(open_mirror(server, keep_bytes=1_000))
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    for turn in range(3):
        batch = relay.write({"a": b'"%d%s"' % (turn, b"x" * 9_000)})
        assert drain(watch, batch.position.revision)[-1].changes == batch.changes
        assert len(stream(server)) == 1
    watch.close()


def test_what_is_small_is_bounded_in_bytes_too(server: RedisServer, open_mirror: OpenMirror) -> None:
    relay = filled(open_mirror(server, keep_bytes=2_000))
    for turn in range(100):
        relay.write({"a": b"%d" % turn})
    held = sum(len(word) for entry in stream(server) for word in entry)
    assert 1_500 < held <= 2_000


def test_filling_begins_the_count_of_bytes_anew(server: RedisServer, open_mirror: OpenMirror) -> None:
    relay = filled(open_mirror(server, keep_bytes=20_000))
    for _ in range(5):
        relay.write({"a": b'"%s"' % (b"x" * 9_000)})
    assert len(stream(server)) == 2
    relay.fill()
    relay.write({"a": b"1"})
    relay.write({"a": b"2"})
    assert len(stream(server)) == 3


# --- who may resume where


@pytest.mark.parametrize(
    "position",
    [
        Position("another", 3, "m"),
        Position("one", 3, "another"),
        Position("one", 3),
        Position("one", 2, "m"),
        Position("", 0),
    ],
    ids=["incarnation", "mark", "no mark", "not in the stream", "the beginning"],
)
def test_what_cannot_resume_lists_and_is_never_called_restored(relay: Relay, position: Position) -> None:
    relay.write({"a": b"4"})
    with pytest.raises(Compacted) as caught:
        relay.mirror.watch(position, timeout_s=WITHIN_S)
    assert not isinstance(caught.value, Restored)


def test_the_newest_revision_with_another_mark_is_another_history(relay: Relay) -> None:
    now = relay.authority.position
    with pytest.raises(Compacted, match="is not the one that was followed"):
        relay.mirror.watch(Position(now.incarnation, now.revision, "another"), timeout_s=WITHIN_S)


def test_a_mirror_that_is_behind_is_said(relay: Relay) -> None:
    ahead = relay.authority.write({"a": b"4"})
    with pytest.raises(StoreUnavailable, match="the mirror is behind"):
        relay.mirror.watch(ahead.position, timeout_s=WITHIN_S)


def test_the_newest_position_resumes_without_a_stream(relay: Relay, server: RedisServer) -> None:
    server.run("DEL", CHANGES)
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    batch = relay.write({"a": b"4"})
    assert [each.position for each in drain(watch, batch.position.revision)] == [batch.position]
    watch.close()


def test_a_gap_in_the_stream_is_noticed(relay: Relay, server: RedisServer) -> None:
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    batch = relay.write({"a": b"4"})
    server.run("XDEL", CHANGES, f"{batch.position.revision}-0")
    relay.write({"a": b"5"})
    with pytest.raises(Compacted, match="does not reach back"):
        watch.next(WITHIN_S)
    watch.close()


def test_a_quiet_watch_notices_that_the_stream_lost_what_it_waits_for(relay: Relay, server: RedisServer) -> None:
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    relay.write({"a": b"4"})
    server.run("DEL", CHANGES)
    with pytest.raises(Compacted, match="does not reach back"):
        watch.next(WITHIN_S)
    watch.close()


def test_a_waiting_watch_is_woken_by_a_fill(relay: Relay) -> None:
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(watch.next, 600)
        relay.authority.write({"a": b"4"})
        relay.fill()
        with pytest.raises(Compacted, match="list again"):
            waiting.result(WITHIN_S)
    assert listed(relay.mirror) == relay.authority.state
    watch.close()


def test_a_quiet_watch_notices_another_incarnation_at_a_lower_revision(relay: Relay) -> None:
    relay.write({"a": b"4"})
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    relay.authority = Authority("two")
    relay.authority.write({"a": b"0"})
    relay.fill()
    with pytest.raises(Compacted) as caught:
        watch.next(WITHIN_S)
    assert not isinstance(caught.value, Restored)
    assert listed(relay.mirror) == relay.authority.state
    watch.close()


# --- what the mirror proves


def test_the_age_is_since_the_authority_was_asked(relay: Relay) -> None:
    mirror = relay.mirror
    asked_us = mirror.clock(timeout_s=WITHIN_S) - 3_000_000
    mirror.prove(relay.lease, relay.authority.position, asked_at_us=asked_us, timeout_s=WITHIN_S)
    for age_s in (mirror.state(timeout_s=WITHIN_S).age_s, mirror.list(timeout_s=WITHIN_S).age_s):
        assert 3 <= age_s < 3 + WITHIN_S
    # A later revision takes nothing away.
    relay.write({"a": b"4"})
    assert mirror.state(timeout_s=WITHIN_S).age_s < 3 + 2 * WITHIN_S


def test_a_proof_of_the_future_is_none_and_the_next_one_counts(relay: Relay, server: RedisServer) -> None:
    """As where the server's clock was set back, or its dump was loaded by one whose clock is behind."""
    mirror, position = relay.mirror, relay.authority.position
    asked_us = mirror.clock(timeout_s=WITHIN_S)
    server.run("HSET", ENTRIES, "#proved", asked_us + 3_600_000_000)
    assert mirror.state(timeout_s=WITHIN_S).age_s == math.inf
    mirror.prove(relay.lease, position, asked_at_us=asked_us, timeout_s=WITHIN_S)
    assert mirror.state(timeout_s=WITHIN_S).age_s < WITHIN_S


def test_a_lease_of_before_a_flush_is_not_the_one_of_the_same_holder_after_it(
    relay: Relay, open_mirror: OpenMirror, server: RedisServer
) -> None:
    mirror, before = relay.mirror, relay.lease
    server.run("FLUSHALL")
    after, _, _ = open_mirror(server).elect(before.holder, ttl_s=WITHIN_S, timeout_s=WITHIN_S)
    assert after is not None
    assert after.token > before.token
    with pytest.raises(LeaseLost):
        mirror.keep(before, ttl_s=WITHIN_S, timeout_s=WITHIN_S)


def test_nothing_is_proved_of_where_the_mirror_does_not_stand(relay: Relay) -> None:
    now = relay.authority.position
    for position in (
        Position(now.incarnation, now.revision + 1, now.fingerprint),
        Position("another", now.revision, now.fingerprint),
        Position(now.incarnation, now.revision, "another"),
    ):
        with pytest.raises(Compacted):
            relay.mirror.prove(relay.lease, position, asked_at_us=1, timeout_s=WITHIN_S)
    assert relay.mirror.state(timeout_s=WITHIN_S).age_s == math.inf


def test_a_fill_begins_without_a_proof(relay: Relay) -> None:
    mirror = relay.mirror
    asked_us = mirror.clock(timeout_s=WITHIN_S)
    mirror.prove(relay.lease, relay.authority.position, asked_at_us=asked_us, timeout_s=WITHIN_S)
    relay.fill()
    assert mirror.state(timeout_s=WITHIN_S).age_s == math.inf


# --- one writer


def test_one_of_many_is_elected(server: RedisServer, open_mirror: OpenMirror) -> None:
    mirrors = [open_mirror(server) for _ in range(8)]
    begin = threading.Barrier(len(mirrors))

    def stand(number: int) -> Lease | None:
        begin.wait(WITHIN_S)
        return mirrors[number].elect(f"w{number}", ttl_s=TTL_S, timeout_s=WITHIN_S)[0]

    with ThreadPoolExecutor(len(mirrors)) as pool:
        won = [lease for lease in pool.map(stand, range(len(mirrors))) if lease is not None]
    assert len(won) == 1
    lease, who, left_s = mirrors[0].elect("late", ttl_s=TTL_S, timeout_s=WITHIN_S)
    assert (lease, who) == (None, won[0].holder)
    assert 0 < left_s <= TTL_S


def test_a_lease_that_is_given_up_is_taken_with_a_larger_token(relay: Relay, open_mirror: OpenMirror) -> None:
    mirror, lease = relay.mirror, relay.lease
    mirror.resign(lease, timeout_s=WITHIN_S)
    second = elected(mirror, "w2")
    assert second.token > lease.token
    mirror.resign(lease, timeout_s=WITHIN_S)  # no longer ours to give up
    assert mirror.state(timeout_s=WITHIN_S).relay == "w2"


def test_a_lease_ends_by_itself_unless_it_is_kept(server: RedisServer, open_mirror: OpenMirror) -> None:
    mirror = open_mirror(server)
    lease = elected(mirror, "w1", ttl_s=0.2)
    second = wait_until(
        lambda: mirror.elect("w2", ttl_s=0.2, timeout_s=WITHIN_S)[0], WITHIN_S, reason="the lease to end"
    )
    assert second.token > lease.token
    with pytest.raises(LeaseLost):
        mirror.keep(lease, ttl_s=TTL_S, timeout_s=WITHIN_S)


def test_keeping_a_lease_lengthens_it_and_says_where_the_mirror_stands(relay: Relay, server: RedisServer) -> None:
    server.run("PEXPIRE", LEASE, 100_000)
    state = relay.mirror.keep(relay.lease, ttl_s=TTL_S, timeout_s=WITHIN_S)
    assert server.run("PTTL", LEASE) > 100_000
    assert state == relay.mirror.state(timeout_s=WITHIN_S)


def test_a_deposed_relay_changes_nothing_in_any_call(relay: Relay, server: RedisServer) -> None:
    relay.mirror.resign(relay.lease, timeout_s=WITHIN_S)
    elected(relay.mirror, "w2")
    before = everything(server)
    for call in written_in_every_way(relay):
        with pytest.raises(LeaseLost):
            call()
    assert everything(server) == before


def test_a_relay_whose_lease_ran_out_changes_nothing_though_nobody_took_it(relay: Relay, server: RedisServer) -> None:
    server.run("DEL", LEASE)
    before = everything(server)
    for call in written_in_every_way(relay):
        with pytest.raises(LeaseLost):
            call()
    assert everything(server) == before


def test_the_token_outlives_its_counter_and_the_other_way_round(relay: Relay, server: RedisServer) -> None:
    mirror, token = relay.mirror, relay.lease.token
    for lost in ("veltrix:{default}:token", ENTRIES):
        server.run("DEL", LEASE, lost)
        lease = elected(mirror, "w2")
        assert lease.token > token
        token = lease.token
        mirror.resign(lease, timeout_s=WITHIN_S)


def test_an_older_token_is_refused_by_what_the_meta_remember(relay: Relay, server: RedisServer) -> None:
    """Redis may lose the lease, and give it back from an old dump; the hash says who wrote last."""
    server.run("HSET", ENTRIES, "#token", relay.lease.token + 1)
    before = everything(server)
    batch = relay.authority.write({"a": b"4"})
    for call in (lambda: relay.append(batch), relay.fill):
        with pytest.raises(LeaseLost):
            call()
    assert everything(server) == before


def test_two_relays_by_turns_never_move_it_back(relay: Relay, open_mirror: OpenMirror, server: RedisServer) -> None:
    """The first fills slowly: its listing is from before what the second has already added."""
    old = relay.authority.listing
    digest = relay.authority.digest
    relay.write({"a": b"4"})
    before = everything(server)
    with pytest.raises(Compacted, match=f"is at revision {relay.authority.position.revision} already"):
        relay.mirror.fill(relay.lease, old, digest=digest, lazy=(), timeout_s=WITHIN_S)
    assert everything(server) == before


def test_a_relay_that_lost_its_lease_while_it_prepared_a_fill_replaces_nothing(
    relay: Relay, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = redis_mirror._chunks

    def deposed_meanwhile(listing: Listing) -> Iterator[list[str | bytes]]:
        yield from chunks(listing)
        server.run("SET", LEASE, f"{relay.lease.token + 1} w2")

    monkeypatch.setattr(redis_mirror, "_chunks", deposed_meanwhile)
    relay.authority.write({"a": b"4"})
    before = server.run("DUMP", ENTRIES)
    with pytest.raises(LeaseLost):
        relay.fill()
    assert server.run("DUMP", ENTRIES) == before
    assert not server.run("KEYS", "*filling*")


def test_what_was_prepared_and_evicted_replaces_nothing(
    relay: Relay, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = redis_mirror._chunks

    def evicted_meanwhile(listing: Listing) -> Iterator[list[str | bytes]]:
        yield from chunks(listing)
        server.run("DEL", *server.run("KEYS", "*filling*"))

    monkeypatch.setattr(redis_mirror, "_chunks", evicted_meanwhile)
    before = server.run("DUMP", ENTRIES)
    with pytest.raises(StoreUnavailable, match="not whole"):
        relay.fill()
    assert server.run("DUMP", ENTRIES) == before


def test_what_a_dead_relay_prepared_goes_by_itself(
    relay: Relay, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks, lives = redis_mirror._chunks, []

    def look(listing: Listing) -> Iterator[list[str | bytes]]:
        yield from chunks(listing)
        lives.extend(server.run("PTTL", key) for key in server.run("KEYS", "*filling*"))

    monkeypatch.setattr(redis_mirror, "_chunks", look)
    relay.fill()
    assert len(lives) == 1
    assert lives[0] > 0
    assert server.run("PTTL", ENTRIES) == -1  # what was put in place stays


def test_an_authority_is_no_mirror(server: RedisServer, open_mirror: OpenMirror) -> None:
    store = RedisStore("127.0.0.1", server.port)
    store.commit([RawOperation("a", b"1")], ChangeRecord(), timeout_s=WITHIN_S)
    store.close()
    mirror, before = open_mirror(server), everything(server)
    for call in (
        lambda: mirror.state(timeout_s=WITHIN_S),
        lambda: mirror.list(timeout_s=WITHIN_S),
        lambda: mirror.watch(Position("one", 1, "m"), timeout_s=WITHIN_S),
        lambda: mirror.elect("w1", ttl_s=TTL_S, timeout_s=WITHIN_S),
    ):
        with pytest.raises(StoreError, match="is an authority, not a mirror"):
            call()
    assert everything(server) == before
    # A lease of an earlier mirror does not help.
    server.run("SET", LEASE, "1 w1")
    before = everything(server)
    relay = Lease("w1", 1)
    listing = Listing(Position("one", 5, "m"), [])
    batch = Batch(Position("one", 6, "m"), 1, ())
    for call in (
        lambda: mirror.fill(relay, listing, digest=0, lazy=(), timeout_s=WITHIN_S),
        lambda: mirror.append(relay, [batch], counts=[(0, 0)], timeout_s=WITHIN_S),
    ):
        with pytest.raises(StoreError, match="is an authority, not a mirror"):
            call()
    assert everything(server) == before


@pytest.mark.parametrize(
    "commands",
    [
        [("SET", ENTRIES, "theirs")],
        [("HSET", ENTRIES, "theirs", "1")],
        [("XADD", CHANGES, "5-0", "theirs", "1")],
        [("SET", CHANGES, "theirs")],
    ],
    ids=["entries of another type", "a hash without meta", "another stream", "a stream of another type"],
)
def test_another_applications_keys_are_named_and_not_touched(
    server: RedisServer, open_mirror: OpenMirror, commands: list[tuple[str, ...]]
) -> None:
    mirror = open_mirror(server)
    server.run("SET", LEASE, "1 w1")
    for command in commands:
        server.run(*command)
    before = everything(server)
    with pytest.raises(StoreError, match="Choose another namespace"):
        mirror.fill(
            Lease("w1", 1), Listing(Position("one", 5, "m"), [("a", b"1", 5)]), digest=0, lazy=(), timeout_s=WITHIN_S
        )
    assert everything(server) == before


# --- its server loses what it had


def test_an_empty_mirror_is_said_and_never_looks_like_an_empty_authority(relay: Relay, server: RedisServer) -> None:
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    server.run("FLUSHALL")
    for call in (
        lambda: relay.mirror.list(timeout_s=WITHIN_S),
        lambda: relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S),
        lambda: watch.next(WITHIN_S),
    ):
        with pytest.raises(StoreUnavailable, match="is empty: no relay has filled it yet"):
            call()
    assert relay.mirror.state(timeout_s=WITHIN_S).position == Position("", 0)
    assert relay.mirror.revisions(timeout_s=WITHIN_S) == (Position("", 0), {})
    relay.lease = elected(relay.mirror, "w1")
    relay.fill()
    assert listed(relay.mirror) == relay.authority.state
    watch.close()


def test_entries_evicted_without_the_stream_are_filled_again(relay: Relay, server: RedisServer) -> None:
    server.run("DEL", ENTRIES)
    with pytest.raises(StoreUnavailable, match="is empty"):
        relay.mirror.list(timeout_s=WITHIN_S)
    state = relay.mirror.keep(relay.lease, ttl_s=TTL_S, timeout_s=WITHIN_S)
    assert state.position == Position("", 0)
    with pytest.raises(Compacted, match="fill it"):
        relay.append(relay.authority.write({"a": b"4"}))
    relay.fill()
    assert listed(relay.mirror) == relay.authority.state


@pytest.mark.parametrize("damage", [("HDEL", ENTRIES, "b"), ("HSET", ENTRIES, "b", "1 2")], ids=["lost", "older"])
def test_entries_that_do_not_add_up_are_refused(relay: Relay, server: RedisServer, damage: tuple[str, ...]) -> None:
    server.run(*damage)
    with pytest.raises(StoreUnavailable, match="did not add up"):
        relay.mirror.list(timeout_s=WITHIN_S)
    assert relay.mirror.revisions(timeout_s=WITHIN_S) == (Position("", 0), {})
    relay.fill()
    assert listed(relay.mirror) == relay.authority.state


def test_yesterdays_dump_is_behind_and_its_relay_starts_anew(own_server: RedisServer, open_mirror: OpenMirror) -> None:
    relay = filled(open_mirror(own_server))
    dump = own_server.save()
    deposed = relay.lease
    relay.mirror.resign(deposed, timeout_s=WITHIN_S)
    relay.lease = elected(relay.mirror, "w2")
    relay.write({"a": b"4"})
    position = relay.authority.position
    watch = relay.mirror.watch(position, timeout_s=WITHIN_S)
    own_server.restart(dump=dump)
    with pytest.raises(StoreUnavailable):
        watch.next(WITHIN_S)
    for call in (
        lambda: watch.next(WITHIN_S),
        lambda: relay.mirror.watch(position, timeout_s=WITHIN_S),
    ):
        with pytest.raises(StoreUnavailable, match="the mirror is behind"):
            call()
    before = everything(own_server)
    with pytest.raises(LeaseLost):
        relay.append(relay.authority.write({"a": b"5"}))
    assert everything(own_server) == before
    own_server.run("DEL", LEASE)  # the dump brought the first relay's back; it would run out
    relay.lease = elected(relay.mirror, "w2")
    relay.fill()
    assert listed(relay.mirror) == relay.authority.state
    watch.close()


def test_a_full_server_is_said_and_keeps_what_it_had(own_server: RedisServer, open_mirror: OpenMirror) -> None:
    relay = filled(open_mirror(own_server))
    state = dict(relay.authority.state)
    own_server.run("CONFIG", "SET", "maxmemory", "1")
    batch = relay.authority.write({"a": b"4"})
    for call in (lambda: relay.append(batch), relay.fill):
        with pytest.raises(StoreUnavailable, match="raise maxmemory"):
            call()
    assert listed(relay.mirror) == state
    own_server.run("CONFIG", "SET", "maxmemory", "0")
    relay.append(batch)
    assert listed(relay.mirror) == relay.authority.state


def test_an_error_holds_no_value_though_the_server_quotes_it(open_mirror: OpenMirror) -> None:
    with redis_server("--rename-command", "HSET", "") as server:
        mirror = open_mirror(server)
        listing = Listing(Position("one", 5, "m"), [("a", b"s3cret", 5)])
        with pytest.raises(StoreError, match="does not know HSET") as caught:
            mirror.fill(elected(mirror, "w1"), listing, digest=0, lazy=(), timeout_s=WITHIN_S)
        assert "s3cret" not in f"{caught.value} {caught.value.__cause__}"


def test_a_stopped_server_is_noticed(own_server: RedisServer, open_mirror: OpenMirror) -> None:
    relay = filled(open_mirror(own_server, timeout_s=0.5))
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    own_server.stop()
    try:
        for call in (
            lambda: watch.next(600),
            lambda: relay.mirror.state(timeout_s=0.2),
            lambda: relay.mirror.list(timeout_s=0.2),
            lambda: relay.mirror.keep(relay.lease, ttl_s=TTL_S, timeout_s=0.2),
        ):
            with pytest.raises(StoreUnavailable, match="did not answer within"):
                call()
    finally:
        own_server.cont()
    watch.close()


# --- who may do what


def test_a_worker_needs_no_command_that_writes(server: RedisServer, relay: Relay, open_mirror: OpenMirror) -> None:
    granted = "%R~veltrix:{default}:* +get +time +exists +hmget +hscan +xrange +xread"
    server.run("ACL", "SETUSER", "worker", "reset", "on", ">pw", *granted.split())
    mirror = open_mirror(server, user="worker", password="pw")
    watch = mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    batch = relay.write({"a": b"4"})
    assert [each.position for each in drain(watch, batch.position.revision)] == [batch.position]
    assert listed(mirror) == relay.authority.state
    assert mirror.state(timeout_s=WITHIN_S).position == batch.position
    before = everything(server)
    with pytest.raises(AuthFailed, match=r"lacks \+eval"):
        mirror.elect("w2", ttl_s=TTL_S, timeout_s=WITHIN_S)
    for command in ("SET", "DEL", "HSET", "HDEL", "XADD", "EVAL"):
        assert server.run("ACL", "DRYRUN", "worker", command, ENTRIES, "1", "1", "1") != b"OK"
    assert everything(server) == before
    watch.close()


def test_the_documented_acl_of_a_relay_is_enough(server: RedisServer, open_mirror: OpenMirror) -> None:
    granted = (
        "~veltrix:{default}:* +get +time +exists +hmget +hscan +xrange +xread +eval +evalsha +set +del +pttl "
        "+pexpire +expire +persist +unlink +rename +hset +hdel +hlen +xadd +xlen +xrevrange"
    )
    server.run("ACL", "SETUSER", "relay", "reset", "on", ">pw", *granted.split())
    relay = filled(open_mirror(server, user="relay", password="pw", keep_bytes=1))
    relay.write({"a": b"4", "b": MISSING})
    relay.write({"a": b"5"})
    relay.mirror.prove(relay.lease, relay.authority.position, asked_at_us=1, timeout_s=WITHIN_S)
    relay.mirror.keep(relay.lease, ttl_s=TTL_S, timeout_s=WITHIN_S)
    assert relay.mirror.revisions(timeout_s=WITHIN_S)[0] == relay.authority.position
    relay.fill()
    server.run("PERSIST", LEASE)
    assert relay.mirror.elect("w2", ttl_s=TTL_S, timeout_s=WITHIN_S)[0] is None
    assert server.run("PTTL", LEASE) > 0  # a lease without an end would outlive its holder
    relay.mirror.resign(relay.lease, timeout_s=WITHIN_S)


# --- amid writes


def test_what_is_written_between_two_pages_of_a_listing_is_replayed(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_reading, "_LIST_TRIALS", 1)
    monkeypatch.setattr(redis_reading, "_FIRST_PAGE", 2)
    read = redis_reading.pairs_of

    def written_meanwhile(reply: Sequence[bytes]) -> list[tuple[str, bytes, int]]:
        for turn in range(5):
            relay.write({"a": b"%d" % turn, f"d{turn}": b"1", "b": MISSING if turn % 2 == 0 else b"2"})
        return read(reply)

    monkeypatch.setattr(redis_reading, "pairs_of", written_meanwhile)
    assert listed(relay.mirror) == relay.authority.state


def test_a_listing_amid_writes_and_fills_is_of_one_revision(
    relay: Relay, server: RedisServer, open_mirror: OpenMirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_reading, "_SCAN_COUNT", 20)
    monkeypatch.setattr(redis_reading, "_LIST_TRIALS", 50)
    relay.authority.write({f"k{number}": b"0" for number in range(400)})
    relay.fill()
    states = {relay.authority.position: dict(relay.authority.state)}
    done = threading.Event()

    def busy() -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            key, gone = f"k{turn * 7 % 400}", f"k{turn * 11 % 400}"
            batch = relay.authority.write({key: b"%d" % turn, gone: MISSING, f"{key}/x": b"1"})
            states[batch.position] = dict(relay.authority.state)
            if turn % 40:
                relay.append(batch)
            else:
                relay.fill()

    reader, seen = open_mirror(server), set()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(busy)
        try:
            for _ in range(10):
                listing = reader.list(timeout_s=WITHIN_S)
                seen.add(listing.position)
                found = {key: (raw, revision) for key, raw, revision in listing.entries}
                assert found == states[listing.position]
        finally:
            done.set()
        writing.result(WITHIN_S)
    assert len(seen) > 1


# --- forks


def test_parent_and_child_each_read_and_watch_after_a_fork(relay: Relay) -> None:
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)
    assert list(watch.next(0)) == []

    def child() -> None:
        batch = relay.write({"a": b"4"})
        assert len(drain(watch, batch.position.revision)) == 1
        assert listed(relay.mirror) == relay.authority.state
        relay.mirror.close()

    in_a_fork(child)
    assert len(drain(watch, relay.mirror.state(timeout_s=WITHIN_S).position.revision)) == 1
    watch.close()


def test_closing_a_watch_ends_its_next_and_leaves_no_connection(
    own_server: RedisServer, open_mirror: OpenMirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_reading, "_BLOCK_S", 600)  # else it would end by itself
    relay = filled(open_mirror(own_server))
    watch = relay.mirror.watch(relay.authority.position, timeout_s=WITHIN_S)

    def connections() -> int:
        return len(own_server.run("CLIENT", "LIST").splitlines()) - 1

    def wait() -> None:
        with pytest.raises(StoreUnavailable, match="closed"):
            watch.next(600)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        try:
            wait_until(lambda: b"cmd=xread" in own_server.run("CLIENT", "LIST"), WITHIN_S, reason="it to wait")
            relay.mirror.close()
            waiting.result(WITHIN_S)
            wait_until(lambda: connections() == 0, WITHIN_S, reason="the server to have noticed")
        finally:
            own_server.kill()  # ends what the close did not
