"""Status: how a process's configuration is, for people and for health checks.

Owns the shape of the answer; the client fills it in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from veltrix_mw.snapshot import Rejection

if TYPE_CHECKING:
    from veltrix_mw.protocols import StoreInfo

__all__ = ["LazyStatus", "Status", "TierStatus", "unwritten"]


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One store as this process sees it.

    `role` is `authority` or `mirror`. `state` of the tier that is followed is `following`, `listing`, `waiting` (after
    a failure) or `stopped`; of the other it is `standby` (well, as far as is known), and of a mirror that is not
    followed also `unreachable`, `stale` (nobody feeds it), `behind`, `empty`, or `uncovered` (it leaves out what this
    process reads). `revision` is what it is known to hold: of an authority that is not followed at least this, as the
    mirror shows it; 0 where nothing is known. `lag` is the revisions it is known to be behind, 0 also where that is not
    known; `error` the last failure, empty if none; `url` holds no secret.
    """

    name: str
    role: str
    url: str
    state: str
    revision: int
    lag: int
    error: str


@dataclass(frozen=True, slots=True)
class LazyStatus:
    """What this process's requests wanted of lazy units, what that asked of the stores, and what is held.

    `fetches` counts loads, by `view.fetch*` and by middlewares, each of one unit or more: `hit` all were held,
    `coalesced` others had them read already, `miss` at least one was read for it, `absent` the same, and there was no
    entry, `error` one could not be had.
    `units_read` counts units, whether they are there or absent: those found in the `mirror`, those asked of the
    `authority` by this process itself, and those `wanted` of the relay, as the mirror lacked them. `filled` are the
    units that it read from the authority as the relay, for all workers. All of these only grow; a forked child goes
    on from its parent's. `held` is how many units are held, absent ones too, and `bytes` what they take, of at most
    `max_bytes`.
    """

    fetches: Mapping[str, int]
    units_read: Mapping[str, int]
    filled: int
    held: int
    bytes: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Status:
    """How this process's configuration is: what it serves, how old that is, and how each tier does.

    `relay` is the instance that feeds the mirror, None if there is none: `relay_missing` says why (empty without a
    mirror). `unwritten` says so where nothing was ever written to the namespace, which a name that is spelled wrongly
    looks like; else it is empty. `lazy` is None where no prefix is lazy.
    """

    ready: bool
    revision: int
    incarnation: str
    origin: str
    age_s: float
    stale: bool
    rejected: Mapping[str, Rejection]
    relay: str | None
    tiers: tuple[TierStatus, ...]
    relay_missing: str = ""
    unwritten: str = ""
    lazy: LazyStatus | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON can carry it, for a page of the app's own; an age that is not known is None."""
        return {
            "ready": self.ready,
            "revision": self.revision,
            "incarnation": self.incarnation,
            "origin": self.origin,
            "age_s": self.age_s if math.isfinite(self.age_s) else None,
            "stale": self.stale,
            "rejected": {key: asdict(why) for key, why in self.rejected.items()},
            "relay": self.relay,
            "relay_missing": self.relay_missing,
            "unwritten": self.unwritten,
            "tiers": [asdict(tier) for tier in self.tiers],
            "lazy": None if self.lazy is None else asdict(self.lazy),
        }


def unwritten(info: StoreInfo) -> str:
    """What to tell of a namespace that nothing was ever written to."""
    return (
        f"nothing was ever written to the namespace {info.namespace!r} at {info.url}: check the namespace; the first "
        "write creates it"
    )
