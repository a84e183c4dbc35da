"""Output: tables and lines for a person, plain text for a pipe.

Owns how things look; knows no verb and no store. On a terminal rich draws them, in the width there is; elsewhere
columns are parted by tabs and nothing is shortened.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from veltrix_mw import MISSING
from veltrix_mw.cli import json_text
from veltrix_mw.cli.difference import Difference

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "difference_line", "fields", "on_terminal", "say_json", "shown", "table", "told_revision"]

_MOST_SHOWN: Final = 300  # characters of one value that a terminal is handed: more than a line of it
_LEAST_SHOWN: Final = 12  # characters of a value, however narrow the terminal
_GAP: Final = 3  # between two columns


def on_terminal() -> bool:
    """Whether a person reads stdout."""
    return sys.stdout.isatty()


def console() -> Console:
    """What draws on stdout."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False, emoji=False)


def say_json(answer: Any) -> None:
    """One JSON text on stdout: indented for a person, one line for a pipe."""
    click.echo(json_text.pretty(answer) if on_terminal() else json_text.compact(answer))


def told_revision(revision: int) -> None:
    """The answer of a write: the bare number for a pipe, so that `rev=$(veltrix put ...)` works."""
    click.echo(f"revision {revision}" if on_terminal() else revision)


def shown(value: Any) -> str:
    """A value on one line, `(absent)` where there is none; cut short on a terminal."""
    if value is MISSING:
        return "(absent)"
    text = json_text.compact(value)
    return text if not on_terminal() or len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "…"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = (), cut: str = "") -> None:
    """Rows under a heading on a terminal, where the column `cut` gives way; tab-parted lines elsewhere."""
    if not on_terminal():
        for row in rows:
            click.echo("\t".join(row))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [list(row) for row in rows]
    screen = console()
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    longest = {
        column: min(max(len(column), *(len(row[at]) for row in cells)), screen.width // 2)
        for at, column in enumerate(columns)
    }
    left = screen.width - sum(longest[column] for column in columns if column != cut) - _GAP * (len(columns) - 1)
    for column in columns:
        drawn.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column == cut,
            overflow="ellipsis" if column == cut else "fold",
            max_width=max(_LEAST_SHOWN, left) if column == cut else longest[column],
        )
    for row in cells:
        drawn.add_row(*[Text(cell) for cell in row])
    screen.print(drawn)


def fields(named: Mapping[str, str]) -> None:
    """Names and what they are, one a line."""
    width = max(len(name) for name in named)
    if not on_terminal():
        for name, text in named.items():
            click.echo(f"{name:<{width}}  {text}")
        return
    drawn = console()
    from rich.text import Text

    for name, text in named.items():
        line = Text.assemble((f"{name:<{width}}  ", "dim"), text)
        drawn.print(line, soft_wrap=True)


def difference_line(difference: Difference, *, lead: str = "", trail: str = "") -> None:
    """One line for what becomes of a key: `checkout/max_items  50 → 80`."""
    old, new = shown(difference.old), shown(difference.new)
    if not on_terminal():
        click.echo("\t".join(part for part in (lead, difference.key, f"{old} → {new}", trail) if part))
        return
    from rich.text import Text

    screen = console()
    room = screen.width - len(lead) - len(difference.key) - len(trail) - len("   →    ")
    line = Text()
    if lead:
        line.append(f"{lead}  ", "dim")
    line.append(difference.key, "bold")
    line.append("  ")
    line.append(_cut(old, max(_LEAST_SHOWN, room - len(new), room // 2)), "red")
    line.append(" → ")
    line.append(_cut(new, max(_LEAST_SHOWN, room - len(old), room // 2)), "green")
    if trail:
        line.append(f"  {trail}", "dim")
    screen.print(line, soft_wrap=True)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
