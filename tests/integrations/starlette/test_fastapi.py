"""FastAPI apps: the parameter `config: RequestConfig`, wherever FastAPI takes parameters.

The annotations of this module are strings (`from __future__ import annotations`), as in many apps.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient

from starlette_veltrix import ConfigMiddleware, RequestConfig, get_config
from veltrix_mw import ConfigClient, NoCurrentView, View, current_view, override_config


@pytest.fixture
def app(client: ConfigClient) -> FastAPI:
    app = FastAPI()
    app.add_middleware(ConfigMiddleware, client=client)
    return app


def value() -> int:
    found: int = current_view()["checkout/max_items"]
    return found


def test_async_and_sync_endpoints_take_the_view_as_a_parameter(client: ConfigClient, app: FastAPI) -> None:
    @app.get("/async")
    async def async_endpoint(config: RequestConfig, request: Request) -> list[Any]:
        return [config["checkout/max_items"], value(), config is request.state.config]

    @app.get("/sync")
    def sync_endpoint(config: RequestConfig, request: Request) -> list[Any]:
        return [config["checkout/max_items"], value(), config is request.state.config]

    http = TestClient(app)
    for path in ("/async", "/sync"):
        assert http.get(path).json() == [41, 41, True]
    client.wait_for(client.put("checkout/max_items", 80))
    for path in ("/async", "/sync"):
        assert http.get(path).json() == [80, 80, True]


def test_the_parameter_is_a_view_and_resolves_in_no_thread(app: FastAPI) -> None:
    seen: list[Any] = []

    @app.get("/")
    async def endpoint(config: RequestConfig) -> None:
        seen.append(config)

    with TestClient(app) as http:
        http.get("/")
        http.get("/")
        threads = {thread.name for thread in threading.enumerate()}
        assert not [name for name in threads if name.startswith("AnyIO worker thread")]
    assert all(isinstance(config, View) for config in seen)


def test_the_parameter_is_no_part_of_the_openapi_schema(app: FastAPI) -> None:
    @app.get("/")
    async def endpoint(config: RequestConfig, page: int = 1) -> int:
        return page

    schema = TestClient(app).get("/openapi.json").json()
    assert [parameter["name"] for parameter in schema["paths"]["/"]["get"]["parameters"]] == ["page"]
    assert "requestBody" not in schema["paths"]["/"]["get"]
    assert "View" not in str(schema)


def test_dependencies_of_every_kind_take_it_and_keep_the_revision(client: ConfigClient, app: FastAPI) -> None:
    ends: list[int] = []

    async def async_dependency(config: RequestConfig) -> int:
        return int(config["checkout/max_items"])

    def sync_dependency(config: RequestConfig) -> int:
        return int(config["checkout/max_items"]) + value()

    async def async_resource(config: RequestConfig) -> AsyncIterator[int]:
        yield config["checkout/max_items"]
        ends.extend((config["checkout/max_items"], value()))

    def sync_resource(config: RequestConfig) -> Iterator[int]:
        yield config["checkout/max_items"]
        ends.extend((config["checkout/max_items"], value()))

    @app.get("/")
    async def endpoint(
        one: int = Depends(async_dependency),
        two: int = Depends(sync_dependency),
        three: int = Depends(async_resource),
        four: int = Depends(sync_resource),
    ) -> list[int]:
        await client.await_for(await client.aput("checkout/max_items", 80))
        return [one, two, three, four, value()]

    assert TestClient(app).get("/").json() == [41, 82, 41, 41, 41]
    assert ends == [41] * 4


def test_a_router_of_its_own_and_included_takes_it(app: FastAPI) -> None:
    router = APIRouter(prefix="/shop")

    @router.get("/")
    async def endpoint(config: RequestConfig) -> int:
        return int(config["checkout/max_items"])

    app.include_router(router)
    assert TestClient(app).get("/shop/").json() == 41


def test_a_websocket_endpoint_takes_it_and_may_renew_it(client: ConfigClient, app: FastAPI) -> None:
    @app.websocket("/")
    async def endpoint(websocket: WebSocket, config: RequestConfig) -> None:
        await websocket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                if await websocket.receive_text() == "renew":
                    config = config.renew()
                await websocket.send_json([config["checkout/max_items"], get_config(websocket)["checkout/max_items"]])

    with TestClient(app).websocket_connect("/") as websocket:
        websocket.send_text("read")
        assert websocket.receive_json() == [41, 41]
        client.wait_for(client.put("checkout/max_items", 80))
        websocket.send_text("read")
        assert websocket.receive_json() == [41, 41]
        websocket.send_text("renew")
        assert websocket.receive_json() == [80, 41]


def test_streams_and_background_tasks_keep_the_revision(client: ConfigClient, app: FastAPI) -> None:
    seen: list[int] = []

    @app.get("/stream")
    async def stream(config: RequestConfig) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield f"{config['checkout/max_items']} {value()} "
            await client.await_for(await client.aput("checkout/max_items", 80))
            yield f"{config['checkout/max_items']} {value()}"

        return StreamingResponse(parts())

    @app.get("/background")
    def background(tasks: BackgroundTasks) -> None:
        async def later() -> None:
            await client.await_for(await client.aput("checkout/max_items", 90))
            seen.append(value())

        tasks.add_task(later)
        tasks.add_task(lambda: seen.append(value()))

    http = TestClient(app)
    assert http.get("/stream").text == "41 41 41 41"
    http.get("/background")
    assert seen == [80, 80]


def test_handlers_of_exceptions_read_it_from_the_request(app: FastAPI) -> None:
    @app.exception_handler(Exception)
    async def handler(request: Request, exc: Exception) -> JSONResponse:
        return JSONResponse(
            [request.state.config["checkout/max_items"], get_config(request)["checkout/max_items"]], status_code=500
        )

    @app.get("/")
    async def endpoint() -> None:
        raise RuntimeError("the app's own")

    answer = TestClient(app, raise_server_exceptions=False).get("/")
    assert (answer.status_code, answer.json()) == (500, [41, 41])


def test_a_mounted_app_takes_it_from_the_app_it_is_mounted_in(app: FastAPI) -> None:
    inner = FastAPI()

    @inner.get("/")
    async def endpoint(config: RequestConfig) -> int:
        return int(config["checkout/max_items"])

    app.mount("/inner", inner)
    assert TestClient(app).get("/inner/").json() == 41


def test_without_the_middleware_the_parameter_says_what_to_do_and_an_override_serves_it() -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(config: RequestConfig) -> int:
        return int(config["checkout/max_items"])

    with pytest.raises(NoCurrentView, match=r"app\.add_middleware"):
        TestClient(app).get("/")
    with override_config({"checkout/max_items": 3}):
        assert TestClient(app).get("/").json() == 3
