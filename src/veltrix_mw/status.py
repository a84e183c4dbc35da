"""Status: how a process's configuration is, for people and for health checks.

Owns the shape of the answer; the client fills it in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
