"""Writing verbs: `put`, `delete`, `rollback`.

Each is one revision, acknowledged by the authority, or an error.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Final

import click

from veltrix_mw import Conflict, Entry, InvalidValue
from veltrix_mw.cli import json_text, output
from veltrix_mw.cli.difference import differences
from veltrix_mw.cli.session import Session, listed, on_store, past, recorded

__all__ = ["delete", "put", "rollback"]

_NEGATIVE: Final = re.compile(r"-[0-9][0-9.eE+-]*")

_expected_option: Final = click.option(
    "--expected",
    type=click.IntRange(min=0),
    metavar="REV",
    help="Write only if the key's revision is REV; 0: only if it is absent.",
)


class _Put(click.Command):
    """A command that takes `-5` for a value, not for options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.ignore_unknown_options = any(_NEGATIVE.fullmatch(argument) for argument in args)
        return super().parse_args(ctx, args)


@click.command(cls=_Put)
@click.argument("key")
@click.argument("value", required=False)
@click.option("--text", "as_text", is_flag=True, help="Take the value as a string, whatever it looks like.")
@click.option(
    "--file", "path", type=click.Path(path_type=Path), metavar="PATH", help="Read the value from a file; - is stdin."
)
@_expected_option
@recorded
@on_store
def put(
    session: Session,
    key: str,
    value: str | None,
    as_text: bool,
    path: Path | None,
    expected: int | None,
    author: str,
    reason: str,
) -> None:
    """Set KEY to VALUE; print the new revision.

    VALUE is JSON; - reads it from stdin.

    \b
    veltrix put checkout/max_items 80
    veltrix put checkout/title '"Summer sale"'
    veltrix put --text checkout/title "Summer sale"
    """
    decoded = _value(value, path, as_text=as_text)
    with session.client() as client:
        revision = client.put(key, decoded, expected=expected, author=author, reason=reason)
    _answer(session, revision)


_PYTHONS: Final = {"True": "true", "False": "false", "None": "null"}


def _value(value: str | None, path: Path | None, *, as_text: bool) -> Any:
    if (value is None) == (path is None):
        raise click.UsageError("give a VALUE, or - for stdin, or --file PATH: one of them")
    given: str | bytes
    if value == "-" or (path is not None and str(path) == "-"):
        given = sys.stdin.buffer.read()
    elif path is not None:
        given = path.read_bytes()
    else:
        assert value is not None
        given = value
    if not as_text:
        try:
            return json_text.parsed(given, of="the value")
        except json_text.NotJson as exc:
            if given in _PYTHONS:
                raise InvalidValue(f"{exc}; in JSON it is written {_PYTHONS[str(given)]}") from None
            raise InvalidValue(
                f"{exc}; a string needs its quotes inside the shell's, as in "
                "veltrix put KEY '\"blue\"', or --text, as in veltrix put --text KEY blue"
            ) from None
    try:
        return given.decode() if isinstance(given, bytes) else given
    except UnicodeDecodeError as exc:
        raise InvalidValue(f"the value is not UTF-8 (byte {exc.start})") from None


@click.command()
@click.argument("key")
@_expected_option
@click.option("--missing-ok", is_flag=True, help="An absent key is no error; nothing is written then.")
@recorded
@on_store
def delete(session: Session, key: str, expected: int | None, missing_ok: bool, author: str, reason: str) -> None:
    """Remove KEY; print the new revision."""
    with session.client() as client:
        revision = client.delete(key, expected=expected, missing_ok=missing_ok, author=author, reason=reason)
    if revision is not None:
        _answer(session, revision)
    elif session.as_json:
        output.say_json({"revision": None})
    else:
        click.echo(f"{key!r} was absent already", err=True)


@click.command()
@click.argument("revision", type=click.IntRange(min=0))
@click.option("--yes", is_flag=True, help="Do not ask.")
@recorded
@on_store
def rollback(session: Session, revision: int, yes: bool, author: str, reason: str) -> None:
    """Bring all keys back to REVISION.

    Shows what changes, asks, and writes it as a new revision.
    """
    asks = sys.stdin.isatty() and not yes
    if not asks and not yes:
        raise click.UsageError("there is no terminal to ask on; pass --yes to roll back without a question")
    with session.client() as client:
        then, now = listed(client, revision), listed(client)
        changes = differences(dict(now), dict(then))
        if not session.as_json:
            for one in changes:
                output.difference_line(one)
        if asks and changes and not click.confirm(f"Write this as revision {now.revision + 1}?", err=True):
            click.echo("nothing was written", err=True)
            click.get_current_context().exit(1)
        # What was shown is what is meant: someone may have written while the question stood.
        newest = listed(client).revision
        if newest != now.revision:
            raise Conflict(
                f"someone wrote revision {newest} meanwhile, nothing was rolled back; run it again to see what changes",
                key="",
                current=Entry(None, newest),
            )
        with past():
            written = client.rollback(revision, author=author, reason=reason)
    if session.as_json:
        output.say_json({"revision": written, "changes": [one.as_json() for one in changes]})
        return
    if written == now.revision:
        click.echo(f"nothing differs from revision {revision}", err=True)
    output.told_revision(written)


def _answer(session: Session, revision: int) -> None:
    if session.as_json:
        output.say_json({"revision": revision})
    else:
        output.told_revision(revision)
