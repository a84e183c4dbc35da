"""What several writers or followers do to one store at once, in threads or in processes of their own.

A job takes a store and JSON arguments, and returns what JSON can carry; `say` hands a line to whoever started it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from veltrix_mw.errors import Conflict
from veltrix_mw.protocols import ChangeRecord, RawOperation, Store

TIMEOUT_S = 30.0  # eight writers share two noisy cores and one disk
ROOT = Path(__file__).parents[2]


def say(line: object) -> None:
    print(json.dumps(line), flush=True)


def increment(store: Store, *, key: str, times: int) -> int:
    """Add one to a counter, `times` times, by compare-and-set; returns how many conflicts were met."""
    conflicts = 0
    for _ in range(times):
        while True:
            raw, revision = store.read([key], None, timeout_s=TIMEOUT_S).get(key, (b"0", 0))
            operation = RawOperation(key, b"%d" % (int(raw) + 1), revision)
            try:
                store.commit([operation], ChangeRecord(), timeout_s=TIMEOUT_S)
            except Conflict:
                conflicts += 1
            else:
                break
    return conflicts


def write_pairs(store: Store, *, name: str, times: int) -> list[int]:
    """Write the keys `pair/a` and `pair/b` in one transaction, always equal; returns the revisions."""
    revisions = []
    for turn in range(times):
        raw = json.dumps(f"{name}-{turn}").encode()
        operations = [RawOperation("pair/a", raw), RawOperation("pair/b", raw)]
        revisions.append(store.commit(operations, ChangeRecord(author=name), timeout_s=TIMEOUT_S))
    return revisions


def write_until_killed(store: Store) -> None:
    """Write pairs without end; says each revision once it is acknowledged."""
    turn = 0
    while True:
        say(write_pairs(store, name=f"turn{turn}", times=1)[0])
        turn += 1


def follow(store: Store, *, until: int) -> list[Any]:
    """List, say so, then watch up to the revision `until`; returns [revision, keys, time seen] of each batch."""
    watch = store.watch(store.list(timeout_s=TIMEOUT_S).position, timeout_s=TIMEOUT_S)
    say("following")
    seen: list[Any] = []
    try:
        while not seen or seen[-1][0] < until:
            batches, now_s = watch.next(TIMEOUT_S), time.monotonic()
            seen.extend([batch.position.revision, [change.key for change in batch.changes], now_s] for batch in batches)
    finally:
        watch.close()
    return seen


def put(store: Store, *, key: str, text: str) -> int:
    return store.commit([RawOperation(key, text.encode())], ChangeRecord(), timeout_s=TIMEOUT_S)


class Process:
    """A job in a process of its own. Killed, at the latest, when the block ends."""

    def __init__(self, spec: dict[str, Any], job: Callable[..., Any], **arguments: Any) -> None:
        task = {"spec": spec, "job": job.__name__, "arguments": arguments}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.stores.jobs", json.dumps(task)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)])},
            text=True,
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self._process.wait()
        self._out.close()

    @property
    def _out(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def line(self) -> Any:
        """The next line that the job says."""
        text = self._out.readline()
        assert text, f"the job ended with {self._process.wait()}"
        return json.loads(text)

    def rest(self) -> list[Any]:
        """All that it said before it was killed; a last line that was cut off is none."""
        return [json.loads(text) for text in self._out if text.endswith("\n")]

    def result(self) -> Any:
        """What the job returned."""
        *_, last = self.rest()
        assert self._process.wait() == 0
        return last

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()


def main() -> None:
    task = json.loads(sys.argv[1])
    module, _, name = task["spec"]["store"].partition(":")
    store: Store = getattr(importlib.import_module(module), name)(**task["spec"]["options"])
    try:
        say(globals()[task["job"]](store, **task["arguments"]))
    finally:
        store.close()


if __name__ == "__main__":
    main()
