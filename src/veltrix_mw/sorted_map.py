"""A persistent, sorted map from key to (value, mod_revision).

Owns the shape of the tree and nothing else: an update copies one path and shares the rest, so a change costs
the same at 10^3 and at 10^6 keys, and a range costs its own size. Sorted, because sections, layers and
prefixes are ranges. Knows nothing of revisions' meaning, of views or of stores.

Three levels of fixed depth: a root of branches, a branch of leaves, a leaf of up to `_LEAF` keys with their
values and revisions in parallel arrays (24 bytes an entry, where a dict takes 42 and an entry object 80 more).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from veltrix_mw.values import MISSING, Missing

__all__ = ["Item", "SortedMap"]

_LEAF: Final = 128  # keys a leaf: a change copies at most this many pointers three times, about a microsecond
_BRANCH: Final = 128  # leaves a branch: 10^6 keys make some 110 branches

Item = tuple[str, Any, int]
"""(key, value, mod_revision)"""


class _Leaf(NamedTuple):
    keys: tuple[str, ...]
    values: tuple[Any, ...]
    revisions: array[int]


class _Branch(NamedTuple):
    mins: tuple[str, ...]  # the first key of each leaf
    leaves: tuple[_Leaf, ...]


def _leaf(items: list[Item]) -> _Leaf:
    keys, values, revisions = zip(*items, strict=True)
    return _Leaf(keys, values, array("q", revisions))


def _branch(leaves: Iterable[_Leaf]) -> _Branch:
    leaves = tuple(leaves)
    return _Branch(tuple(leaf.keys[0] for leaf in leaves), leaves)


class SortedMap:
    """An immutable sorted map; `updated` gives a new one that shares what did not change.

    Safe to read from any number of threads, as nothing in it is ever changed.
    """

    __slots__ = ("_branches", "_len", "_mins")

    def __init__(
        self, branches: tuple[_Branch, ...] = (), length: int = 0, *, mins: tuple[str, ...] | None = None
    ) -> None:
        self._branches = branches
        self._mins = tuple(branch.mins[0] for branch in branches) if mins is None else mins
        self._len = length

    @classmethod
    def from_sorted(cls, items: Iterable[Item]) -> SortedMap:
        """Build from items in ascending order of key, each key once. Three quarters full, so that updates fit."""
        items = items if isinstance(items, list) else list(items)
        fill = _LEAF * 3 // 4
        leaves = [_leaf(items[start : start + fill]) for start in range(0, len(items), fill)]
        fill = _BRANCH * 3 // 4
        branches = tuple(_branch(leaves[start : start + fill]) for start in range(0, len(leaves), fill))
        return cls(branches, len(items))

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[str]:
        for branch in self._branches:
            for leaf in branch.leaves:
                yield from leaf.keys

    def items(self) -> Iterator[Item]:
        """All items, in ascending order of key."""
        for branch in self._branches:
            for leaf in branch.leaves:
                yield from zip(*leaf, strict=True)

    def _locate(self, key: str) -> tuple[_Leaf, int] | None:
        if not self._branches:
            return None
        # A key below the first one wraps to the last leaf, where it is not found: no test needed.
        branch = self._branches[bisect_right(self._mins, key) - 1]
        leaf = branch.leaves[bisect_right(branch.mins, key) - 1]
        at = bisect_left(leaf.keys, key)
        if at < len(leaf.keys) and leaf.keys[at] == key:
            return leaf, at
        return None

    def get(self, key: str) -> Any | Missing:
        """The value of `key`, or `MISSING`."""
        found = self._locate(key)
        return MISSING if found is None else found[0].values[found[1]]

    def item(self, key: str) -> Item | None:
        """The item of `key`, or None."""
        found = self._locate(key)
        return None if found is None else (key, found[0].values[found[1]], found[0].revisions[found[1]])

    def below(self, prefix: str) -> Iterator[Item]:
        """The items whose key begins with `prefix`, ascending; costs their number."""
        if not self._branches:
            return
        first = max(bisect_right(self._mins, prefix) - 1, 0)
        for branch in self._branches[first:]:
            start = max(bisect_right(branch.mins, prefix) - 1, 0)
            for leaf in branch.leaves[start:]:
                keys, values, revisions = leaf
                for at in range(bisect_left(keys, prefix), len(keys)):
                    key = keys[at]
                    if not key.startswith(prefix):
                        return
                    yield key, values[at], revisions[at]

    def updated(self, changes: Mapping[str, tuple[Any, int] | Missing]) -> SortedMap:
        """A new map with each key of `changes` set to its (value, mod_revision), or removed for `MISSING`."""
        if not changes:
            return self
        if len(changes) * 8 > self._len:
            return self._merged(changes)
        branches = list(self._branches)
        mins = list(self._mins)
        length = self._len
        for key in sorted(changes):  # an eighth of the keys at most, so some branch is always left
            at = max(bisect_right(mins, key) - 1, 0)
            replaced, grown = _branch_with(branches[at], key, changes[key])
            branches[at : at + 1] = replaced
            mins[at : at + 1] = [branch.mins[0] for branch in replaced]
            length += grown
        return SortedMap(tuple(branches), length, mins=tuple(mins))

    def _merged(self, changes: Mapping[str, tuple[Any, int] | Missing]) -> SortedMap:
        """The same by rebuilding all: cheaper when much of the map changes."""
        merged: dict[str, tuple[Any, int]] = {key: (value, revision) for key, value, revision in self.items()}
        for key, change in changes.items():
            if isinstance(change, Missing):
                merged.pop(key, None)
            else:
                merged[key] = change
        return SortedMap.from_sorted([(key, *merged[key]) for key in sorted(merged)])


def _branch_with(branch: _Branch, key: str, change: tuple[Any, int] | Missing) -> tuple[list[_Branch], int]:
    """The branches that take this one's place (none, one, or two after a split), and by how much it grew."""
    at = max(bisect_right(branch.mins, key) - 1, 0)
    old = branch.leaves[at]
    replaced, grown = _leaf_with(old, key, change)
    if len(replaced) == 1 and grown >= 0 and replaced[0].keys[0] is old.keys[0]:
        # Most changes: no boundary moves, and to share `mins` spares looking at every leaf of the branch.
        return [_Branch(branch.mins, (*branch.leaves[:at], replaced[0], *branch.leaves[at + 1 :]))], grown
    leaves = [*branch.leaves[:at], *replaced, *branch.leaves[at + 1 :]]
    if len(replaced) == 1 and grown < 0 and len(leaves) > 1:
        _join_small(leaves, at)
    if not leaves:
        return [], grown
    if len(leaves) <= _BRANCH:
        return [_branch(leaves)], grown
    half = len(leaves) // 2
    return [_branch(leaves[:half]), _branch(leaves[half:])], grown


def _join_small(leaves: list[_Leaf], at: int) -> None:
    """Join a leaf that shrank with its neighbour, so that deletions do not leave a trail of tiny leaves."""
    if len(leaves[at].keys) > _LEAF // 8:
        return
    left = at - 1 if at else 0
    one, two = leaves[left], leaves[left + 1]
    if len(one.keys) + len(two.keys) <= _LEAF * 3 // 4:
        leaves[left : left + 2] = [_Leaf(one.keys + two.keys, one.values + two.values, one.revisions + two.revisions)]


def _leaf_with(leaf: _Leaf, key: str, change: tuple[Any, int] | Missing) -> tuple[list[_Leaf], int]:
    """The leaves that take this one's place (none, one, or two after a split), and by how much it grew."""
    keys, values, revisions = leaf
    at = bisect_left(keys, key)
    held = at < len(keys) and keys[at] == key
    if isinstance(change, Missing):
        if not held:
            return [leaf], 0
        if len(keys) == 1:
            return [], -1
        return [
            _Leaf(
                keys[:at] + keys[at + 1 :],
                values[:at] + values[at + 1 :],
                revisions[:at] + revisions[at + 1 :],
            )
        ], -1
    value, revision = change
    after = at + 1 if held else at
    revisions = revisions[:at] + array("q", (revision,)) + revisions[after:]
    values = (*values[:at], value, *values[after:])
    if held:
        return [_Leaf(keys, values, revisions)], 0
    keys = (*keys[:at], key, *keys[at:])
    if len(keys) <= _LEAF:
        return [_Leaf(keys, values, revisions)], 1
    half = len(keys) // 2
    return [
        _Leaf(keys[:half], values[:half], revisions[:half]),
        _Leaf(keys[half:], values[half:], revisions[half:]),
    ], 1
