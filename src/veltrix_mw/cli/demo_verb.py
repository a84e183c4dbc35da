"""The verb `demo`. Loads what it runs only when it is called."""

from __future__ import annotations

import click

from veltrix_mw.cli.session import Session, answers

__all__ = ["demo"]


@click.command()
@click.option("--cluster", is_flag=True, help="On three etcd and a Redis, which it starts, kills and brings back.")
@answers
def demo(session: Session, cluster: bool) -> None:
    """Show it all: an app, a change, a trace.

    Runs an app with two workers, changes a value while it serves, and shows what each request sees. On a terminal it
    stays up afterwards, for you to try, until Ctrl-C. All that it shows it measured. Everything is in a temporary
    folder, which is gone at the end.

    --cluster: four workers under load on etcd and Redis, from PATH. It kills etcd's leader, Redis, then everything, and
    brings all back; shows what each worker serves meanwhile and when it converged. Takes about a minute, and ends.
    """
    if cluster:
        from veltrix_mw.cli.demo_cluster import run
    else:
        from veltrix_mw.cli.demo import run

    click.get_current_context().exit(run(as_json=session.as_json))
