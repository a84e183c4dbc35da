"""A worker process of a herd, for tests: `python -m tests.herd_worker OPTIONS`, those of a `ConfigClient`, in JSON.

Once it follows the mirror it prints `ready`. For each line that says what its readers want it prints `set` once all of
them stand at the line, half of them threads and half of them tasks; at the next line they go, together, and it prints
what came of it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.support.child import Child
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, unit_reader

__all__ = ["Answers", "Worker"]

WITHIN_S: Final = 60.0  # an end to waiting in vain
ABSENT: Final = "absent"


@dataclass(frozen=True)
class Answers:
    """What came of one herd in one process: values, in JSON, and faults, with how many readers had them."""

    values: Counter[str]
    faults: Counter[str]
    units_read: Counter[str]  # by the process's own figures, in this herd


class Worker(Child):
    """Such a process."""

    def __init__(self, **options: Any) -> None:
        """The options are those of its client, beside `url`."""
        super().__init__("tests.herd_worker", json.dumps(options))

    def until(self, word: str) -> None:
        """Wait until it says so."""
        said = self.line()
        assert said == word, said

    def line_up(self, wanted: Sequence[Sequence[str]], *, filled_within_s: float) -> None:
        """Have a reader line up for each of `wanted`: its keys, of which it tells the values, or the one value.

        `filled_within_s` is how long the relay is waited for.
        """
        self._tell({"wanted": wanted, "filled_within_s": filled_within_s})

    def go(self) -> None:
        self._tell("go")

    def answers(self) -> Answers:
        """What came of it, once every reader has an answer."""
        return Answers(**{name: Counter(counts) for name, counts in json.loads(self.line()).items()})

    def _tell(self, what: Any) -> None:
        self.tell(json.dumps(what))


# --- the process


def follows_mirror(client: ConfigClient) -> bool:
    return any(tier.role == "mirror" and tier.state == "following" for tier in client.status().tiers)


class _Herd:
    """Readers that stand at a line, until they go."""

    def __init__(self, client: ConfigClient, wanted: Sequence[Sequence[str]]) -> None:
        self._client = client
        self._go = threading.Event()
        self._gone: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._lock = threading.Lock()  # protects the two below
        self.values: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        threads, tasks = wanted[::2], wanted[1::2]
        self._at_line = threading.Barrier(len(threads) + 2)
        self._threads = [threading.Thread(target=self._read, args=(keys,)) for keys in threads]
        self._threads.append(threading.Thread(target=asyncio.run, args=(self._read_all(tasks),)))
        for thread in self._threads:
            thread.start()
        self._at_line.wait(WITHIN_S)

    def run(self) -> None:
        self._loop.call_soon_threadsafe(self._gone.set)
        self._go.set()
        for thread in self._threads:
            thread.join()

    def _read(self, keys: Sequence[str]) -> None:
        self._at_line.wait(WITHIN_S)
        self._go.wait(WITHIN_S)
        try:
            view = self._client.view()
            found = view.fetch_many(keys) if len(keys) > 1 else view.fetch(keys[0], ABSENT)
        except Exception as exc:
            self._note(self.faults, repr(exc))
        else:
            self._note(self.values, json.dumps(found))

    async def _read_all(self, wanted: Sequence[Sequence[str]]) -> None:
        self._loop, self._gone = asyncio.get_running_loop(), asyncio.Event()
        reading = [asyncio.ensure_future(self._aread(keys)) for keys in wanted]
        await asyncio.sleep(0)  # all of them come to the line
        await self._loop.run_in_executor(None, self._at_line.wait, WITHIN_S)
        await asyncio.gather(*reading)

    async def _aread(self, keys: Sequence[str]) -> None:
        await self._gone.wait()
        try:
            view = self._client.view()
            found = await (view.afetch_many(keys) if len(keys) > 1 else view.afetch(keys[0], ABSENT))
        except Exception as exc:
            self._note(self.faults, repr(exc))
        else:
            self._note(self.values, json.dumps(found))

    def _note(self, counter: Counter[str], what: str) -> None:
        with self._lock:
            counter[what] += 1


def _told(said: Any) -> None:
    print(said, flush=True)


def main(options: str) -> None:
    with ConfigClient(**json.loads(options)) as client:
        client.wait_ready(WITHIN_S)
        reader = client._views.reader
        assert reader is not None
        wait_until(lambda: follows_mirror(client), WITHIN_S, reason="the mirror to be followed")
        _told("ready")
        for line in sys.stdin:
            asked = json.loads(line)
            unit_reader.FILLED_WITHIN_S = asked["filled_within_s"]  # type: ignore[misc]
            wait_until(lambda: follows_mirror(client), WITHIN_S, reason="the mirror to be followed")
            herd, before = _Herd(client, asked["wanted"]), Counter(reader.units_read)
            _told("set")
            sys.stdin.readline()
            herd.run()
            units_read = Counter(reader.units_read) - before
            _told(json.dumps({"values": herd.values, "faults": herd.faults, "units_read": units_read}))


if __name__ == "__main__":
    main(sys.argv[1])
