"""The writer, over the store in memory: what it refuses, what it writes, and what it reads back."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from veltrix_mw.errors import Compacted, Conflict, InvalidKey, InvalidValue, KeyMissing, VeltrixError
from veltrix_mw.operations import Delete, Put
from veltrix_mw.protocols import ChangeRecord, Limits, Listing, RawOperation, StoreInfo
from veltrix_mw.snapshot import Entry, Version
from veltrix_mw.sorted_map import SortedMap
from veltrix_mw.stores.memory import MemoryStore
from veltrix_mw.telemetry import Telemetry
from veltrix_mw.validation import Schemas
from veltrix_mw.values import MAX_VALUE_BYTES, MISSING, decode
from veltrix_mw.writer import Writer

SECRET = "hunter2"


@dataclass(frozen=True)
class Pay:
    limit: int
    currency: str = "EUR"


class Limited(MemoryStore):
    """A store with the limits of another one; counts what is committed, and lets a test write in between."""

    def __init__(self, limits: Limits, **options: Any) -> None:
        super().__init__(**options)
        self._limits = limits
        self.commits = 0
        self.before_commit: Callable[[], None] | None = None

    @property
    def info(self) -> StoreInfo:
        return StoreInfo("limited", "memory://", "default", self._limits)

    def commit(self, operations: Sequence[RawOperation], record: ChangeRecord, *, timeout_s: float) -> int:
        interlude, self.before_commit = self.before_commit, None
        if interlude is not None:
            interlude()
        self.commits += 1
        return super().commit(operations, record, timeout_s=timeout_s)


class Desk:
    """A writer, its store, and the store's content."""

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        schemas: Mapping[str, Any] | None = None,
        telemetry: Telemetry | None = None,
        **options: Any,
    ) -> None:
        self.store = Limited(limits or Limits(MAX_VALUE_BYTES), **options)
        self.now_s = 1000.0
        self.writer = Writer(
            self.store,
            schemas=Schemas(schemas or {}),
            entries=self.entries,
            telemetry=telemetry or Telemetry("off"),
            wall_clock=lambda: self.now_s,
        )

    def listing(self) -> Listing:
        return self.store.list(timeout_s=1)

    def entries(self, _keys: Sequence[str] = ()) -> SortedMap:
        """What a follower would serve of it."""
        items = []
        for key, raw, revision in self.listing().entries:
            with suppress(InvalidValue):
                items.append((key, decode(raw), revision))
        return SortedMap.from_sorted(items)

    def content(self) -> dict[str, Any]:
        return {key: value for key, value, _ in self.entries().items()}

    @property
    def revision(self) -> int:
        return self.listing().position.revision

    def raw(self, key: str, raw: bytes) -> int:
        """Write as someone else does, who checks nothing."""
        return MemoryStore.commit(self.store, [RawOperation(key, raw)], ChangeRecord(), timeout_s=1)


@pytest.fixture
def desk() -> Desk:
    return Desk()


# Writing


def test_all_operations_are_one_revision(desk: Desk) -> None:
    assert desk.writer.write([Put("a", 1), Put("b", {"c": [1]})]) == 1
    assert desk.writer.write([Put("a", 2), Delete("b"), Put("c", None)]) == 2
    assert desk.content() == {"a": 2, "c": None}
    assert [(key, revision) for key, _, revision in desk.listing().entries] == [("a", 2), ("c", 2)]


def test_operations_may_come_from_a_generator(desk: Desk) -> None:
    def operations() -> Iterator[Put]:
        for number in range(3):
            yield Put(f"k{number}", number)

    assert desk.writer.write(operations()) == 1
    assert desk.content() == {"k0": 0, "k1": 1, "k2": 2}


def test_the_text_in_the_store_is_compact_json(desk: Desk) -> None:
    desk.writer.write([Put("a", {"x": ("é", 1.0)})])
    assert desk.listing().entries[0][1] == '{"x":["é",1.0]}'.encode()


def test_a_write_of_the_same_value_is_a_revision_too(desk: Desk) -> None:
    assert (desk.writer.write([Put("a", 1)]), desk.writer.write([Put("a", 1)])) == (1, 2)


@pytest.mark.parametrize(
    ("operations", "error", "said"),
    [
        ([], InvalidValue, "nothing to write: give at least one Put or Delete"),
        ([Put("ok", 1), Put("a//b", 1)], InvalidKey, "'a//b' is not a key"),
        ([Put("ok", 1), Delete("a\n")], InvalidKey, "is not a key"),
        ([Put("ok", 1), Put(3, 1)], InvalidKey, "a key is a str, not int"),
        ([Put("ok", 1), Delete(None)], InvalidKey, "a key is a str, not NoneType"),
        ([Put("k" * 513, 1)], InvalidKey, "at most 512 bytes"),
        ([Put("ok", 1), Put("a", float("nan"))], InvalidValue, "^'a': the value holds NaN"),
        ([Put("ok", 1), Put("a", {1: 1})], InvalidValue, "^'a': an object's member names are str"),
        ([Put("ok", 1), Put("a", object())], InvalidValue, "^'a': the value is not JSON"),
        ([Put("ok", 1), Put("a", "x" * MAX_VALUE_BYTES)], InvalidValue, "^'a': the value has .*1048576"),
        ([Put("ok", 1), Put("ok", 2)], InvalidValue, "'ok' is written twice in one revision; keep one"),
        ([Put("ok", 1), Delete("ok")], InvalidValue, "'ok' is written twice"),
        ([Put("ok", 1), ("a", 1)], TypeError, "takes Put and Delete, not tuple"),
        ("ab", TypeError, "takes Put and Delete, not str"),
        ([Put("ok", 1, expected=-1)], InvalidValue, "expected of 'ok' is a mod_revision: a whole number, 0 for"),
        ([Put("ok", 1, expected=True)], InvalidValue, "expected of 'ok'"),
        ([Put("ok", 1, expected="1")], InvalidValue, "expected of 'ok'"),
        ([Delete("present", expected=1.0)], InvalidValue, "expected of 'present'"),
        ([Put("ok", 1), Delete("absent")], KeyMissing, "'absent' does not exist, so there is nothing to delete"),
        ([Put("ok", 1), Put("present", 1, expected=0)], Conflict, "'present' is at revision 1"),
        ([Put("ok", 1), Delete("absent", expected=4)], Conflict, "'absent' is absent"),
    ],
)
def test_what_is_wrong_is_refused_whole(desk: Desk, operations: Any, error: type[Exception], said: str) -> None:
    desk.writer.write([Put("present", 0)])
    with pytest.raises(error, match=said):
        desk.writer.write(operations)
    assert desk.revision == 1
    assert desk.content() == {"present": 0}


def test_a_key_written_twice_among_very_many_is_found_at_once(desk: Desk) -> None:
    """In one pass: comparing each with each would take an hour here."""
    operations = [Put(f"k{number}", 1) for number in range(100_000)]
    with pytest.raises(InvalidValue, match="'k99999' is written twice"):
        desk.writer.write([*operations, Put("k99999", 2)])


@pytest.mark.parametrize(
    ("value", "key"),
    [({SECRET: {1: 2}}, "a"), ([SECRET, float("inf")], "a"), (f"{SECRET}\ud800", "a"), (SECRET, "p/limit")],
)
def test_no_refused_value_is_in_the_error_nor_in_the_errors_behind_it(value: Any, key: str) -> None:
    desk = Desk(schemas={"p/": Pay})
    with pytest.raises(InvalidValue) as raised:
        desk.writer.write([Put(key, value)])
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    behind: BaseException | None = raised.value
    while behind is not None:
        assert SECRET not in repr(behind) + repr(vars(behind))
        behind = behind.__cause__ or behind.__context__


# Limits


def test_the_store_s_limits_are_named_when_they_are_passed() -> None:
    desk = Desk(limits=Limits(max_value_bytes=10, max_operations=3, max_transaction_bytes=20))
    desk.writer.write([Put("abcd", 1), Put("b", "12345678")])
    desk.writer.write([Put(key, 1) for key in "xyz"])
    with pytest.raises(InvalidValue, match=r"^'b': the value has 11 bytes; at most 10"):
        desk.writer.write([Put("b", "123456789")])
    with pytest.raises(InvalidValue, match="4 operations in one revision; limited takes at most 3: write them in sev"):
        desk.writer.write([Put(key, 1) for key in "wxyz"])
    assert desk.writer.write([Put("a", "12345678"), Put("abcdef", "1")]) == 3  # 1 + 10 + 6 + 3 bytes
    with pytest.raises(InvalidValue, match="21 bytes in one revision; limited takes at most 20: write them in sev"):
        desk.writer.write([Put("a", "12345678"), Put("abcdefg", "1")])
    with pytest.raises(InvalidValue, match="21 bytes in one revision"):
        desk.writer.write([Delete("d" * 21)])
    assert desk.store.commits == 3


def test_a_rollback_beyond_the_limits_names_them_too() -> None:
    desk = Desk(limits=Limits(max_value_bytes=100, max_operations=3))
    for key in "abcd":
        desk.writer.write([Put(key, 1)])
    with pytest.raises(InvalidValue, match="4 operations in one revision; limited takes at most 3"):
        desk.writer.rollback(0)
    assert desk.revision == 4
    assert desk.writer.rollback(1) == 5
    assert desk.content() == {"a": 1}


# Compare-and-set


def test_expected_is_the_mod_revision_or_0_for_absent(desk: Desk) -> None:
    assert desk.writer.write([Put("a", 1, expected=0)]) == 1
    desk.writer.write([Put("other", 1)])
    assert desk.writer.write([Put("a", 2, expected=1)]) == 3
    with pytest.raises(Conflict) as raised:
        desk.writer.write([Put("a", 3, expected=1)])
    assert raised.value.key == "a"
    assert raised.value.current == Entry(2, 3)
    assert desk.writer.write([Delete("a", expected=3)]) == 4
    with pytest.raises(Conflict) as raised:
        desk.writer.write([Put("a", 3, expected=3)])
    assert raised.value.current == Entry(MISSING, 0)
    assert desk.writer.write([Put("a", 3, expected=raised.value.current.mod_revision)]) == 5


def test_no_update_of_eight_writers_is_lost(desk: Desk) -> None:
    desk.writer.write([Put("count", 0)])
    begin = threading.Barrier(8)

    def add_ten() -> None:
        begin.wait(10)
        for _ in range(10):
            entry = desk.writer.read(["count"])["count"]
            while True:
                try:
                    desk.writer.write([Put("count", entry.value + 1, expected=entry.mod_revision)])
                    break
                except Conflict as conflict:
                    entry = conflict.current

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(add_ten) for _ in range(8)]:
            done.result(30)
    assert desk.content() == {"count": 80}


# Schemas


def test_a_write_that_would_break_a_schema_is_refused_and_one_that_fits_is_not() -> None:
    desk = Desk(schemas={"p/": Pay, "top": int})
    desk.writer.write([Put("p/limit", 5), Put("elsewhere", "x"), Put("top", 1)])
    for operations, said in (
        ([Put("p/limit", "x")], "schema of 'p/'"),
        ([Delete("p/limit"), Put("p/currency", "USD")], "schema of 'p/'"),
        ([Put("elsewhere", "y"), Put("top", "x")], "schema of 'top'"),
    ):
        with pytest.raises(InvalidValue, match=f"^the write would break the {said}: "):
            desk.writer.write(operations)
    assert desk.revision == 1
    # Judged together: neither alone would do.
    assert desk.writer.write([Delete("p/limit")]) == 2
    assert desk.writer.write([Put("p/currency", "USD"), Put("p/limit", 7)]) == 3


def test_entries_are_looked_at_only_where_a_schema_is_touched() -> None:
    def never(_keys: Sequence[str]) -> SortedMap:
        raise AssertionError("nobody needed the entries")

    store = MemoryStore()
    writer = Writer(store, schemas=Schemas({"p/": Pay}), entries=never, telemetry=Telemetry("off"))
    assert writer.write([Put("q/limit", "x"), Put("p", "x")]) == 1


# The record


def test_the_record_says_who_why_and_when(desk: Desk) -> None:
    desk.writer.write([Put("a", 1)], author="ops", reason="sale")
    desk.now_s = 2000.0
    desk.writer.write([Put("a", 2)])
    second, first = desk.store.history("a", limit=9, timeout_s=1)
    assert first.record == ChangeRecord("ops", "sale", 1000.0, "")
    assert second.record == ChangeRecord("", "", 2000.0, "")


def test_the_record_carries_the_traceparent_of_the_write_s_own_span() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    desk = Desk(telemetry=Telemetry("requests", tracer_provider=provider))
    desk.writer.write([Put("a", 1)])
    desk.writer.rollback(0)
    spans = exporter.get_finished_spans()
    told = [version.record.traceparent for version in reversed(desk.store.history("a", limit=9, timeout_s=1))]
    assert [span.name for span in spans] == ["veltrix.write", "veltrix.write"]
    for revision, (span, traceparent) in enumerate(zip(spans, told, strict=True), start=1):
        assert span.context is not None
        told_span = f"{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"
        assert traceparent == f"00-{told_span}"
        assert span.attributes is not None
        assert span.attributes["veltrix.revision"] == revision


@pytest.mark.parametrize(
    ("note", "said"),
    [
        (None, "is a str, not NoneType"),
        (7, "is a str, not int"),
        (b"ops", "is a str, not bytes"),
        ("\ud800", "half of a surrogate pair"),
        ("x" * 4097, "at most 4096 bytes"),
        ("é" * 2049, "at most 4096 bytes"),
    ],
)
@pytest.mark.parametrize("name", ["author", "reason"])
def test_an_author_or_reason_that_no_record_can_hold_is_refused(desk: Desk, name: str, note: Any, said: str) -> None:
    desk.writer.write([Put("a", 1)])
    with pytest.raises(InvalidValue, match=f"the {name} of a change .*{said}"):
        desk.writer.write([Put("a", 2)], **{name: note})
    if note:
        with pytest.raises(InvalidValue, match=f"the {name} of a change"):
            desk.writer.rollback(0, **{name: note})
    assert desk.revision == 1
    desk.writer.write([Put("a", 2)], **{name: "é" * 2048})


# Reading


def test_read_gives_the_present_ones_now_or_as_of_a_revision(desk: Desk) -> None:
    desk.writer.write([Put("a", {"x": [1]})])
    desk.writer.write([Put("a", 2), Put("b", 3)])
    assert desk.writer.read(["a", "b", "c"]) == {"a": Entry(2, 2), "b": Entry(3, 2)}
    then = desk.writer.read(["a", "b"], 1)
    assert then == {"a": Entry({"x": (1,)}, 1)}
    with pytest.raises(TypeError, match="frozen"):
        then["a"].value["x"] = 2
    assert desk.writer.read([]) == {}
    assert desk.writer.read(iter(["a"])) == {"a": Entry(2, 2)}  # type: ignore[arg-type]


def test_read_refuses_what_it_cannot_mean(desk: Desk) -> None:
    desk.writer.write([Put("a", 1)])
    with pytest.raises(TypeError, match=r"write read\(\['a'\]\)"):
        desk.writer.read("a")
    with pytest.raises(InvalidKey):
        desk.writer.read(["a", "a//b"])
    with pytest.raises(ValueError, match="there is no revision 9"):
        desk.writer.read(["a"], 9)
    for revision in ("1", 1.0, True):
        with pytest.raises(InvalidValue, match="a revision is a whole number"):
            desk.writer.read(["a"], revision)  # type: ignore[arg-type]


def test_reading_a_stored_text_that_is_not_json_names_the_key_and_not_the_text(desk: Desk) -> None:
    desk.raw("a", SECRET.encode())
    with pytest.raises(InvalidValue, match=r"^'a': the value is not JSON") as raised:
        desk.writer.read(["a"])
    assert SECRET not in "".join(traceback.format_exception(raised.value))


# History


def test_history_tells_the_versions_newest_first_deleted_and_undecodable_ones_too(desk: Desk) -> None:
    desk.writer.write([Put("a", [1])], author="ann", reason="first")
    desk.writer.write([Put("other", 1)])
    desk.raw("a", SECRET.encode())
    desk.now_s = 2000.0
    desk.writer.write([Delete("a")], author="bob")
    desk.writer.write([Put("a", None)])
    null, deleted, broken, first = desk.writer.history("a")
    assert null == Version("a", None, 5, time_s=2000.0)
    assert deleted == Version("a", MISSING, 4, author="bob", time_s=2000.0, deleted=True)
    assert (broken.value, broken.revision, broken.deleted) == (MISSING, 3, False)
    assert broken.invalid.startswith("the value is not JSON")
    assert SECRET not in repr(broken)
    assert first == Version("a", (1,), 1, author="ann", reason="first", time_s=1000.0)
    assert desk.writer.history("a", limit=2) == (null, deleted)
    assert desk.writer.history("never") == ()
    with pytest.raises(InvalidKey):
        desk.writer.history("a//b")
    for limit in (0, -1):
        with pytest.raises(ValueError, match="1 or more"):
            desk.writer.history("a", limit=limit)


# Rollback


def test_a_rollback_is_a_new_revision_with_the_keyspace_as_it_was(desk: Desk) -> None:
    desk.writer.write([Put("kept", 0), Put("changed", 1), Put("deleted", 1)])
    then = desk.content()
    desk.writer.write([Put("changed", 2), Delete("deleted"), Put("added", 1)])
    desk.now_s = 2000.0
    assert desk.writer.rollback(1, author="ops") == 3
    assert desk.content() == then
    assert [(key, revision) for key, _, revision in desk.listing().entries] == [
        ("changed", 3),
        ("deleted", 3),
        ("kept", 1),
    ]
    assert desk.writer.history("added")[0].deleted
    assert desk.writer.history("changed")[0] == Version(
        "changed", 1, 3, author="ops", reason="rollback to revision 1", time_s=2000.0
    )
    assert desk.writer.rollback(2, reason="back again") == 4
    assert desk.content() == {"kept": 0, "changed": 2, "added": 1}
    assert desk.writer.history("changed")[0].reason == "back again"


def test_a_rollback_where_nothing_differs_writes_nothing(desk: Desk) -> None:
    desk.writer.write([Put("a", 1)])
    desk.writer.write([Put("a", 2)])
    desk.writer.write([Put("a", 1)])
    assert desk.writer.rollback(3) == desk.writer.rollback(1) == 3
    assert desk.revision == 3
    assert desk.store.commits == 3


def test_a_rollback_to_before_the_first_revision_leaves_nothing(desk: Desk) -> None:
    desk.writer.write([Put("a", 1), Put("b", 1)])
    assert desk.writer.rollback(0) == 2
    assert desk.content() == {}


@pytest.mark.parametrize(
    "meanwhile",
    [[Put("changed", 9)], [Delete("changed")], [Delete("added")], [Put("deleted", 9)], [Put("added", 9)]],
    ids=["put of a changed key", "delete of a changed", "delete of an added", "put of a deleted", "put of an added"],
)
def test_a_write_in_the_middle_of_a_rollback_is_a_conflict_and_stands(desk: Desk, meanwhile: list[Put]) -> None:
    desk.writer.write([Put("changed", 1), Put("deleted", 1)])
    desk.writer.write([Put("changed", 2), Delete("deleted"), Put("added", 1)])
    expected: list[dict[str, Any]] = []

    def interlude() -> None:
        desk.writer.write(meanwhile)
        expected.append(desk.content())

    desk.store.before_commit = interlude
    with pytest.raises(Conflict) as raised:
        desk.writer.rollback(1)
    assert raised.value.key == meanwhile[0].key
    assert desk.content() == expected[0]
    assert desk.revision == 3


def test_a_rollback_to_what_is_no_longer_kept_is_compacted() -> None:
    desk = Desk(keep_revisions=2)
    for number in range(5):
        desk.writer.write([Put("a", number)])
    with pytest.raises(Compacted):
        desk.writer.rollback(1)
    assert desk.writer.rollback(4) == 6
    assert desk.content() == {"a": 3}


@pytest.mark.parametrize("revision", [9, -1])
def test_a_rollback_to_a_revision_that_never_was_is_refused(desk: Desk, revision: int) -> None:
    desk.writer.write([Put("a", 1)])
    with pytest.raises(ValueError, match=f"there is no revision {revision}"):
        desk.writer.rollback(revision)
    assert desk.revision == 1


@pytest.mark.parametrize("revision", ["1", 1.0, None, True])
def test_a_rollback_takes_a_whole_number(desk: Desk, revision: Any) -> None:
    desk.writer.write([Put("a", 1)])
    with pytest.raises(InvalidValue, match=f"a revision is a whole number, not {type(revision).__name__}"):
        desk.writer.rollback(revision)


def test_a_rollback_that_every_worker_would_hold_back_is_refused() -> None:
    desk = Desk(schemas={"p/": Pay})
    desk.raw("p/limit", b'"x"')
    desk.raw("free", SECRET.encode())
    desk.writer.write([Put("p/limit", 5)])
    desk.writer.write([Put("free", 1)])
    with pytest.raises(InvalidValue, match="schema of 'p/'"):
        desk.writer.rollback(1)
    with pytest.raises(InvalidValue, match=r"^'free': the value is not JSON") as raised:
        desk.writer.rollback(3)
    assert SECRET not in str(raised.value)
    assert desk.revision == 4
    # What is broken and stays as it is does not stand in the way.
    desk.raw("other", SECRET.encode())
    desk.writer.write([Put("free", 2)])
    assert desk.writer.rollback(5) == 7


def test_every_error_but_those_of_misuse_is_the_library_s_own(desk: Desk) -> None:
    desk.writer.write([Put("a", 1)])
    for attempt in (
        lambda: desk.writer.write([]),
        lambda: desk.writer.write([Put("", 1)]),
        lambda: desk.writer.write([Put("a", {1})]),
        lambda: desk.writer.write([Delete("z")]),
        lambda: desk.writer.write([Put("a", 1, 7)]),
    ):
        with pytest.raises(VeltrixError):
            attempt()
