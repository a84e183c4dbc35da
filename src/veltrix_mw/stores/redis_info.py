"""What Redis says of itself in INFO, and what is wrong with that.

Owns the verdicts on version, memory and persistence. Pure: knows no connection, nor who may ask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from veltrix_mw.findings import Said, fail, ok, warn

__all__ = ["info_of", "memory_said", "persistence_said", "version_said"]

_NEARLY_FULL: Final = 0.9  # of maxmemory
_OLDEST: Final[tuple[int, int]] = (5, 0)  # streams
_COMFORTABLE: Final[tuple[int, int]] = (7, 0)  # ACLs that grant reading alone


def info_of(reply: bytes) -> dict[str, str]:
    """A section of INFO, taken apart."""
    text = reply.decode("utf-8", "replace")
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))


def version_said(told: Mapping[str, str], *, scheme: str) -> Said:
    number = told.get("valkey_version") or told.get("redis_version", "")
    name = f"{'Valkey' if 'valkey_version' in told else 'Redis'} {number}"
    version = _parsed(told.get("redis_version", ""))
    if version < _OLDEST:
        return fail(f"{name} has no streams: take Redis 5 or newer, best 7")
    if told.get("redis_mode") == "cluster" and not scheme.endswith("+cluster"):
        return fail(f"{name} is a node of a Redis Cluster, which {scheme}:// does not follow")
    if version < _COMFORTABLE:
        return warn(f"{name} works, but cannot grant a user to read alone (%R~): take Redis 7 where you have users")
    return ok(name)


def memory_said(told: Mapping[str, str], *, spares_ours: bool) -> Said:
    """`spares_ours`: what may be evicted, where only keys with an end are, comes again."""
    used, most = int(told.get("used_memory", 0)), int(told.get("maxmemory", 0))
    policy = told.get("maxmemory_policy", "noeviction")
    mib = 1 << 20
    if not most:
        return warn(
            f"{used / mib:.1f} MiB used, without a maxmemory: it grows until its machine has no more; "
            "set maxmemory, with room to spare"
        )
    shown = f"{used / mib:.1f} of {most / mib:.1f} MiB used, {policy}"
    if policy != "noeviction" and not (spares_ours and policy.startswith("volatile-")):
        return warn(f"{shown}: it may evict keys of this namespace; set maxmemory-policy noeviction")
    if used >= _NEARLY_FULL * most:
        return warn(f"{shown}: nearly full, and then nothing is written; raise maxmemory, or remove what else is there")
    return ok(shown)


def persistence_said(told: Mapping[str, str]) -> Said:
    if told.get("aof_enabled") == "1":
        return ok("appendonly yes")
    return warn("appendonly no: a restart loses acknowledged writes; set appendonly yes, and make backups")


def _parsed(version: str) -> tuple[int, int]:
    """One that cannot be read is nothing to warn of."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return _COMFORTABLE if found is None else (int(found[1]), int(found[2]))
