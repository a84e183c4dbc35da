"""A process that holds a lease, for tests: `python -m tests.lease_holder URL NAME TTL_S [TIMES FILE]`.

Once it holds the lease it prints the token, and then again for each line that it is given, or `lost`; it gives the
lease up when its input ends. With TIMES and FILE it takes the lease so many times, and writes there when it has it and
when it has not any more.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Final

from tests.support.stopping import stop
from veltrix_mw.errors import LeaseLost
from veltrix_mw.leases import Lease, open_lease

ROOT: Final = Path(__file__).parents[1]


class Holder:
    """Such a process; killed, at the latest, when the block ends."""

    def __init__(self, url: str, name: str, *, ttl_s: float, times: int = 0, file: Path | None = None) -> None:
        more = [] if file is None else [str(times), str(file)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.lease_holder", url, name, str(ttl_s), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)])},
            text=True,
        )

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self._in, self._out):
            pipe.close()

    @property
    def _in(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def _out(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def line(self) -> str:
        """What it says next."""
        text = self._out.readline().strip()
        assert text, f"the holder ended with {self.process.wait()}"
        return text

    def ask(self) -> str:
        """The token that it holds now, or `lost`."""
        self._in.write("\n")
        self._in.flush()
        return self.line()

    def stop(self) -> None:
        """SIGSTOP."""
        stop(self.process.pid)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def _take(lease: Lease, times: int, file: str) -> None:
    log = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for _ in range(times):
        with lease:
            os.write(log, f"in {os.getpid()} {lease.token}\n".encode())
            os.write(log, f"out {os.getpid()} {lease.token}\n".encode())
    print("done", flush=True)


def _hold(lease: Lease) -> None:
    with lease:
        print(lease.token, flush=True)
        for _ in sys.stdin:
            try:
                told = str(lease.token)
            except LeaseLost:
                told = "lost"
            print(told, flush=True)


def main(url: str, name: str, ttl_s: str, times: str = "", file: str = "") -> None:
    lease = open_lease(url, name, ttl_s=float(ttl_s))
    if times:
        _take(lease, int(times), file)
    else:
        _hold(lease)


if __name__ == "__main__":
    main(*sys.argv[1:])
