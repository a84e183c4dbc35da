"""The following verb: `watch`, which prints changes as they come.

Owns the way from what a subscription tells (states) to what happened (each version, from the authority's history).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Final

import click

from veltrix_mw import MISSING, Change, ConfigClient, Entry, Snapshot, StoreError
from veltrix_mw.cli import json_text, output
from veltrix_mw.cli.difference import Difference
from veltrix_mw.cli.prefix import Prefix, prefix_argument
from veltrix_mw.cli.session import Session, lazy_option, on_store
from veltrix_mw.cli.stopping import stopping

__all__ = ["watch"]

_MOST_VERSIONS: Final = 1000  # of one key, between two looks; a burst beyond it is shown from its last ones

_Told = tuple[tuple[Change, ...], Snapshot]


@dataclass(frozen=True, slots=True)
class _Happened:
    """One key in one revision."""

    revision: int
    difference: Difference
    author: str = ""
    reason: str = ""


@click.command()
@prefix_argument
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N changes.")
@lazy_option
@on_store
def watch(session: Session, prefix: Prefix, count: int | None) -> None:
    """Print each change as it comes.

    Below PREFIX, until Ctrl-C. With --json a line for each: revision, key, old, new, author, reason; old or new is
    left out where the key is absent.

    With a mirror it follows as a worker does: the mirror while that is well, else the authority. A mirror that leaves
    out prefixes is followed only if --lazy names them; what is below them is not watched.
    """
    told: SimpleQueue[_Told | None] = SimpleQueue()  # its put may interrupt its get: a signal's handler does that
    with session.client(mirrored=True) as client, stopping(lambda: told.put(None)):
        client.wait_ready()
        warnings = _Warnings(logging.WARNING)
        logging.getLogger("veltrix_mw").addHandler(warnings)
        end = client.subscribe("", lambda changes, snapshot: told.put((changes, snapshot)))
        begun = client.snapshot
        click.echo(f"watching{prefix.phrase} from revision {begun.revision}, Ctrl-C ends", err=True)
        try:
            for shown, one in enumerate(_happenings(client, begun, told, prefix), start=1):
                _show(session, one)
                if shown == count:
                    return
        finally:
            end()
            logging.getLogger("veltrix_mw").removeHandler(warnings)


class _Warnings(logging.Handler):
    """What the follower has to say while it goes on, a line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"warning: {json_text.plain(record.getMessage())}", err=True)


def _happenings(
    client: ConfigClient, heard: Snapshot, told: SimpleQueue[_Told | None], prefix: Prefix
) -> Iterator[_Happened]:
    """What happens after `heard`, revision by revision, until None is told."""
    while (item := told.get()) is not None:
        changes, snapshot = item
        wanted = [change for change in changes if prefix.holds(change.key)]
        if snapshot.incarnation != heard.incarnation and heard.incarnation:
            click.echo("warning: the authority's history is another one now: it was restored or replaced", err=True)
            found = [_state(change, snapshot) for change in wanted]
        else:
            found = [one for change in wanted for one in _versions(client, change, heard.revision, snapshot)]
        heard = snapshot
        yield from sorted(found, key=lambda one: (one.revision, one.difference.key))


def _versions(client: ConfigClient, change: Change, after: int, snapshot: Snapshot) -> Sequence[_Happened]:
    """Every version of the change's key from `after` to `snapshot`: a subscription merges what comes quickly."""
    try:
        kept = client.history(change.key, limit=_MOST_VERSIONS)
    except StoreError:
        return [_state(change, snapshot)]  # it went away since: the change itself is known all the same
    found = []
    old = _value(change.old)
    for version in reversed(kept):
        if after < version.revision <= snapshot.revision and not version.invalid:
            happened = Difference(change.key, old, version.value)
            found.append(_Happened(version.revision, happened, version.author, version.reason))
            old = version.value
    return found


def _state(change: Change, snapshot: Snapshot) -> _Happened:
    revision = change.new.mod_revision if isinstance(change.new, Entry) else snapshot.revision
    return _Happened(revision, Difference(change.key, _value(change.old), _value(change.new)))


def _value(side: Any) -> Any:
    return side.value if isinstance(side, Entry) else MISSING


def _show(session: Session, one: _Happened) -> None:
    if session.as_json:
        record = {"author": one.author, "reason": one.reason}
        click.echo(json_text.compact({"revision": one.revision, **one.difference.as_json(), **record}))
        return
    who = ": ".join(json_text.plain(part) for part in (one.author, one.reason) if part)
    output.difference_line(one.difference, lead=str(one.revision), trail=f"({who})" if who else "")
