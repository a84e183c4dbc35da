"""Reading verbs: `get`, `list`, `history`.

Each is one call to the authority, and starts no follower.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import click

from veltrix_mw import ConfigClient, Entry, InvalidValue, KeyMissing, Snapshot, StoreError, VeltrixError, Version
from veltrix_mw.cli import json_text, output
from veltrix_mw.cli.prefix import Prefix, prefix_argument
from veltrix_mw.cli.session import Session, listed, on_store, past, revision_option

__all__ = ["get", "history", "list_"]


@click.command()
@click.argument("key")
@revision_option
@click.option("--raw", is_flag=True, help="Print a string without its quotes, for use in a shell.")
@on_store
def get(session: Session, key: str, revision: int | None, raw: bool) -> None:
    """Print the value of KEY, as JSON.

    It is what the authority has. A worker whose schema does not take it serves the last value that it took, and says so
    in its log and in `client.status().rejected`.
    """
    if raw and session.as_json:
        raise click.UsageError("--raw and --json exclude each other")
    with session.client() as client:
        with past():
            try:
                found = client.read([key], revision)
            except InvalidValue as exc:
                if revision is not None:
                    raise
                raise InvalidValue(f"{exc}; {_served_meanwhile(client, key)}") from exc
        if key not in found:
            raise _missing(client, key, revision)
    entry = found[key]
    if session.as_json:
        output.say_json({"key": key, "value": entry.value, "mod_revision": entry.mod_revision})
    elif raw and isinstance(entry.value, str):
        click.echo(entry.value.encode())
    elif output.on_terminal():
        output.console().print_json(json_text.compact(entry.value))
    else:
        click.echo(json_text.compact(entry.value))


def _missing(client: ConfigClient, key: str, revision: int | None) -> KeyMissing:
    when = "does not exist" if revision is None else f"did not exist at revision {revision}"
    hint = "veltrix list shows the keys there are"
    with suppress(StoreError):
        hint = client.unwritten() or hint
    return KeyMissing(f"{key!r} {when}; {hint}")


def _served_meanwhile(client: ConfigClient, key: str) -> str:
    """What workers go on with, where the newest value of `key` is none."""
    good: Version | None = None
    with suppress(VeltrixError):
        good = next((version for version in client.history(key) if not version.invalid), None)
    if good is None:
        return "workers hold it back, and one that never had a good value raises HeldBack; write a good one"
    if good.deleted:
        return f"workers go on without it, as it was deleted in revision {good.revision}; write a good one"
    return (
        f"workers go on with its value of revision {good.revision} (veltrix get {key} --revision {good.revision}); "
        "write a good one"
    )


@click.command("list")
@prefix_argument
@revision_option
@click.option("--keys", "keys_only", is_flag=True, help="The keys alone.")
@on_store
def list_(session: Session, prefix: Prefix, revision: int | None, keys_only: bool) -> None:
    """List keys, values and revisions.

    All that is below PREFIX, each with the revision that wrote it. PREFIX is a key, with or without
    the slash after it; default all.
    """
    with session.client() as client:
        snapshot = listed(client, revision)
    keys = [key for key in snapshot if prefix.holds(key)]
    _warn_of_rejected(snapshot)
    if session.as_json:
        output.say_json(
            keys if keys_only else {key: _entry_json(snapshot.entry(key)) for key in keys},
        )
    elif keys_only:
        for key in keys:
            click.echo(key)
    elif keys:
        rows = ((key, output.shown(snapshot[key]), str(snapshot.entry(key).mod_revision)) for key in keys)
        output.table(("key", "value", "revision"), rows, right=("revision",), cut="value")
    elif output.on_terminal():
        click.echo(f"no keys{prefix.phrase} at revision {snapshot.revision}", err=True)


@click.command()
@click.argument("key")
@click.option("--limit", type=click.IntRange(min=1), default=100, metavar="N", help="At most so many; default 100.")
@on_store
def history(session: Session, key: str, limit: int) -> None:
    """Show the versions of KEY that are kept.

    The newest first: who wrote it, when and why.
    """
    with session.client() as client:
        versions = client.history(key, limit=limit)
    if not versions:
        raise KeyMissing(f"{key!r} has no history; veltrix list shows the keys there are")
    if session.as_json:
        output.say_json([version_json(version) for version in versions])
        return
    rows = [
        (
            str(version.revision),
            _time(version.time_s),
            json_text.plain(version.author),
            json_text.plain(version.reason),
            _state(version),
        )
        for version in versions
    ]
    output.table(("revision", "time", "author", "reason", "value"), rows, right=("revision",), cut="value")


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {"value": entry.value, "mod_revision": entry.mod_revision}


def version_json(version: Version) -> dict[str, Any]:
    """A version's members; `value` is left out where the key was deleted, or what is stored is no value."""
    shown: dict[str, Any] = {"revision": version.revision, "key": version.key, "deleted": version.deleted}
    if version.invalid:
        shown["invalid"] = version.invalid
    elif not version.deleted:
        shown["value"] = version.value
    return {**shown, "author": version.author, "reason": version.reason, "time_s": version.time_s}


def _state(version: Version) -> str:
    if version.deleted:
        return "(deleted)"
    return f"(invalid: {version.invalid})" if version.invalid else output.shown(version.value)


def _time(time_s: float) -> str:
    """Local time with its offset, to the second; empty where nobody noted it, as with a write by etcdctl."""
    if not time_s:
        return ""
    try:
        return datetime.fromtimestamp(time_s, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    except (ValueError, OverflowError, OSError):
        return "(no time)"  # another writer's clock or unit


def _warn_of_rejected(snapshot: Snapshot) -> None:
    for key, why in snapshot.rejected.items():
        click.echo(f"warning: {key!r} is left out: {json_text.plain(why.reason)}", err=True)
