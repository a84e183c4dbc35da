"""The verb `doctor`: what is wrong between this machine and the store, and what to do.

Owns how findings are drawn, and the exit code; what is looked at is the library's `diagnosis`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import click

from veltrix_mw.cli import json_text, output
from veltrix_mw.cli.session import Session, lazy_option, on_store, quieten_log
from veltrix_mw.diagnosis import Finding, State, diagnose
from veltrix_mw.words import counted

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
@click.option("--strict", is_flag=True, help="Exit with 1 for a warning, too.")
@lazy_option
@on_store
def doctor(session: Session, folder: Path | None, strict: bool) -> None:
    """Find out what is wrong, and what to do.

    Looks at the authority, at the mirror if there is one, and at the last-known-good folder: address, connection, TLS,
    user, permissions, versions, clocks, and whether the mirror is fed. Needs no app. Changes nothing on any server.

    A line for each check: ok, warn, fail, or not made; those that were not made for one fault share a line. The last
    line says where to begin. Exit code 0 without a failure, warnings or not; 1 with one, and with --strict for a
    warning; 2 for wrong options.
    """
    quieten_log()
    findings, unmade = list[Finding](), list[Finding]()
    for finding in _found(session, folder):
        findings.append(finding)
        if session.as_json:
            continue
        if unmade and not _are_alike(unmade[0], finding):
            _draw_unmade(unmade)
            unmade = []
        if finding.state is State.NOT_MADE:
            unmade.append(finding)
        else:
            _draw(finding)
    if unmade:
        _draw_unmade(unmade)
    failed, warned = ([each for each in findings if each.state is state] for state in (State.FAIL, State.WARN))
    well = not failed and not (strict and warned)
    if session.as_json:
        checks = [
            {"part": each.part, "check": each.check, "state": str(each.state), "text": json_text.plain(each.text)}
            for each in findings
        ]
        output.say_json({"well": well, "checks": checks})
    else:
        click.echo(_summed_up(failed, warned, findings))
    if not well:
        click.get_current_context().exit(_FAILED)


def _found(session: Session, folder: Path | None) -> Iterator[Finding]:
    return diagnose(
        session.url, mirror=session.mirror, namespace=session.namespace, lazy=session.lazy, last_known_good=folder
    )


def _are_alike(one: Finding, other: Finding) -> bool:
    """Whether both were not made for the same reason."""
    return (one.part, one.state, one.text) == (other.part, other.state, other.text)


def _draw_unmade(findings: Sequence[Finding]) -> None:
    """Checks that were not made for one reason, on one line."""
    first = findings[0]
    if len(findings) > 1:
        names = ", ".join(each.check for each in findings)
        first = replace(first, check=f"{len(findings)} checks", text=f"{first.text}: {names}")
    _draw(first)


def _draw(finding: Finding) -> None:
    state = click.style(f"{finding.state:<{_STATE_WIDTH}}", fg=_COLOURS[finding.state])
    text = json_text.plain(" ".join(finding.text.split()))
    click.echo(f"{state}  {finding.part:<{_PART_WIDTH}}  {finding.check:<{_CHECK_WIDTH}}  {text}")


def _summed_up(failed: Sequence[Finding], warned: Sequence[Finding], findings: Sequence[Finding]) -> str:
    """The last line: how it stands, and where to begin."""
    warnings = counted(len(warned), "warning")
    if failed:
        also = f" and {warnings}" if warned else ""
        return f"{counted(len(failed), 'failure')}{also}: begin with {failed[0].part} {failed[0].check}"
    if warned:
        return f"no failure, {warnings}: {', '.join(f'{each.part} {each.check}' for each in warned)}"
    made = sum(each.state is State.OK for each in findings)
    return f"all is well, by {counted(made, 'check')}"
