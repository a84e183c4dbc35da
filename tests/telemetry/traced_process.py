"""A process with an app of one framework, all of OpenTelemetry's instrumentations that it may meet, and our middleware.

    python -m tests.telemetry.traced_process FRAMEWORK STORE NAMESPACE ETCD_PORT REDIS_PORT

`STORE` is `gateway`, `grpc` or `mirrored`. Goes through the scenes in turn, and prints what each of them exported, as
JSON, and each planted secret that it found in anything that was told. The instrumentations are for a whole process, so
the tests do not go without one of their own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

from opentelemetry import metrics, trace
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from tests.support.planted import PASSWORD, TENANT, VALUE, take, watching
from tests.support.proxy import Proxy
from tests.support.sdk import Sdk
from veltrix_mw import ConfigClient, StoreUnavailable, current_view

USER: Final = "shop"
WITHIN_S: Final = 30.0
HERD: Final = 50

Ask = Callable[[Sequence[str]], list[int]]


class Begun(SpanProcessor):
    """Counts the fetches that have begun."""

    def __init__(self) -> None:
        self.fetches = 0
        self._lock = threading.Lock()

    def on_start(self, span: Span, parent_context: Any = None) -> None:
        if span.name == "veltrix.fetch":
            with self._lock:
                self.fetches += 1


# --- the apps: /hot reads three keys, one of them absent; /cold/TENANT fetches one of a tenant; each answers the status


def hot() -> int:
    config = current_view()
    return 200 if (config["a"], config.get("b"), "c" in config) == (f"{VALUE}-a", f"{VALUE}-b", False) else 500


def cold(tenant: str) -> int:
    try:
        return 200 if current_view().fetch(f"tenants/{tenant}/limit") == f"{VALUE}-limit" else 500
    except StoreUnavailable:
        return 503


async def acold(tenant: str) -> int:
    try:
        return 200 if await current_view().afetch(f"tenants/{tenant}/limit") == f"{VALUE}-limit" else 500
    except StoreUnavailable:
        return 503


def asgi(client: ConfigClient) -> Ask:
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    from veltrix_mw.asgi import ConfigMiddleware

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        _, page, *rest = scope["path"].split("/")
        status = hot() if page == "hot" else await acold(*rest)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return asgi_asking(OpenTelemetryMiddleware(ConfigMiddleware(app, client=client)))


def wsgi(client: ConfigClient) -> Ask:
    from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
    from werkzeug.test import Client

    from veltrix_mw.wsgi import ConfigMiddleware

    def app(environ: Any, start_response: Any) -> list[bytes]:
        _, page, *rest = environ["PATH_INFO"].split("/")
        start_response(f"{hot() if page == 'hot' else cold(*rest)} So", [])
        return [b""]

    served = OpenTelemetryMiddleware(ConfigMiddleware(app, client=client))
    return asking(lambda path: Client(served).get(path, buffered=True).status_code)


def flask(client: ConfigClient) -> Ask:
    import flask
    from opentelemetry.instrumentation.flask import FlaskInstrumentor

    from flask_veltrix import Veltrix

    FlaskInstrumentor().instrument()
    app = flask.Flask("shop")  # the class is another one from here on
    Veltrix(app, client=client)
    app.get("/hot")(lambda: ("", hot()))
    app.get("/cold/<tenant>", endpoint="cold")(lambda tenant: ("", cold(tenant)))
    return asking(lambda path: app.test_client().get(path, buffered=True).status_code)


def django(client: ConfigClient) -> Ask:
    import django
    from django.conf import settings
    from django.http import HttpResponse
    from django.test import Client
    from django.urls import path
    from opentelemetry.instrumentation.django import DjangoInstrumentor

    routes = sys.modules["routes"] = type(sys)("routes")
    routes.urlpatterns = [  # type: ignore[attr-defined]
        path("hot", lambda _: HttpResponse(status=hot())),
        path("cold/<str:tenant>", lambda _, tenant: HttpResponse(status=cold(tenant))),
    ]
    settings.configure(
        INSTALLED_APPS=["django_veltrix"],
        MIDDLEWARE=["django_veltrix.ConfigMiddleware"],
        ROOT_URLCONF="routes",
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="k",
        LOGGING_CONFIG=None,
        VELTRIX={"CLIENT": client},
    )
    DjangoInstrumentor().instrument()
    django.setup()
    return asking(lambda path: Client().get(path).status_code)


def starlette(client: ConfigClient) -> Ask:
    from opentelemetry.instrumentation.starlette import StarletteInstrumentor
    from starlette import applications
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from starlette_veltrix import ConfigMiddleware

    StarletteInstrumentor().instrument()

    async def hot_page(_request: Request) -> Response:
        return Response(status_code=hot())

    async def cold_page(request: Request) -> Response:
        return Response(status_code=await acold(request.path_params["tenant"]))

    app = applications.Starlette(routes=[Route("/hot", hot_page), Route("/cold/{tenant}", cold_page)])
    app.add_middleware(ConfigMiddleware, client=client)
    return asgi_asking(app)


def fastapi(client: ConfigClient) -> Ask:
    from fastapi import FastAPI, Response
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

    from starlette_veltrix import ConfigMiddleware

    app = FastAPI()
    app.add_middleware(ConfigMiddleware, client=client)

    @app.get("/hot")
    def hot_page() -> Response:  # in a thread of the framework's
        return Response(status_code=hot())

    @app.get("/cold/{tenant}")
    async def cold_page(tenant: str) -> Response:
        return Response(status_code=await acold(tenant))

    FastAPIInstrumentor.instrument_app(app)
    return asgi_asking(app)


APPS: Final = {app.__name__: app for app in (asgi, wsgi, flask, django, starlette, fastapi)}


def asking(get: Callable[[str], int]) -> Ask:
    def ask(paths: Sequence[str]) -> list[int]:
        with ThreadPoolExecutor(len(paths)) as pool:
            return list(pool.map(get, paths))

    return ask


def asgi_asking(app: Any) -> Ask:
    import httpx

    async def all_of_them(paths: Sequence[str]) -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            answers = await asyncio.gather(*(client.get(path, timeout=WITHIN_S) for path in paths))
        return [answer.status_code for answer in answers]

    return lambda paths: asyncio.run(all_of_them(paths))


# --- the scenes


class Stage:
    def __init__(self, framework: str, store: str, namespace: str, etcd_port: int, redis_port: int) -> None:
        self.sdk, self.begun = Sdk(), Begun()
        self.sdk.tracer_provider.add_span_processor(self.begun)
        trace.set_tracer_provider(self.sdk.tracer_provider)
        metrics.set_meter_provider(self.sdk.meter_provider)
        instrument_drivers()
        self.members = [Proxy(etcd_port), Proxy(etcd_port)]
        hosts = ",".join(f"127.0.0.1:{member.port}" for member in self.members)
        transport = "?transport=grpc" if store == "grpc" else ""
        self.mirror = Proxy(redis_port) if store == "mirrored" else None
        self.client = ConfigClient(
            f"etcd://{USER}:{PASSWORD}@{hosts}/{namespace}{transport}",
            mirror=f"redis://:{PASSWORD}@127.0.0.1:{self.mirror.port}/0" if self.mirror else None,
            lazy=("tenants/",),
        )
        self.told: dict[str, Any] = {}
        with self.client:
            self.seed()
            self.ask = APPS[framework](self.client)
            self.play()

    def seed(self) -> None:
        client = self.client
        client.put("a", f"{VALUE}-a")
        last = client.put("b", f"{VALUE}-b")
        for tenant in (TENANT, f"{TENANT}-herd", f"{TENANT}-moved"):
            last = client.put(f"tenants/{tenant}/limit", f"{VALUE}-limit")
        client.wait_for(last, WITHIN_S)
        until(lambda: self.mirror is None or client.status().tiers[-1].state == "following")
        client.wait_for(client.put("b", f"{VALUE}-b"), WITHIN_S)  # what is served comes from there, too

    def play(self) -> None:
        self.ask(["/hot"])  # the first request waits for the start
        with self.scene("hot"):
            self.statuses = self.ask(["/hot"])
        with self.scene("cold"):
            self.statuses = self.ask([f"/cold/{TENANT}"])
        with self.scene("herd"):
            self.herd()
        with self.scene("write"):
            with self.sdk.app.start_as_current_span("job"):
                revision = self.client.put("a", f"{VALUE}-a")
            self.client.wait_for(revision, WITHIN_S)
            until(lambda: any(span.links for span in self.sdk.spans("veltrix.refresh")))
        if self.mirror is None:
            with self.scene("failover"):
                self.lose_member()
            with self.scene("failing"):
                for member in self.members:
                    member.refuse()
                self.statuses = self.ask([f"/cold/{TENANT}-other"])
            for member in self.members:
                member.heal()
        self.told["metrics"] = {
            name: [[dict(attributes), value] for attributes, value in self.sdk.points(name).items()]
            for name in self.sdk.metrics()
        }

    def herd(self) -> None:
        """Nothing is answered before all have asked."""
        gates = self.members if self.mirror is None else [self.mirror]
        for gate in gates:
            gate.blackhole()
        before = self.begun.fetches

        def open_gates() -> None:
            until(lambda: self.begun.fetches == before + HERD)
            for gate in gates:
                gate.heal()

        opening = threading.Thread(target=open_gates)
        opening.start()
        self.statuses = self.ask([f"/cold/{TENANT}-herd"] * HERD)
        opening.join()

    def lose_member(self) -> None:
        """The member that calls go to refuses them."""
        used = self.client._authority._members._here().used  # type: ignore[attr-defined]
        [lost] = [member for member in self.members if member.port == used[1]]
        before = self.failovers()
        lost.refuse()
        self.statuses = self.ask([f"/cold/{TENANT}-moved"])
        until(lambda: self.failovers() > before)
        self.told["lost"] = lost.port

    def failovers(self) -> int:
        return sum(self.sdk.points("veltrix.failovers").values())

    @contextmanager
    def scene(self, name: str) -> Iterator[None]:
        self.sdk.exporter.clear()
        self.statuses: list[int] = []
        yield
        self.told[name] = {"statuses": self.statuses, "spans": [plain(span) for span in self.sdk.spans()]}


def instrument_drivers() -> None:
    from opentelemetry.instrumentation.grpc import GrpcInstrumentorClient
    from opentelemetry.instrumentation.redis import RedisInstrumentor
    from opentelemetry.instrumentation.threading import ThreadingInstrumentor
    from opentelemetry.instrumentation.urllib3 import URLLib3Instrumentor

    for instrumentor in (GrpcInstrumentorClient, RedisInstrumentor, ThreadingInstrumentor, URLLib3Instrumentor):
        instrumentor().instrument()


def until(condition: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + WITHIN_S
    while not condition():
        if time.monotonic() > ends_s:
            raise TimeoutError("it did not come to that")
        threading.Event().wait(0.01)


def plain(span: ReadableSpan) -> dict[str, Any]:
    assert span.instrumentation_scope is not None
    assert span.context is not None
    return {
        "scope": span.instrumentation_scope.name,
        "name": span.name,
        "kind": span.kind.name,
        "id": span.context.span_id,
        "trace": span.context.trace_id,
        "parent": span.parent and span.parent.span_id,
        "links": [link.context.span_id for link in span.links],
        "attributes": dict(span.attributes or {}),
        "status": span.status.status_code.name,
        "events": [event.name for event in span.events],
    }


if __name__ == "__main__":
    framework, store, namespace, *ports = sys.argv[1:]
    logging.getLogger("veltrix_mw").setLevel(logging.DEBUG)
    with watching():
        stage = Stage(framework, store, namespace, *map(int, ports))
    print(json.dumps({**stage.told, "leaks": take()}))
