"""The sorted map: against a dict, its shape, and what an update shares."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from veltrix_mw import sorted_map
from veltrix_mw.sorted_map import SortedMap
from veltrix_mw.values import MISSING, Missing

Changes = dict[str, tuple[Any, int] | Missing]


def made(count: int) -> SortedMap:
    return SortedMap.from_sorted([(f"k{number:07}", number, number) for number in range(count)])


def leaves(tree: SortedMap) -> Iterator[Any]:
    for branch in tree._branches:
        yield from branch.leaves


def check_shape(tree: SortedMap) -> None:
    """What every method relies upon."""
    assert tree._mins == tuple(branch.mins[0] for branch in tree._branches)
    keys: list[str] = []
    for branch in tree._branches:
        assert 1 <= len(branch.leaves) <= sorted_map._BRANCH
        assert branch.mins == tuple(leaf.keys[0] for leaf in branch.leaves)
        for leaf in branch.leaves:
            assert 1 <= len(leaf.keys) <= sorted_map._LEAF
            assert len(leaf.keys) == len(leaf.values) == len(leaf.revisions)
            assert isinstance(leaf.revisions, array)
            keys.extend(leaf.keys)
    assert keys == sorted(set(keys))
    assert len(keys) == len(tree)


def applied(model: dict[str, tuple[Any, int]], changes: Changes) -> dict[str, tuple[Any, int]]:
    after = dict(model)
    for key, change in changes.items():
        if isinstance(change, Missing):
            after.pop(key, None)
        else:
            after[key] = change
    return after


KEYS = st.text(alphabet="ab/", max_size=4) | st.integers(0, 400).map(lambda number: f"n/{number:03}")
CHANGE = st.one_of(st.just(MISSING), st.tuples(st.one_of(st.none(), st.integers(0, 3)), st.integers(1, 2**62)))


class Against(RuleBasedStateMachine):
    """A map with tiny leaves and branches does what a dict does, and every earlier map stays as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(sorted_map, "_LEAF", 16)
        self.patch.setattr(sorted_map, "_BRANCH", 4)
        self.tree = SortedMap()
        self.model: dict[str, tuple[Any, int]] = {}
        self.kept: list[tuple[SortedMap, dict[str, tuple[Any, int]]]] = []

    def teardown(self) -> None:
        self.patch.undo()

    def apply(self, changes: Changes) -> None:
        if len(self.kept) < 10:
            self.kept.append((self.tree, self.model))
        self.tree = self.tree.updated(changes)
        self.model = applied(self.model, changes)

    @initialize(count=st.sampled_from([0, 1, 12, 13, 200, 400]))
    def begin(self, count: int) -> None:
        self.tree = SortedMap.from_sorted((f"n/{number:03}", number, number) for number in range(count))
        self.model = {f"n/{number:03}": (number, number) for number in range(count)}

    @rule(key=KEYS, change=CHANGE)
    def one_key(self, key: str, change: Any) -> None:
        self.apply({key: change})

    @rule(changes=st.dictionaries(KEYS, CHANGE, max_size=20))
    def some_keys(self, changes: Changes) -> None:
        self.apply(changes)

    @rule(changes=st.dictionaries(KEYS, CHANGE, min_size=100, max_size=200))
    def many_keys(self, changes: Changes) -> None:
        self.apply(changes)

    @rule(start=st.integers(0, 400), count=st.integers(1, 60), step=st.sampled_from([1, 2, 5]))
    def remove_a_run_one_by_one(self, start: int, count: int, step: int) -> None:
        for number in range(start, start + count * step, step):
            self.apply({f"n/{number:03}": MISSING})

    @rule(start=st.integers(0, 400), count=st.integers(1, 60))
    def add_a_run_one_by_one(self, start: int, count: int) -> None:
        for number in range(start, start + count):
            self.apply({f"n/{number:03}": (number, number + 1)})

    @rule(bulk=st.booleans())
    def remove_all(self, bulk: bool) -> None:
        if bulk:
            self.apply(dict.fromkeys(self.model, MISSING))
        else:
            for key in list(self.model):
                self.apply({key: MISSING})
        assert len(self.tree) == 0
        assert list(self.tree) == []

    @rule(prefix=st.one_of(KEYS, st.sampled_from(["", "n/", "n/1", "z", "\U0010ffff"])))
    def below(self, prefix: str) -> None:
        wanted = [(key, *self.model[key]) for key in sorted(self.model) if key.startswith(prefix)]
        assert list(self.tree.below(prefix)) == wanted

    @rule(key=KEYS)
    def look_up(self, key: str) -> None:
        if key in self.model:
            assert self.tree.get(key) == self.model[key][0]
            assert self.tree.item(key) == (key, *self.model[key])
        else:
            assert self.tree.get(key) is MISSING
            assert self.tree.item(key) is None

    @invariant()
    def holds_what_the_dict_holds(self) -> None:
        check_shape(self.tree)
        assert list(self.tree.items()) == [(key, *self.model[key]) for key in sorted(self.model)]
        assert list(self.tree) == sorted(self.model)

    @invariant()
    def earlier_maps_stay_as_they_were(self) -> None:
        for tree, model in self.kept:
            assert {key: (value, revision) for key, value, revision in tree.items()} == model


TestAgainstADict = Against.TestCase
TestAgainstADict.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def test_an_empty_map_holds_nothing() -> None:
    for tree in (SortedMap(), SortedMap.from_sorted([]), made(1).updated({"k0000000": MISSING})):
        check_shape(tree)
        assert (len(tree), list(tree), list(tree.items()), list(tree.below(""))) == (0, [], [], [])
        assert tree.get("a") is MISSING
        assert tree.item("a") is None
        assert list(tree.updated({"a": (1, 2)}).items()) == [("a", 1, 2)]


def test_an_update_without_changes_is_the_map_itself() -> None:
    tree = made(10)
    assert tree.updated({}) is tree


@pytest.mark.parametrize("key", ["k0050000", "k0050000/new", "a", "z"])
def test_a_change_of_a_large_map_makes_one_new_leaf_and_shares_the_others(key: str) -> None:
    tree = made(100_000)
    known = {id(leaf) for leaf in leaves(tree)}
    branches = {id(branch) for branch in tree._branches}
    for changes in ({key: ("new", 7)}, {key: MISSING}):
        after = tree.updated(changes)  # type: ignore[arg-type]
        assert sum(id(leaf) not in known for leaf in leaves(after)) <= 1
        assert sum(id(branch) not in branches for branch in after._branches) <= 1
        assert after.get(key) == ("new" if changes[key] is not MISSING else MISSING)


def test_ten_changes_far_apart_make_ten_new_leaves() -> None:
    tree = made(100_000)
    known = {id(leaf) for leaf in leaves(tree)}
    after = tree.updated({f"k{number:07}": ("new", 1) for number in range(0, 100_000, 10_000)})
    assert sum(id(leaf) not in known for leaf in leaves(after)) == 10
    assert len(after) == 100_000


def test_a_look_up_and_a_range_touch_only_their_own_leaves() -> None:
    """Ranges cost their own size: what lies beside them is poisoned and not noticed."""
    tree = made(100_000)
    wanted = [item for item in tree.items() if item[0].startswith("k005000")]

    class Poison(str):
        __slots__ = ()

        def startswith(self, *_: Any) -> bool:
            raise AssertionError("a key outside of the range was looked at")

    def poisoned(leaf: Any) -> Any:
        if leaf.keys[0] < "k0050100" and leaf.keys[-1] > "k0049900":
            return leaf
        return leaf._replace(keys=tuple(Poison(key) for key in leaf.keys))

    others = tuple(branch._replace(leaves=tuple(poisoned(leaf) for leaf in branch.leaves)) for branch in tree._branches)
    assert list(SortedMap(others, len(tree)).below("k005000")) == wanted
    assert len(wanted) == 10


def test_deleting_most_keys_one_by_one_does_not_leave_a_trail_of_tiny_leaves() -> None:
    tree = made(50_000)
    gone = [f"k{number:07}" for number in range(50_000) if number % 100]
    random.Random(7).shuffle(gone)
    for key in gone:
        tree = tree.updated({key: MISSING})
    check_shape(tree)
    assert len(tree) == 500
    # Each of the 261 leaves there were keeps 2 keys if none are joined; a leaf of more than 32 is left alone.
    assert sum(1 for _ in leaves(tree)) <= 65


def test_keys_added_in_order_leave_no_leaf_less_than_half_full() -> None:
    tree = SortedMap()
    for number in range(3000):
        tree = tree.updated({f"k{number:07}": (number, number)})
    check_shape(tree)
    assert min(len(leaf.keys) for leaf in leaves(tree)) >= sorted_map._LEAF // 2


def test_a_revision_of_63_bits_is_kept() -> None:
    tree = made(20).updated({"a": (None, 2**63 - 1)})
    assert tree.item("a") == ("a", None, 2**63 - 1)


def test_keys_sort_by_code_point_as_stores_sort_them_by_byte() -> None:
    keys = ["a", "a-b", "a.b", "a/b", "a0", "aA", "a_b", "aa", "a~"]
    tree = SortedMap().updated(dict.fromkeys(reversed(keys), (1, 1)))
    assert list(tree) == sorted(keys, key=str.encode)
    assert [item[0] for item in tree.below("a/")] == ["a/b"]
