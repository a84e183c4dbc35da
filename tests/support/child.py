"""A process of a test's own that is talked to by lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Final, Self

__all__ = ["Child"]

ROOT: Final = Path(__file__).parents[2]


class Child:
    """`python -m MODULE ARGUMENTS`; killed, at the latest, when the block ends."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)])},
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.stdin, self._stdout):
            pipe.close()

    @property
    def stdin(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def _stdout(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def tell(self, line: str) -> None:
        self.stdin.write(f"{line}\n")
        self.stdin.flush()

    def line(self) -> str:
        """What it says next. Fails where it has ended."""
        text = self._stdout.readline().strip()
        assert text, f"the process ended with {self.process.wait()}"
        return text
