"""How messages become revisions, what a process remembers, and how keys are named: without a server."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veltrix_mw.errors import StoreUnavailable
from veltrix_mw.protocols import Batch, ChangeRecord, Position, RawChange, Restored
from veltrix_mw.stores.etcd_messages import Event, Header, KeyValue, Watched, prefix_end
from veltrix_mw.stores.etcd_space import Change, Space, agrees, foreign_mark
from veltrix_mw.stores.etcd_watch import CHANGE, ENTRIES, LABEL, Assembly
from veltrix_mw.stores.etcd_witness import Witness
from veltrix_mw.values import MISSING

SPACE = Space("shop", prefix=None, lazy=("tenants/",), is_text=False)


def assembly(*, label: str = "label", revision: int = 10, space: Space = SPACE) -> Assembly:
    return Assembly(space, Position(label or "7?", revision, "r:x"), label=label, cluster_id="7")


def entry(key: str, value: bytes | None, revision: int) -> Event:
    kind = KeyValue(f"shop/{key}".encode(), value or b"", mod_revision=revision)
    return Event(kind, "DELETE" if value is None else "PUT")


def entered(*events: Event, fragment: bool = False) -> Watched:
    return Watched(watch_id=ENTRIES, events=list(events), fragment=fragment)


def recorded(revision: int, author: str = "ann") -> Watched:
    stored = KeyValue(SPACE.change, Change.written(ChangeRecord(author)), mod_revision=revision)
    return Watched(watch_id=CHANGE, events=[Event(stored)])


def labelled(label: str | None) -> Watched:
    stored = KeyValue(SPACE.label, (label or "").encode())
    return Watched(watch_id=LABEL, events=[Event(stored, "DELETE" if label is None else "PUT")])


def told(batches: Sequence[Batch]) -> list[tuple[int, int, str]]:
    return [(batch.previous, batch.position.revision, batch.record.author) for batch in batches]


# --- assembling


@pytest.mark.parametrize("order", [0, 1], ids=["the record first", "the entries first"])
def test_a_revision_goes_out_with_its_record_whichever_comes_first(order: int) -> None:
    made = assembly()
    messages = [recorded(12), entered(entry("a", b"1", 12))]
    messages = messages[::-1] if order else messages
    made.take(messages[0], 0.0)
    assert made.ready() == []
    made.take(messages[1], 0.0)
    (batch,) = made.ready()
    assert told([batch]) == [(10, 12, "ann")]
    assert batch.changes == (RawChange("a", b"1"),)
    assert (made.ready(), made.unresolved) == ([], 0)


def test_a_revision_of_someone_else_waits_until_it_is_known_that_it_has_no_record() -> None:
    made = assembly()
    made.take(entered(entry("a", b"1", 12), entry("b", b"2", 13)), 5.0)
    assert (made.ready(), made.unresolved) == ([], 13)
    assert 5.0 < made.due_s < 5.1
    made.resolve(13, Change(9, "r:old", ChangeRecord()), "label", 5.1)
    first, second = made.ready()
    assert told([first, second]) == [(10, 12, ""), (12, 13, "")]
    assert first.position.fingerprint == foreign_mark([(b"shop/a", b"1")])
    assert made.due_s == float("inf")


def test_a_record_that_etcd_has_and_the_watch_did_not_bring_is_waited_for_then_the_watch_is_left() -> None:
    made = assembly()
    made.take(entered(entry("a", b"1", 12)), 0.0)
    late = Change(12, "r:new", ChangeRecord("ann"))
    made.resolve(12, late, "label", 0.1)
    assert made.ready() == [], "never with another mark than a listing would show"
    with pytest.raises(StoreUnavailable):
        made.resolve(12, late, "label", 2.0)
    made.take(recorded(12), 2.0)
    assert told(made.ready()) == [(10, 12, "ann")]


def test_a_stream_of_writes_is_not_out_of_step_because_the_newest_record_is_always_on_its_way() -> None:
    made = assembly(revision=0)
    for revision in range(1, 200):
        now_s = revision * 0.1
        made.take(entered(entry("k", b"1", revision)), now_s)
        made.resolve(revision, Change(revision, "r:mark", ChangeRecord()), "label", now_s)
        made.take(recorded(revision), now_s)
        assert told(made.ready()) == [(revision - 1, revision, "ann")]


def test_a_record_that_never_comes_is_out_of_step_also_while_writes_go_on() -> None:
    made = assembly(revision=0)
    with pytest.raises(StoreUnavailable, match="watch again"):
        for revision in range(1, 200):
            now_s = revision * 0.1
            made.take(entered(entry("k", b"1", revision)), now_s)
            made.resolve(revision, Change(revision, "r:mark", ChangeRecord()), "label", now_s)
    assert revision < 20
    assert made.ready() == []


def test_a_later_record_proves_that_earlier_revisions_have_none() -> None:
    made = assembly()
    made.take(entered(entry("a", b"1", 11), entry("a", b"2", 12), entry("a", b"3", 13)), 0.0)
    made.take(recorded(12), 0.0)
    assert told(made.ready()) == [(10, 11, ""), (11, 12, "ann")]
    assert made.unresolved == 13


def test_fragments_are_held_until_the_last() -> None:
    made = assembly()
    made.take(recorded(12), 0.0)
    made.take(entered(entry("a", b"1", 12), fragment=True), 0.0)
    assert made.ready() == []
    made.take(entered(entry("b", b"2", 12), fragment=True), 0.0)
    assert made.ready() == []
    made.take(entered(entry("c", None, 12)), 0.0)
    (batch,) = made.ready()
    assert [(change.key, change.value) for change in batch.changes] == [("a", b"1"), ("b", b"2"), ("c", MISSING)]


def test_what_comes_twice_goes_out_once() -> None:
    made = assembly()
    twice = entered(entry("a", b"1", 10), entry("a", b"2", 12))
    for _ in range(2):
        made.take(twice, 0.0)
        made.take(recorded(12), 0.0)
    assert told(made.ready()) == [(10, 12, "ann")]
    made.take(twice, 0.0)
    assert made.ready() == []


def test_other_shapes_of_keys_are_no_revision_and_lazy_ones_no_change() -> None:
    made = assembly()
    made.take(entered(entry("sp ace", b"1", 11), entry("tenants/a", b"1", 12), entry("\u00e9", None, 13)), 0.0)
    made.take(recorded(14), 0.0)
    (batch,) = made.ready()
    assert (batch.position.revision, batch.changes) == (12, ())
    assert batch.position.fingerprint == foreign_mark([(b"shop/tenants/a", b"1")])
    assert made.ignored_changed


def test_a_burst_goes_out_in_parts() -> None:
    made = assembly(revision=0)
    made.take(entered(*(entry("a", b"1", revision) for revision in range(1, 601))), 0.0)
    made.take(recorded(600), 0.0)
    parts = []
    while part := made.ready():
        parts.append(len(part))
    assert (sum(parts), max(parts)) == (600, 256)
    large = assembly(revision=0)
    large.take(entered(*(entry("a", b"x" * 700_000, revision) for revision in range(1, 4))), 0.0)
    large.take(recorded(3), 0.0)
    assert [len(large.ready()) for _ in range(4)] == [1, 1, 1, 0]


def test_records_are_not_kept_longer_than_they_are_needed() -> None:
    made = assembly(revision=0)
    for revision in range(1, 100):
        made.take(recorded(revision), 0.0)
        made.take(entered(entry("a", b"1", revision)), 0.0)
        assert len(made.ready()) == 1
    assert made._changes == {}


def test_another_label_is_another_history_but_the_first_one_is_taken() -> None:
    made = assembly()
    made.take(labelled("label"), 0.0)
    for other in ("other", None):
        with pytest.raises(Restored):
            assembly().take(labelled(other), 0.0)
    first = assembly(label="", revision=0)
    first.take(entered(entry("a", b"1", 12)), 0.0)
    first.take(recorded(12), 0.0)
    assert first.ready() == [], "the first write of ours brings the label, too"
    first.take(labelled("new"), 0.0)
    assert [batch.position.incarnation for batch in first.ready()] == ["new"]
    with pytest.raises(Restored):
        first.take(labelled("other"), 0.0)


def test_a_record_without_a_label_is_asked_about_once() -> None:
    made = assembly(label="")
    made.take(entered(entry("a", b"1", 12)), 0.0)
    made.take(recorded(12), 0.0)
    assert made.unresolved == 12
    made.resolve(12, Change(12, "r:x", ChangeRecord()), "", 0.1)
    assert [batch.position.incarnation for batch in made.ready()] == ["7?"]


@given(seed=st.integers(0, 10_000), foreign=st.sets(st.integers(1, 30)))
def test_any_interleaving_of_the_watchers_gives_the_same_revisions(seed: int, foreign: set[int]) -> None:
    """Each watcher's messages keep their order; between watchers there is none."""
    shuffle = random.Random(seed)
    entries = [entered(entry(f"k{revision % 4}", b"%d" % revision, revision)) for revision in range(1, 31)]
    records = [recorded(revision, f"by{revision}") for revision in range(1, 31) if revision not in foreign]
    made, out = assembly(revision=0), list[Batch]()
    while entries or records:
        made.take((entries if entries and (not records or shuffle.random() < 0.5) else records).pop(0), 0.0)
        out += made.ready()
    if made.unresolved:
        newest = max({*range(31)} - foreign)
        made.resolve(made.unresolved, Change(newest, "r:x", ChangeRecord()) if newest else None, "label", 0.0)
        out += made.ready()
    assert told(out) == [(n - 1, n, "" if n in foreign else f"by{n}") for n in range(1, 31)]
    assert all(batch.position.fingerprint.startswith("x:" if n in foreign else "r:") for n, batch in enumerate(out, 1))


# --- marks


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=3), st.binary(max_size=3)), unique_by=lambda put: put[0]))
def test_what_is_left_of_a_revision_agrees_with_it_and_nothing_else_does(put: list[tuple[bytes, bytes]]) -> None:
    known = foreign_mark(put)
    assert foreign_mark(put[::-1]) == known
    for start in range(len(put) + 1):
        assert agrees(foreign_mark(put[start:]), known)
        assert agrees(foreign_mark(put[:start]), known)
    if len(put) < 8:
        assert not agrees(foreign_mark([*put, (b"other key", b"1")]), known)
        assert not agrees("r:" + known[2:], known)
        if put:
            (name, value), *rest = put
            assert not agrees(foreign_mark([(name, value + b"x"), *rest]), known)


def test_a_record_is_read_back_and_each_has_a_mark_of_its_own() -> None:
    record = ChangeRecord("ann", "sale", 1.25, "00-x")
    one, other = (KeyValue(value=Change.written(record), mod_revision=5) for _ in range(2))
    assert Change.of(one).record == record
    assert Change.of(one) == Change.of(one)
    assert Change.of(one).fingerprint != Change.of(other).fingerprint
    for strange in (b"", b"not json", b"[]", b'{"author": 5}', b"\xff"):
        change = Change.of(KeyValue(value=strange, mod_revision=5))
        assert (change.record, change.fingerprint[:2], len(change.fingerprint) > 2) == (ChangeRecord(), "r:", True)


def test_spans_cover_the_namespace_but_for_the_lazy_prefixes() -> None:
    space = Space("shop", prefix=None, lazy=("b/", "a/x/", "a/"), is_text=False)
    assert space.lazy_spans == ((b"shop/a/", b"shop/a0"), (b"shop/b/", b"shop/b0"))
    assert space.eager_spans == ((b"shop/", b"shop/a/"), (b"shop/a0", b"shop/b/"), (b"shop/b0", b"shop0"))
    assert prefix_end(b"a\xff\xff") == b"b"
    assert prefix_end(b"\xff") == b"\0"
    assert prefix_end(b"") == b"\0"


# --- what is remembered


def header(revision: int, term: int = 2, cluster: str = "7") -> Header:
    return Header(cluster, "1", revision, term)


@pytest.mark.parametrize("then", [header(9), header(20, term=1), header(20, cluster="8")])
def test_a_header_that_goes_back_is_told_once(then: Header) -> None:
    witness = Witness()
    witness.answered(header(10), witness.seen)
    witness.remember(Position("l", 5, "r:x"), 10, witness.seen.epoch)
    witness.answered(then, witness.seen)
    assert witness.complete_to(Position("l", 5, "r:x")) == 0
    with pytest.raises(Restored):
        witness.check()
    witness.check()
    witness.answered(then, witness.seen)
    witness.check()
    assert witness.recall(Position("l", 3, "r:y"), 9) == Position("l", 3, "r:y"), "what was remembered is gone"


def test_an_answer_that_was_overtaken_is_no_restore() -> None:
    witness = Witness()
    witness.answered(header(10), witness.seen)
    sent = witness.seen
    witness.answered(header(20), witness.seen)
    witness.answered(header(12), sent)
    witness.check()
    assert witness.seen.revision == 20


def test_an_answer_from_before_a_restore_does_not_count_after_it() -> None:
    witness = Witness()
    witness.answered(header(100), witness.seen)
    sent = witness.seen
    witness.answered(header(50), witness.seen)
    witness.answered(header(101), sent)
    with pytest.raises(Restored):
        witness.check()
    witness.answered(header(51), witness.seen)
    witness.check()


def test_a_watch_of_before_a_restore_is_told_though_another_call_was_told_first() -> None:
    witness = Witness()
    witness.answered(header(10), witness.seen)
    epoch = witness.seen.epoch
    witness.answered(header(9), witness.seen)
    with pytest.raises(Restored):
        witness.check()
    with pytest.raises(Restored):
        witness.check(epoch)
    witness.remember(Position("l", 5, "r:x"), 10, epoch)
    assert witness.seen.position is None


def test_a_listing_that_shows_less_than_was_delivered_has_the_remembered_position() -> None:
    witness = Witness()
    known = Position("l", 8, foreign_mark([(b"a", b"1"), (b"b", b"1")]))
    witness.remember(known, 8, 0)
    assert witness.recall(Position("l", 5, "r:x"), 9) == known, "a deletion"
    assert witness.recall(Position("l", 8, foreign_mark([(b"a", b"1")])), 9) == known, "a part was overwritten"
    for found, at in (
        (Position("l", 5, "r:x"), 7),  # as of before it
        (Position("l", 9, "r:x"), 9),
        (Position("m", 5, "r:x"), 9),
        (Position("l", 8, foreign_mark([(b"a", b"2")])), 9),
        (Position("l", 8, "r:x"), 9),
    ):
        assert witness.recall(found, at) == found
    witness.forget()
    assert witness.recall(Position("l", 5, "r:x"), 9) == Position("l", 5, "r:x")


def test_what_is_remembered_never_goes_back() -> None:
    witness = Witness()
    newer, older = Position("l", 8, "r:b"), Position("l", 5, "r:a")
    witness.remember(newer, 12, 0)
    witness.remember(older, 20, 0)
    assert (witness.complete_to(newer), witness.complete_to(older)) == (12, 0)
    witness.remember(newer, 9, 0)
    assert witness.complete_to(newer) == 12
