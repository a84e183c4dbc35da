"""Failures: which exit code an error is, and how it is told.

Owns the exit codes and the words on stderr; knows no verb.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Final

import click

from veltrix_mw import (
    AuthFailed,
    Compacted,
    Conflict,
    InvalidKey,
    InvalidValue,
    KeyMissing,
    SettingsError,
    StoreError,
    StoreUnavailable,
    VeltrixError,
)

__all__ = ["EXIT_CODES", "NoSuchRevision", "exit_code", "tell"]

OK: Final = 0
NOT_FOUND: Final = 1
USAGE: Final = 2
CONFLICT: Final = 3
INVALID: Final = 4
UNAVAILABLE: Final = 5
NOT_ALLOWED: Final = 6
FAULT: Final = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED: Final = 130  # what shells make of SIGINT ...
PIPE_CLOSED: Final = 141  # ... and of SIGPIPE

EXIT_CODES: Final = """\
\b
Exit codes:
  0  done
  1  not found: no such key, or no such revision (any more); doctor: a check failed
  2  usage or settings
  3  conflict: someone wrote in between
  4  invalid key or value
  5  the store is unavailable, or was too slow
  6  not allowed
"""


class NoSuchRevision(VeltrixError):
    """The revision asked for was not written yet."""


# The first that fits: subclasses stand before their bases.
_CODES: Final[tuple[tuple[type[Exception], int], ...]] = (
    (KeyMissing, NOT_FOUND),
    (NoSuchRevision, NOT_FOUND),
    (Compacted, NOT_FOUND),
    (Conflict, CONFLICT),
    (InvalidKey, INVALID),
    (InvalidValue, INVALID),
    (SettingsError, USAGE),
    (AuthFailed, NOT_ALLOWED),
    (StoreUnavailable, UNAVAILABLE),
    (VeltrixError, UNAVAILABLE),
    (click.ClickException, USAGE),
    (click.Abort, INTERRUPTED),
    (OSError, USAGE),
)


def exit_code(error: Exception) -> int:
    """The exit code of an error."""
    if type(error) is StoreError:
        return USAGE  # of no kind: what the URL names is no store, and retrying does not help
    return next((code for kind, code in _CODES if isinstance(error, kind)), FAULT)


def tell(error: Exception, *, as_json: bool) -> None:
    """Say on stderr, in one line, what went wrong and what to do."""
    message = " ".join(_message(error).split())
    told = json.dumps({"error": {"type": _kind(error), "message": message}}) if as_json else f"error: {message}"
    click.echo(told, err=True)


def silence_stdout() -> None:
    """Nobody reads any more: let the interpreter's last flush go nowhere instead of failing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _kind(error: Exception) -> str:
    """The name that scripts may rely on: of the error tree, not of what a store derives from it."""
    if isinstance(error, click.ClickException):
        return "UsageError"
    told = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ in {"veltrix_mw.errors", __name__})
    return next(told, type(error).__name__)


def _message(error: Exception) -> str:
    match error:
        case click.UsageError():
            path = error.ctx.command_path if error.ctx is not None else "veltrix"
            return f"{error.format_message().rstrip('.')}; see {path} --help"
        case click.ClickException():
            return error.format_message()
        case click.Abort():
            return "interrupted"
        case OSError():
            return f"{error.filename or 'input or output'}: {error.strerror or type(error).__name__}"
        case VeltrixError():
            return str(error)
        case _:
            # Not its text: that may hold a value.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
            return f"a fault of veltrix itself ({type(error).__name__} at {where}); please report it"
