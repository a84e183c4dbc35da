"""A process that holds a lease, for tests: `python -m tests.lease_holder URL NAME TTL_S [TIMES FILE]`.

Once it holds the lease it prints the token, and then again for each line that it is given, or `lost`; it gives the
lease up when its input ends. With TIMES and FILE it takes the lease so many times, and writes there when it has it and
when it has not any more.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.support.child import Child
from tests.support.stopping import stop
from veltrix_mw.errors import LeaseLost
from veltrix_mw.leases import Lease, open_lease


class Holder(Child):
    """Such a process."""

    def __init__(self, url: str, name: str, *, ttl_s: float, times: int = 0, file: Path | None = None) -> None:
        more = [] if file is None else [str(times), str(file)]
        super().__init__("tests.lease_holder", url, name, str(ttl_s), *more)

    def ask(self) -> str:
        """The token that it holds now, or `lost`."""
        self.tell("")
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
