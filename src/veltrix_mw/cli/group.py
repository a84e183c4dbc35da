"""The group: `veltrix` itself, its verbs and how it ends.

Owns the way from an error to an exit code. Its help names the exit codes; scripts rely on them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from veltrix_mw.cli.demo_verb import demo
from veltrix_mw.cli.doctor import doctor
from veltrix_mw.cli.failure import EXIT_CODES, PIPE_CLOSED, exit_code, silence_stdout, tell
from veltrix_mw.cli.following import watch
from veltrix_mw.cli.health import status
from veltrix_mw.cli.reading import get, history, list_
from veltrix_mw.cli.relaying import relay
from veltrix_mw.cli.session import Session, lazy_option, on_store
from veltrix_mw.cli.tracing import trace
from veltrix_mw.cli.transfer import export, import_
from veltrix_mw.cli.writing import delete, put, rollback

__all__ = ["main"]


class Veltrix(click.Group):
    """A group whose errors are one line and an exit code; no traceback leaves it."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and end the process with an exit code; with `standalone_mode=False` return or raise instead."""
        given = list(sys.argv[1:] if args is None else args)

        def run() -> Any:
            return super(Veltrix, self).main(
                given, prog_name, complete_var, False, windows_expand_args=windows_expand_args, **extra
            )

        if not standalone_mode:
            return run()
        try:
            ended = run()
        except Exception as exc:  # noqa: BLE001  # whatever it is, a person gets a line and not a traceback
            tell(exc, as_json="--json" in given)
            sys.exit(exit_code(exc))
        sys.exit(ended if isinstance(ended, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            silence_stdout()
            ctx.exit(PIPE_CLOSED)


def _show_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    try:
        number = version("veltrix-mw")
    except PackageNotFoundError:
        number = "of a source tree that is not installed"
    click.echo(f"veltrix {number}")
    ctx.exit()


@click.group(
    cls=Veltrix,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@lazy_option
@on_store
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="The version.")
@click.pass_context
def main(ctx: click.Context, session: Session) -> None:
    """Read, change and watch configuration.

    \b
    export VELTRIX_URL=sqlite:///config.db
    veltrix put checkout/max_items 80
    veltrix get checkout/max_items

    --url, --mirror, --namespace and --json stand before or after the verb. A mirror matters to watch, status,
    doctor, trace and relay; all others ask the authority alone.
    """
    ctx.obj = session
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for verb in (get, put, delete, list_, watch, history, rollback, import_, export, status, doctor, trace, relay, demo):
    main.add_command(verb)
