"""P6: applying one change to 10^3 ... 10^6 keys, and what a burst of changes does to an event loop that serves."""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.harness import QUICK, Figure, in_turn, ratios
from veltrix_mw import ConfigClient
from veltrix_mw.keyspace import Keyspace
from veltrix_mw.protocols import Batch, ChangeRecord, Listing, Position, RawChange, RawOperation, Store
from veltrix_mw.validation import Schemas
from veltrix_mw.views import Views

SIZES = (1_000, 10_000, 100_000, 1_000_000)
MEASURED_S = 0.2
BURST = 2_000 if QUICK else 10_000


def measure() -> list[Figure]:
    return [*_flat(), *_stall()]


def _applier(size: int) -> Callable[[int], None]:
    """Applies changes to a keyspace of `size` keys as the follower does: decode, apply, publish a view."""
    space, views = Keyspace(Schemas({})), Views()
    entries = [(f"shop/section-{number % 1000:03d}/key-{number:07d}", b"%d" % number, 1) for number in range(size)]
    entries.sort()
    space.restore(Listing(Position("one", 1), entries), incarnation="one", origin="memory", proved_at_s=0.0)
    views.publish(space.snapshot, None)
    keys = [entries[number * 7919 % size][0] for number in range(997)]
    revision = 1

    def run(calls: int) -> None:
        nonlocal revision
        for _ in range(calls):
            revision += 1
            key = keys[revision % 997]
            change = (RawChange(key, b"%d" % revision),)
            changed = space.apply(Batch(Position("one", revision), revision - 1, change))
            views.publish(space.snapshot, changed)

    return run


def _flat() -> list[Figure]:
    rivals = {f"{size:,} keys": _applier(size) for size in SIZES}
    rivals["1,000 keys (A/A control)"] = _applier(1_000)
    found = ratios(in_turn(rivals), "1,000 keys")
    return [
        Figure(
            "P6 one change",
            name,
            ratio,
            spread,
            bar=2.0 if name == "1,000,000 keys" else None,
            note="against 1,000 keys",
        )
        for name, (ratio, spread) in found.items()
        if name != "1,000 keys"
    ]


def _stall() -> list[Figure]:
    """The longest that an event loop is kept from running, in turn: idle, beside a raw watch thread, beside ours.

    A burst of changes lies ready in a database; the raw thread reads and decodes them, ours follows them.
    """
    samples: dict[str, list[float]] = {"idle": [], "raw watch thread": [], "ours": []}
    for _ in range(3 if QUICK else 7):
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{folder}/config.db?keep_revisions={2 * BURST}"
            client = ConfigClient(url, telemetry="off")
            client.wait_for(client.put("limit", 0))
            client.close()
            published = client._published
            assert published is not None
            last = _write_burst(client._store)
            samples["idle"].append(_longest(lambda: None))
            samples["raw watch thread"].append(_longest(partial(_raw, client._store, published.position, last)))
            samples["ours"].append(_longest(partial(_follow, client, last)))
            assert client.view().revision == last
            client.close()
    found = ratios(samples, "raw watch thread")
    over_idle_ms = [1000 * (ours - idle) for ours, idle in zip(samples["ours"], samples["idle"], strict=True)]
    median_ms = statistics.median(over_idle_ms)
    note = f"longest stall of an event loop, burst of {BURST:,}; {median_ms:.1f} ms over idle"
    return [
        Figure("P6 burst", "idle loop", *found["idle"], note="against a raw watch thread"),
        Figure(
            "P6 burst", "a view's follower", *found["ours"], bar=1.25, note=note, extra={"over_idle_ms": over_idle_ms}
        ),
    ]


def _write_burst(store: Store) -> int:
    record, revision = ChangeRecord(), 0
    for number in range(BURST):
        operation = RawOperation(f"key-{number % 997}", b'{"limit": %d}' % number)
        revision = store.commit([operation], record, timeout_s=5)
    return revision


def _follow(client: ConfigClient, last: int) -> None:
    client.start()
    client.wait_for(last, timeout_s=60)


def _raw(store: Store, position: Position, last: int) -> None:
    """What any follower must do: take each change and decode it into a dict."""
    kept: dict[str, Any] = {}
    watch = store.watch(position, timeout_s=5)
    while position.revision < last:
        for batch in watch.next(1.0):
            position = batch.position
            for change in batch.changes:
                if isinstance(change.value, bytes):
                    kept[change.key] = json.loads(change.value)
    watch.close()


def _longest(burst: Callable[[], Any]) -> float:
    """The longest gap, in seconds, between two turns of an event loop while `burst` runs in another thread."""

    async def watch() -> float:
        done = threading.Event()

        def run() -> None:
            try:
                burst()
            finally:
                done.set()

        thread = threading.Thread(target=run)
        begun = last = time.perf_counter()
        longest = 0.0
        thread.start()
        while not done.is_set() or last - begun < MEASURED_S:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        thread.join()
        return longest

    return asyncio.run(watch())
