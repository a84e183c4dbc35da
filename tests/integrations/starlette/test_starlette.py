"""Starlette apps: every place where Starlette runs the app's code sees the request's view."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blockbuster import blockbuster_ctx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from starlette_veltrix import ConfigMiddleware, get_config
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, NoCurrentView, Put, SettingsError, View, current_view, override_config

Endpoint = Callable[..., Any]


def app_of(client: ConfigClient, *routes: Any, **more: Any) -> Starlette:
    return Starlette(routes=list(routes), middleware=[Middleware(ConfigMiddleware, client=client)], **more)


def value() -> int:
    found: int = current_view()["checkout/max_items"]
    return found


def running(client: ConfigClient) -> bool:
    return client.status().tiers[0].state != "stopped"


# Where the app's code runs


async def async_endpoint(request: Request) -> Response:
    return JSONResponse(
        [request.state.config["checkout/max_items"], get_config(request)["checkout/max_items"], value()]
    )


def sync_endpoint(request: Request) -> Response:
    return JSONResponse(
        [request.state.config["checkout/max_items"], get_config(request)["checkout/max_items"], value()]
    )


class ClassEndpoint(HTTPEndpoint):
    async def get(self, request: Request) -> Response:
        return await async_endpoint(request)


@pytest.mark.parametrize("endpoint", [async_endpoint, sync_endpoint, ClassEndpoint])
def test_an_endpoint_reads_the_view_by_request_state_by_accessor_and_as_the_current_one(
    client: ConfigClient, endpoint: Endpoint
) -> None:
    http = TestClient(app_of(client, Route("/", endpoint)))
    assert http.get("/").json() == [41, 41, 41]
    client.wait_for(client.put("checkout/max_items", 80))
    assert http.get("/").json() == [80, 80, 80]


def test_added_by_add_middleware_it_works_as_well(client: ConfigClient) -> None:
    app = Starlette(routes=[Route("/", async_endpoint)])
    app.add_middleware(ConfigMiddleware, client=client)
    assert TestClient(app).get("/").json() == [41, 41, 41]


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_streamed_body_keeps_its_revision_to_the_last_part(client: ConfigClient, kind: str) -> None:
    def change() -> None:
        client.wait_for(client.put("checkout/max_items", 80))

    async def parts() -> AsyncIterator[str]:
        yield f"{value()} "
        await asyncio.to_thread(change)
        yield f"{value()}"

    def sync_parts() -> Iterator[str]:
        yield f"{value()} "
        change()
        yield f"{value()}"

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(parts() if kind == "async" else sync_parts())

    http = TestClient(app_of(client, Route("/", endpoint)))
    assert http.get("/").text == "41 41"
    assert http.get("/").text == "80 80"


def test_background_tasks_and_threads_keep_the_view(client: ConfigClient) -> None:
    seen: dict[str, int] = {}

    async def async_task() -> None:
        seen["async task"] = value()

    def sync_task() -> None:
        seen["sync task"] = value()

    async def endpoint(request: Request) -> Response:
        seen["thread"] = await run_in_threadpool(value)
        seen["to_thread"] = await asyncio.to_thread(value)
        await client.await_for(await client.aput("checkout/max_items", 80))
        task = async_task if request.query_params["task"] == "async" else sync_task
        return PlainTextResponse("ok", background=BackgroundTask(task))

    http = TestClient(app_of(client, Route("/", endpoint)))
    http.get("/?task=async")
    assert seen == {"thread": 41, "to_thread": 41, "async task": 41}
    http.get("/?task=sync")
    assert seen["sync task"] == 80


def test_a_websocket_keeps_its_view_until_it_asks_for_a_new_one(client: ConfigClient) -> None:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        config = get_config(websocket)
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                if await websocket.receive_text() == "renew":
                    config = config.renew()
                await websocket.send_json([config["checkout/max_items"], value()])

    http = TestClient(app_of(client, WebSocketRoute("/", endpoint)))
    with http.websocket_connect("/") as websocket:

        def ask(what: str) -> Any:
            websocket.send_text(what)
            return websocket.receive_json()

        assert ask("read") == [41, 41]
        client.wait_for(client.put("checkout/max_items", 80))
        assert ask("read") == [41, 41]
        assert ask("renew") == [80, 41]


def test_a_websocket_with_an_invalid_layer_is_closed_with_1008(client: ConfigClient) -> None:
    async def endpoint(websocket: WebSocket) -> None:
        raise AssertionError("the app ran")

    app = Starlette(routes=[WebSocketRoute("/", endpoint)])
    app.add_middleware(ConfigMiddleware, client=client, layers=lambda scope: ["../"])
    with pytest.raises(WebSocketDisconnect) as closed, TestClient(app).websocket_connect("/"):
        pass
    assert closed.value.code == 1008
    assert TestClient(app).get("/").status_code == 400


def test_layers_of_a_request_lie_over_the_base_and_the_header_tells_the_revision(client: ConfigClient) -> None:
    client.wait_for(client.put("tenants/acme/checkout/max_items", 7))
    app = Starlette(routes=[Route("/{tenant}", async_endpoint)])
    app.add_middleware(
        ConfigMiddleware, client=client, layers=lambda scope: [f"tenants{scope['path']}/"], revision_header=True
    )
    http = TestClient(app)
    assert http.get("/acme").json() == [7, 7, 7]
    other = http.get("/zenith")
    assert other.json() == [41, 41, 41]
    assert other.headers["x-config-revision"] == str(client.snapshot.revision)


# Errors


async def failing(request: Request) -> Response:
    raise RuntimeError("the app's own")


async def refusing(request: Request) -> Response:
    raise HTTPException(418)


def test_exception_handlers_read_config_also_the_one_outside_of_all_middleware(client: ConfigClient) -> None:
    async def server_error(request: Request, exc: Exception) -> Response:
        with pytest.raises(NoCurrentView):
            current_view()  # it runs outside of user middleware
        return JSONResponse(
            [request.state.config["checkout/max_items"], get_config(request)["checkout/max_items"]], status_code=500
        )

    def http_error(request: Request, exc: Exception) -> Response:
        return JSONResponse([get_config(request)["checkout/max_items"], value()], status_code=418)

    app = app_of(
        client,
        Route("/fail", failing),
        Route("/refuse", refusing),
        exception_handlers={Exception: server_error, HTTPException: http_error},
    )
    http = TestClient(app, raise_server_exceptions=False)
    assert (http.get("/fail").status_code, http.get("/fail").json()) == (500, [41, 41])
    assert (http.get("/refuse").status_code, http.get("/refuse").json()) == (418, [41, 41])
    with pytest.raises(RuntimeError, match="the app's own"):
        TestClient(app).get("/fail")


# Other middleware


class Watching(BaseHTTPMiddleware):
    """Reads config before and after the app, as far as it can be seen from here."""

    seen: list[Any]

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        self.seen.append(getattr(request.state, "config", None))
        response = await call_next(request)
        self.seen.append(request.state.config)
        return response


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_a_base_http_middleware_may_lie_outside_or_inside(client: ConfigClient, place: str) -> None:
    class Watcher(Watching):
        seen: list[Any] = []  # noqa: RUF012

    async def parts() -> AsyncIterator[str]:
        yield f"{value()} "
        await client.await_for(await client.aput("checkout/max_items", 80))
        yield f"{value()}"

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(parts())

    ours, theirs = Middleware(ConfigMiddleware, client=client), Middleware(Watcher)
    app = Starlette(routes=[Route("/", endpoint)], middleware=[theirs, ours] if place == "outside" else [ours, theirs])
    assert TestClient(app).get("/").text == "41 41"
    before, after = Watcher.seen
    assert (before is None) == (place == "outside")
    assert after["checkout/max_items"] == 41


def test_outer_middleware_sees_the_route_that_was_found(client: ConfigClient) -> None:
    seen: list[Any] = []

    class Outer:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app(scope, receive, send)
            seen.append(scope.get("endpoint"))

    app = Starlette(
        routes=[Route("/items", async_endpoint)],
        middleware=[Middleware(Outer), Middleware(ConfigMiddleware, client=client)],
    )
    TestClient(app).get("/items")
    assert seen == [async_endpoint]


# Several apps and clients


def test_mounted_apps_share_the_view_and_may_be_wrapped_too(client: ConfigClient) -> None:
    bare = Starlette(routes=[Route("/", async_endpoint)])
    wrapped = app_of(client, Route("/", async_endpoint))
    http = TestClient(app_of(client, Mount("/bare", bare), Mount("/wrapped", wrapped)))
    assert http.get("/bare/").json() == [41, 41, 41]
    assert http.get("/wrapped/").json() == [41, 41, 41]


def test_a_wrapped_app_may_be_mounted_in_one_that_is_not_and_starts_at_its_first_request() -> None:
    client = ConfigClient("memory://")
    client.put("checkout/max_items", 41)
    outer = Starlette(routes=[Mount("/shop", app_of(client, Route("/", async_endpoint)))])
    try:
        with TestClient(outer) as http:
            assert not running(client), "a mounted app gets no lifespan"
            assert http.get("/shop/").json() == [41, 41, 41]
    finally:
        client.close()


def test_two_apps_with_two_clients_nested_each_read_their_own(client: ConfigClient) -> None:
    with ConfigClient("memory://") as other:
        other.wait_for(other.put("checkout/max_items", 5))
        inner = app_of(other, Route("/", async_endpoint))
        http = TestClient(app_of(client, Mount("/inner", inner), Route("/", async_endpoint)))
        assert http.get("/inner/").json() == [5, 5, 5]
        assert http.get("/").json() == [41, 41, 41]


# The lifespan and the client


def test_with_a_lifespan_the_client_lives_as_long_as_the_app() -> None:
    client = ConfigClient("memory://")
    client.put("checkout/max_items", 41)
    seen: list[bool] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        seen.append(running(client))
        yield {"pool": "theirs"}
        seen.append(running(client))

    async def endpoint(request: Request) -> Response:
        return JSONResponse([request.state.pool, request.state.config["checkout/max_items"]])

    with TestClient(app_of(client, Route("/", endpoint), lifespan=lifespan)) as http:
        assert http.get("/").json() == ["theirs", 41]
        assert running(client)
    assert seen == [True, True]
    assert not running(client)


def test_without_a_lifespan_the_first_request_starts_the_client() -> None:
    client = ConfigClient("memory://")
    client.put("checkout/max_items", 41)
    app = app_of(client, Route("/", async_endpoint))
    assert not running(client)
    try:
        assert TestClient(app).get("/").json() == [41, 41, 41]
        assert running(client)
    finally:
        client.close()


def test_the_app_may_be_started_again_after_its_lifespan_ended() -> None:
    client = ConfigClient("memory://")
    app = app_of(client, Route("/", async_endpoint))
    for number in (1, 2):
        with TestClient(app) as http:
            client.wait_for(client.put("checkout/max_items", number))
            assert http.get("/").json() == [number] * 3
        assert not running(client)


def test_a_failed_start_up_closes_the_client_and_its_error_reaches_the_server() -> None:
    client = ConfigClient("memory://")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        raise RuntimeError("the database is away")
        yield

    with pytest.raises(RuntimeError, match="the database is away"), TestClient(app_of(client, lifespan=lifespan)):
        pass
    assert not running(client)


def test_a_url_instead_of_a_client_makes_one_that_the_lifespan_closes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'config.db'}"
    with ConfigClient(url) as writer:
        writer.put("checkout/max_items", 41)
    app = Starlette(routes=[Route("/", both)])
    app.add_middleware(ConfigMiddleware, url=url, defaults={"other": 7})
    before = threading.active_count()
    with TestClient(app) as http:
        assert http.get("/").json() == [41, 7]
    assert threading.active_count() == before


async def both(request: Request) -> Response:
    config: View = request.state.config
    return JSONResponse([config["checkout/max_items"], config["other"]])


def test_settings_of_a_mirror_reach_the_client(tmp_path: Path, mirror: str) -> None:
    url = f"sqlite:///{tmp_path / 'config.db'}"
    with ConfigClient(url) as writer:
        writer.put("checkout/max_items", 41)
    app = Starlette(routes=[Route("/", async_endpoint)])
    app.add_middleware(ConfigMiddleware, url=url, mirror=mirror, lazy=["tenants/"], instance="feeder")
    with TestClient(app) as http, ConfigClient(url, mirror=mirror, relay="never") as other:
        wait_until(lambda: other.mirror_state().relay == "feeder", 60, reason="the app to be the relay")
        wait_until(lambda: other.mirror_state().lazy == ("tenants/",), 60, reason="the mirror to be filled")
        assert http.get("/").json() == [41, 41, 41]


def test_without_client_and_url_the_environment_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'config.db'}"
    with ConfigClient(url) as writer:
        writer.put("checkout/max_items", 41)
    app = Starlette(routes=[Route("/", async_endpoint)])
    app.add_middleware(ConfigMiddleware)
    with pytest.raises(SettingsError, match="VELTRIX_URL"), TestClient(app):
        pass
    monkeypatch.setenv("VELTRIX_URL", url)
    with TestClient(app) as http:
        assert http.get("/").json() == [41, 41, 41]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "memory://"}, "url"),
        ({"defaults": {}}, "defaults"),
    ],
)
def test_a_client_together_with_settings_for_another_is_refused(
    client: ConfigClient, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=f"these settings there: {said}"):
        ConfigMiddleware(Starlette(), client=client, **settings)


def test_a_setting_that_no_client_knows_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"ConfigMiddleware: .*maximum_age"):
        ConfigMiddleware(Starlette(), url="memory://", maximum_age=3)


# Without a middleware, and in tests


def test_without_the_middleware_the_accessor_says_what_to_do() -> None:
    async def endpoint(request: Request) -> Response:
        get_config(request)
        raise AssertionError

    with pytest.raises(NoCurrentView, match=r"app\.add_middleware"):
        TestClient(Starlette(routes=[Route("/", endpoint)])).get("/")


def test_overridden_values_are_seen_with_and_without_the_middleware(client: ConfigClient) -> None:
    async def endpoint(request: Request) -> Response:
        return JSONResponse(get_config(request)["checkout/max_items"])

    with override_config({"checkout/max_items": 3}):
        assert TestClient(Starlette(routes=[Route("/", endpoint)])).get("/").json() == 3
        assert TestClient(app_of(client, Route("/", endpoint))).get("/").json() == 3
    assert TestClient(app_of(client, Route("/", endpoint))).get("/").json() == 41


def test_a_cold_start_blocks_no_loop(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'config.db'}"
    with ConfigClient(url) as writer:
        writer.put("checkout/max_items", 41)
    client = ConfigClient(url)
    try:
        with blockbuster_ctx():
            assert TestClient(app_of(client, Route("/", async_endpoint))).get("/").json() == [41, 41, 41]
        client.close()
        with blockbuster_ctx(), TestClient(app_of(client, Route("/", async_endpoint))) as http:
            assert http.get("/").json() == [41, 41, 41]
    finally:
        client.close()


def test_concurrent_requests_each_see_one_revision_while_a_writer_writes(client: ConfigClient) -> None:
    """Two keys are always written together; no request may see them differ, its streamed body included."""
    client.wait_for(client.write([Put("pair/left", 0), Put("pair/right", 0)]))
    stopping, revisions, faults = threading.Event(), set[int](), list[str]()

    async def parts(left: int, revision: int) -> AsyncIterator[str]:
        for _ in range(5):
            view = current_view()
            if not (view["pair/left"] == view["pair/right"] == left and view.revision == revision):
                faults.append("in the body")
            await asyncio.sleep(0)
            yield "part"
        revisions.add(revision)

    async def endpoint(request: Request) -> Response:
        config = request.state.config
        left = config["pair/left"]
        if await run_in_threadpool(lambda: current_view()["pair/right"]) != left:
            faults.append("in a thread")
        return StreamingResponse(parts(left, config.revision))

    def write() -> None:
        number = 0
        while not stopping.is_set():
            number += 1
            client.write([Put("pair/left", number), Put("pair/right", number)])

    def ask() -> None:
        for _ in range(15):
            http.get("/")

    writer = threading.Thread(target=write)
    with TestClient(app_of(client, Route("/", endpoint))) as http:
        asking = [threading.Thread(target=ask) for _ in range(4)]
        for thread in (writer, *asking):
            thread.start()
        for thread in asking:
            thread.join(60)
        stopping.set()
        writer.join(20)
    assert faults == []
    assert len(revisions) > 1, "the writer wrote between the requests"


def test_importing_the_package_loads_no_fastapi() -> None:
    show = "import sys, starlette_veltrix; print('fastapi' in sys.modules, 'starlette' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_without_fastapi_only_the_parameter_is_missing_and_says_what_to_install() -> None:
    script = """
import sys
sys.modules["fastapi"] = None  # what importing it does where it is not installed
import starlette_veltrix
from starlette_veltrix import ConfigMiddleware, get_config
try:
    from starlette_veltrix import RequestConfig
except ImportError as exc:
    print(exc)
try:
    starlette_veltrix.other
except AttributeError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said, unknown = done.stdout.splitlines()
    assert "pip install 'veltrix-mw[fastapi]'" in said
    assert unknown == "module 'starlette_veltrix' has no attribute 'other'"
