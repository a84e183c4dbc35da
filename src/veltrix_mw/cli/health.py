"""The verb `status`: how the authority and the mirror do.

Owns what is asked of each tier, and what a mirror's answer means. Follows nothing; the exit code is the authority's:
with a mirror that is away or stale workers follow the authority, so that is a warning.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Any, Final

import click

from veltrix_mw import ConfigClient, NeverWritten, Snapshot, StoreError, StoreNotFound, TierStatus
from veltrix_mw.cli import json_text, output
from veltrix_mw.cli.failure import exit_code, tell
from veltrix_mw.cli.session import Session, listed, on_store
from veltrix_mw.words import ago, counted

__all__ = ["STALE_AFTER_S", "status"]

STALE_AFTER_S: Final = 10.0
"""From this age on workers leave a mirror: longer than a relay's takeover takes."""

_SETTLE_S: Final = 1.0  # what is on its way to a mirror that is fed comes within milliseconds
_AGAIN_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class _Authority:
    """What the authority answered: all that it holds, or why not."""

    snapshot: Snapshot | None
    error: StoreError | None
    took_s: float


@dataclass(frozen=True, slots=True)
class _Mirror:
    """What the mirror answered. `lag` is None where it cannot be told; `relay` None where nobody feeds it."""

    state: str
    error: str = ""
    took_s: float | None = None
    revision: int = 0
    lag: int | None = None
    age_s: float = math.inf
    lazy: tuple[str, ...] = ()
    relay: str | None = None

    @property
    def relay_missing(self) -> str:
        """Why there is no relay; empty where there is one."""
        if self.relay is not None:
            return ""
        if self.state in {"unreachable", "not found"}:
            return "the mirror cannot be asked"
        return "nobody feeds the mirror; run `veltrix relay`, or let workers that may write it stand for election"


@click.command()
@on_store
def status(session: Session) -> None:
    """Show how the authority and the mirror do.

    The exit code tells of the authority. A mirror that is unreachable, empty, stale (nobody feeds it) or behind is a
    warning: workers follow the authority meanwhile. It is not found where no sentinel, or no node of a cluster, says
    where it is: workers that knew that before go on with it.
    """
    with session.client(mirrored=True) as client:
        authority = _ask_authority(client)
        unwritten = _unwritten(client, authority)
        mirror = _ask_mirror(client, authority.snapshot)
        answer = {**_answer(client, authority, mirror), "unwritten": unwritten}
    if session.as_json:
        output.say_json(answer)
    else:
        _draw(answer)
    if unwritten:
        click.echo(f"warning: {json_text.plain(unwritten)}", err=True)
    if mirror is not None and mirror.error:
        meanwhile = "workers follow the authority meanwhile"
        if mirror.state == "not found":
            meanwhile = "only workers that knew its server before may follow it meanwhile"
        said = f"the mirror is {mirror.state}, and {meanwhile}: {mirror.error}"
        click.echo(f"warning: {json_text.plain(said)}", err=True)
    if authority.error is not None:
        tell(authority.error, as_json=session.as_json)
        click.get_current_context().exit(exit_code(authority.error))


def _ask_authority(client: ConfigClient) -> _Authority:
    begun_s = time.monotonic()
    try:
        snapshot = listed(client)
    except StoreError as exc:
        return _Authority(None, exc, time.monotonic() - begun_s)
    return _Authority(snapshot, None, time.monotonic() - begun_s)


def _unwritten(client: ConfigClient, authority: _Authority) -> str:
    """What to tell of a namespace that answers and that nobody ever wrote to; empty for any other."""
    if authority.snapshot is None or authority.snapshot.incarnation:
        return ""
    with suppress(StoreError):
        return client.unwritten()
    return ""


def _ask_mirror(client: ConfigClient, snapshot: Snapshot | None) -> _Mirror | None:
    """How the mirror does beside what the authority held just before; None where there is no mirror."""
    end_s, pause = time.monotonic() + _SETTLE_S, Event()
    while True:
        begun_s = time.monotonic()
        try:
            state = client.mirror_state()
        except StoreNotFound as exc:
            return _Mirror("not found", str(exc))
        except StoreError as exc:
            return _Mirror("unreachable", str(exc))
        if state is None:
            return None
        seen = _judged(state, snapshot, time.monotonic() - begun_s)
        # What was written a moment ago may be on its way.
        if seen.state != "behind" or time.monotonic() >= end_s:
            return seen
        pause.wait(_AGAIN_S)


def _judged(state: Any, snapshot: Snapshot | None, took_s: float) -> _Mirror:
    """What a mirror's state means. The first fault that fits is told: who mends it mends the others."""
    position, same = state.position, False
    lag = None
    if snapshot is not None:
        same = position.incarnation == snapshot.incarnation
        lag = max(0, snapshot.revision - position.revision) if same else None
    if not position.incarnation:
        kind, why = "empty", "it holds nothing; a relay fills it"
    elif state.age_s > STALE_AFTER_S:
        kind, why = "stale", f"its relay last asked the authority {ago(state.age_s)}"
    elif snapshot is not None and not same:
        kind, why = "behind", "it holds another incarnation than the authority"
    elif lag:
        kind, why = "behind", f"it stands at revision {position.revision}, the authority at {position.revision + lag}"
    else:
        kind, why = "reachable", ""
    return _Mirror(
        kind,
        why,
        took_s=took_s,
        revision=position.revision,
        lag=lag,
        age_s=state.age_s,
        lazy=tuple(state.lazy),
        relay=state.relay or None,
    )


def _answer(client: ConfigClient, authority: _Authority, mirror: _Mirror | None) -> dict[str, Any]:
    snapshot = authority.snapshot or Snapshot()
    ignored, examples = client.ignored
    # `client.status()` knows the tiers' names and redacted URLs without I/O; a process that follows nothing asks.
    first, *others = client.status().tiers
    tiers = [_authority_tier(first, authority)]
    if mirror is not None:
        tiers += [_mirror_tier(tier, mirror) for tier in others]
    return {
        "ready": authority.error is None,
        "namespace": client.namespace,
        "revision": snapshot.revision,
        "incarnation": snapshot.incarnation,
        "entries": len(snapshot) + len(snapshot.rejected),
        "rejected": {key: {"revision": why.revision, "reason": why.reason} for key, why in snapshot.rejected.items()},
        "ignored": {"count": ignored, "examples": list(examples)},
        "relay": None if mirror is None else mirror.relay,
        "relay_missing": "" if mirror is None else mirror.relay_missing,
        "tiers": tiers,
    }


def _authority_tier(tier: TierStatus, authority: _Authority) -> dict[str, Any]:
    error = authority.error
    return {
        "name": tier.name,
        "role": tier.role,
        "url": tier.url,
        "state": _reachability(error),
        "revision": 0 if authority.snapshot is None else authority.snapshot.revision,
        "answered_in_s": round(authority.took_s, 6) if error is None else None,
        "error": "" if error is None else str(error),
    }


def _mirror_tier(tier: TierStatus, mirror: _Mirror) -> dict[str, Any]:
    return {
        "name": tier.name,
        "role": tier.role,
        "url": tier.url,
        "state": mirror.state,
        "revision": mirror.revision,
        "answered_in_s": None if mirror.took_s is None else round(mirror.took_s, 6),
        "error": mirror.error,
        "lag": mirror.lag,
        "age_s": round(mirror.age_s, 3) if math.isfinite(mirror.age_s) else None,
        "lazy": list(mirror.lazy),
    }


def _reachability(error: StoreError | None) -> str:
    if error is None:
        return "reachable"
    return "never written" if isinstance(error, NeverWritten) else "unreachable"


def _draw(answer: dict[str, Any]) -> None:
    authority, *mirrors = answer["tiers"]
    named = {"authority": authority["state"], "namespace": answer["namespace"]}
    named |= _held(answer) if answer["ready"] else {"revision": "-"}
    for mirror in mirrors:
        named |= _mirrored(mirror, answer)
    output.fields(named)
    if output.on_terminal():
        click.echo()
    rows = [
        (
            tier["name"],
            tier["role"],
            tier["state"],
            "-" if tier["answered_in_s"] is None else f"{tier['answered_in_s'] * 1000:.1f} ms",
            tier["url"],
        )
        for tier in answer["tiers"]
    ]
    output.table(("tier", "role", "state", "answered in", "url"), rows, right=("answered in",))


def _held(answer: dict[str, Any]) -> dict[str, str]:
    rejected, ignored = answer["rejected"], answer["ignored"]
    held = {
        "revision": str(answer["revision"]),
        "incarnation": answer["incarnation"] or "none yet: nothing was written",
        "entries": str(answer["entries"]),
        "rejected": ", ".join(f"{key} ({why['reason']})" for key, why in rejected.items()) or "none",
    }
    if ignored["count"]:
        named = ", ".join(json_text.plain(key) for key in ignored["examples"])
        held["ignored"] = f"{ignored['count']}, whose keys have another shape" + (f", as {named}" if named else "")
    return held


def _mirrored(mirror: dict[str, Any], answer: dict[str, Any]) -> dict[str, str]:
    told = {"mirror": mirror["state"]}
    if mirror["answered_in_s"] is not None and mirror["state"] != "empty":
        lag = "" if mirror["lag"] is None else f", {counted(mirror['lag'], 'revision')} behind"
        age_s = math.inf if mirror["age_s"] is None else mirror["age_s"]
        told["mirrored"] = f"revision {mirror['revision']}{lag}"
        told["proved"] = f"{ago(age_s)}: then the relay found nothing newer at the authority"
        if mirror["lazy"]:
            told["left out"] = ", ".join(mirror["lazy"])
    else:
        told["mirrored"] = "-"
    holder = answer["relay"]
    told["relay"] = f"none, because {answer['relay_missing']}" if holder is None else json_text.plain(holder)
    return told
