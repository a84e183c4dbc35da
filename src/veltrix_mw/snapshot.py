"""The snapshot: every eager entry of a namespace at one revision, frozen.

Owns what a snapshot holds and its digest; knows nothing of how one is followed, pinned or stored.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from veltrix_mw.errors import HeldBack, KeyMissing
from veltrix_mw.sorted_map import Item, SortedMap
from veltrix_mw.values import MISSING, FrozenDict, Missing

__all__ = ["Change", "Entry", "Proof", "Rejection", "Snapshot", "Version"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value and the revision that wrote it.

    `value` is frozen (`MISSING` where the key is absent, and then `mod_revision` is 0).
    """

    value: Any
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one key from one snapshot to the next: `old` and `new` are entries, `MISSING` if absent."""

    key: str
    old: Entry | Missing
    new: Entry | Missing


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why the authority's newest state of a key is not served: `revision` wrote it, `reason` says what is wrong.

    `deleted`: the revision that was held back would have removed the key. A reason never holds a value.
    """

    revision: int
    reason: str
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a key, as its history keeps it.

    `value` is frozen, or `MISSING` where the key was deleted; a stored text
    that does not decode is `MISSING` too, and `invalid` says why. `time_s` is Unix time in seconds.
    """

    key: str
    value: Any
    revision: int
    author: str = ""
    reason: str = ""
    time_s: float = 0.0
    deleted: bool = False
    invalid: str = ""


class Proof:
    """When a snapshot was last proved to be current, on the monotonic clock.

    Written by the follower alone; a snapshot that was replaced keeps the last proof it had, so that the age of a
    pinned view goes on ticking.
    """

    __slots__ = ("at_s",)

    def __init__(self, at_s: float = -math.inf) -> None:
        self.at_s: float = at_s


_DIGEST_MOD: Final = 1 << 64


class _Rejections(FrozenDict):
    """The rejections of a snapshot, frozen: later snapshots that reject the same share it.

    Whoever compares two snapshots' rejections may begin with `is`.
    """

    __slots__ = ("_ordered",)

    _ordered: tuple[str, ...] | None  # made when first asked for

    def __init__(self, rejected: Mapping[str, Rejection]) -> None:
        super().__init__(rejected)
        self._ordered = None

    def below(self, prefix: str) -> Iterator[tuple[str, Rejection]]:
        """Those of the keys that begin with `prefix`, ascending; costs their number, but for the first time."""
        ordered = self._ordered
        if ordered is None:
            ordered = self._ordered = tuple(sorted(self))
        for at in range(bisect_left(ordered, prefix), len(ordered)):
            key = ordered[at]
            if not key.startswith(prefix):
                return
            yield key, self[key]


_NO_REJECTIONS: Final = _Rejections({})


class Snapshot(Mapping[str, Any]):
    """Every eager entry of a namespace at one revision: a mapping from key to frozen value.

    Immutable: nothing that is reachable from it ever changes, but for the proof that tells its age.
    """

    __slots__ = ("_digest", "_entries", "_incarnation", "_origin", "_proof", "_rejected", "_revision")

    def __init__(
        self,
        entries: SortedMap | None = None,
        *,
        revision: int = 0,
        incarnation: str = "",
        origin: str = "none",
        rejected: Mapping[str, Rejection] = _NO_REJECTIONS,
        proof: Proof | None = None,
        digest: int | None = None,
    ) -> None:
        self._entries = SortedMap() if entries is None else entries
        self._revision = revision
        self._incarnation = incarnation
        self._origin = origin
        self._rejected: _Rejections
        if isinstance(rejected, _Rejections):
            self._rejected = rejected
        else:
            self._rejected = _Rejections(rejected) if rejected else _NO_REJECTIONS
        self._proof = Proof() if proof is None else proof
        self._digest = digest

    @property
    def revision(self) -> int:
        """The revision this snapshot is at; 0 before anything was listed."""
        return self._revision

    @property
    def incarnation(self) -> str:
        """The label of the authority's history that the revision belongs to."""
        return self._incarnation

    @property
    def origin(self) -> str:
        """The tier it came from: `etcd`, `redis`, `sqlite`, `memory`, `disk` (last-known-good) or `none`."""
        return self._origin

    @property
    def rejected(self) -> Mapping[str, Rejection]:
        """The keys whose newest state was rejected; they serve their last good value, or none.

        The same object from snapshot to snapshot while nothing of it changes.
        """
        return self._rejected

    @property
    def digest(self) -> int:
        """The sum modulo 2^64 of `digest_of` over the authority's entries, accepted or not.

        Equal digests at one revision mean equal keyspaces. Computed when first asked for (about a microsecond
        an entry), then carried from change to change.
        """
        if self._digest is None:
            from veltrix_mw.digest import digest_of

            total = sum(
                digest_of(key, revision) for key, _, revision in self._entries.items() if key not in self._rejected
            )
            total += sum(digest_of(key, held.revision) for key, held in self._rejected.items() if not held.deleted)
            self._digest = total % _DIGEST_MOD
        return self._digest

    def entry(self, key: str) -> Entry:
        """The entry of `key`; raises `KeyMissing`, or `HeldBack` when only a rejected value is known."""
        item = self._entries.item(key) if isinstance(key, str) else None
        if item is None:
            raise self._missing(key)
        return Entry(item[1], item[2])

    def __getitem__(self, key: str) -> Any:
        value = self._entries.get(key) if isinstance(key, str) else MISSING
        if value is MISSING:
            raise self._missing(key)
        return value

    def get(self, key: str, /, default: Any = None) -> Any:
        """The value of `key`, or `default` when it is absent; raises `HeldBack` when only a rejected one is known."""
        try:
            return self[key]
        except HeldBack:
            raise  # a KeyError too, but a key that is held back does not look absent
        except KeyMissing:
            return default

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        if self._entries.item(key) is not None:
            return True
        missing = self._missing(key)
        if isinstance(missing, HeldBack):
            raise missing  # a key that is held back does not look absent
        return False

    def __repr__(self) -> str:
        held = f", {len(self._rejected)} held back" if self._rejected else ""
        return f"<Snapshot revision={self._revision} origin={self._origin} entries={len(self._entries)}{held}>"

    def below(self, prefix: str) -> Iterator[Item]:
        """(key, value, mod_revision) of the keys that begin with `prefix`, ascending; costs their number."""
        return self._entries.below(prefix)

    def _missing(self, key: str) -> KeyMissing:
        held = self._rejected.get(key)
        if held is not None and not held.deleted:
            return HeldBack(f"{key!r} is held back: revision {held.revision} was rejected ({held.reason})")
        return KeyMissing(f"there is no key {key!r} at revision {self._revision}")

    def _succeeded(
        self,
        changes: Mapping[str, tuple[Any, int] | Missing],
        *,
        revision: int,
        rejected: Mapping[str, Rejection],
        served: SortedMap | None = None,
        origin: str = "",
    ) -> Snapshot:
        """The next snapshot: `changes` to what is served (`served`, if that was made already), and the
        rejections that hold from now on; `origin` where the tier is another one."""
        following = Snapshot(
            self._entries.updated(changes) if served is None else served,
            revision=revision,
            incarnation=self._incarnation,
            origin=origin or self._origin,
            rejected=rejected,
            proof=Proof(self._proof.at_s),
        )
        if self._digest is not None:
            moved = set(changes)
            before, after = self._rejected, following._rejected
            if before is not after:
                moved.update(key for key, why in after.items() if before.get(key) is not why)
                moved.update(key for key in before if key not in after)
            gone = sum(self._share(key) for key in moved)
            following._digest = (self._digest - gone + sum(following._share(key) for key in moved)) % _DIGEST_MOD
        return following

    def _share(self, key: str) -> int:
        from veltrix_mw.digest import digest_of  # whoever follows has loaded it

        held = self._rejected.get(key)
        if held is not None:
            return 0 if held.deleted else digest_of(key, held.revision)
        item = self._entries.item(key)
        return 0 if item is None else digest_of(key, item[2])
