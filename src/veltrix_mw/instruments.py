"""The instruments: the metrics that clients feed, and who is asked when they are exported.

Owns the metrics' names, units and buckets, and that there is one set of them for each meter provider. Knows no client:
of each it asks the plain numbers that `Stats` names. `opentelemetry.metrics` is imported with the first set.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from veltrix_mw.version import __version__

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram, Meter, MeterProvider, Observation

__all__ = ["SCHEMA_URL", "SCOPE", "Instruments", "Observed", "Stats", "instruments_of"]

SCOPE: Final = "veltrix_mw"
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.33.0"

_LOOKUP_BUCKETS_S: Final = (1e-6, 5e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
_REFRESH_BUCKETS_S: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
_PROPAGATION_BUCKETS_S: Final = (*_REFRESH_BUCKETS_S, 60.0)
_CALL_BUCKETS_S: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)  # the convention's for databases

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Observed:
    """Where a client stands now; `age_s` is inf before the first confirmation."""

    age_s: float
    revision: int
    entries: int


class Stats(Protocol):
    """What a client shows to the observable instruments.

    Held weakly, so it must be weakly referable, and hashed by identity. Read on the exporter's thread, without a
    lock: all but `lazy_entries` and `relay_held` are plain integers that only grow.
    """

    @property
    def namespace(self) -> str: ...
    @property
    def views(self) -> int:
        """Views pinned so far."""
        ...

    @property
    def reconnects(self) -> int:
        """Watches opened again so far."""
        ...

    @property
    def failovers(self) -> int:
        """Times so far that calls went to another server than before."""
        ...

    @property
    def rejections(self) -> int:
        """Changes held back so far."""
        ...

    @property
    def dropped_layers(self) -> int:
        """Invalid layers of requests that were dropped so far."""
        ...

    @property
    def stale_reads(self) -> int:
        """Reads refused so far, as what they asked for was older than it may be."""
        ...

    @property
    def fetches(self) -> Mapping[str, int]:
        """Fetches of lazy units so far, by result: `hit`, `miss`, `absent`, `coalesced`, `error`."""
        ...

    @property
    def lazy_entries(self) -> int | None:
        """Lazy units held now, absent ones too; None where no prefix is lazy."""
        ...

    @property
    def relay_held(self) -> int | None:
        """1 where this process sees a relay that feeds the mirror, 0 where it sees none; None without a mirror."""
        ...

    def observe(self) -> Observed | None:
        """Where the client stands now; None for one that is closed, which stands still."""
        ...


class Instruments:
    """The instruments of one meter provider, shared by every client that uses it.

    There is one for each provider: an SDK drops, in silence, the callbacks of an instrument created twice.
    """

    def __init__(self, meter: Meter) -> None:
        # A dict of weak references, not a WeakSet: a set that grows while another thread iterates over it raises,
        # and a lock could be held by a fork.
        self._stats: dict[weakref.ref[Stats], None] = {}
        self.lookup_duration = _histogram(
            meter, "veltrix.lookup.duration", "What config cost a request: the sum of its reads", _LOOKUP_BUCKETS_S
        )
        self.fetch_duration = _histogram(meter, "veltrix.fetch.duration", "Waiting for lazy units", _LOOKUP_BUCKETS_S)
        self.call_duration = _histogram(
            meter, "db.client.operation.duration", "Duration of calls to the stores", _CALL_BUCKETS_S
        )
        self.refresh_duration = _histogram(
            meter, "veltrix.refresh.duration", "Listing, or applying a batch of changes", _REFRESH_BUCKETS_S
        )
        self.propagation_duration = _histogram(
            meter,
            "veltrix.propagation.duration",
            "From the write of a change to its application in this process",
            _PROPAGATION_BUCKETS_S,
        )

        def counter(name: str, unit: str, description: str, total: Callable[[Stats], int]) -> None:
            meter.create_observable_counter(name, [lambda _: self._totals(total)], unit, description)

        def gauge(name: str, unit: str, description: str, reading: Callable[[Observed], float]) -> None:
            meter.create_observable_gauge(name, [lambda _: self._readings(reading)], unit, description)

        counter("veltrix.views", "{view}", "Views pinned", lambda stats: stats.views)
        counter("veltrix.rejected", "{change}", "Changes held back", lambda stats: stats.rejections)
        counter("veltrix.stale_reads", "{read}", "Reads refused as stale", lambda stats: stats.stale_reads)
        counter("veltrix.layers.dropped", "{layer}", "Invalid layers dropped", lambda stats: stats.dropped_layers)
        meter.create_observable_counter(
            "veltrix.fetches", [lambda _: self._results()], "{fetch}", "Fetches of lazy units, by result"
        )
        counter("veltrix.reconnects", "{reconnect}", "Watches opened again", lambda stats: stats.reconnects)
        counter("veltrix.failovers", "{failover}", "Changes of the server called", lambda stats: stats.failovers)
        gauge("veltrix.snapshot.age", "s", "Time since the snapshot was last confirmed", lambda now: now.age_s)
        gauge("veltrix.snapshot.revision", "{revision}", "The snapshot's revision", lambda now: now.revision)
        gauge("veltrix.snapshot.entries", "{entry}", "Entries in the snapshot", lambda now: now.entries)
        meter.create_observable_gauge(
            "veltrix.lazy.entries",
            [lambda _: self._totals(lambda stats: stats.lazy_entries)],
            "{entry}",
            "Lazy units held",
        )
        meter.create_observable_gauge(
            "veltrix.relay.held",
            [lambda _: self._least(lambda stats: stats.relay_held)],
            "{relay}",
            "Whether this process sees a relay that feeds the mirror",
        )

    def observe(self, stats: Stats) -> None:
        """Add `stats`, unless it is there; it leaves when it is collected."""
        self._stats[weakref.ref(stats, self._forget)] = None

    def take(self, other: Instruments) -> None:
        """Observe what the other does, too."""
        for reference in list(other._stats):
            stats = reference()
            if stats is not None:
                self.observe(stats)

    def _forget(self, reference: weakref.ref[Stats]) -> None:
        self._stats.pop(reference, None)

    def _read(self, read: Callable[[Stats], _T]) -> Iterator[tuple[str, _T]]:
        """(namespace, what was read) of every client alive."""
        for reference in list(self._stats):
            stats = reference()
            if stats is None:
                continue
            try:
                found = stats.namespace, read(stats)
            except Exception:  # noqa: BLE001, S112  # one client that fails must not hide the others from the export
                continue
            yield found

    def _totals(self, total: Callable[[Stats], int | None]) -> Iterable[Observation]:
        """One observation a namespace: the sum over those of its clients that have a number."""
        totals: dict[str, int] = {}
        for namespace, count in self._read(total):
            if count is not None:
                totals[namespace] = totals.get(namespace, 0) + count
        return _observations(totals)

    def _least(self, reading: Callable[[Stats], int | None]) -> Iterable[Observation]:
        """One observation a namespace: the least of those of its clients that have a number."""
        least: dict[str, int] = {}
        for namespace, number in self._read(reading):
            if number is not None:
                least[namespace] = min(number, least.get(namespace, number))
        return _observations(least)

    def _results(self) -> Iterable[Observation]:
        """One observation a namespace and result of its fetches: the sum over its clients."""
        from opentelemetry.metrics import Observation

        totals: dict[tuple[str, str], int] = {}
        for namespace, fetches in self._read(lambda stats: dict(stats.fetches)):
            for result, count in fetches.items():
                totals[namespace, result] = totals.get((namespace, result), 0) + count
        return [
            Observation(count, {"veltrix.namespace": namespace, "veltrix.result": result})
            for (namespace, result), count in totals.items()
        ]

    def _readings(self, reading: Callable[[Observed], float]) -> Iterable[Observation]:
        """One observation a namespace: of its client of the highest age, as that is the one to worry about."""
        oldest: dict[str, Observed] = {}
        for namespace, now in self._read(lambda stats: stats.observe()):
            if now is not None and (namespace not in oldest or now.age_s > oldest[namespace].age_s):
                oldest[namespace] = now
        return _observations({namespace: reading(now) for namespace, now in oldest.items()})


def _observations(values: Mapping[str, float]) -> list[Observation]:
    from opentelemetry.metrics import Observation

    return [
        Observation(value, {"veltrix.namespace": namespace})
        for namespace, value in values.items()
        if math.isfinite(value)
    ]


def _histogram(meter: Meter, name: str, description: str, buckets_s: Sequence[float]) -> Histogram:
    return meter.create_histogram(
        name, unit="s", description=description, explicit_bucket_boundaries_advisory=buckets_s
    )


_made: weakref.WeakKeyDictionary[MeterProvider, Instruments] = weakref.WeakKeyDictionary()
_made_global: Instruments | None = None
_making = threading.Lock()  # protects the two above: instruments are made once


def _renew_lock() -> None:
    global _making
    _making = threading.Lock()


# A fork may come while another thread holds the lock; in the child nobody would release it.
os.register_at_fork(after_in_child=_renew_lock)


def instruments_of(provider: MeterProvider | None) -> Instruments:
    """The instruments of `provider`, or of the global one.

    The global one is a proxy until an SDK is set, and its instruments move to the SDK then: those made for
    the proxy are the SDK's from that moment on.
    """
    global _made_global
    from opentelemetry import metrics

    # These two may run an SDK's own set-up, or read files: not under the lock.
    current = metrics.get_meter_provider()
    with _making:
        is_global = provider is None or provider is current
        if provider is None:
            provider = current
        made = _made.get(provider) or (_made_global if is_global else None)
        if made is not None and is_global and _made_global is not None and made is not _made_global:
            # The proxy's instruments moved to a provider that had some: of two that are alike the SDK asks the first.
            made.take(_made_global)
        if made is None:
            made = Instruments(metrics.get_meter(SCOPE, __version__, provider, schema_url=SCHEMA_URL))
            _made[provider] = made
        if is_global:
            _made_global = made
        return made
