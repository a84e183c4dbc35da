"""The verb `relay`: feeds the mirror in the foreground, or stands by for the process that does.

Owns the words for what becomes of it, and when it gives up: at wrong credentials at its start. All else is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from queue import SimpleQueue
from typing import Any, Final

import click

from veltrix_mw import AuthFailed
from veltrix_mw.cli import json_text
from veltrix_mw.cli.session import Session, lazy_option, on_store
from veltrix_mw.cli.stopping import stopping

__all__ = ["relay"]

_Told = tuple[str, Mapping[str, Any]]

_WORDS: Final[Mapping[str, str]] = {
    "elected": "elected: this is the relay now",
    "standing_by": "standing by: {holder} is the relay",
    "resumed": "resumed: revision {revision}",
    "refilled": "refilled: revision {revision}, entries {entries} ({reason})",
    "restored": "restored: the authority's history is another one now, incarnation {incarnation}",
    "authority_failed": "authority unreachable: {reason}",
    "authority_answers": "authority answers again",
    "mirror_failed": "mirror unreachable: {reason}",
    "mirror_answers": "mirror answers again",
    "barred": "not allowed to feed the mirror: {reason}",
    "deposed": "deposed: {reason}",
    "resigned": "resigned: {reason}",
    "stopped": "stopped",
}
"""A line for each event of `ConfigClient.feed`, and the last one."""


@click.command()
@click.option("--instance", metavar="NAME", help="The name that status shows; default host:pid and a random part.")
@lazy_option
@on_store
def relay(session: Session, instance: str | None) -> None:
    """Feed the mirror, until Ctrl-C or SIGTERM.

    Needs --url and --mirror (or their variables), and credentials that may write the mirror. Of several relays one is
    elected, and the others stand by and say where they do not reach the authority; workers that may write the mirror
    stand for election too. It waits while a server is away, and ends at once (exit code 6) where the credentials it
    starts with are refused.

    --lazy names the same prefixes as the workers' lazy setting: the mirror leaves them out.

    Prints a line for each turn of events; with --json an object, with time_s, event and what belongs to it. Never keys
    or values.
    """
    told: SimpleQueue[_Told | None] = SimpleQueue()  # its put may interrupt its get: a signal's handler does that
    with session.client(mirrored=True, instance=instance) as client, stopping(lambda: told.put(None)):
        client.feed(lambda event, fields: told.put((event, fields)))
        _announce(client.status().tiers, client.instance)
        while (item := told.get()) is not None:
            event, fields = item
            if event == "refused":
                raise AuthFailed(f"the {fields['tier']} refuses this relay: {fields['reason']}")
            _tell(session, event, fields, own_name=client.instance)
    _tell(session, "stopped", {})


def _announce(tiers: Any, instance: str) -> None:
    authority, mirror = tiers
    named = json_text.plain(instance)
    click.echo(f"relaying {authority.url} to {mirror.url} as {named}, Ctrl-C ends", err=True)


def _tell(session: Session, event: str, fields: Mapping[str, Any], *, own_name: str = "") -> None:
    if session.as_json:
        click.echo(json_text.compact({"time_s": round(time.time(), 3), "event": event, **fields}))
        return
    if event == "standing_by" and fields["holder"] == own_name:
        click.echo("standing by: a lease in this relay's own name is held still")  # its last one, until that runs out
        return
    safe = {name: json_text.plain(part) if isinstance(part, str) else part for name, part in fields.items()}
    click.echo(_WORDS[event].format(**safe))
