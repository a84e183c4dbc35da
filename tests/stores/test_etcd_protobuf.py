"""etcd's messages as protobuf: what goes out and comes back is the same, and the wire is the one that etcd speaks."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veltrix_mw.stores import etcd_messages as messages
from veltrix_mw.stores.etcd_messages import (
    Authenticate,
    Authenticated,
    Compare,
    Event,
    Header,
    KeepLease,
    KeyValue,
    LeaseAsked,
    LeaseGranted,
    LeaseKept,
    Operation,
    Range,
    Ranged,
    Result,
    Status,
    StatusAsked,
    Transacted,
    Transaction,
    WatchAsked,
    WatchCreate,
    Watched,
)
from veltrix_mw.stores.etcd_protobuf import _FIELDS, decode, encode

whole = st.integers(-(2**63), 2**63 - 1)
digits = st.integers(1, 2**64 - 1).map(str)
headers = st.builds(Header, digits, digits, whole, whole)
stored = st.builds(KeyValue, st.binary(), st.binary(), whole, whole, whole, whole)
ranged = st.builds(Ranged, headers, st.lists(stored, max_size=4), st.booleans(), whole)
watched = st.builds(
    Watched,
    headers,
    whole,
    st.booleans(),
    st.booleans(),
    whole,
    st.text(),
    st.booleans(),
    st.lists(st.builds(Event, stored, st.sampled_from(["PUT", "DELETE"])), max_size=4),
)
ranges = st.builds(
    Range,
    st.binary(),
    st.binary(),
    whole,
    whole,
    st.sampled_from(["NONE", "DESCEND"]),
    st.sampled_from(["KEY", "MOD"]),
    st.booleans(),
    st.booleans(),
    whole,
    whole,
)
compares = st.one_of(
    st.builds(Compare.at, st.binary(), whole),
    st.builds(Compare.present, st.binary()),
    st.builds(Compare.holds, st.binary(), st.binary()),
)
operations = st.one_of(
    ranges.map(Operation.range),
    st.builds(Operation.put, st.binary(), st.binary(), lease=whole),
    st.binary().map(Operation.delete),
)
everything = st.one_of(
    ranged,
    watched,
    st.builds(Transacted, headers, st.booleans(), st.lists(st.builds(Result, st.none() | ranged), max_size=3)),
    st.builds(Authenticated, headers, st.text()),
    st.builds(Status, headers, st.text(), digits, st.lists(st.text(), max_size=3)),
    ranges,
    st.builds(Authenticate, st.text(), st.text()),
    st.builds(WatchAsked, st.none() | st.builds(WatchCreate, st.binary(), st.binary(), whole, whole, st.booleans())),
    st.builds(
        Transaction,
        st.lists(operations, max_size=3),
        st.lists(compares, max_size=3),
        st.lists(operations, max_size=3),
    ),
    st.builds(LeaseAsked, whole),
    st.builds(LeaseGranted, headers, whole, whole),
    st.builds(KeepLease, whole),
    st.builds(LeaseKept, headers, whole),
    st.just(StatusAsked()),
)


@given(message=everything)
def test_what_goes_out_comes_back(message: messages.Message) -> None:
    assert decode(encode(message), type(message)) == message


@given(message=everything, data=st.data())
def test_what_is_cut_off_is_never_taken_for_something_else_than_a_shorter_message(
    message: messages.Message, data: st.DataObject
) -> None:
    """Between two fields nothing tells that more should follow: there, what comes out goes in as the shorter bytes."""
    raw = encode(message)
    cut = raw[: data.draw(st.integers(0, max(0, len(raw) - 1)))]
    try:
        shorter = decode(cut, type(message))
    except ValueError:
        return
    assert encode(shorter) in {cut, b"\x0a\0" + cut}  # a header that is absent is written as an empty one


@given(raw=st.binary(max_size=60), kind=st.sampled_from(sorted(_FIELDS, key=lambda kind: kind.__name__)))
def test_any_bytes_are_a_message_or_a_value_error(raw: bytes, kind: type[Any]) -> None:
    try:
        made = decode(raw, kind)
    except ValueError:
        return
    assert isinstance(made, kind)


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (Range(b"a", b"b", 300, -1), "0a0161 120162 18ac02 20ffffffffffffffffff01"),
        (Range(b"a", sort_order="DESCEND", sort_target="MOD", keys_only=True), "0a0161 2802 3003 4001"),
        (Range(b"a", count_only=True, min_mod_revision=2, max_mod_revision=3), "0a0161 4801 5002 5803"),
        (Transaction([Operation.put(b"k", b"v")]), "1208 1206 0a016b 120176"),
        (Transaction([], [Compare.at(b"k", 7)], [Operation.delete(b"k")]), "0a07 1002 1a016b 3007 1a05 1a03 0a016b"),
        (Transaction([], [Compare.present(b"k")]), "0a07 0801 1002 1a016b"),
        (Transaction([], [Compare.holds(b"k", b"v")]), "0a08 1003 1a016b 3a0176"),
        (Transaction([Operation.range(Range(b""))]), "1202 0a00"),
        (WatchAsked(WatchCreate(b"k", b"", 5, 3, True)), "0a09 0a016b 1805 3803 4001"),
        (Authenticate("u", "p"), "0a0175 120170"),
        (StatusAsked(), ""),
    ],
)
def test_what_is_asked_is_written_as_etcd_reads_it(message: messages.Message, wire: str) -> None:
    assert encode(message).hex() == wire.replace(" ", "")


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        ("0a0d 08ffffffffffffffffff01 1802", Ranged(Header("18446744073709551615", revision=2))),
        ("1209 0a016b 1802 2a0276 31 1801 2002", Ranged(kvs=[KeyValue(b"k", b"v1", 0, 2)], more=True, count=2)),
        ("1001 1a00 1a04 0a02 2003", Transacted(succeeded=True, responses=[Result(), Result(Ranged(count=3))])),
        ("2001 2807 32 02 6e6f", Watched(canceled=True, compact_revision=7, cancel_reason="no")),
        ("1003 1801 3801", Watched(watch_id=3, created=True, fragment=True)),
        ("5a07 0801 1203 0a016b", Watched(events=[Event(KeyValue(b"k"), "DELETE")])),
        ("1203 746f6b", Authenticated(token="tok")),
        ("1205 332e342e32 2005 42 01 78 42 01 79", Status(version="3.4.2", leader="5", errors=["x", "y"])),
        ("18ffffffffffffffffff01", Header(revision=-1)),
        ("", Ranged()),
    ],
)
def test_what_etcd_writes_is_read(wire: str, message: messages.Message) -> None:
    assert decode(bytes.fromhex(wire.replace(" ", "")), type(message)) == message


UNKNOWN = [
    b"\x98\x06\x96\x01",  # a number
    b"\x99\x06" + struct.pack("<d", 1.5),
    b"\x9a\x06\x03abc",
    b"\x9d\x06" + struct.pack("<f", 1.5),
]


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_what_a_newer_etcd_adds_is_passed_over(unknown: bytes) -> None:
    known = encode(Ranged(Header("1", "2", 3, 4), [KeyValue(b"k", b"v")], True, 5))
    assert decode(unknown + known + unknown, Ranged) == decode(known, Ranged)
    within = b"\x12" + bytes([len(unknown)]) + unknown
    assert decode(known + within, Ranged).kvs[1] == KeyValue()
    for end in range(1, len(unknown)):
        with pytest.raises(ValueError, match=r"cut off"):
            decode(known + unknown[:end], Ranged)


def test_a_known_number_of_another_type_is_passed_over() -> None:
    assert decode(b"\x20\x05" + b"\x22\x03abc", Ranged) == Ranged(count=5)


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        ("1a", "Ranged is cut off"),
        ("1280", "Ranged is cut off"),
        ("1205 0a016b", "Ranged is cut off"),  # the inner message is longer than what there is
        ("1203 0a056b", "Ranged is cut off"),  # the key is longer than the inner message
        ("1202 18ff 01", "Ranged is cut off"),  # so is the number
        ("20ffffffffffffffffffff01", "more than 64 bits"),
        ("00", "number 0"),
        ("9b06", "wire type 3"),
    ],
)
def test_what_is_no_message_says_why(wire: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode(bytes.fromhex(wire.replace(" ", "")), Ranged)


def test_a_choice_that_is_not_known_is_told() -> None:
    with pytest.raises(ValueError, match="7 is none of PUT, DELETE"):
        decode(b"\x08\x07", Event)


def test_every_message_that_travels_has_its_numbers() -> None:
    kinds = {
        kind
        for kind in vars(messages).values()
        if isinstance(kind, type)
        and issubclass(kind, messages.Message)
        and kind not in {messages.Message, messages.Answer}
    }
    assert kinds == set(_FIELDS)
    for kind, fields in _FIELDS.items():
        assert {field.name for field in fields} == {field.name for field in msgspec.structs.fields(kind)}, kind
        assert len({field.number for field in fields}) == len(fields), kind
