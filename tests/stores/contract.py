"""The contract that every store keeps.

A store's test module derives a class from `StoreContract` and gives it a fixture `harness`; its own tests stand
beside it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.stores import jobs
from veltrix_mw.errors import Compacted, Conflict, KeyMissing, StoreError
from veltrix_mw.protocols import Batch, ChangeRecord, Position, RawOperation, Restored, Store, Watch
from veltrix_mw.snapshot import Entry
from veltrix_mw.values import MISSING, Missing

WITHIN_S = 10.0
"""How long a test waits for what must come: no figure of the store's, only an end to waiting in vain."""

WRITERS = 8


class Harness(ABC):
    """One backend as the contract sees it: opens stores on it, in this process and others.

    Closes what it opened.
    """

    def __init__(self) -> None:
        self._stores: list[Store] = []
        self._names = (f"shop{number}" for number in itertools.count())
        self.namespace = next(self._names)

    @abstractmethod
    def spec(self, **options: Any) -> dict[str, Any]:
        """Which class (`module:name`), with which options, opens this harness's namespace."""

    @abstractmethod
    def make(self, **options: Any) -> Store: ...

    @abstractmethod
    def forget(self, oldest: int) -> None:
        """Make `oldest` the oldest revision that is kept. May write another revision of the key `forgotten`."""

    processes = True
    """Whether other processes can open it, too."""

    keeps_records = True
    """Whether a version keeps its record for as long as it is kept, also through compaction."""

    pushes = False
    """Whether its watches are sent what is written, so that they may have it before the history is forgotten."""

    def open(self, **options: Any) -> Store:
        store = self.make(**options)
        self._stores.append(store)
        return store

    def renamed(self) -> None:
        """From here on, stores are opened on another namespace, in which nothing was written."""
        self.namespace = next(self._names)

    def counts_by_prefix(self, store: Store) -> bool:
        """Whether the store's next confirmation can count without what this store leaves out and others do not."""
        return True

    def close(self) -> None:
        for store in self._stores:
            store.close()

    def race(self, job: Callable[..., Any], arguments: Sequence[dict[str, Any]]) -> list[Any]:
        """Run a job once for each of `arguments`, all at once; in processes if the store has them, else threads."""
        if not self.processes:
            store = self.open()
            with ThreadPoolExecutor(len(arguments)) as pool:
                return list(pool.map(lambda given: job(store, **given), arguments))
        running = [jobs.Process(self.spec(), job, **given) for given in arguments]
        try:
            return [process.result() for process in running]
        finally:
            for process in running:
                process.__exit__()


def put(store: Store, key: str, raw: bytes, *, expected: int | None = None) -> int:
    return write(store, RawOperation(key, raw, expected))


def delete(store: Store, key: str, *, expected: int | None = None) -> int:
    return write(store, RawOperation(key, MISSING, expected))


def write(store: Store, *operations: RawOperation, record: ChangeRecord | None = None) -> int:
    return store.commit(operations, record or ChangeRecord(), timeout_s=WITHIN_S)


def entries(store: Store, revision: int | None = None) -> dict[str, tuple[bytes, int]]:
    listing = store.list(timeout_s=WITHIN_S) if revision is None else store.list_at(revision, timeout_s=WITHIN_S)
    return {key: (raw, mod_revision) for key, raw, mod_revision in listing.entries}


def here(store: Store) -> Position:
    return store.list(timeout_s=WITHIN_S).position


def units(store: Store, *names: str, at: Position | None = None) -> dict[str, list[tuple[str, bytes, int]]]:
    """The entries of units, now or as of a position."""
    read = store.read_units(names, here(store) if at is None else at, timeout_s=WITHIN_S)
    assert not any(unit.refused for unit in read.values())
    return {name: list(unit.entries) for name, unit in read.items()}


def drain(watch: Watch, until: int) -> list[Batch]:
    """The batches of a watch, up to the revision `until`."""
    batches: list[Batch] = []
    deadline_s = time.monotonic() + WITHIN_S
    while not batches or batches[-1].position.revision < until:
        left_s = deadline_s - time.monotonic()
        assert left_s > 0, f"revision {until} did not come; last: {[b.position.revision for b in batches[-1:]]}"
        batches.extend(watch.next(left_s))
    return batches


def replay(state: dict[str, tuple[bytes, int]], batch: Batch) -> dict[str, tuple[bytes, int]]:
    state = dict(state)
    for change in batch.changes:
        if isinstance(change.value, Missing):
            del state[change.key]
        else:
            state[change.key] = (change.value, batch.position.revision)
    return state


def in_a_fork(body: Callable[[], None]) -> None:
    """Run `body` in a forked child and wait for it; fails with the child's traceback."""
    read_fd, write_fd = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 and newer warn of forks beside other threads: that servers do it all the same is what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            body()
            status = 0
        except BaseException:
            os.write(write_fd, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(write_fd)
    with os.fdopen(read_fd) as said:
        report = said.read()
    assert os.waitpid(pid, 0)[1] == 0, report


class StoreContract:
    """What holds for every store."""

    @pytest.fixture
    def store(self, harness: Harness) -> Store:
        return harness.open()

    @pytest.fixture
    def written(self, store: Store) -> Store:
        """A store with three revisions: a=1, b=2, then a=3."""
        for key, raw in (("a", b"1"), ("b", b"2"), ("a", b"3")):
            put(store, key, raw)
        return store

    @pytest.fixture
    def watching(self) -> Iterator[Callable[[Store, Position], Watch]]:
        opened: list[Watch] = []

        def watch(store: Store, position: Position) -> Watch:
            opened.append(store.watch(position, timeout_s=WITHIN_S))
            return opened[-1]

        yield watch
        for each in opened:
            each.close()

    # --- what is written is there, in order

    def test_it_is_a_store(self, store: Store) -> None:
        assert isinstance(store, Store)

    def test_its_info_names_the_namespace(self, harness: Harness, store: Store) -> None:
        assert store.info.namespace == harness.namespace

    def test_a_commit_returns_the_revision_that_reads_then_show(self, store: Store) -> None:
        revision = put(store, "checkout/max_items", b"80")
        assert entries(store) == {"checkout/max_items": (b"80", revision)}
        assert store.read(["checkout/max_items"], None, timeout_s=WITHIN_S) == {"checkout/max_items": (b"80", revision)}

    def test_revisions_only_grow(self, store: Store) -> None:
        revisions = [put(store, f"k{turn % 3}", b"1") for turn in range(20)]
        assert revisions == sorted(set(revisions))
        assert here(store).revision == revisions[-1]

    def test_writing_the_same_value_again_is_a_revision(self, store: Store) -> None:
        assert put(store, "k", b"1") < put(store, "k", b"1")

    def test_values_are_kept_byte_for_byte(self, store: Store) -> None:
        raw = {
            "a": b' { "b" : 1.0e5 } ',
            "b": '"\u00e9\\u00e9\U0001f600"'.encode(),
            "c": b'"\\u0000"',
            "d": b"null",
            "e": b'"' + b"x" * 300_000 + b'"',
        }
        revision = write(store, *(RawOperation(key, value) for key, value in raw.items()))
        assert entries(store) == {key: (value, revision) for key, value in raw.items()}

    def test_a_large_listing_is_sorted_by_key(self, store: Store) -> None:
        names = [f"{a}{b}" for a, b in itertools.product(["a/", "a", "a-", "A", "z/z/", "~", "0"], range(150))]
        for start in range(0, len(names), 100):
            write(store, *(RawOperation(name, b"1") for name in names[start : start + 100]))
        listed = [key for key, _, _ in store.list(timeout_s=WITHIN_S).entries]
        assert listed == sorted(names, key=str.encode)

    def test_namespaces_do_not_see_each_other(self, harness: Harness, written: Store) -> None:
        before = here(written)
        harness.renamed()
        other = harness.open()
        put(other, "a", b"9")
        assert {key: raw for key, (raw, _) in entries(other).items()} == {"a": b"9"}
        assert here(other).incarnation != before.incarnation
        assert here(written) == before
        assert written.confirm(before, timeout_s=WITHIN_S).count == 2

    def test_reading_leaves_out_what_is_absent(self, written: Store) -> None:
        assert set(written.read(["a", "none", "b"], None, timeout_s=WITHIN_S)) == {"a", "b"}
        assert written.read([], None, timeout_s=WITHIN_S) == {}

    def test_an_empty_transaction_is_refused(self, written: Store) -> None:
        with pytest.raises(ValueError, match="operation"):
            write(written)

    def test_stores_of_one_namespace_share_it(self, harness: Harness, written: Store) -> None:
        assert entries(harness.open()) == entries(written)

    def test_after_close_a_call_opens_anew(self, written: Store) -> None:
        kept = entries(written)
        second = written
        second.close()
        second.close()
        assert len(kept) == 2
        put(second, "c", b"1")
        assert set(entries(second)) >= {"c"}

    # --- a transaction is one revision, whole

    def test_a_transaction_is_one_revision(self, store: Store, watching: Callable[[Store, Position], Watch]) -> None:
        put(store, "old", b"0")
        watch = watching(store, here(store))
        revision = write(store, RawOperation("b", b"2"), RawOperation("old", MISSING), RawOperation("a", b"1"))
        (batch,) = drain(watch, revision)
        assert [(change.key, change.value) for change in batch.changes] == [("a", b"1"), ("b", b"2"), ("old", MISSING)]
        assert entries(store) == {"a": (b"1", revision), "b": (b"2", revision)}

    @pytest.mark.parametrize(
        ("failing", "error"),
        [(RawOperation("z", b"1", 99_999), Conflict), (RawOperation("z", MISSING), KeyMissing)],
        ids=["conflict", "missing"],
    )
    def test_a_transaction_that_fails_leaves_nothing(
        self, written: Store, failing: RawOperation, error: type[Exception]
    ) -> None:
        before, position = entries(written), here(written)
        with pytest.raises(error):
            write(written, RawOperation("a", b"9"), RawOperation("new", b"9"), failing)
        assert (entries(written), here(written)) == (before, position)
        assert written.history("new", limit=9, timeout_s=WITHIN_S) == []
        assert written.confirm(position, timeout_s=WITHIN_S).revision == position.revision

    def test_nobody_sees_half_of_a_transaction(
        self, harness: Harness, store: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        jobs.write_pairs(store, name="first", times=1)
        watch = watching(store, here(store))
        writers, times = 3, 25
        done = threading.Event()
        halves: list[object] = []

        def look() -> None:
            reader = harness.open()
            while not done.is_set():
                listed = entries(reader)
                read = reader.read(["pair/a", "pair/b"], None, timeout_s=WITHIN_S)
                halves.extend(seen for seen in (listed, read) if seen["pair/a"] != seen["pair/b"])

        looking = threading.Thread(target=look)
        looking.start()
        try:
            made = harness.race(jobs.write_pairs, [{"name": f"w{n}", "times": times} for n in range(writers)])
        finally:
            done.set()
            looking.join()
        assert halves == []
        revisions = sorted(itertools.chain.from_iterable(made))
        batches = drain(watch, revisions[-1])
        assert [batch.position.revision for batch in batches] == revisions
        assert {tuple(change.key for change in batch.changes) for batch in batches} == {("pair/a", "pair/b")}
        assert all(batch.changes[0].value == batch.changes[1].value for batch in batches)

    # --- compare-and-set

    def test_eight_writers_lose_no_update(self, harness: Harness, store: Store) -> None:
        times = 10
        harness.race(jobs.increment, [{"key": "count", "times": times}] * WRITERS)
        assert entries(store)["count"][0] == b"%d" % (WRITERS * times)
        assert len(store.history("count", limit=1000, timeout_s=WITHIN_S)) == WRITERS * times

    def test_expected_zero_creates_once(self, store: Store) -> None:
        revision = put(store, "k", b"1", expected=0)
        with pytest.raises(Conflict):
            put(store, "k", b"2", expected=0)
        assert entries(store) == {"k": (b"1", revision)}

    def test_expected_zero_holds_again_after_a_delete(self, store: Store) -> None:
        put(store, "k", b"1")
        delete(store, "k")
        revision = put(store, "k", b"2", expected=0)
        assert entries(store) == {"k": (b"2", revision)}

    def test_a_write_and_a_delete_with_the_right_expected_pass(self, store: Store) -> None:
        first = put(store, "k", b"1")
        second = put(store, "k", b"2", expected=first)
        delete(store, "k", expected=second)
        assert entries(store) == {}

    @pytest.mark.parametrize(
        "operation", [RawOperation("a", b"9", 1), RawOperation("a", MISSING, 1)], ids=["put", "delete"]
    )
    def test_a_conflict_shows_the_entry_as_it_is(self, store: Store, operation: RawOperation) -> None:
        put(store, "a", b"1")
        revision = put(store, "a", b'{"secret": [1]}')
        with pytest.raises(Conflict) as caught:
            write(store, operation if revision != 1 else RawOperation("a", operation.value, 99_999))
        assert caught.value.key == "a"
        assert caught.value.current == Entry({"secret": (1,)}, revision)
        assert "secret" not in str(caught.value)

    def test_a_conflict_over_an_absent_key_shows_revision_zero(self, store: Store) -> None:
        put(store, "a", b"1")
        delete(store, "a")
        for key in ("a", "never"):
            with pytest.raises(Conflict) as caught:
                put(store, key, b"2", expected=99_999)
            assert (caught.value.key, caught.value.current) == (key, Entry(MISSING, 0))

    def test_deleting_an_absent_key_is_an_error(self, store: Store) -> None:
        put(store, "a", b"1")
        delete(store, "a")
        for key, expected in (("a", None), ("never", None), ("never", 0)):
            with pytest.raises(KeyMissing, match=key):
                delete(store, key, expected=expected)

    # --- watching

    def test_a_watch_resumes_after_its_position(
        self, written: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        all_of_it = drain(watching(written, Position("", 0)), here(written).revision)
        assert len(all_of_it) == 3
        for index, batch in enumerate(all_of_it[:-1]):
            rest = drain(watching(written, batch.position), here(written).revision)
            # Which tier a batch comes through is no part of it, and a slow machine may see a move between the two.
            assert [replace(each, origin="") for each in rest] == [
                replace(each, origin="") for each in all_of_it[index + 1 :]
            ]

    def test_each_batch_says_what_it_follows_and_carries_its_record(
        self, store: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        put(store, "a", b"0")
        start = here(store)
        watch = watching(store, start)
        record = ChangeRecord(
            "ops", "sale", 1_700_000_000.25, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        )
        revision = write(store, RawOperation("a", b"1"), record=record)
        last = put(store, "a", b"2")
        first, second = drain(watch, last)
        assert (first.previous, first.position.revision, first.record) == (start.revision, revision, record)
        assert (second.previous, second.position) == (revision, here(store))
        assert second.record == ChangeRecord()

    def test_a_quiet_watch_returns_nothing_by_its_timeout(
        self, written: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        watch = watching(written, here(written))
        assert list(watch.next(0)) == []
        assert list(watch.next(0.05)) == []

    def test_a_watch_of_an_empty_namespace_brings_the_first_write(
        self, harness: Harness, written: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        harness.renamed()
        store = harness.open()
        listing = store.list(timeout_s=WITHIN_S)
        assert (listing.position.revision, list(listing.entries)) == (0, [])
        watch = watching(store, listing.position)
        assert list(watch.next(0)) == []
        revision = put(store, "first", b"1")
        (batch,) = drain(watch, revision)
        assert (batch.previous, batch.position) == (0, here(store))

    def test_a_waiting_watch_is_woken_by_a_commit_of_another_thread(
        self, harness: Harness, written: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        watch, other = watching(written, here(written)), harness.open()
        with ThreadPoolExecutor(1) as pool:
            try:
                # Again and again: a commit may come before the thread waits, and then wakes nobody.
                for turn in range(20):
                    waiting = pool.submit(watch.next, 600)
                    revision = put(other, "a", b"%d" % turn)
                    assert [batch.position.revision for batch in waiting.result(WITHIN_S)] == [revision]
            finally:
                watch.close()

    def test_many_revisions_come_in_order_and_each_once(
        self, harness: Harness, written: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        start = here(written)
        made = [put(written, "a", b"%d" % turn) for turn in range(300)]
        batches = drain(watching(harness.open(), start), made[-1])
        assert [batch.position.revision for batch in batches] == made
        assert [batch.previous for batch in batches] == [start.revision, *made[:-1]]

    def test_revisions_larger_than_one_answer_come_whole(
        self, written: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        start = here(written)
        large = b'"' + b"x" * 700_000 + b'"'
        made = [write(written, RawOperation("x", large), RawOperation("y", large)) for _ in range(3)]
        batches = drain(watching(written, start), made[-1])
        assert [[change.value for change in batch.changes] for batch in batches] == [[large, large]] * 3

    def test_closing_a_watch_ends_its_next(self, written: Store, watching: Callable[[Store, Position], Watch]) -> None:
        watch = watching(written, here(written))
        with ThreadPoolExecutor(1) as pool:
            begun = threading.Event()

            def wait() -> str:
                begun.set()
                try:
                    return f"returned {list(watch.next(600))}"
                except StoreError:
                    return "raised"

            waiting = pool.submit(wait)
            begun.wait(WITHIN_S)
            watch.close()
            watch.close()
            assert waiting.result(WITHIN_S) in {"raised", "returned []"}

    def test_closing_the_store_ends_its_watches(
        self, written: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        watch = watching(written, here(written))
        written.close()
        with pytest.raises(StoreError):
            watch.next(WITHIN_S)

    # --- confirming

    def test_a_confirmation_tells_the_newest_revision_and_the_count(self, written: Store) -> None:
        old = here(written)
        newest = put(written, "c", b"1")
        confirmation = written.confirm(old, timeout_s=WITHIN_S)
        assert (confirmation.incarnation, confirmation.revision, confirmation.count) == (old.incarnation, newest, 3)
        delete(written, "c")
        assert written.confirm(here(written), timeout_s=WITHIN_S).count == 2

    # --- lazy prefixes

    def test_lazy_prefixes_are_left_out(
        self, harness: Harness, store: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        lazy = harness.open(lazy=("tenants/", "users/", "tenants/acme/"))
        start = put(store, "a", b"1")
        watch = watching(lazy, here(lazy))
        # Beside the prefixes, and in the gap between them: what only looks like them is eager.
        eager = ("tenants", "tenants-", "tenants0", "u", "users.", "users0", "z")
        left_out = ("tenants/acme", "tenants/acme/limit", "tenants/b/c", "users/1")
        mixed = write(store, *(RawOperation(key, b"1") for key in (*eager, *left_out)))
        unseen = put(store, "users/1", b"2")
        gone = write(store, RawOperation("users/1", MISSING), RawOperation("z", MISSING))
        assert set(lazy.info.lazy) >= {"tenants/", "users/"}
        assert set(entries(lazy)) == {"a", *eager} - {"z"}
        assert set(entries(lazy, mixed)) == {"a", *eager}
        assert set(entries(store)) == {"a", *eager, *left_out} - {"z", "users/1"}
        assert here(lazy) == here(store)
        position = here(lazy)
        counts = harness.counts_by_prefix(lazy)
        assert lazy.confirm(position, timeout_s=WITHIN_S).count == (len(eager) if counts else None)
        batches = drain(watch, gone)
        assert [(batch.previous, batch.position.revision) for batch in batches] == [
            (start, mixed),
            (mixed, unseen),
            (unseen, gone),
        ]
        assert [[change.key for change in batch.changes] for batch in batches] == [["a", *eager][1:], [], ["z"]]
        assert lazy.confirm(batches[1].position, timeout_s=WITHIN_S).revision == gone

    def test_a_lazy_prefix_can_be_written_and_read_by_key(self, harness: Harness) -> None:
        lazy = harness.open(lazy=("users/",))
        revision = put(lazy, "users/1", b"1")
        with pytest.raises(Conflict):
            put(lazy, "users/1", b"2", expected=0)
        assert lazy.read(["users/1"], None, timeout_s=WITHIN_S) == {"users/1": (b"1", revision)}
        assert [version.value for version in lazy.history("users/1", limit=9, timeout_s=WITHIN_S)] == [b"1"]
        assert (entries(lazy), here(lazy).revision) == ({}, revision)

    def test_changes_below_lazy_prefixes_are_told_apart(
        self, harness: Harness, store: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        put(store, "users/1", b"1")
        lazy = harness.open(lazy=("users/",))
        watch = watching(lazy, here(lazy))
        mixed = write(store, *(RawOperation(key, b"2") for key in ("users/2", "b", "users/1/name")))
        gone = write(store, RawOperation("users/1", MISSING), RawOperation("b", MISSING))
        told = [
            {change.key: change.value for change in batch.lazy_changes}
            for batch in drain(watch, gone)
            if batch.position.revision in {mixed, gone}
        ]
        assert told == [{"users/1/name": b"2", "users/2": b"2"}, {"users/1": MISSING}]

    @pytest.fixture
    def tenants(self, harness: Harness) -> Store:
        """A store that is read a tenant at a time."""
        put(harness.open(), "a", b"1")  # the first opens for all: a relay leaves nothing out then
        return harness.open(lazy=("tenants/", "users/"))

    def test_a_unit_is_the_key_of_its_name_and_all_below_it(self, tenants: Store) -> None:
        inside = ("tenants/acme", "tenants/acme/limits/max", "tenants/acme/zone")
        beside = ("tenants/acm", "tenants/acme-", "tenants/acme0", "tenants/acme.x/y", "users/acme", "z")
        revision = write(tenants, *(RawOperation(key, f'"{key}"'.encode()) for key in (*inside, *beside)))
        read = units(tenants, "tenants/acme", "users/acme", "users/none")
        assert read["tenants/acme"] == [(key, f'"{key}"'.encode(), revision) for key in inside]
        assert read["users/acme"] == [("users/acme", b'"users/acme"', revision)]
        assert read["users/none"] == []

    def test_units_are_read_as_of_a_past_position(self, tenants: Store) -> None:
        first = put(tenants, "tenants/acme/a", b"1")
        then = here(tenants)
        second = write(tenants, RawOperation("tenants/acme/a", MISSING), RawOperation("tenants/acme/b", b"2"))
        put(tenants, "users/1", b"1")
        names = ("tenants/acme", "users/1")
        assert units(tenants, *names, at=then) == {"tenants/acme": [("tenants/acme/a", b"1", first)], "users/1": []}
        bare = Position(then.incarnation, then.revision)
        assert units(tenants, *names, at=bare) == units(tenants, *names, at=then)
        assert units(tenants, *names)["tenants/acme"] == [("tenants/acme/b", b"2", second)]
        assert units(tenants, *names, at=Position(then.incarnation, 0)) == {"tenants/acme": [], "users/1": []}

    def test_many_units_are_read_at_once(self, tenants: Store) -> None:
        names = [f"users/{number}" for number in range(130)]
        for start in range(0, len(names), 100):
            write(tenants, *(RawOperation(f"{name}/x", b"1") for name in names[start : start + 100]))
        assert units(tenants) == {}
        read = units(tenants, *names)
        assert [[entry[0] for entry in read[name]] for name in names] == [[f"{name}/x"] for name in names]

    def test_a_unit_of_many_keys_is_read_whole(self, tenants: Store) -> None:
        names = sorted(f"tenants/acme/{number}" for number in range(1_300))
        for start in range(0, len(names), 100):
            write(tenants, *(RawOperation(name, b"1") for name in names[start : start + 100]))
        assert [entry[0] for entry in units(tenants, "tenants/acme")["tenants/acme"]] == names

    def test_a_unit_beyond_the_bounds_is_refused_alone(self, tenants: Store) -> None:
        for number in range(5):
            put(tenants, f"tenants/huge/{number}", b'"' + b"x" * 1_000_000 + b'"')
        put(tenants, "tenants/acme", b"1")
        read = tenants.read_units(["tenants/huge", "tenants/acme"], here(tenants), timeout_s=WITHIN_S)
        assert "'tenants/huge' has more than 4 MiB" in read["tenants/huge"].refused
        assert read["tenants/huge"].entries == ()
        assert [entry[0] for entry in read["tenants/acme"].entries] == ["tenants/acme"]

    def test_units_of_a_compacted_position_cannot_be_read(self, harness: Harness, tenants: Store) -> None:
        put(tenants, "tenants/acme", b"1")
        then = here(tenants)
        harness.forget(put(tenants, "tenants/acme", b"2"))
        with pytest.raises(Compacted) as caught:
            units(tenants, "tenants/acme", at=then)
        assert not isinstance(caught.value, Restored)

    @pytest.mark.parametrize("other", ["incarnation", "revision"])
    def test_units_of_another_history_cannot_be_read(self, tenants: Store, other: str) -> None:
        now = here(tenants)
        another = {
            "incarnation": Position("0123456789abcdef", now.revision, now.fingerprint),
            "revision": Position(now.incarnation, now.revision + 1_000_000, now.fingerprint),
        }[other]
        with pytest.raises(Restored):
            units(tenants, "tenants/acme", at=another)

    def test_units_of_a_store_that_was_never_written_to_are_absent(self, harness: Harness) -> None:
        assert units(harness.open(lazy=("tenants/",)), "tenants/acme") == {"tenants/acme": []}

    # --- another history

    @pytest.mark.parametrize("other", ["incarnation", "revision", "fingerprint"])
    def test_a_position_of_another_history_is_refused(self, written: Store, other: str) -> None:
        now = here(written)
        position = {
            "incarnation": Position("0123456789abcdef", now.revision, now.fingerprint),
            "revision": Position(now.incarnation, now.revision + 1, now.fingerprint),
            "fingerprint": Position(now.incarnation, now.revision, now.fingerprint[::-1] + "0"),
        }[other]
        with pytest.raises(Restored):
            written.watch(position, timeout_s=WITHIN_S)
        with pytest.raises(Restored):
            written.confirm(position, timeout_s=WITHIN_S)

    def test_a_position_without_a_fingerprint_is_not_trusted(self, written: Store) -> None:
        with pytest.raises(Compacted):
            written.watch(Position(here(written).incarnation, here(written).revision), timeout_s=WITHIN_S)

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
        with pytest.raises(Restored):
            watch.next(WITHIN_S)

    # --- history

    def test_history_is_newest_first_with_records(self, store: Store) -> None:
        records = [ChangeRecord(author=name, reason="why", time_s=1.5) for name in ("ann", "bob", "cyd")]
        made = [
            write(store, RawOperation("k", b"1"), RawOperation("other", b"1"), record=records[0]),
            write(store, RawOperation("k", MISSING), record=records[1]),
            write(store, RawOperation("k", b"3"), record=records[2]),
        ]
        versions = store.history("k", limit=10, timeout_s=WITHIN_S)
        assert [(v.key, v.value, v.revision, v.record) for v in versions] == [
            ("k", b"3", made[2], records[2]),
            ("k", MISSING, made[1], records[1]),
            ("k", b"1", made[0], records[0]),
        ]
        assert store.history("k", limit=2, timeout_s=WITHIN_S) == versions[:2]
        assert store.history("never", limit=2, timeout_s=WITHIN_S) == []

    def test_the_past_can_be_listed_and_read(self, written: Store) -> None:
        first, second, third = (batch[0] for batch in self._revisions(written))
        deleted = delete(written, "b")
        assert entries(written, first) == {"a": (b"1", first)}
        assert entries(written, second) == {"a": (b"1", first), "b": (b"2", second)}
        assert entries(written, third) == {"a": (b"3", third), "b": (b"2", second)}
        assert entries(written, deleted) == entries(written)
        assert written.read(["a", "b"], first, timeout_s=WITHIN_S) == {"a": (b"1", first)}
        assert written.read(["a", "b"], deleted, timeout_s=WITHIN_S) == {"a": (b"3", third)}
        assert entries(written, 0) == {}

    @staticmethod
    def _revisions(store: Store) -> list[tuple[int, int]]:
        versions = [v for key in ("a", "b") for v in store.history(key, limit=9, timeout_s=WITHIN_S)]
        return sorted((v.revision, 0) for v in versions)

    def test_a_past_listing_has_that_revisions_position(self, written: Store) -> None:
        then = here(written)
        put(written, "c", b"1")
        assert written.list_at(then.revision, timeout_s=WITHIN_S).position == then

    @pytest.mark.parametrize("revision", [-1, 1_000_000])
    def test_a_revision_that_never_was_cannot_be_read(self, written: Store, revision: int) -> None:
        with pytest.raises(ValueError, match="revision"):
            written.list_at(revision, timeout_s=WITHIN_S)
        with pytest.raises(ValueError, match="revision"):
            written.read(["a"], revision, timeout_s=WITHIN_S)

    # --- compaction

    def test_what_is_before_the_oldest_kept_revision_is_compacted(self, harness: Harness, written: Store) -> None:
        old = here(written)
        oldest = put(written, "b", b"4")
        harness.forget(oldest)
        for position in (old, Position("", 0)):
            with pytest.raises(Compacted) as caught:
                written.watch(position, timeout_s=WITHIN_S)
            assert not isinstance(caught.value, Restored)
        with pytest.raises(Compacted):
            written.list_at(old.revision, timeout_s=WITHIN_S)
        with pytest.raises(Compacted):
            written.read(["a"], old.revision, timeout_s=WITHIN_S)
        with pytest.raises(Compacted):
            entries(written, 0)

    def test_what_is_kept_is_whole_after_compaction(
        self, harness: Harness, written: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        put(written, "gone", b"1")
        delete(written, "gone")
        oldest = put(written, "b", b"4")
        position, kept = here(written), entries(written)
        newer = put(written, "a", b"5")
        harness.forget(oldest)
        assert entries(written, oldest) == kept
        assert set(entries(written)) - {"forgotten"} == {"a", "b"}
        assert drain(watching(written, position), newer)[0].changes[0].value == b"5"
        assert written.history("gone", limit=9, timeout_s=WITHIN_S) == []

    def test_a_key_that_never_changed_keeps_its_record_through_compaction(self, harness: Harness, store: Store) -> None:
        record = ChangeRecord(author="ann", reason="first", time_s=2.0)
        revision = write(store, RawOperation("still", b"1"), record=record)
        made = [put(store, "a", b"%d" % turn) for turn in range(5)]
        harness.forget(made[-1])
        (version,) = store.history("still", limit=9, timeout_s=WITHIN_S)
        kept = record if harness.keeps_records else ChangeRecord()
        assert (version.revision, version.value, version.record) == (revision, b"1", kept)

    def test_an_open_watch_that_falls_behind_is_told(
        self, harness: Harness, written: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        watch = watching(written, here(written))
        made = [put(harness.open(), "a", b"%d" % turn) for turn in range(5)]
        harness.forget(made[-1])
        if not harness.pushes:
            with pytest.raises(Compacted):
                watch.next(WITHIN_S)
            return
        with contextlib.suppress(Compacted):
            assert [batch.position.revision for batch in drain(watch, made[-1])] == made

    # --- fork

    def test_a_forked_child_can_use_the_store(self, harness: Harness, written: Store) -> None:
        kept = entries(written)

        def child() -> None:
            assert entries(written) == kept
            revision = put(written, "child", b"1")
            watch = written.watch(here(written), timeout_s=WITHIN_S)
            later = put(written, "child", b"2")
            assert later > revision
            assert [batch.position.revision for batch in drain(watch, later)] == [later]
            watch.close()
            written.close()

        in_a_fork(child)
        assert put(written, "parent", b"1")
        assert ("child" in entries(written)) == harness.processes

    def test_a_fork_amid_calls_of_other_threads_leaves_both_sides_working(
        self, harness: Harness, written: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        start = here(written)
        watch = watching(written, start)
        done = threading.Event()

        def busy() -> list[int]:
            made: list[int] = []
            # As many as the watch waits for, also where a write takes longer than all the forks.
            while not done.is_set() or len(made) < 10:
                # Fewer than any store keeps: a fast one would leave the watch, which looks later, behind its history.
                if len(made) < 5_000:
                    made.append(put(written, "busy", b"1"))
                entries(written)
            return made

        with ThreadPoolExecutor(2) as pool:
            writing = pool.submit(busy)
            following = pool.submit(lambda: drain(watch, start.revision + 10))
            try:
                for turn in range(5):
                    in_a_fork(lambda turn=turn: self._write_as_a_child(written, turn))  # type: ignore[misc]
            finally:
                done.set()
            made = writing.result()
            seen = following.result()
            if seen[-1].position.revision < made[-1]:
                seen += drain(watch, made[-1])
        revisions = [batch.position.revision for batch in seen]
        assert [batch.previous for batch in seen] == [start.revision, *revisions[:-1]]
        assert revisions == sorted(set(revisions))
        assert {*made} <= {*revisions}
        children = {f"child{turn}" for turn in range(5)}
        assert children & set(entries(written)) == (children if harness.processes else set())

    @staticmethod
    def _write_as_a_child(store: Store, turn: int) -> None:
        put(store, f"child{turn}", b"1")
        assert f"child{turn}" in entries(store)
        store.close()

    # --- against a model

    # Each example has a namespace of its own on the fixture's backend, and each store's class its own run.
    @settings(
        max_examples=25,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(data=st.data())
    def test_it_behaves_like_a_list_of_dicts(self, harness: Harness, data: st.DataObject) -> None:
        self.check_against_a_model(harness, data)

    def check_against_a_model(self, harness: Harness, data: st.DataObject) -> None:
        harness.renamed()
        store = harness.make()
        try:
            states, positions = self._write_at_random(store, data)
            newest = states[-1][0]
            for revision, state in states:
                assert entries(store, revision) == state
                assert store.read(sorted(state), revision, timeout_s=WITHIN_S) == state
            self._check_replays(store, states, positions)
            if newest:
                # By its place: the revisions of a shared server are others when the same is tried again.
                oldest = states[data.draw(st.integers(1, len(states) - 1))][0]
                harness.forget(oldest)
                kept = [index for index, (revision, _) in enumerate(states) if revision >= oldest]
                for index in kept:
                    assert entries(store, states[index][0]) == states[index][1]
                if oldest > states[1][0]:
                    with pytest.raises(Compacted):
                        entries(store, states[kept[0] - 1][0])
                self._check_replays(store, [states[i] for i in kept], [positions[i] for i in kept])
        finally:
            store.close()

    @staticmethod
    def _write_at_random(
        store: Store, data: st.DataObject
    ) -> tuple[list[tuple[int, dict[str, tuple[bytes, int]]]], list[Position]]:
        """Random transactions, right and wrong ones; returns the model's states with their revisions, and positions."""
        state: dict[str, tuple[bytes, int]] = {}
        states, positions = [(0, state)], [here(store)]
        keys, values = st.sampled_from("abcd"), st.sampled_from([b"1", b'"two"', b"[3]", MISSING])
        expecteds = st.sampled_from(["any", "right", "wrong"])
        transactions = st.lists(
            st.dictionaries(keys, st.tuples(values, expecteds), min_size=1, max_size=3), max_size=12
        )
        for transaction in data.draw(transactions):
            operations, following, sound = [], dict(state), True
            for key, (value, kind) in transaction.items():
                current = state.get(key, (b"", 0))[1]
                expected = {"any": None, "right": current, "wrong": current + 1}[kind]
                operations.append(RawOperation(key, value, expected))
                sound = sound and kind != "wrong" and (value is not MISSING or key in state)
                following.pop(key, None)
                if not isinstance(value, Missing):
                    following[key] = (value, 0)
            if sound:
                revision = write(store, *operations)
                assert revision > states[-1][0]
                state = {key: (raw, rev or revision) for key, (raw, rev) in following.items()}
                states.append((revision, state))
            else:
                with pytest.raises((Conflict, KeyMissing)):
                    write(store, *operations)
            assert entries(store) == state
            positions[len(states) - 1 :] = [here(store)]
        return states, positions

    @staticmethod
    def _check_replays(
        store: Store, states: list[tuple[int, dict[str, tuple[bytes, int]]]], positions: list[Position]
    ) -> None:
        """From each position, the watch leads through all later states to the newest."""
        newest = states[-1][0]
        for index, position in enumerate(positions[:-1]):
            watch = store.watch(position, timeout_s=WITHIN_S)
            try:
                state = states[index][1]
                for batch, (revision, expected) in zip(drain(watch, newest), states[index + 1 :], strict=False):
                    state = replay(state, batch)
                    assert (batch.position.revision, state) == (revision, expected)
            finally:
                watch.close()


class SharedStoreContract(StoreContract):
    """What holds beside it for a store that other processes open too."""

    def test_a_change_is_seen_by_another_process(self, harness: Harness, written: Store) -> None:
        until = here(written).revision + 5
        with jobs.Process(harness.spec(), jobs.follow, until=until) as follower:
            assert follower.line() == "following"
            while put(written, "a", b"4") < until:
                pass
            assert [seen[1] for seen in follower.result()] == [["a"]] * 5

    def test_what_another_process_writes_wakes_a_watch(
        self, harness: Harness, written: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        watch = watching(written, here(written))
        (revision,) = harness.race(jobs.put, [{"key": "a", "text": "4"}])
        assert [change.value for batch in drain(watch, revision) for change in batch.changes] == [b"4"]

    def test_a_writer_killed_in_mid_write_loses_nothing_that_was_acknowledged(
        self, harness: Harness, store: Store, watching: Callable[[Store, Position], Watch]
    ) -> None:
        watch = watching(store, here(store))
        newest = 0
        for _ in range(3):
            with jobs.Process(harness.spec(), jobs.write_until_killed) as writer:
                acknowledged = [writer.line() for _ in range(5)]
                writer.kill()
                acknowledged += writer.rest()
            after = put(store, "after", b"1")
            batches = drain(watch, after)
            revisions = [batch.position.revision for batch in batches]
            assert [batch.previous for batch in batches] == [newest, *revisions[:-1]]
            assert revisions == sorted(set(revisions))
            assert {*acknowledged} <= {batch.position.revision for batch in batches}
            for batch in batches[:-1]:
                assert [change.key for change in batch.changes] == ["pair/a", "pair/b"]
                assert batch.changes[0].value == batch.changes[1].value
            listed = entries(harness.open())
            assert listed["pair/a"] == listed["pair/b"]
            newest = after
