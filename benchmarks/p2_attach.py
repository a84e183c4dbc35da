"""P2: attaching a view to a request, in units of the bare floor: a name in scope or environ, plus a ContextVar."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from benchmarks.harness import Figure, in_turn, ratios
from veltrix_mw import ConfigClient, Freshness, asgi, wsgi

_floor: ContextVar[Any] = ContextVar("floor")


class AsgiFloor:
    """The least that any middleware does that puts something into the request's context."""

    def __init__(self, app: Any, value: Any) -> None:
        self.app = app
        self.value = value

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {})["config"] = self.value
        token = _floor.set(self.value)
        try:
            await self.app(scope, receive, send)
        finally:
            _floor.reset(token)


class WsgiFloor:
    """The same for WSGI."""

    def __init__(self, app: Any, value: Any) -> None:
        self.app = app
        self.value = value

    def __call__(self, environ: Any, start_response: Any) -> Any:
        environ["config"] = self.value
        token = _floor.set(self.value)
        try:
            return self.app(environ, start_response)
        finally:
            _floor.reset(token)


async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
    pass


def wsgi_app(_environ: Any, _start_response: Any) -> Any:
    return []


def _asgi(app: Any) -> Callable[[int], None]:
    def run(calls: int) -> None:
        for _ in range(calls):
            coroutine = app({"type": "http"}, None, None)
            with suppress(StopIteration):
                coroutine.send(None)

    return run


def _wsgi(app: Any) -> Callable[[int], None]:
    def run(calls: int) -> None:
        for _ in range(calls):
            app({}, None)

    return run


def measure() -> list[Figure]:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    figures = []
    provider = MeterProvider([InMemoryMetricReader()])
    rule = Freshness("k/", max_age_s=20, on_stale="fail")
    with (
        ConfigClient("memory://", meter_provider=provider) as client,
        ConfigClient("memory://", meter_provider=provider, freshness=(rule,)) as fresh,
    ):
        for each in (client, fresh):
            each.put("k/k", 1)
            each.wait_ready()
        pairs = {
            "ASGI": (
                _asgi(asgi_app),
                _asgi(AsgiFloor(asgi_app, 1)),
                _asgi(asgi.ConfigMiddleware(asgi_app, client=client)),
                _asgi(asgi.ConfigMiddleware(asgi_app, client=fresh)),
            ),
            "WSGI": (
                _wsgi(wsgi_app),
                _wsgi(WsgiFloor(wsgi_app, 1)),
                _wsgi(wsgi.ConfigMiddleware(wsgi_app, client=client)),
                _wsgi(wsgi.ConfigMiddleware(wsgi_app, client=fresh)),
            ),
        }
        labels = {"control": "A/A control", "ours": "a view", "fresh": "a view, freshness="}
        for name, (bare, floor, ours, refusing) in pairs.items():
            samples = in_turn({"bare": bare, "floor": floor, "control": floor, "ours": ours, "fresh": refusing})
            for other in ("floor", *labels):  # what the middleware adds to the bare app
                samples[other] = [
                    max(with_it - without, 1e-9)
                    for with_it, without in zip(samples[other], samples["bare"], strict=True)
                ]
            found = ratios({key: samples[key] for key in ("floor", *labels)}, "floor")
            for other, label in labels.items():
                bar = 2.0 if other == "ours" else None
                figures.append(Figure("P2 attach", f"{name}, {label}", *found[other], bar=bar, note="in bare floors"))
    return figures
