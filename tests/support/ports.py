"""Ports for servers in tests."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["free_port"]

_FIRST: Final = 10_000
_COUNT: Final = 5_000  # the demo takes its ports above them, and Linux those of outgoing connections above 32,767
_TURN: Final = Path(tempfile.gettempdir()) / f"veltrix-ports-{os.getuid()}"


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now.

    All test processes of this user are given other ones, in turn, so that nobody takes it before it is used, nor while
    its server is away for a moment.
    """
    descriptor = os.open(_TURN, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        turn = int(os.pread(descriptor, 16, 0) or b"0")
        while True:
            turn = (turn + 1) % _COUNT
            if _is_free(_FIRST + turn):
                os.pwrite(descriptor, b"%-16d" % turn, 0)
                return _FIRST + turn
    finally:
        os.close(descriptor)


def _is_free(port: int) -> bool:
    with socket.socket() as bound:
        try:
            bound.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
