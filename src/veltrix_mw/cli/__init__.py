"""The command `veltrix`: read, change and watch a namespace from a shell.

Owns its verbs, their output and their exit codes; uses the library's public names and nothing else of it.

Exit codes: 0 done · 1 not found: no such key, or no such revision (any more); doctor: a check failed · 2 usage or
settings · 3 conflict: someone wrote in between · 4 invalid key or value · 5 the store is unavailable, or was too
slow · 6 not allowed · 70 a fault of veltrix itself · 130 interrupted · 141 the reader of the output went away.

Errors are one line on stderr; with `--json`, `{"error": {"type": ..., "message": ...}}`. The extra `cli` brings what
this needs; without it importing works, and calling `main` says so.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

__all__ = ["main"]

if TYPE_CHECKING:
    from veltrix_mw.cli.group import main
else:
    try:
        import click  # noqa: F401
        import rich  # noqa: F401  # what it draws with is loaded late: it is half of the start
    except ModuleNotFoundError as exc:
        if exc.name not in {"click", "rich"}:
            raise
        _missing = exc.name

        def main(*_: object, **__: object) -> None:
            """Say what to install, and end with exit code 2."""
            sys.stderr.write(f'error: the command line needs {_missing}: pip install "veltrix-mw[cli]"\n')
            raise SystemExit(2)
    else:
        from veltrix_mw.cli.group import main
