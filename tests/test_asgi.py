"""The ASGI middleware, driven as a server drives it: what a request sees, and that nobody else sees a difference."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import json
import logging
import re
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from blockbuster import blockbuster_ctx
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.support.waiting import wait_until
from veltrix_mw import (
    ConfigClient,
    NoCurrentView,
    NotReady,
    Put,
    SettingsError,
    StoreUnavailable,
    View,
    carry_view,
    current_view,
)
from veltrix_mw.asgi import VIEW_KEY, ConfigMiddleware
from veltrix_mw.protocols import Listing
from veltrix_mw.stores.memory import MemoryStore

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@pytest.fixture
def client() -> Iterator[ConfigClient]:
    with ConfigClient("memory://") as client:
        client.wait_for(client.put("checkout/max_items", 41))
        yield client


def http(**more: Any) -> Scope:
    return {"type": "http", "method": "GET", "path": "/", "headers": [], **more}


def websocket(**more: Any) -> Scope:
    return {"type": "websocket", "path": "/", "headers": [], **more}


class Server:
    """The other side of one connection: hands out `incoming`, keeps what is sent."""

    def __init__(self, *incoming: Message) -> None:
        self.incoming = list(incoming)
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        return self.incoming.pop(0)

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(self, app: App, scope: Scope) -> list[Message]:
        await app(scope, self.receive, self.send)
        return self.sent


def run(app: App, scope: Scope, *incoming: Message) -> list[Message]:
    return asyncio.run(Server(*incoming).run(app, scope))


async def ok(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"1")]})
    await send({"type": "http.response.body", "body": b"ok"})


# What a request sees


@pytest.mark.parametrize("scope", [http(), websocket()], ids=["http", "websocket"])
def test_a_connection_has_its_view_in_the_scope_and_as_the_current_one(client: ConfigClient, scope: Scope) -> None:
    seen: list[View] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend((scope["state"]["config"], scope[VIEW_KEY], current_view()))

    run(ConfigMiddleware(app, client=client), scope)
    assert len(seen) == 3
    assert seen[0] is seen[1] is seen[2]
    assert seen[0]["checkout/max_items"] == 41


def test_a_request_keeps_its_revision_and_the_next_one_sees_the_change(client: ConfigClient) -> None:
    seen: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(current_view()["checkout/max_items"])
        await client.await_for(await client.aput("checkout/max_items", 80))
        seen.append(current_view()["checkout/max_items"])
        seen.append(scope["state"]["config"].renew()["checkout/max_items"])

    wrapped = ConfigMiddleware(app, client=client)
    run(wrapped, http())
    assert seen == [41, 41, 80]
    run(wrapped, http())
    assert seen[3:] == [80, 80, 80]


def test_other_scopes_pass_untouched(client: ConfigClient) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        with pytest.raises(NoCurrentView):
            current_view()

    scope = {"type": "some.extension"}
    run(ConfigMiddleware(app, client=client), scope)
    assert seen == [{"type": "some.extension"}]
    assert seen[0] is scope


def test_the_scope_is_the_servers_own_with_two_names_more(client: ConfigClient) -> None:
    scope = http(state={"theirs": 1})
    state = scope["state"]

    async def app(inner: Scope, receive: Receive, send: Send) -> None:
        assert inner is scope
        inner["route"] = "found"

    run(ConfigMiddleware(app, client=client), scope)
    assert scope["route"] == "found", "outer middleware sees what inner parts add"
    assert scope["state"] is state
    assert state["theirs"] == 1
    assert set(state) == {"theirs", "config"}
    assert set(scope) - set(http()) == {"state", "route", VIEW_KEY}


def test_the_view_stays_in_the_scope_after_the_app_and_not_in_the_context(client: ConfigClient) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("the app's own")

    async def server_error(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(RuntimeError, match="the app's own"):
            await ConfigMiddleware(failing, client=client)(scope, receive, send)
        assert scope["state"]["config"]["checkout/max_items"] == 41
        with pytest.raises(NoCurrentView):
            current_view()

    run(server_error, http())


def test_the_attribute_has_the_name_that_was_asked_for(client: ConfigClient) -> None:
    scope = http()
    run(ConfigMiddleware(ok, client=client, attribute="settings"), scope)
    assert isinstance(scope["state"]["settings"], View)
    assert "config" not in scope["state"]


def test_without_the_header_option_every_message_is_the_apps_own(client: ConfigClient) -> None:
    message = {"type": "http.response.start", "status": 204}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(message)

    (sent,) = run(ConfigMiddleware(app, client=client), http())
    assert sent is message


def test_the_revision_header_is_added_to_the_apps_headers(client: ConfigClient) -> None:
    start, body = run(ConfigMiddleware(ok, client=client, revision_header=True), http())
    assert start["headers"] == [(b"x-app", b"1"), (b"x-config-revision", b"%d" % client.snapshot.revision)]
    assert body == {"type": "http.response.body", "body": b"ok"}


def test_the_revision_header_does_not_change_the_apps_message(client: ConfigClient) -> None:
    message = {"type": "http.response.start", "status": 204}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(message)

    (sent,) = run(ConfigMiddleware(app, client=client, revision_header=True), http())
    assert message == {"type": "http.response.start", "status": 204}
    assert sent["headers"] == [(b"x-config-revision", b"%d" % client.snapshot.revision)]


def test_what_the_app_raises_reaches_the_server_as_it_is(client: ConfigClient) -> None:
    failure = RuntimeError("the app's own")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise failure

    with pytest.raises(RuntimeError) as raised:
        run(ConfigMiddleware(app, client=client), http())
    assert raised.value is failure
    assert raised.value.__context__ is None


def test_a_middleware_without_a_client_is_refused() -> None:
    with pytest.raises(SettingsError, match="client is a ConfigClient, not str"):
        ConfigMiddleware(ok, client="memory://")  # type: ignore[arg-type]


def test_an_unknown_layer_policy_is_refused(client: ConfigClient) -> None:
    with pytest.raises(SettingsError, match="on_invalid_layer"):
        ConfigMiddleware(ok, client=client, on_invalid_layer="drop")  # type: ignore[arg-type]


# Wrapped more than once


def test_wrapped_twice_a_request_has_one_view(client: ConfigClient) -> None:
    seen: list[View] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend((scope["state"]["config"], current_view()))

    async def between(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["config"])
        await client.await_for(await client.aput("checkout/max_items", 80))
        await ConfigMiddleware(app, client=client)(scope, receive, send)

    run(ConfigMiddleware(between, client=client, revision_header=True), http())
    assert seen[0] is seen[1] is seen[2]
    assert seen[0]["checkout/max_items"] == 41


@pytest.mark.parametrize("attribute", ["config", "inner_config"])
def test_two_clients_nested_each_give_their_part_their_own_view(client: ConfigClient, attribute: str) -> None:
    seen: dict[str, list[Any]] = {}

    def note(name: str, scope: Scope) -> None:
        seen[name] = [current_view()["who"], scope["state"]["config"]["who"], scope[VIEW_KEY]["who"]]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        note("inner", scope)

    with ConfigClient("memory://") as other:
        client.wait_for(client.put("who", "outer"))
        other.wait_for(other.put("who", "inner"))
        inner = ConfigMiddleware(app, client=other, attribute=attribute)

        async def between(scope: Scope, receive: Receive, send: Send) -> None:
            note("before", scope)
            await inner(scope, receive, send)
            note("after", scope)

        scope = http()
        run(ConfigMiddleware(between, client=client), scope)
    config = "inner" if attribute == "config" else "outer"
    assert seen == {"before": ["outer"] * 3, "inner": ["inner", config, "inner"], "after": ["outer"] * 3}
    assert set(scope["state"]) == {"config"}


@pytest.fixture
def layered(client: ConfigClient) -> ConfigClient:
    """Regions are the outer layers, tenants the inner ones."""
    settings = {"regions/eu/checkout/max_items": 5, "regions/eu/both": "eu", "tenants/acme/both": "acme"}
    client.wait_for(client.write([Put(key, value) for key, value in settings.items()]))
    return client


def eu(scope: Scope) -> list[str]:
    return ["regions/eu/"]


def acme(scope: Scope) -> list[str]:
    return ["tenants/acme/"]


@pytest.mark.parametrize("make", [http, websocket])
@pytest.mark.parametrize("attribute", ["config", "inner_config"])
def test_inner_layers_lie_over_outer_ones_at_one_revision_and_for_the_inner_part_alone(
    layered: ConfigClient, attribute: str, make: Callable[[], Scope]
) -> None:
    client, scope, seen = layered, make(), list[Any]()

    def note(name: str) -> None:
        view = scope["state"][name]
        assert view is scope[VIEW_KEY]
        assert view is current_view()
        seen.append((view["checkout/max_items"], view["both"]))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        note(attribute)

    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        note(attribute)
        raise RuntimeError("the app's own")

    async def between(scope: Scope, receive: Receive, send: Send) -> None:
        changed = [Put("regions/eu/checkout/max_items", 6), Put("tenants/acme/both", "new")]
        note("config")
        await client.await_for(await client.awrite(changed))
        await ConfigMiddleware(app, client=client, layers=acme, attribute=attribute)(scope, receive, send)
        note("config")
        with pytest.raises(RuntimeError):
            await ConfigMiddleware(failing, client=client, layers=acme, attribute=attribute)(scope, receive, send)
        note("config")
        assert set(scope["state"]) == {"config"}

    run(ConfigMiddleware(between, client=client, layers=eu), scope)
    assert seen == [(5, "eu"), (5, "acme"), (5, "eu"), (5, "acme"), (5, "eu")]


def test_an_inner_middleware_sets_the_attribute_it_was_asked_for_while_its_app_runs(client: ConfigClient) -> None:
    scope, seen = http(), []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["inner_config"] is scope["state"]["config"] is current_view())

    inner = ConfigMiddleware(app, client=client, attribute="inner_config")
    run(ConfigMiddleware(inner, client=client), scope)
    assert seen == [True]
    assert set(scope["state"]) == {"config"}


def test_an_inner_layer_that_is_no_prefix_is_answered_400_and_the_outer_part_keeps_its_view(
    layered: ConfigClient,
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the app ran")

    async def between(scope: Scope, receive: Receive, send: Send) -> None:
        await ConfigMiddleware(app, client=layered, layers=lambda scope: ["../"])(scope, receive, send)
        assert scope["state"]["config"] is scope[VIEW_KEY] is current_view()
        assert current_view()["both"] == "eu"

    start, _ = run(ConfigMiddleware(between, client=layered, layers=eu), http())
    assert start["status"] == 400


@pytest.mark.parametrize("outer", [False, True])
def test_an_inner_middleware_sends_its_header_and_an_outer_one_does_not_repeat_it(
    client: ConfigClient, outer: bool
) -> None:
    inner = ConfigMiddleware(ok, client=client, revision_header=True)
    start, _ = run(ConfigMiddleware(inner, client=client, revision_header=outer), http())
    assert start["headers"] == [(b"x-app", b"1"), (b"x-config-revision", b"%d" % client.snapshot.revision)]


@pytest.mark.parametrize(
    "options", [{}, {"layers": acme}, {"revision_header": True}], ids=["plain", "layers", "header"]
)
def test_a_scope_that_is_sent_again_is_a_new_request(client: ConfigClient, options: Any) -> None:
    seen: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["state"]["config"] is scope[VIEW_KEY] is current_view()
        seen.append(current_view()["checkout/max_items"])

    scope, wrapped = http(), ConfigMiddleware(app, client=client, **options)
    run(wrapped, scope)
    client.wait_for(client.put("checkout/max_items", 80))
    run(wrapped, scope)
    assert seen == [41, 80]


@pytest.mark.parametrize("traced_outside", [True, False])
def test_the_reads_of_an_inner_middleware_are_told_before_the_last_message_and_once(traced_outside: bool) -> None:
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = tracers.get_tracer("server")

    def traced(app: App) -> App:
        async def tracing(scope: Scope, receive: Receive, send: Send) -> None:
            with tracer.start_as_current_span("request", end_on_exit=False) as span:

                async def sending(message: Message) -> None:
                    if message["type"] == "http.response.body":
                        span.end()
                    await send(message)

                await app(scope, receive, sending)

        return tracing

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert current_view()["checkout/max_items"] == 41
        await ok(scope, receive, send)

    async def between(scope: Scope, receive: Receive, send: Send) -> None:
        assert current_view()["checkout/max_items"] == 41
        inner = ConfigMiddleware(app, client=client, layers=acme)
        await (inner if traced_outside else traced(inner))(scope, receive, send)

    with ConfigClient("memory://", tracer_provider=tracers, meter_provider=meters) as client:
        client.wait_for(client.put("checkout/max_items", 41))
        outer = ConfigMiddleware(between, client=client)
        run(traced(outer) if traced_outside else outer, http())
        (span,) = [span for span in exporter.get_finished_spans() if span.name == "request"]
        assert (span.attributes or {})["veltrix.lookup.count"] == (2 if traced_outside else 1)
        data: Any = reader.get_metrics_data()
        found = {metric.name: metric for metric in data.resource_metrics[0].scope_metrics[0].metrics}
        assert [point.count for point in found["veltrix.lookup.duration"].data.data_points] == [1]
    meters.shutdown()


# Layers


def by_header(scope: Scope) -> list[str]:
    return [value.decode() for name, value in scope["headers"] if name == b"x-layer"]


def test_a_requests_layers_lie_over_the_base(client: ConfigClient) -> None:
    client.wait_for(client.put("tenants/acme/checkout/max_items", 7))
    scope, other = http(headers=[(b"x-layer", b"tenants/acme/")]), http()
    wrapped = ConfigMiddleware(ok, client=client, layers=by_header)
    run(wrapped, scope)
    run(wrapped, other)
    assert scope["state"]["config"]["checkout/max_items"] == 7
    assert other["state"]["config"]["checkout/max_items"] == 41


@pytest.mark.parametrize("layer", [b"tenants/acme", b"../", b"tenants/\xc3\xa9/", b"/", b""])
def test_a_layer_that_is_no_prefix_is_answered_400_before_the_app_runs(client: ConfigClient, layer: bytes) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the app ran")

    scope = http(headers=[(b"x-layer", layer)])
    start, body = run(ConfigMiddleware(app, client=client, layers=by_header), scope)
    assert start["status"] == 400
    assert (b"content-length", b"%d" % len(body["body"])) in start["headers"]
    assert layer == b"" or layer == b"/" or layer not in body["body"], "what was sent is not echoed"
    assert VIEW_KEY not in scope


def test_a_websocket_with_an_invalid_layer_is_closed_with_1008(client: ConfigClient) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the app ran")

    scope = websocket(headers=[(b"x-layer", b"../")])
    server = Server({"type": "websocket.connect"})
    asyncio.run(server.run(ConfigMiddleware(app, client=client, layers=by_header), scope))
    (closed,) = server.sent
    assert (closed["type"], closed["code"]) == ("websocket.close", 1008)
    assert server.incoming == [], "the connect was taken first"


@pytest.mark.parametrize("as_generator", [False, True])
def test_an_invalid_layer_can_be_dropped_and_the_valid_ones_stay(client: ConfigClient, as_generator: bool) -> None:
    client.wait_for(client.put("tenants/acme/checkout/max_items", 7))

    def layers(scope: Scope) -> Any:
        found = by_header(scope)
        return (layer for layer in found) if as_generator else found

    scope = http(headers=[(b"x-layer", b"tenants/acme/"), (b"x-layer", b"../")])
    run(ConfigMiddleware(ok, client=client, layers=layers, on_invalid_layer="ignore"), scope)
    assert scope["state"]["config"]["checkout/max_items"] == 7
    assert client.dropped_layers == 1


def test_layers_that_are_a_str_are_the_apps_mistake_and_not_the_requests(client: ConfigClient) -> None:
    with pytest.raises(SettingsError, match="sequence of prefixes"):
        run(ConfigMiddleware(ok, client=client, layers=lambda scope: "tenants/acme/"), http())


# What carries the view


def test_tasks_threads_and_generators_of_a_request_keep_its_view(client: ConfigClient) -> None:
    seen: dict[str, int] = {}

    async def later(changed: asyncio.Event) -> None:
        await changed.wait()
        seen["task"] = current_view()["checkout/max_items"]

    async def stream(changed: asyncio.Event) -> AsyncGenerator[int]:
        yield current_view()["checkout/max_items"]
        await changed.wait()
        yield current_view()["checkout/max_items"]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        changed = asyncio.Event()
        task = asyncio.create_task(later(changed))
        parts = stream(changed)
        seen["first part"] = await anext(parts)
        await client.await_for(await client.aput("checkout/max_items", 80))
        changed.set()
        seen["second part"] = await anext(parts)
        seen["thread"] = await asyncio.to_thread(lambda: current_view()["checkout/max_items"])
        await parts.aclose()
        background.append(task)

    async def main() -> None:
        await Server().run(ConfigMiddleware(app, client=client), http())
        await background[0]  # it outlives the request

    background: list[asyncio.Task[None]] = []
    asyncio.run(main())
    assert seen == {"task": 41, "first part": 41, "second part": 41, "thread": 41}


def test_run_in_executor_needs_carry_view(client: ConfigClient) -> None:
    def read() -> int:
        value: int = current_view()["checkout/max_items"]
        return value

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(NoCurrentView, match="carry_view"):
            await loop.run_in_executor(None, read)
        assert await loop.run_in_executor(None, carry_view(read)) == 41

    run(ConfigMiddleware(app, client=client), http())


def test_a_cancelled_request_leaves_no_view_behind(client: ConfigClient) -> None:
    async def main() -> None:
        entered = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            entered.set()
            await asyncio.Event().wait()

        wrapped = ConfigMiddleware(app, client=client)

        async def request() -> None:
            try:
                await wrapped(http(), server.receive, server.send)
            finally:
                with pytest.raises(NoCurrentView):
                    current_view()

        server = Server()
        task = asyncio.create_task(request())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_a_request_that_the_garbage_collector_closes_in_another_context_is_silent(client: ConfigClient) -> None:
    class Forever:
        def __await__(self) -> Generator[None]:
            yield

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Forever()

    server = Server()
    request = ConfigMiddleware(app, client=client)(http(), server.receive, server.send)
    contextvars.copy_context().run(request.send, None)
    del request
    gc.collect()  # an exception ignored here is a warning, and a warning is an error
    with pytest.raises(NoCurrentView):
        current_view()


def test_concurrent_requests_each_see_one_revision_while_a_writer_writes(client: ConfigClient) -> None:
    """Two keys are always written together; no request may see them differ, not even across its streamed body."""
    client.wait_for(client.write([Put("pair/left", 0), Put("pair/right", 0)]))
    stopping, revisions = threading.Event(), set()

    def write() -> None:
        number = 0
        while not stopping.is_set():
            number += 1
            client.write([Put("pair/left", number), Put("pair/right", number)])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        view = current_view()
        left, revision = view["pair/left"], view.revision
        await asyncio.sleep(0)
        assert current_view()["pair/right"] == left
        for _ in range(5):
            part = (current_view().revision, current_view()["pair/left"], scope["state"]["config"]["pair/right"])
            await send({"type": "http.response.body", "body": json.dumps(part).encode(), "more_body": True})
            assert part == (revision, left, left)
            assert await asyncio.to_thread(lambda: current_view()["pair/right"]) == left
        revisions.add(revision)

    async def main() -> None:
        wrapped = ConfigMiddleware(app, client=client)
        # Until requests have seen 20 revisions: then the writer surely wrote in the midst of them.
        deadline_s = time.monotonic() + 40
        while len(revisions) < 20 and time.monotonic() < deadline_s:
            await asyncio.gather(*(Server().run(wrapped, http()) for _ in range(20)))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        asyncio.run(main())
    finally:
        stopping.set()
        writer.join()
    assert len(revisions) >= 20


# The lifespan


class Life:
    """A server's lifespan of an app, step by step."""

    def __init__(self, app: App, state: dict[str, Any] | None = None) -> None:
        self.to_app: asyncio.Queue[Message] = asyncio.Queue()
        self.from_app: asyncio.Queue[Message] = asyncio.Queue()
        scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0"}}
        if state is not None:
            scope["state"] = state
        self.scope = scope
        self.task = asyncio.ensure_future(app(scope, self.to_app.get, self.from_app.put))

    async def tell(self, kind: str) -> str:
        await self.to_app.put({"type": f"lifespan.{kind}"})
        answer = asyncio.ensure_future(self.from_app.get())
        await asyncio.wait({answer, self.task}, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        if not answer.done():
            answer.cancel()
            await self.task
            raise AssertionError("the app ended without an answer")
        kind = (await answer)["type"]
        return kind.removeprefix("lifespan.")


async def living(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that knows lifespans."""
    if scope["type"] != "lifespan":
        await ok(scope, receive, send)
        return
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


def running(client: ConfigClient) -> bool:
    return client.status().tiers[0].state != "stopped"


def unstarted() -> ConfigClient:
    return ConfigClient("memory://")


def test_the_lifespan_starts_the_client_and_closes_it_before_it_is_over() -> None:
    client = unstarted()

    async def main() -> None:
        life = Life(ConfigMiddleware(living, client=client))
        assert await life.tell("startup") == "startup.complete"
        assert running(client)
        assert await life.tell("shutdown") == "shutdown.complete"
        assert not running(client)
        await life.task

    asyncio.run(main())


def test_a_client_that_the_caller_started_is_the_callers_to_close() -> None:
    client = unstarted()

    async def main() -> None:
        life = Life(ConfigMiddleware(living, client=client))
        await life.tell("startup")
        await life.tell("shutdown")
        await life.task
        assert running(client)

    with client:
        asyncio.run(main())
    assert not running(client)


def test_two_apps_on_one_client_close_it_when_the_last_one_ends() -> None:
    client = unstarted()

    async def main() -> None:
        one, two = Life(ConfigMiddleware(living, client=client)), Life(ConfigMiddleware(living, client=client))
        await one.tell("startup")
        await two.tell("startup")
        await one.tell("shutdown")
        assert running(client)
        await two.tell("shutdown")
        assert not running(client)
        await asyncio.gather(one.task, two.task)

    asyncio.run(main())


def test_the_lifespans_scope_and_state_are_the_servers_own() -> None:
    client, state = unstarted(), {"theirs": 1}
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        scope["state"]["pool"] = 2
        await living(scope, receive, send)

    async def main() -> None:
        life = Life(ConfigMiddleware(app, client=client), state)
        await life.tell("startup")
        assert seen[0] is life.scope
        state.clear()  # as granian does before the shutdown
        assert await life.tell("shutdown") == "shutdown.complete"
        assert not running(client)
        await life.task

    asyncio.run(main())
    assert state == {}


async def _raises_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        raise ValueError("this app can only handle HTTP")
    await ok(scope, receive, send)


async def _returns_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "lifespan":
        await ok(scope, receive, send)


@pytest.mark.parametrize("kind", [ValueError, AssertionError, KeyError, NotImplementedError, TypeError])
def test_what_apps_raise_that_know_no_lifespan_is_answered_for_and_logged_by_its_type(
    kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    client = unstarted()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise kind("what the app says")

    async def main() -> None:
        life = Life(ConfigMiddleware(app, client=client))
        assert await life.tell("startup") == "startup.complete"
        assert await life.tell("shutdown") == "shutdown.complete"
        await life.task

    with caplog.at_level(logging.INFO, "veltrix_mw"):
        asyncio.run(main())
    said = [record.getMessage() for record in caplog.records if "lifespan" in record.getMessage()]
    assert said == [f"veltrix.no_lifespan error={kind.__name__}"]


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionRefusedError("the database is away"),
        RuntimeError("the app's own"),
        MemoryError(),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "a ValueError, but of another cause"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_any_other_failure_at_once_is_the_servers_to_see_and_closes_the_client(failure: Exception) -> None:
    client = unstarted()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise failure

    async def main() -> None:
        with pytest.raises(type(failure)) as raised:
            await Life(ConfigMiddleware(app, client=client)).tell("startup")
        assert raised.value is failure
        assert not running(client)

    asyncio.run(main())


@pytest.mark.parametrize("app", [_raises_at_once, _returns_at_once])
def test_an_app_that_knows_no_lifespan_is_answered_for_and_served(app: App) -> None:
    client = unstarted()

    async def main() -> None:
        wrapped = ConfigMiddleware(app, client=client)
        life = Life(wrapped)
        assert await life.tell("startup") == "startup.complete"
        assert running(client)
        start, _ = await Server().run(wrapped, http())
        assert start["status"] == 200
        assert await life.tell("shutdown") == "shutdown.complete"
        assert not running(client)
        await life.task

    asyncio.run(main())


def test_an_app_that_fails_with_an_error_of_its_own_at_once_raises_to_the_server_and_the_client_is_closed() -> None:
    client = unstarted()

    class OwnError(Exception):
        pass

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise OwnError

    async def main() -> None:
        with pytest.raises(OwnError):
            await Life(ConfigMiddleware(app, client=client)).tell("startup")
        assert not running(client)

    asyncio.run(main())


def test_an_app_that_raises_after_it_received_raises_to_the_server_and_the_client_is_closed() -> None:
    client, failure = unstarted(), RuntimeError("the database is away")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        raise failure

    async def main() -> None:
        life = Life(ConfigMiddleware(app, client=client))
        with pytest.raises(RuntimeError) as raised:
            await life.tell("startup")
        assert raised.value is failure
        assert not running(client)

    asyncio.run(main())


def test_an_app_that_answered_without_receiving_is_not_answered_for() -> None:
    client = unstarted()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "lifespan.startup.complete"})

    async def main() -> None:
        life = Life(ConfigMiddleware(app, client=client))
        assert await life.tell("startup") == "startup.complete"
        await life.task
        assert life.from_app.empty()

    asyncio.run(main())
    assert not running(client)


def test_a_failed_start_up_closes_the_client_before_the_server_hears_of_it() -> None:
    client = unstarted()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    async def main() -> None:
        life = Life(ConfigMiddleware(app, client=client))
        assert await life.tell("startup") == "startup.failed"
        assert not running(client)
        await life.task

    asyncio.run(main())


def test_a_cancelled_lifespan_closes_the_client() -> None:
    client = unstarted()

    async def main() -> None:
        life = Life(ConfigMiddleware(living, client=client))
        await life.tell("startup")
        life.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await life.task

    asyncio.run(main())
    assert not running(client)


def test_a_lifespan_that_is_closed_without_a_loop_closes_the_client() -> None:
    client = unstarted()

    class Forever:
        def __await__(self) -> Generator[None]:
            yield

    async def receive() -> Message:
        await Forever()
        raise AssertionError

    lifespan = ConfigMiddleware(living, client=client)({"type": "lifespan"}, receive, Server().send)
    lifespan.send(None)
    assert running(client)
    lifespan.close()
    assert not running(client)


def test_closing_the_client_does_not_block_the_loop() -> None:
    client = unstarted()

    async def main() -> None:
        life = Life(ConfigMiddleware(living, client=client))
        with blockbuster_ctx():
            await life.tell("startup")
            await life.tell("shutdown")
            await life.task

    asyncio.run(main())
    assert not running(client)


# The first request


def test_without_a_lifespan_the_first_request_starts_the_client_and_waits_for_its_first_list(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'config.db'}"
    with ConfigClient(url) as writer:
        writer.put("checkout/max_items", 41)
    client, scope = ConfigClient(url), http()
    try:
        run(ConfigMiddleware(ok, client=client), scope)
        assert scope["state"]["config"]["checkout/max_items"] == 41
    finally:
        client.close()


def test_a_cold_start_on_sqlite_does_nothing_on_the_loop_that_blocks(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'config.db'}"
    with ConfigClient(url) as writer:
        writer.put("checkout/max_items", 41)
    client = ConfigClient(url, last_known_good=tmp_path / "kept")
    scope = http()

    async def main() -> None:
        with blockbuster_ctx():
            await Server().run(ConfigMiddleware(ok, client=client), scope)

    try:
        asyncio.run(main())
        assert scope["state"]["config"]["checkout/max_items"] == 41
    finally:
        client.close()


class AwayStore(MemoryStore):
    """A store that cannot be reached until it is `there`."""

    def __init__(self) -> None:
        super().__init__()
        self.there = threading.Event()

    def list(self, *, timeout_s: float) -> Listing:
        if not self.there.is_set():
            raise StoreUnavailable("away")
        return super().list(timeout_s=timeout_s)


def test_a_store_that_is_away_delays_the_first_requests_once_and_fails_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = ConfigClient(AwayStore(), start_timeout_s=0.2, defaults={"checkout/max_items": 50})
    reads: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        view = scope["state"]["config"]
        reads.append(view["checkout/max_items"])
        with pytest.raises(NotReady, match="away"):
            view["other"]

    async def waits_again(*_: object) -> bool:
        raise AssertionError("the fourth request waits too")

    async def main() -> None:
        wrapped = ConfigMiddleware(app, client=client)
        await asyncio.gather(*(Server().run(wrapped, http()) for _ in range(3)))
        monkeypatch.setattr("veltrix_mw.client.awaited", waits_again)
        await Server().run(wrapped, http())

    try:
        asyncio.run(main())
    finally:
        client.close()
    assert reads == [50] * 4
    (told,) = _not_ready(caplog)
    assert re.fullmatch(r"veltrix\.not_ready reason=(['\"]).*away.*\1", told.getMessage())


def _not_ready(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.getMessage().startswith("veltrix.not_ready")]


def test_a_client_that_becomes_ready_later_is_served_without_a_new_start(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'config.db'}"
    client = ConfigClient(url, start_timeout_s=0.05)
    wrapped = ConfigMiddleware(ok, client=client)
    scope = http()
    try:
        run(wrapped, scope)
        assert scope["state"]["config"].origin == "none"
        with ConfigClient(url) as writer:
            writer.put("checkout/max_items", 41)
        client.wait_ready(10)

        def served() -> int:
            scope = http()
            run(wrapped, scope)
            value: int = scope["state"]["config"].get("checkout/max_items", 0)
            return value

        assert wait_until(served, 10, reason="the value is served") == 41
    finally:
        client.close()


def test_requests_that_were_cancelled_while_they_waited_harm_nobody(caplog: pytest.LogCaptureFixture) -> None:
    store = AwayStore()
    client = ConfigClient(store, start_timeout_s=20)
    wrapped = ConfigMiddleware(ok, client=client)

    async def main() -> None:
        cancelled = asyncio.create_task(Server().run(wrapped, http()))
        waiting = asyncio.create_task(Server().run(wrapped, http()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        store.there.set()
        start, _ = await waiting
        assert start["status"] == 200

    try:
        asyncio.run(main())
    finally:
        client.close()
    assert [record for record in caplog.records if record.name in {"asyncio", "concurrent.futures"}] == []


def test_a_loop_that_closed_while_its_request_waited_is_not_woken(caplog: pytest.LogCaptureFixture) -> None:
    store = AwayStore()
    client = ConfigClient(store, start_timeout_s=20)

    async def main() -> None:
        request = asyncio.create_task(Server().run(ConfigMiddleware(ok, client=client), http()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not request.done()
        request.cancel()

    try:
        asyncio.run(main())
        store.there.set()
        client.wait_ready(10)
    finally:
        client.close()
    assert [record for record in caplog.records if record.name.startswith("concurrent")] == []


# Loops that are not asyncio's


def test_under_trio_the_first_request_waits_for_the_first_list_and_the_lifespan_closes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'config.db'}"
    with ConfigClient(url) as writer:
        writer.put("checkout/max_items", 41)
    client, scope = ConfigClient(url), http()

    async def main() -> None:
        wrapped = ConfigMiddleware(living, client=client)
        await Server().run(wrapped, scope)
        lifespan = Server({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
        sent = await lifespan.run(wrapped, {"type": "lifespan"})
        assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]

    trio.run(main)
    assert scope["state"]["config"]["checkout/max_items"] == 41
    assert not running(client)


def test_under_trio_a_store_that_is_away_fails_no_request(tmp_path: Path) -> None:
    client, scope = ConfigClient(f"sqlite:///{tmp_path / 'missing.db'}", start_timeout_s=0.1), http()
    try:
        trio.run(Server().run, ConfigMiddleware(ok, client=client), scope)
    finally:
        client.close()
    assert scope["state"]["config"].origin == "none"


def test_under_trio_a_cancelled_lifespan_closes_the_client() -> None:
    client = unstarted()

    async def main() -> None:
        async def receive() -> Message:
            await trio.sleep_forever()
            raise AssertionError

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ConfigMiddleware(living, client=client), {"type": "lifespan"}, receive, Server().send)
            await trio.testing.wait_all_tasks_blocked()
            assert running(client)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert not running(client)


def test_on_a_loop_that_nobody_knows_the_first_request_goes_on_without_waiting(tmp_path: Path) -> None:
    client, scope = ConfigClient(f"sqlite:///{tmp_path / 'missing.db'}", start_timeout_s=20), http()
    try:
        server = Server()
        request = ConfigMiddleware(ok, client=client)(scope, server.receive, server.send)
        with pytest.raises(StopIteration):
            request.send(None)
    finally:
        client.close()
    assert server.sent[0]["status"] == 200
