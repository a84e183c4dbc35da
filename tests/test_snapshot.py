"""The snapshot: a mapping at one revision, what is held back in it, and its digest."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veltrix_mw.digest import digest_of
from veltrix_mw.errors import HeldBack, KeyMissing
from veltrix_mw.snapshot import Change, Entry, Proof, Rejection, Snapshot, Version
from veltrix_mw.sorted_map import SortedMap
from veltrix_mw.values import MISSING, Missing

KEYS = st.sampled_from([f"k{number}" for number in range(12)])
CHANGES = st.dictionaries(KEYS, st.one_of(st.just(MISSING), st.tuples(st.integers(), st.integers(1, 50))), max_size=6)
REJECTIONS = st.dictionaries(KEYS, st.builds(Rejection, st.integers(1, 50), st.just("wrong"), st.booleans()))


def held(entries: Mapping[str, tuple[Any, int]], **options: Any) -> Snapshot:
    return Snapshot(SortedMap.from_sorted([(key, *entries[key]) for key in sorted(entries)]), **options)


def by_the_book(snapshot: Snapshot) -> int:
    """The digest as the contract words it."""
    authority = {key: snapshot.entry(key).mod_revision for key in snapshot}
    for key, why in snapshot.rejected.items():
        authority.pop(key, None)
        if not why.deleted:
            authority[key] = why.revision
    total = 0
    for key, mod_revision in authority.items():
        hashed = hashlib.blake2b(key.encode() + b"\0" + str(mod_revision).encode(), digest_size=8)
        total += int.from_bytes(hashed.digest(), "big")
    return total % 2**64


def test_an_empty_snapshot_is_at_revision_0_and_of_no_origin() -> None:
    empty = Snapshot()
    assert (empty.revision, empty.incarnation, empty.origin, len(empty)) == (0, "", "none", 0)
    assert (dict(empty), dict(empty.rejected), empty.digest) == ({}, {}, 0)


def test_it_is_a_mapping_from_key_to_value_in_order_of_key() -> None:
    snapshot = held({"b": (2, 5), "a": (None, 4)}, revision=9)
    assert isinstance(snapshot, Mapping)
    assert list(snapshot) == ["a", "b"]
    assert list(snapshot.items()) == [("a", None), ("b", 2)]
    assert list(snapshot.values()) == [None, 2]
    assert snapshot == {"a": None, "b": 2}
    assert len(snapshot) == 2
    assert "a" in snapshot
    assert "c" not in snapshot
    assert snapshot.get("a", 7) is None
    assert snapshot.get("c") is None
    assert snapshot.get("c", 7) == 7
    assert snapshot.entry("b") == Entry(2, 5)
    assert list(snapshot.below("b")) == [("b", 2, 5)]


def test_an_absent_key_raises_key_missing_that_names_the_revision() -> None:
    snapshot = held({"a": (1, 4)}, revision=9)
    for read in (snapshot.__getitem__, snapshot.entry):
        with pytest.raises(KeyMissing, match=r"^there is no key 'b' at revision 9$") as raised:
            read("b")
        assert isinstance(raised.value, KeyError)
        assert not isinstance(raised.value, HeldBack)


@pytest.mark.parametrize("key", [3, None, b"a", ("a",)])
def test_what_is_no_str_is_absent_as_it_is_from_any_mapping(key: Any) -> None:
    snapshot = held({"a": (1, 4)})
    assert key not in snapshot
    assert snapshot.get(key, 7) == 7
    for read in (snapshot.__getitem__, snapshot.entry):
        with pytest.raises(KeyMissing):
            read(key)


def test_a_key_held_back_without_a_good_value_does_not_look_absent() -> None:
    rejected = {"bad": Rejection(8, "expected int"), "gone": Rejection(8, "expected int", deleted=True)}
    snapshot = held({"a": (1, 4)}, revision=9, rejected=rejected)
    for read in (
        snapshot.__getitem__,
        snapshot.entry,
        snapshot.get,
        snapshot.__contains__,
        lambda key: snapshot.get(key, 7),
    ):
        with pytest.raises(HeldBack, match=r"'bad' is held back: revision 8 was rejected \(expected int\)"):
            read("bad")
    # What the authority does not have either is absent.
    with pytest.raises(KeyMissing) as raised:
        snapshot["gone"]
    assert not isinstance(raised.value, HeldBack)
    assert snapshot.get("gone", 7) == 7
    assert "gone" not in snapshot
    assert "a" in snapshot


def test_a_key_held_back_serves_its_last_good_value() -> None:
    snapshot = held({"a": (1, 4)}, revision=9, rejected={"a": Rejection(8, "expected int")})
    assert snapshot["a"] == snapshot.get("a") == 1
    assert snapshot.entry("a") == Entry(1, 4)
    assert snapshot.rejected == {"a": Rejection(8, "expected int")}


def test_nothing_of_it_can_be_changed() -> None:
    rejected = {"a": Rejection(8, "wrong")}
    snapshot = held({"a": (1, 4)}, rejected=rejected)
    rejected["b"] = Rejection(9, "wrong")
    assert list(snapshot.rejected) == ["a"]
    with pytest.raises(TypeError):
        snapshot.rejected["b"] = Rejection(9, "wrong")  # type: ignore[index]
    with pytest.raises(TypeError):
        snapshot["a"] = 2  # type: ignore[index]
    for name in ("revision", "incarnation", "origin", "digest", "rejected", "other"):
        with pytest.raises(AttributeError):
            setattr(snapshot, name, 1)


@pytest.mark.parametrize(
    "record", [Entry(1, 2), Change("k", MISSING, Entry(1, 2)), Rejection(1, "r"), Version("k", 1, 2)]
)
def test_records_are_frozen(record: Any) -> None:
    for field in dataclasses.fields(record):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field.name, 1)
    assert not hasattr(record, "__dict__")


def test_no_value_is_in_what_a_snapshot_shows() -> None:
    snapshot = held({"secret": ("hunter2", 4)}, revision=9, origin="memory", rejected={"k": Rejection(1, "wrong")})
    assert repr(snapshot) == "<Snapshot revision=9 origin=memory entries=1, 1 held back>"


def test_the_digest_of_one_entry_is_blake2b_64_of_key_nul_and_decimal_revision() -> None:
    hashed = hashlib.blake2b(b"checkout/max_items\x0041", digest_size=8).digest()
    assert digest_of("checkout/max_items", 41) == int.from_bytes(hashed, "big")
    # As `b2sum -l 64` says it: workers of different versions compare theirs.
    assert digest_of("checkout/max_items", 41) == 0x502986F9D4C2A77F


def test_the_digest_does_not_depend_on_values_nor_on_the_snapshot_s_revision() -> None:
    assert held({"a": (1, 4)}, revision=5).digest == held({"a": ("x", 4)}, revision=6).digest
    assert held({"a": (1, 4)}).digest != held({"a": (1, 5)}).digest
    assert held({"a": (1, 4)}).digest != held({"b": (1, 4)}).digest


@given(
    st.dictionaries(KEYS, st.tuples(st.integers(), st.integers(1, 50))),
    REJECTIONS,
    st.lists(st.tuples(CHANGES, REJECTIONS), max_size=6),
    st.integers(0, 6),
)
def test_the_digest_carried_from_change_to_change_is_the_one_computed_from_scratch(
    entries: dict[str, tuple[Any, int]],
    rejected: dict[str, Rejection],
    steps: list[tuple[dict[str, tuple[Any, int] | Missing], dict[str, Rejection]]],
    asked_at: int,
) -> None:
    snapshot = held(entries, rejected=rejected, incarnation="i", origin="memory", proof=Proof(3.0))
    for revision, (changes, rejections) in enumerate(steps, start=100):
        if revision - 100 >= asked_at:
            assert snapshot.digest == by_the_book(snapshot)
        after = snapshot._succeeded(changes, revision=revision, rejected=rejections)
        assert (after.revision, after.incarnation, after.origin) == (revision, "i", "memory")
        assert dict(after.rejected) == rejections
        for key, change in changes.items():
            assert after._entries.item(key) == (None if isinstance(change, Missing) else (key, *change))
        assert {key: snapshot._entries.item(key) for key in snapshot if key not in changes} == {
            key: after._entries.item(key) for key in after if key not in changes
        }
        snapshot = after
    assert snapshot.digest == by_the_book(snapshot)
    assert snapshot.digest == snapshot.digest


def test_a_digest_that_was_asked_for_is_carried_and_not_computed_anew() -> None:
    snapshot = held({f"k{number}": (1, 1) for number in range(10)})
    assert snapshot._succeeded({"a": (1, 2)}, revision=2, rejected={})._digest is None
    before = snapshot.digest
    after = snapshot._succeeded({"a": (1, 2)}, revision=2, rejected={})
    assert after._digest == (before + digest_of("a", 2)) % 2**64


def test_the_age_of_a_replaced_snapshot_stays_its_own() -> None:
    first = held({}, proof=Proof(1.0))
    second = first._succeeded({}, revision=2, rejected={})
    assert second._proof.at_s == 1.0
    second._proof.at_s = 2.0
    assert first._proof.at_s == 1.0
