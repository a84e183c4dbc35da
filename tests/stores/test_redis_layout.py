"""The layout in Redis: names, encodings, and what is refused as not ours."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veltrix_mw.protocols import Batch, ChangeRecord, Position, RawChange
from veltrix_mw.stores.redis_layout import (
    MAX_CHANGES,
    META_FIELDS,
    MIRROR,
    Names,
    NotOurs,
    append_arguments,
    encode_record,
    meta_of,
    pairs_of,
    state_of,
    stored_of,
    stream_entry_of,
    stream_id,
)
from veltrix_mw.values import MISSING

META = {
    "#format": b"1",
    "#kind": b"mirror",
    "#incarnation": b"abc",
    "#revision": b"12",
    "#mark": b"m12",
    "#count": b"3",
    "#digest": b"18446744073709551615",
    "#lazy": b"tenants/ users/",
    "#proved": b"1700000000000000",
    "#token": b"4",
    "#units": b"4-12",
}
ENTRY = [b"prev", b"11 m11", b"incarnation", b"abc", b"mark", b"m12", b"record", b"{}"]


def values(**changed: bytes | None) -> list[bytes | None]:
    return [(META | {f"#{name}": value for name, value in changed.items()})[field] for field in META_FIELDS]


def test_all_names_of_a_namespace_share_its_hash_tag() -> None:
    names = Names("shop/eu")
    every = [names.entries, names.changes, names.lease, names.token, names.wanted, names.filling(3)]
    assert all(name.startswith("veltrix:{shop/eu}:") for name in every)
    assert len(set(every)) == len(every)


def test_meta_are_read() -> None:
    meta = meta_of(values())
    assert meta is not None
    assert (meta.kind, meta.position, meta.count) == (MIRROR, Position("abc", 12, "m12"), 3)
    assert (meta.digest, meta.lazy, meta.proved_us, meta.token) == (2**64 - 1, ("tenants/", "users/"), 1.7e15, 4)


def test_a_hash_without_meta_has_none() -> None:
    assert meta_of([None] * len(META_FIELDS)) is None


@pytest.mark.parametrize("changed", [{"format": b"2"}, {"revision": b"x"}, {"count": None}, {"mark": b"\xff"}])
def test_meta_that_are_not_ours_are_refused(changed: dict[str, bytes | None]) -> None:
    with pytest.raises(NotOurs, match="field '#"):
        meta_of(values(**changed))


def test_the_age_of_a_mirror_is_by_its_own_clock() -> None:
    proved_us = 1_700_000_000_000_000
    state = state_of(meta_of(values()), proved_us + 2_500_000, b"4 w1 of host")
    assert (state.age_s, state.relay) == (2.5, "w1 of host")
    assert state_of(meta_of(values()), proved_us - 5, None).age_s == math.inf  # the clock was set back since
    assert state_of(meta_of(values(proved=None)), proved_us, None).age_s == math.inf
    assert state_of(None, proved_us, None).position == Position("", 0)


def test_an_entry_holds_its_revision_and_its_bytes_as_they_are() -> None:
    assert stored_of(b"a", b"12  { }\n") == (b" { }\n", 12)
    assert pairs_of([b"#revision", b"3", b"a/b", b"1 null"]) == [("a/b", b"null", 1)]


@pytest.mark.parametrize("raw", [b"", b"12", b"x 1", b"-1 1", b" 1", b"secret"])
def test_a_value_without_a_revision_is_named_and_not_shown(raw: bytes) -> None:
    with pytest.raises(NotOurs, match="field 'a/b'") as caught:
        stored_of(b"a/b", raw)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("field", [b"", b"a b", b"/a", b"\xff", b"a" * 513])
def test_a_field_that_is_no_key_is_refused(field: bytes) -> None:
    with pytest.raises(NotOurs, match="no key"):
        pairs_of([field, b"1 1"])


def test_a_stream_entry_is_read_in_any_order_of_its_fields() -> None:
    changes = [b"-b", b"", b"+a", b"1", b"~b", b"3 x", b"~a", b"", b"unknown", b"later"]
    for fields in ([*ENTRY, *changes], [*changes, *ENTRY]):
        entry = stream_entry_of(b"12-0", fields)
        assert (entry.position, entry.previous, entry.previous_mark) == (Position("abc", 12, "m12"), 11, "m11")
        assert entry.changes == (RawChange("a", b"1"), RawChange("b", MISSING))
        assert entry.before == {"a": None, "b": (b"x", 3)}
        assert not entry.relist


@pytest.mark.parametrize(
    ("entry_id", "fields"),
    [
        (b"12-1", ENTRY),
        (b"12-0", ENTRY[2:]),
        (b"12-0", [b"prev", b"x m", *ENTRY[2:]]),
        (b"12-0", [*ENTRY, b"+a b", b"1"]),
        (b"12-0", [*ENTRY, b"~a", b"secret"]),
        (b"12-0", [b"prev", b"\xff", *ENTRY[2:]]),
    ],
)
def test_a_stream_entry_that_is_not_ours_is_refused(entry_id: bytes, fields: list[bytes]) -> None:
    with pytest.raises(NotOurs) as caught:
        stream_entry_of(entry_id, fields)
    assert "secret" not in str(caught.value)


@given(
    st.builds(
        ChangeRecord, st.text(), st.text(), st.floats(allow_nan=False, allow_infinity=False, min_value=0), st.text()
    )
)
def test_a_record_survives(record: ChangeRecord) -> None:
    assert stream_entry_of(b"12-0", [*ENTRY[:6], b"record", encode_record(record)]).record == record


@pytest.mark.parametrize("raw", [b"", b"x", b"[]", b'{"author": 1}', b"[" * 100_000, b'{"time_s": "x"}'])
def test_a_record_that_cannot_be_read_is_empty(raw: bytes) -> None:
    assert stream_entry_of(b"12-0", [*ENTRY[:6], b"record", raw]).record == ChangeRecord()


def test_a_revision_too_large_for_one_entry_of_the_stream_leaves_its_changes_out() -> None:
    def arguments(count: int) -> list[str | bytes]:
        batch = Batch(Position("abc", 12, "m"), 11, tuple(RawChange(f"k{number}", b"1") for number in range(count)))
        return append_arguments(batch, lease="1 w", token=1, count=1, digest=0, keep_revisions=9, keep_bytes=9)[1]

    assert [arguments(MAX_CHANGES)[11], arguments(MAX_CHANGES + 1)[11]] == ["0", "1"]


def test_a_stream_id_is_the_revision() -> None:
    assert stream_id(12) == "12-0"
