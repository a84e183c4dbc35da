"""The keyspace: what is served, what is held back, and when that ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veltrix_mw.digest import digest_of
from veltrix_mw.errors import HeldBack, InvalidValue, KeyMissing
from veltrix_mw.keyspace import Keyspace
from veltrix_mw.protocols import Batch, ChangeRecord, Listing, Position, RawChange, RawVersion
from veltrix_mw.validation import Schemas
from veltrix_mw.values import MISSING


@dataclass(frozen=True)
class Pay:
    currency: str
    limit: int
    retries: int = 3


def raw(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def listing(entries: dict[str, tuple[Any, int]], revision: int, incarnation: str = "one") -> Listing:
    items = [(key, raw(entries[key][0]), entries[key][1]) for key in sorted(entries)]
    return Listing(Position(incarnation, revision), items)


def batch(revision: int, **changes: Any) -> Batch:
    named = {key.replace("__", "/"): value for key, value in changes.items()}
    return batch_of(revision, named)


def batch_of(revision: int, changes: dict[str, Any]) -> Batch:
    made = tuple(RawChange(key, MISSING if value is MISSING else raw(value)) for key, value in changes.items())
    return Batch(Position("one", revision), revision - 1, made)


def keyspace(schemas: dict[str, Any] | None = None, **options: Any) -> Keyspace:
    return Keyspace(Schemas(schemas or {}), **options)


def restored(space: Keyspace, entries: dict[str, tuple[Any, int]], revision: int, incarnation: str = "one") -> Keyspace:
    space.restore(listing(entries, revision, incarnation), incarnation=incarnation, origin="memory", proved_at_s=0)
    return space


def authority_digest(entries: dict[str, int]) -> int:
    return sum(digest_of(key, revision) for key, revision in entries.items()) % (1 << 64)


def test_a_listing_is_taken_whole_and_a_batch_is_one_swap() -> None:
    space = restored(keyspace(), {"a": (1, 1), "b": (2, 2)}, 2)
    first = space.snapshot
    assert dict(first) == {"a": 1, "b": 2}
    assert space.apply(batch(3, a=5, b=MISSING, c=7)) == {"a", "b", "c"}
    assert dict(first) == {"a": 1, "b": 2}
    assert dict(space.snapshot) == {"a": 5, "c": 7}
    assert space.snapshot.revision == 3
    assert space.snapshot.entry("a").mod_revision == 3
    assert space.snapshot.digest == authority_digest({"a": 3, "c": 3})


def test_a_revision_with_a_value_that_is_not_json_is_held_back_whole() -> None:
    space = restored(keyspace(), {"a": (1, 1), "b": (2, 1), "gone": (3, 1)}, 1)
    assert space.apply(batch(2, a=b"not json", b=20, gone=MISSING)) == set()
    snapshot = space.snapshot
    assert dict(snapshot) == {"a": 1, "b": 2, "gone": 3}
    assert snapshot.revision == 2
    assert set(snapshot.rejected) == {"a", "b", "gone"}
    assert "not JSON" in snapshot.rejected["a"].reason
    assert "'a'" in snapshot.rejected["b"].reason
    assert snapshot.rejected["gone"].deleted
    assert snapshot.entry("a").mod_revision == 1
    assert snapshot.rejected["a"].revision == 2
    assert snapshot.digest == authority_digest({"a": 2, "b": 2})
    assert space.entry_count == 2


def test_a_later_good_change_of_the_culprit_releases_what_was_held_back_with_it() -> None:
    space = restored(keyspace(), {"a": (1, 1), "b": (2, 1), "gone": (3, 1)}, 1)
    space.apply(batch(2, a=b"{", b=20, gone=MISSING))
    assert space.apply(batch(3, a=10)) == {"a", "b", "gone"}
    assert dict(space.snapshot) == {"a": 10, "b": 20}
    assert not space.snapshot.rejected
    assert space.snapshot.entry("b").mod_revision == 2
    assert space.snapshot.digest == authority_digest({"a": 3, "b": 2})


def test_a_change_of_an_innocent_key_ends_its_own_rejection_alone() -> None:
    space = restored(keyspace(), {"a": (1, 1), "b": (2, 1), "c": (3, 1)}, 1)
    space.apply(batch(2, a=b"{", b=20, c=30))
    assert space.apply(batch(3, b=21)) == {"b"}
    assert dict(space.snapshot) == {"a": 1, "b": 21, "c": 3}
    assert set(space.snapshot.rejected) == {"a", "c"}


def test_deleting_the_culprit_ends_the_rejection() -> None:
    space = restored(keyspace(), {"a": (1, 1)}, 1)
    space.apply(batch(2, a=b"{"))
    space.apply(batch(3, a=MISSING))
    assert dict(space.snapshot) == {}
    assert not space.snapshot.rejected
    assert space.snapshot.digest == 0


def test_a_revision_that_breaks_a_schema_is_held_back_and_later_ones_go_on() -> None:
    space = restored(keyspace({"pay/": Pay}), {"pay/currency": ("EUR", 1), "pay/limit": (5, 1), "x": (1, 1)}, 1)
    assert space.apply(batch(2, pay__limit="many", x=2)) == set()
    assert set(space.snapshot.rejected) == {"pay/limit", "x"}
    assert "pay/limit" in space.snapshot.rejected["x"].reason
    assert space.apply(batch(3, y=1)) == {"y"}
    assert space.apply(batch(4, pay__limit=7)) == {"pay/limit", "x"}
    assert dict(space.snapshot) == {"pay/currency": "EUR", "pay/limit": 7, "x": 2, "y": 1}


def test_a_section_may_be_completed_by_several_revisions() -> None:
    """Two required fields, written one after the other by someone without the schema."""
    space = restored(keyspace({"pay/": Pay}), {}, 0)
    assert space.apply(batch(1, pay__currency="EUR")) == set()
    assert "pay/currency" in space.snapshot.rejected
    assert space.apply(batch(2, pay__limit=5)) == {"pay/currency", "pay/limit"}
    assert not space.snapshot.rejected


def test_a_rejection_that_another_key_of_its_section_mends_is_lifted() -> None:
    schema = {
        "type": "object",
        "if": {"properties": {"mode": {"const": "strict"}}, "required": ["mode"]},
        "then": {"required": ["key"]},
    }
    space = restored(keyspace({"auth/": schema}), {"auth/mode": ("lax", 1)}, 1)
    space.apply(batch(2, auth__mode="strict"))
    assert space.snapshot["auth/mode"] == "lax"
    space.apply(batch(3, auth__key="k1"))
    assert dict(space.snapshot) == {"auth/mode": "strict", "auth/key": "k1"}
    assert not space.snapshot.rejected


def test_of_a_listing_only_the_failing_key_is_held_back() -> None:
    space = restored(keyspace({"pay/": Pay}), {"pay/currency": ("EUR", 1), "pay/limit": (5, 1)}, 1)
    restored(space, {"pay/currency": ("USD", 2), "pay/limit": ("x", 3), "junk": (b"oops", 4), "ok": (1, 5)}, 5)
    snapshot = space.snapshot
    assert dict(snapshot) == {"pay/currency": "USD", "pay/limit": 5, "ok": 1}
    assert set(snapshot.rejected) == {"pay/limit", "junk"}
    assert snapshot.digest == authority_digest({"pay/currency": 2, "pay/limit": 3, "junk": 4, "ok": 5})
    assert space.wanting == ("junk",)
    with pytest.raises(HeldBack, match="not JSON"):
        snapshot["junk"]
    with pytest.raises(KeyMissing):
        snapshot["absent"]


def test_of_a_listing_a_section_without_one_culprit_goes_back_whole() -> None:
    space = restored(keyspace({"pay/": Pay}), {"pay/currency": ("EUR", 1), "pay/limit": (5, 1), "x": (1, 1)}, 1)
    restored(space, {"pay/currency": ("USD", 2), "x": (2, 3)}, 3)
    snapshot = space.snapshot
    assert dict(snapshot) == {"pay/currency": "EUR", "pay/limit": 5, "x": 2}
    assert not snapshot.rejected["pay/currency"].deleted
    assert snapshot.rejected["pay/limit"].deleted
    assert snapshot.digest == authority_digest({"pay/currency": 2, "x": 3})
    assert space.entry_count == 2
    space.apply(batch(4, pay__limit=9))
    assert dict(space.snapshot) == {"pay/currency": "USD", "pay/limit": 9, "x": 2}
    assert not space.snapshot.rejected


def test_a_fresh_worker_without_a_good_value_says_held_back_until_history_knows_one() -> None:
    space = restored(keyspace({"n": int}), {"n": ("five", 4), "junk": (b"?", 5)}, 5)
    assert set(space.wanting) == {"n", "junk"}
    record = ChangeRecord()
    space.recover(
        {
            "n": [
                RawVersion("n", b'"five"', 4, record),
                RawVersion("n", b'"x"', 3, record),
                RawVersion("n", b"3", 2, record),
            ],
            "junk": [
                RawVersion("junk", b"?", 5, record),
                RawVersion("junk", MISSING, 3, record),
                RawVersion("junk", b"1", 1, record),
            ],
        }
    )
    assert dict(space.snapshot) == {"n": 3, "junk": 1}
    assert space.snapshot.entry("n").mod_revision == 2
    assert set(space.snapshot.rejected) == {"n", "junk"}
    assert space.snapshot.digest == authority_digest({"n": 4, "junk": 5})


def test_a_whole_section_is_recovered_as_of_one_past_revision() -> None:
    space = restored(keyspace({"pay/": Pay}), {"pay/currency": ("USD", 3)}, 5)
    assert space.wanting == ("pay/currency",)
    record = ChangeRecord()
    space.recover({"pay/currency": [RawVersion("pay/currency", b'"USD"', 3, record)]})
    assert space.wanting == ("pay/currency",)


def test_what_a_restart_loads_is_checked_against_the_schemas_of_today() -> None:
    space = keyspace({"n": int})
    space.load([("k", 1, 1), ("n", "five", 2)], revision=2, incarnation="one")
    assert dict(space.snapshot) == {"k": 1}
    assert set(space.snapshot.rejected) == {"n"}
    assert space.snapshot.origin == "disk"


def test_the_last_known_good_serves_for_what_a_listing_brings_wrong() -> None:
    space = keyspace({"n": int})
    space.load([("n", 5, 2)], revision=2, incarnation="one")
    restored(space, {"n": ("x", 3), "m": (1, 3)}, 3)
    assert dict(space.snapshot) == {"n": 5, "m": 1}


def test_a_listing_of_another_history_under_the_same_label_is_taken_by_its_values() -> None:
    """A revision that is known may be another one after a restore: its number proves nothing."""
    space = restored(keyspace(), {"a": ({"deep": [1]}, 1), "b": (1, 2), "c": ("x", 2)}, 2)
    restored(space, {"a": ({"deep": [2]}, 1), "b": (True, 2), "c": ("y", 2)}, 3)
    assert space.snapshot["a"] == {"deep": (2,)}
    assert space.snapshot["b"] is True
    assert space.snapshot["c"] == "y"


def test_values_are_shared_with_the_snapshot_before_where_nothing_changed() -> None:
    space = restored(keyspace(), {"a": ({"deep": [1]}, 1), "b": ({"deep": [1]}, 1)}, 1)
    before = space.snapshot
    restored(space, {"a": ({"deep": [1]}, 1), "b": ({"deep": [1]}, 2)}, 2)
    assert space.snapshot["a"] is before["a"]
    assert space.snapshot["b"] is not before["b"]
    restored(space, {"a": ({"deep": [2]}, 1)}, 2, incarnation="two")
    assert space.snapshot["a"] == {"deep": (2,)}


def test_a_keyspace_beyond_its_bounds_is_refused_and_the_last_one_stays() -> None:
    space = restored(keyspace(max_entries=2, max_bytes=100), {"a": (1, 1)}, 1)
    with pytest.raises(InvalidValue, match="3 entries, more than the 2"):
        restored(space, {"a": (1, 1), "b": (1, 1), "c": (1, 1)}, 2)
    with pytest.raises(InvalidValue, match="bytes"):
        restored(space, {"a": ("x" * 200, 1)}, 2)
    assert dict(space.snapshot) == {"a": 1}
    space.apply(batch(2, b=1, c=1))
    assert dict(space.snapshot) == {"a": 1}
    assert "more than 2 entries" in space.snapshot.rejected["b"].reason
    space.apply(batch(3, a=MISSING))
    assert dict(space.snapshot) == {}
    assert set(space.snapshot.rejected) == {"b", "c"}


def test_overlapping_schemas_all_hold() -> None:
    space = restored(keyspace({"p/": dict[str, int], "p/a": int}), {"p/a": (1, 1)}, 1)
    space.apply(batch(2, p__a="x"))
    space.apply(batch(3, p__b="x"))
    assert dict(space.snapshot) == {"p/a": 1}
    restored(space, {"p/a": ("x", 2), "p/b": (3, 4)}, 4)
    assert dict(space.snapshot) == {"p/a": 1, "p/b": 3}


VALUES = st.sampled_from([MISSING, 1, 2, "text", b"{not json"])
STEPS = st.lists(
    st.dictionaries(st.sampled_from(["n/a", "n/b", "m", "free"]), VALUES, min_size=1, max_size=3), max_size=12
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_a_worker_that_followed_and_one_that_lists_afresh_agree_on_all_that_is_good(
    steps: Sequence[dict[str, Any]],
) -> None:
    """Digest and count are the authority's throughout; when nothing is wrong any more, both serve the same."""
    schemas = {"n/": dict[str, int], "m": int}
    followed = restored(keyspace(schemas), {}, 0)
    state: dict[str, tuple[Any, int]] = {}
    for revision, changes in enumerate(steps, start=1):
        followed.apply(batch_of(revision, changes))
        for key, value in changes.items():
            if value is MISSING:
                state.pop(key, None)
            else:
                state[key] = (value, revision)
        snapshot = followed.snapshot
        assert snapshot.digest == authority_digest({key: at for key, (_, at) in state.items()})
        assert followed.entry_count == len(state)
        for key, (value, at) in state.items():
            if key not in snapshot.rejected:
                assert snapshot.entry(key).mod_revision == at
                assert snapshot[key] == value
        for key in snapshot:
            assert key in state or snapshot.rejected[key].deleted
        fresh = restored(keyspace(schemas), state, revision).snapshot
        assert fresh.digest == snapshot.digest
        if not fresh.rejected:
            assert not snapshot.rejected
            assert dict(snapshot) == dict(fresh) == {key: value for key, (value, _) in state.items()}


def test_the_rejections_stay_one_object_while_nothing_of_them_changes() -> None:
    space = restored(keyspace({"p/": dict[str, int]}), {"a": (1, 1), "bad": (b"{", 2), "p/x": ("text", 3)}, 5)
    rejected = space.snapshot.rejected
    assert set(rejected) == {"bad", "p/x"}
    for revision, key in enumerate(("a", "b", "c/d"), start=6):
        space.apply(batch_of(revision, {key: revision}))
        assert space.snapshot.rejected is rejected
    assert space.entry_count == 5
    restored(space, {"a": (6, 6), "b": (7, 7), "c/d": (8, 8), "bad": (b"{", 2), "p/x": ("text", 3)}, 9)
    assert space.snapshot.rejected is rejected
    space.apply(batch_of(10, {"bad": MISSING}))
    assert set(space.snapshot.rejected) == {"p/x"}
    assert space.entry_count == 4


def test_the_count_is_the_authority_s_also_after_history_gave_a_good_value() -> None:
    space = restored(keyspace(), {"a": (1, 1), "bad": (b"{", 2)}, 5)
    assert space.entry_count == 2
    space.recover({"bad": [RawVersion("bad", b"1", 1, ChangeRecord())]})
    assert space.snapshot["bad"] == 1
    assert space.entry_count == 2


def test_a_change_among_many_that_are_held_back_looks_at_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"bad/k{number:04}": ("text", 2) for number in range(2000)}
    space = restored(keyspace({"bad/": dict[str, int]}), {"a": (1, 1), **many}, 5)
    assert len(space.snapshot.rejected) == 2000
    digest, count = space.snapshot.digest, space.entry_count
    space.apply(batch_of(6, {"a": 2}))
    assert space.entry_count == count

    def walked(*_: Any) -> Any:
        raise AssertionError("it went through all that is held back")

    for name in ("items", "values", "__iter__", "keys"):
        monkeypatch.setattr(type(space.snapshot.rejected), name, walked, raising=False)
    space.apply(batch_of(7, {"a": 3, "b": 1}))
    assert space.entry_count == count + 1
    assert space.snapshot.digest != digest
    assert space.snapshot["a"] == 3
