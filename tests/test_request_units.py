"""What the middlewares load before a handler runs: the lazy units of a request's layers, and those it wants beside."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
import trio

from veltrix_mw import ConfigClient, NotLoaded, SettingsError, View, asgi, current_view, wsgi
from veltrix_mw.errors import StoreUnavailable
from veltrix_mw.protocols import Position, RawUnit
from veltrix_mw.stores.memory import MemoryStore

Handler = Callable[[], Any]
Serve = Callable[..., int]


class AskedStore(MemoryStore):
    """Notes which units it is asked for."""

    def __init__(self) -> None:
        super().__init__(lazy=("tenants/", "users/"))
        self.asked: list[list[str]] = []
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def read_units(self, names: Sequence[str], position: Position, *, timeout_s: float) -> dict[str, RawUnit]:
        self.asked.append(sorted(names))
        self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return super().read_units(names, position, timeout_s=timeout_s)


@pytest.fixture
def store() -> AskedStore:
    return AskedStore()


@pytest.fixture
def client(store: AskedStore) -> Iterator[ConfigClient]:
    with ConfigClient(store, fetch_timeout_s=10) as client:
        client.wait_ready()
        for key, value in {"limit": 1, "tenants/acme/limit": 5, "users/1/name": "ann"}.items():
            revision = client.put(key, value)
        client.wait_for(revision)
        yield client
        store.gate.set()


def serve_wsgi(client: ConfigClient, handler: Handler, *around: dict[str, Any]) -> int:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        handler()
        start_response("200 OK", [])
        return []

    for options in around or ({},):
        app = wsgi.ConfigMiddleware(app, client=client, **options)  # type: ignore[assignment]
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    answered: list[str] = []
    body = app(environ, lambda status, headers: answered.append(status))
    b"".join(body)
    return int(answered[0].split()[0])


async def answer_asgi(client: ConfigClient, handler: Handler, *around: dict[str, Any]) -> int:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        handler()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    for options in around or ({},):
        app = asgi.ConfigMiddleware(app, client=client, **options)  # type: ignore[assignment]
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is asked for")

    await app({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, send)
    status: int = sent[0]["status"]
    return status


def serve_asyncio(client: ConfigClient, handler: Handler, *around: dict[str, Any]) -> int:
    return asyncio.run(answer_asgi(client, handler, *around))


def serve_trio(client: ConfigClient, handler: Handler, *around: dict[str, Any]) -> int:
    return trio.run(answer_asgi, client, handler, *around)


@pytest.fixture(params=[serve_wsgi, serve_asyncio, serve_trio], ids=["wsgi", "asyncio", "trio"])
def serve(request: pytest.FixtureRequest) -> Serve:
    served: Serve = request.param
    return served


def layers(*prefixes: str) -> dict[str, Any]:
    return {"layers": lambda _: prefixes}


def prefetch(*keys: str) -> dict[str, Any]:
    return {"prefetch": lambda _: keys}


def test_a_handler_reads_what_its_layers_and_prefetch_name(
    client: ConfigClient, store: AskedStore, serve: Serve
) -> None:
    read: list[Any] = []

    def handler() -> None:
        view = current_view()
        read.extend((view["limit"], view["users/1/name"], view.get("users/1/none"), dict(view.section("users/1/"))))

    options = {**layers("tenants/acme/", "regions/eu/"), **prefetch("users/1/name", "limit")}
    assert serve(client, handler, options) == 200
    assert read == [5, "ann", None, {"name": "ann"}]
    assert sorted(itertools.chain(*store.asked)) == ["tenants/acme", "users/1"]


def test_layers_of_the_client_are_loaded_too(store: AskedStore, client: ConfigClient, serve: Serve) -> None:
    read: list[Any] = []
    with ConfigClient(store, layers=("tenants/acme/",)) as layered:
        layered.wait_ready()
        assert serve(layered, lambda: read.append(current_view()["limit"])) == 200
    assert read == [5]


def test_what_the_view_was_given_stays_when_it_is_held_no_more(
    client: ConfigClient, store: AskedStore, serve: Serve
) -> None:
    read: list[Any] = []

    def handler() -> None:
        units = client._views.units
        assert units is not None
        units._cache.clear()
        client.wait_for(client.put("tenants/acme/limit", 6))
        units._cache.clear()
        read.append(current_view()["limit"])

    assert serve(client, handler, layers("tenants/acme/")) == 200
    assert read == [5]


def test_a_unit_that_cannot_be_loaded_is_told_by_the_read_that_needs_it(
    client: ConfigClient, store: AskedStore, serve: Serve
) -> None:
    store.error = StoreUnavailable("the store is away")
    read: list[Any] = []

    def handler() -> None:
        read.append(current_view().fetch("limit", default=None) if store.error is None else None)
        with pytest.raises(NotLoaded, match="the store is away"):
            current_view()["limit"]
        store.error = None
        read.append(current_view().fetch("limit"))

    assert serve(client, handler, layers("tenants/acme/")) == 200
    assert read == [None, 5]


def test_a_key_that_is_none_is_answered_400_before_the_handler_runs(client: ConfigClient, serve: Serve) -> None:
    ran: list[Any] = []
    assert serve(client, lambda: ran.append(1), prefetch("tenants/../admin")) == 400
    assert ran == []


@pytest.mark.parametrize("tenant", ["acme/keys", "acme/checkout/deep"])
def test_one_tenant_cannot_name_what_lies_within_anothers_unit(client: ConfigClient, serve: Serve, tenant: str) -> None:
    ran: list[Any] = []
    assert serve(client, lambda: ran.append(1), layers(f"tenants/{tenant}/")) == 400
    assert ran == []
    ignoring = {**layers(f"tenants/{tenant}/"), "on_invalid_layer": "ignore"}
    assert serve(client, lambda: ran.append(current_view()._request_layers), ignoring) == 200
    assert ran == [()]


def test_or_dropped_and_counted(client: ConfigClient, serve: Serve) -> None:
    read: list[Any] = []
    options = {**prefetch("tenants/../admin", "users/1/name"), "on_invalid_layer": "ignore"}
    assert serve(client, lambda: read.append(current_view()["users/1/name"]), options) == 200
    assert (read, client.dropped_layers) == (["ann"], 1)


def test_keys_given_as_one_str_are_the_apps_fault(client: ConfigClient, serve: Serve) -> None:
    with pytest.raises(SettingsError, match="sequence of keys"):
        serve(client, lambda: None, {"prefetch": lambda _: "users/1/name"})


def test_a_middleware_further_in_loads_into_the_same_request(
    client: ConfigClient, store: AskedStore, serve: Serve
) -> None:
    read: list[Any] = []

    def handler() -> None:
        assert client._views.units is not None
        client._views.units._cache.clear()  # it is the view that has them
        view = current_view()
        read.extend((view["limit"], view["users/1/name"], view.revision))

    revision = client.view().revision
    assert serve(client, handler, prefetch("users/1/name"), layers("tenants/acme/")) == 200  # the inner one first
    assert read == [5, "ann", revision]
    read.clear()
    assert serve(client, handler, layers("tenants/acme/"), prefetch("users/1/name")) == 200
    assert read == [5, "ann", revision]


def test_requests_have_views_of_their_own_where_something_is_lazy(client: ConfigClient, serve: Serve) -> None:
    seen: list[View] = []
    for _ in range(2):
        serve(client, lambda: seen.append(current_view()))
    assert seen[0] is not seen[1]
    assert seen[0] != seen[1]
    with ConfigClient("memory://") as eager:
        eager.wait_ready()
        seen.clear()
        for _ in range(2):
            serve(eager, lambda: seen.append(current_view()), prefetch("a"))
        assert seen[0] is seen[1]


def test_a_loop_goes_on_while_units_are_loaded(client: ConfigClient, store: AskedStore) -> None:
    read: list[Any] = []

    async def main() -> None:
        store.gate.clear()
        request = asyncio.ensure_future(
            answer_asgi(client, lambda: read.append(current_view()["limit"]), layers("tenants/acme/"))
        )
        while not store.asked:
            await asyncio.sleep(0)
        assert not read
        store.gate.set()
        assert await request == 200

    asyncio.run(main())
    assert read == [5]
