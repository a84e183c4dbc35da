"""Status: how a process's configuration is, for people and for health checks.

Owns the shape of the answer; the client fills it in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from veltrix_mw.snapshot import Rejection

__all__ = ["Status", "TierStatus"]


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One store as this process sees it.

    `role` is `authority`; `state` `following`, `listing`, `waiting` (after a failure), `stopped`; `lag` the
    revisions it is known to be behind; `error` the last failure, empty if none; `url` holds no secret.
    """

    name: str
    role: str
    url: str
    state: str
    revision: int
    lag: int
    error: str


@dataclass(frozen=True, slots=True)
class Status:
    """How this process's configuration is: what it serves, how old that is, and how each tier does."""

    ready: bool
    revision: int
    incarnation: str
    origin: str
    age_s: float
    stale: bool
    rejected: Mapping[str, Rejection]
    relay: str | None
    tiers: tuple[TierStatus, ...]

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
            "tiers": [asdict(tier) for tier in self.tiers],
        }
