"""`flask veltrix ...`: the `veltrix` command on the store of the app, and its mirror.

Owns which store that is; the verbs are the CLI's. Imports neither the library nor the CLI before it is called: the
`flask` command loads this module for every project it is run in.
"""

from __future__ import annotations

import click
from flask import current_app
from flask.cli import with_appcontext

__all__ = ["group"]


@click.command(
    "veltrix",
    add_help_option=False,  # its help is the CLI's
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    short_help="Read and change the app's configuration.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def group(arguments: tuple[str, ...]) -> None:
    """Run a command of `veltrix` on the store that the app reads.

    `--url`, `--mirror`, `--namespace` and `--lazy` name others.
    """
    from flask_veltrix.settings import MissingUrl
    from veltrix_mw import SettingsError
    from veltrix_mw.cli import main  # says what to install if its extra is missing

    try:
        store = _filled_in()
    except MissingUrl:
        store = []  # the CLI says how to name one
    except SettingsError as exc:
        raise click.UsageError(str(exc)) from exc
    main([*store, *arguments], prog_name="flask veltrix")


@with_appcontext
def _filled_in() -> list[str]:
    """The options that name the app's store. Raises what the app does where it cannot be made."""
    pins = current_app.extensions.get("veltrix")
    if pins is None:
        raise click.UsageError(f"the app {current_app.name!r} has no Veltrix: call Veltrix(app) where it is made")
    store = ["--url", pins.url, "--mirror", pins.mirror, "--namespace", pins.client.namespace]
    return [*store, *(part for prefix in pins.client.lazy for part in ("--lazy", prefix))]
