"""The verb `doctor`: what is wrong between this machine and the store, and what to do.

Owns how findings are drawn, and the exit code; what is looked at is the library's `diagnosis`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from veltrix_mw.cli import json_text, output
from veltrix_mw.cli.session import Session, lazy_option, on_store, quieten_log
from veltrix_mw.diagnosis import Finding, State, diagnose

__all__ = ["doctor"]

_FAILED: Final = 1
_COLOURS: Final = {State.OK: "green", State.WARN: "yellow", State.FAIL: "red", State.NOT_MADE: "bright_black"}
_STATE_WIDTH: Final = max(len(state) for state in State)
_PART_WIDTH: Final = len("last-known-good")
_CHECK_WIDTH: Final = len("authentication")


@click.command()
@click.option(
    "--last-known-good",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Look at this last-known-good folder too.",
)
@lazy_option
@on_store
def doctor(session: Session, folder: Path | None) -> None:
    """Find out what is wrong, and what to do.

    Looks at the authority, at the mirror if there is one, and at the last-known-good folder: address, connection, TLS,
    user, permissions, versions, clocks, and whether the mirror is fed. Needs no app. Changes nothing on any server.

    A line for each check: ok, warn, fail, or not made, because of one before it that failed. Exit code 0 without a
    failure, warnings or not; 1 with one; 2 for wrong options.
    """
    quieten_log()
    findings = []
    for finding in _found(session, folder):
        findings.append(finding)
        if not session.as_json:
            _draw(finding)
    failed = any(finding.state is State.FAIL for finding in findings)
    if session.as_json:
        checks = [
            {"part": each.part, "check": each.check, "state": str(each.state), "text": json_text.plain(each.text)}
            for each in findings
        ]
        output.say_json({"well": not failed, "checks": checks})
    if failed:
        click.get_current_context().exit(_FAILED)


def _found(session: Session, folder: Path | None) -> Iterator[Finding]:
    return diagnose(
        session.url, mirror=session.mirror, namespace=session.namespace, lazy=session.lazy, last_known_good=folder
    )


def _draw(finding: Finding) -> None:
    state = click.style(f"{finding.state:<{_STATE_WIDTH}}", fg=_COLOURS[finding.state])
    text = json_text.plain(" ".join(finding.text.split()))
    click.echo(f"{state}  {finding.part:<{_PART_WIDTH}}  {finding.check:<{_CHECK_WIDTH}}  {text}")
