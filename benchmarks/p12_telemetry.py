"""P12: what telemetry costs a request: beside no SDK, beside the calls that it makes by hand, beside itself at `off`.

A look-up is one of a hot key; a request one of an ASGI or WSGI app behind the middleware that answers at once, as what
telemetry adds to each look-up is measured by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from benchmarks.harness import Figure, in_turn, ratios, statement
from veltrix_mw import ConfigClient, asgi, wsgi

ATTRIBUTES = {
    "veltrix.revision": 1,
    "veltrix.origin": "memory",
    "veltrix.stale": False,
    "veltrix.lookup.count": 0,
    "veltrix.lookup.total": 0.0,
}

Run = Callable[[int], None]


def measure() -> Iterator[Figure]:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

    meters, spans = MeterProvider([InMemoryMetricReader()]), TracerProvider()
    silent = TracerProvider(sampler=ALWAYS_OFF)

    def client(level: str) -> ConfigClient:
        return ConfigClient("memory://", telemetry=level, meter_provider=meters, tracer_provider=spans)

    with client("requests") as told, client("off") as off, client("lookups") as each_read:
        for one in (told, off, each_read):
            one.wait_for(one.put("k", 1))
        yield from _reads(told, each_read, silent, spans)
        for name, served in (("ASGI", _asgi), ("WSGI", _wsgi)):
            yield from _requests(name, served(told), served(off), meters, silent, spans)


def _reads(told: ConfigClient, each_read: ConfigClient, silent: Any, spans: Any) -> Iterator[Figure]:
    """A hot look-up, in requests whose spans record or do not."""

    def within(provider: Any, client: ConfigClient) -> Run:
        def run(calls: int) -> None:
            with _span(provider), client.pinned() as view:
                statement("view['k']", view=view)(calls)

        return run

    def without(calls: int) -> None:
        with told.pinned() as view:
            statement("view['k']", view=view)(calls)

    samples = in_turn(
        {
            "without": without,
            "again": without,
            "silent": within(silent, told),
            "recorded": within(spans, told),
            "spanned": within(spans, each_read),
        }
    )
    found = ratios(samples, "without")
    note = "in look-ups without an SDK"
    yield Figure("P12 telemetry", "a look-up, A/A control", *found["again"], note=note)
    yield Figure("P12 telemetry", "a look-up, span does not record", *found["silent"], bar=1.1, note=note)
    yield Figure("P12 telemetry", "a look-up, span records", *found["recorded"], note=f"{note}: counted and timed")
    yield Figure("P12 telemetry", "a look-up, level lookups", *found["spanned"], note=f"{note}: a span each")


def _requests(name: str, told: Run, off: Run, meters: Any, silent: Any, spans: Any) -> Iterator[Figure]:
    from opentelemetry.trace import get_current_span

    histogram = meters.get_meter("bench").create_histogram(f"bench.{name}")

    def by_hand(calls: int) -> None:
        off(calls)
        span = get_current_span()
        for key, value in ATTRIBUTES.items():
            span.set_attribute(key, value)
        histogram.record(1e-6, {"veltrix.origin": "memory"})

    samples = in_turn({"off": _within(spans, off), "hand": _within(spans, by_hand), "told": _within(spans, told)})
    for other in ("hand", "told"):
        samples[other] = [max(b - a, 1e-9) for a, b in zip(samples["off"], samples[other], strict=True)]
    found = ratios({"hand": samples["hand"], "told": samples["told"]}, "hand")
    note = "what telemetry adds to a request whose span records, in five attributes and a histogram record by hand"
    yield Figure("P12 telemetry", f"{name}, span records", *found["told"], bar=1.0, note=note)
    samples = in_turn({"none": told, "off": off, "silent": _within(silent, told), "held": _within(silent, off)})
    found = ratios({"none": samples["none"], "off": samples["off"]}, "none")
    note = "a request, beside the default level where there is no SDK"
    yield Figure("P12 telemetry", f"{name}, off", *found["off"], bar=1.1, note=note)
    found = ratios({"held": samples["held"], "silent": samples["silent"]}, "held")
    note = "a request whose span does not record, beside level off"
    yield Figure("P12 telemetry", f"{name}, span does not record", *found["silent"], note=note)


class _span:
    """A span that is current for the block, whatever its provider decided."""

    def __init__(self, provider: Any) -> None:
        self._around = provider.get_tracer("bench").start_as_current_span("request")

    def __enter__(self) -> None:
        self._around.__enter__()

    def __exit__(self, *_: object) -> None:
        self._around.__exit__(None, None, None)


def _within(provider: Any, run: Run) -> Run:
    """Each request in a server span of its own."""

    def within(calls: int) -> None:
        for _ in range(calls):
            with _span(provider):
                run(1)

    return within


def _asgi(client: ConfigClient) -> Run:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(_message: Any) -> None:
        pass

    served = asgi.ConfigMiddleware(app, client=client)

    def run(calls: int) -> None:
        for _ in range(calls):
            with suppress(StopIteration):
                served({"type": "http"}, None, send).send(None)

    return run


def _wsgi(client: ConfigClient) -> Run:
    def app(_environ: Any, start_response: Any) -> Any:
        start_response("204 No Content", [])
        return []

    served = wsgi.ConfigMiddleware(app, client=client)

    def run(calls: int) -> None:
        for _ in range(calls):
            served({}, _started)

    return run


def _started(_status: str, _headers: Any) -> Any:
    return None
