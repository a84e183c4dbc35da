"""`manage.py veltrix ...`: the CLI `veltrix`, with the project's URLs, namespace and lazy prefixes filled in.

Owns the filling in; verbs, options and exit codes are the CLI's, which needs the extra `cli`.
"""

from __future__ import annotations

import sys
from argparse import REMAINDER, ArgumentParser
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any, Final, NoReturn

from django.core.management.base import BaseCommand, CommandError

from django_veltrix.settings import MissingUrl, Settings
from veltrix_mw import SettingsError

__all__ = ["Command"]

_OPTIONS: Final = ("url", "mirror", "namespace")
"""What of VELTRIX the CLI takes, by the same names; what is written on the command line comes later and wins."""

_USAGE: Final = 2
"""The CLI's exit code for wrong settings."""


class Command(BaseCommand):
    """`manage.py veltrix get checkout/max_items`, and every other verb of the CLI.

    Reads the project's settings and nothing else: no request, no client of this process.
    """

    help = "Reads and changes config: the command `veltrix`, on the project's store."
    requires_system_checks = ()  # it also has to run to mend what they find

    def run_from_argv(self, argv: list[str]) -> None:
        """Everything after the command's name is the CLI's, but for what Django itself has taken already."""
        taken = ArgumentParser(add_help=False, allow_abbrev=False)
        taken.add_argument("--settings")
        taken.add_argument("--pythonpath")
        _, arguments = taken.parse_known_args(argv[2:])
        try:
            _run(arguments, prog_name=f"{argv[0]} {argv[1]}")
        except CommandError as exc:
            self.stderr.write(f"error: {exc}")
            raise SystemExit(exc.returncode) from exc

    def print_help(self, prog_name: str, subcommand: str) -> None:
        """The CLI's own help, for `manage.py help veltrix`."""
        self.run_from_argv([prog_name, subcommand, "--help"])

    def add_arguments(self, parser: ArgumentParser) -> None:
        """One list: the CLI's arguments, for `call_command("veltrix", "get", "k")`."""
        parser.add_argument("arguments", nargs=REMAINDER)

    def handle(self, *_: Any, **options: Any) -> None:
        """Run by `call_command`. Raises `CommandError` with the CLI's exit code as `returncode`."""
        stdout = options.get("stdout")
        try:
            with nullcontext() if stdout is None else redirect_stdout(stdout):
                _run(options["arguments"], prog_name="manage.py veltrix")
        except SystemExit as exc:
            if exc.code:
                code = exc.code if isinstance(exc.code, int) else 1
                raise CommandError(f"veltrix ended with exit code {code}", returncode=code) from exc


def _run(arguments: Sequence[str], *, prog_name: str) -> NoReturn:
    """Run the CLI on the project's store. Raises `SystemExit` as it ends, `CommandError` if it cannot begin."""
    from veltrix_mw.cli import main

    raise SystemExit(main(args=[*_filled_in(arguments), *arguments], prog_name=prog_name))


def _filled_in(arguments: Sequence[str]) -> list[str]:
    try:
        settings = Settings.read()
    except MissingUrl:
        return []  # the CLI says how to name one
    except SettingsError as exc:
        raise CommandError(str(exc), returncode=_USAGE) from exc
    if settings.embedded is not None and not _names_or_needs_none(arguments):
        sys.stderr.write(f"warning: VELTRIX names no URL and DEBUG is on: this is the store {settings.embedded}\n")
    given = settings.arguments
    named = [part for name in _OPTIONS if name in given for part in (f"--{name}", given[name])]
    return [*named, *(part for prefix in given.get("lazy", ()) for part in ("--lazy", prefix))]


def _names_or_needs_none(arguments: Sequence[str]) -> bool:
    """Whether the command line names a store itself, or asks for help alone."""
    return not arguments or any(
        word in {"-h", "--help", "--version"} or word == "--url" or word.startswith("--url=") for word in arguments
    )
