"""Transfer verbs: `export` and `import`, a namespace as one JSON object.

What one writes the other takes, without loss.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from veltrix_mw import MISSING, ConfigClient, Delete, InvalidKey, InvalidValue, NeverWritten, Put, Snapshot
from veltrix_mw.cli import json_text, output
from veltrix_mw.cli.difference import Difference, differences
from veltrix_mw.cli.prefix import Prefix, prefix_argument
from veltrix_mw.cli.session import Session, listed, on_store, recorded, revision_option
from veltrix_mw.words import counted

__all__ = ["export", "import_"]


@click.command()
@prefix_argument
@revision_option
@click.option("--output", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write a file, for you alone.")
@on_store
def export(session: Session, prefix: Prefix, revision: int | None, path: Path | None) -> None:
    """Write keys and values as one JSON object.

    All that is below PREFIX, as import takes it.
    """
    with session.client() as client:
        snapshot = listed(client, revision)
    lost = [key for key in snapshot.rejected if prefix.holds(key)]
    if lost:
        raise InvalidValue(f"what is stored at {', '.join(map(repr, lost))} is no JSON; mend or delete it, then export")
    keys = {key: snapshot[key] for key in snapshot if prefix.holds(key)}
    text = json_text.pretty(keys) + "\n"
    if path is None or str(path) == "-":
        click.echo(text, nl=False)
        return
    _write_whole(path, text)
    if session.as_json:
        output.say_json({"file": str(path), "revision": snapshot.revision, "entries": len(keys)})
    else:
        click.echo(f"wrote {counted(len(keys), 'key')} as of revision {snapshot.revision} to {path}", err=True)


def _write_whole(path: Path, text: str) -> None:
    """Replace the file at once, readable by its owner alone: configuration often holds secrets."""
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise click.UsageError(f"{path} is not a file; without --output the object goes to stdout")
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # made with mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Show what would change; write nothing.")
@click.option("--replace", is_flag=True, help="Also delete the keys that FILE does not have (below --prefix).")
@click.option(
    "--prefix", default="", metavar="PREFIX", help="Take only keys below it; another one in FILE is an error."
)
@recorded
@on_store
def import_(session: Session, file: Path, dry_run: bool, replace: bool, prefix: str, author: str, reason: str) -> None:
    """Write the keys of a JSON object.

    FILE holds keys and values as export writes them; - is stdin. Writes only what differs, as one revision. Fails, and
    writes nothing, when one of these keys changes meanwhile.
    """
    wanted = _keys(sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes(), Prefix(prefix))
    with session.client() as client:
        now = listed(client) if dry_run else _listed_or_empty(client)
        changes, operations = _plan(now, wanted, Prefix(prefix) if replace else None)
        written = now.revision
        if operations and not dry_run:
            written = client.write(operations, author=author, reason=reason)
        if replace and not dry_run and not now.incarnation:
            # The list had failed. Only now it is known whether there was something to delete.
            rest, operations = _plan(listed(client), wanted, Prefix(prefix))
            changes += rest
            if operations:
                written = client.write(operations, author=author, reason=reason)
    if session.as_json:
        answer = [one.as_json() for one in changes]
        output.say_json({"revision": None if dry_run else written, "changes": answer})
    elif dry_run:
        for one in changes:
            output.difference_line(one)
        click.echo(f"{counted(len(changes), 'key')} would change; nothing was written", err=True)
    else:
        click.echo(f"{counted(len(changes), 'key')} changed", err=True)
        output.told_revision(written)


def _listed_or_empty(client: ConfigClient) -> Snapshot:
    """What there is; nothing in a store that the first write makes.

    Every key is then written on the condition that it is absent: what is there after all is a conflict, never lost.
    """
    try:
        return listed(client)
    except NeverWritten:
        return Snapshot()


def _keys(raw: bytes, prefix: Prefix) -> Mapping[str, Any]:
    wanted = json_text.parsed(raw, of="the input")
    if not isinstance(wanted, dict):
        raise InvalidValue('the input is not an object; write {"checkout/max_items": 80}, as export does')
    for key in wanted:
        if not prefix.holds(key):
            raise InvalidKey(f"{key!r} in the input is not below {prefix.text!r}; leave it out, or widen --prefix")
    return wanted


def _plan(
    now: Snapshot, wanted: Mapping[str, Any], cleared: Prefix | None
) -> tuple[list[Difference], list[Put | Delete]]:
    """What becomes of which key, and the writes that do it, each compared and set.

    `cleared`: below it, keys that are not wanted go.
    """
    unreadable = {key: why.revision for key, why in now.rejected.items()}
    if cleared is None:
        kept = {key: now[key] for key in now if key in wanted}
    else:
        kept = {key: now[key] for key in now if key in wanted or cleared.holds(key)}
    changes = differences(kept, wanted)
    if cleared is not None:
        changes += [Difference(key, MISSING, MISSING) for key in unreadable if key not in wanted and cleared.holds(key)]
    operations: list[Put | Delete] = []
    for one in changes:
        at = unreadable.get(one.key) or (now.entry(one.key).mod_revision if one.key in now else 0)
        operations.append(Delete(one.key, at) if one.new is MISSING else Put(one.key, one.new, at))
    return changes, operations
