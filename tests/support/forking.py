"""A forked child of a test, which tells whether it found what it should."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Final

__all__ = ["forked"]

_WITHIN_S: Final = 10.0


def forked(child: Callable[[], bool]) -> bool:
    """Whether `child` returned true in a forked process; it is killed if it hangs."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        good = False
        try:
            signal.alarm(int(_WITHIN_S))  # ends a child that waits for ever
            good = child()
            os.write(writer, b"1" if good else b"0")
        finally:
            os._exit(0 if good else 1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(pid, 0)
    return told == b"1" and status == 0
