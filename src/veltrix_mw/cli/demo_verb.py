"""The verb `demo`. Loads what it runs only when it is called."""

from __future__ import annotations

import click

from veltrix_mw.cli.session import Session, answers

__all__ = ["demo"]


@click.command()
@answers
def demo(session: Session) -> None:
    """Show it all: an app, a change, a trace.

    Runs an app with two workers, changes a value while it serves, and shows what each request sees. On a terminal it
    stays up afterwards, for you to try, until Ctrl-C. All that it shows it measured. Everything is in a temporary
    folder, which is gone at the end.
    """
    from veltrix_mw.cli.demo import run

    click.get_current_context().exit(run(as_json=session.as_json))
