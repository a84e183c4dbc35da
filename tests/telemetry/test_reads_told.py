"""What a request's span is told where requests, clients and waits are not simple."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, SamplingResult

from tests.support.sdk import Sdk
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, Conflict, KeyMissing, RevisionTimeout, asgi, carry_view, current_view, wsgi
from veltrix_mw.stores.memory import MemoryStore
from veltrix_mw.telemetry import FetchOutcome

WITHIN_S = 20.0


@pytest.fixture
def sdk() -> Iterator[Sdk]:
    made = Sdk()
    yield made
    made.close()


Start = Callable[..., ConfigClient]


@pytest.fixture
def start(sdk: Sdk) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(store: Any = "memory://", **settings: Any) -> ConfigClient:
            client = ConfigClient(
                store, tracer_provider=sdk.tracer_provider, meter_provider=sdk.meter_provider, **settings
            )
            stack.enter_context(client)
            client.wait_for(client.put("k", 1), WITHIN_S)
            sdk.exporter.clear()
            return client

        yield start


def cost(sdk: Sdk) -> dict[str, Any]:
    return {name: value for name, value in (sdk.span("GET /").attributes or {}).items() if name.startswith("veltrix.")}


async def respond(send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def request(sdk: Sdk, app: Any) -> None:
    async def send(_message: Any) -> None:
        pass

    with sdk.app.start_as_current_span("GET /"):
        asyncio.run(app({"type": "http"}, None, send))


def records(sdk: Sdk) -> int:
    return sum(count for count, _ in sdk.points("veltrix.lookup.duration").values())


def test_reads_of_two_clients_and_of_a_pin_within_are_one_sum_told_once(sdk: Sdk, start: Start) -> None:
    outer, inner = start(), start()

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        for _ in range(5):
            current_view()["k"]
        with outer.pinned() as view:
            view["k"]
        with inner.pinned() as view:
            view["k"]
        await respond(send)

    request(sdk, asgi.ConfigMiddleware(asgi.ConfigMiddleware(app, client=inner), client=outer))
    assert cost(sdk)["veltrix.lookup.count"] == 7
    assert records(sdk) == 1


def test_a_wait_for_a_revision_is_part_of_what_config_cost(sdk: Sdk, start: Start) -> None:
    client = start()

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        with pytest.raises(RevisionTimeout):
            await client.await_for(99, 0.05)
        await respond(send)

    request(sdk, asgi.ConfigMiddleware(app, client=client))
    waited = sdk.span("veltrix.fetch")
    assert cost(sdk)["veltrix.lookup.total"] * 1e9 >= waited.end_time - waited.start_time  # type: ignore[operator]
    assert cost(sdk)["veltrix.lookup.count"] == 0


class Late(MemoryStore):
    """Lists once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Event()

    def list(self, *, timeout_s: float) -> Any:
        self.may.wait(WITHIN_S)
        return super().list(timeout_s=timeout_s)


@pytest.mark.parametrize("interface", ["ASGI", "WSGI"])
def test_the_wait_for_the_first_list_is_a_fetch_and_part_of_what_config_cost(sdk: Sdk, interface: str) -> None:
    store = Late()
    with ConfigClient(store, tracer_provider=sdk.tracer_provider, meter_provider=sdk.meter_provider) as client:

        async def app(_scope: Any, _receive: Any, send: Any) -> None:
            await respond(send)

        def plain(_environ: Any, start_response: Any) -> list[bytes]:
            start_response("204 No Content", [])
            return []

        threading.Timer(0.05, store.may.set).start()
        if interface == "ASGI":
            request(sdk, asgi.ConfigMiddleware(app, client=client))
        else:
            with sdk.app.start_as_current_span("GET /"):
                wsgi.ConfigMiddleware(plain, client=client)({}, lambda *_: lambda _: None)
    waited = sdk.span("veltrix.fetch")
    assert waited.attributes == {"veltrix.start": True, "veltrix.result": "hit"}
    assert waited.parent is not None
    assert waited.parent.span_id == sdk.span("GET /").context.span_id
    assert cost(sdk)["veltrix.lookup.total"] * 1e9 >= waited.end_time - waited.start_time  # type: ignore[operator]


@pytest.mark.parametrize("carried", [False, True])
def test_reads_where_no_span_is_current_belong_to_the_requests_trace(sdk: Sdk, start: Start, carried: bool) -> None:
    client = start(lazy=("tenants/",), telemetry="lookups")
    client.wait_for(client.put("tenants/acme/k", 2), WITHIN_S)
    sdk.exporter.clear()

    def read() -> None:
        current_view().fetch("tenants/acme/k")

    def body(_environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        if carried:
            thread = threading.Thread(target=carry_view(read))
            thread.start()
            thread.join()
        else:
            read()
        yield b""

    served = wsgi.ConfigMiddleware(body, client=client)
    with sdk.app.start_as_current_span("GET /") as span:
        answer = served({}, lambda *_: lambda _: None)
    list(answer)  # as servers' instrumentations have it: their span is current no longer
    answer.close()  # type: ignore[attr-defined]
    read_spans = [each for each in sdk.spans() if each.name in {"veltrix.fetch", "veltrix.lookup"}]
    assert [each.name for each in read_spans] == ["veltrix.fetch", "veltrix.lookup"]
    assert {each.parent and each.parent.span_id for each in read_spans} == {span.get_span_context().span_id}


def test_a_derived_value_has_a_span_at_level_lookups(sdk: Sdk, start: Start) -> None:
    client = start(telemetry="lookups")

    def build(view: Any) -> int:
        return int(view["k"])

    with sdk.app.start_as_current_span("GET /"), client.pinned() as view:
        view.derive(build)
    (told,) = [span for span in sdk.spans("veltrix.lookup") if "build" in span.attributes["veltrix.key"]]  # type: ignore[index,operator]
    assert told.attributes["veltrix.result"] == "hit"  # type: ignore[index]


def test_a_cancelled_wait_is_told_as_that_and_recorded_nowhere(sdk: Sdk, start: Start) -> None:
    client = start()

    async def cancelled() -> None:
        task = asyncio.create_task(client.await_for(99, WITHIN_S))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = sdk.points("veltrix.fetch.duration")
    asyncio.run(cancelled())
    waited = sdk.span("veltrix.fetch")
    assert waited.attributes == {"veltrix.revision": 99, "veltrix.result": "cancelled"}
    assert sdk.points("veltrix.fetch.duration") == before


@pytest.mark.parametrize(("level", "named"), [("requests", False), ("lookups", True)])
def test_an_error_that_names_a_key_is_told_by_its_type_below_lookups(
    sdk: Sdk, start: Start, level: str, named: bool
) -> None:
    client = start(telemetry=level)
    with pytest.raises(KeyMissing):
        client.delete("tenants/globex/limit")
    with pytest.raises(Conflict):
        client.put("k", 2, expected=99)
    failed = sdk.spans("veltrix.write")
    assert [span.attributes["error.type"] for span in failed] == ["KeyMissing", "Conflict"]  # type: ignore[index]
    told = "".join(span.to_json() for span in failed)
    assert ("globex" in told) == named


def test_a_call_for_several_is_the_child_of_one_that_records() -> None:
    class Second(Sampler):
        """Lets each but the first be recorded."""

        seen = 0

        def should_sample(self, *arguments: Any, **options: Any) -> SamplingResult:
            Second.seen += 1
            return (ALWAYS_OFF if Second.seen == 1 else ALWAYS_ON).should_sample(*arguments, **options)

        def get_description(self) -> str:
            return "second"

    sdk = Sdk(ParentBased(Second()))
    telemetry = sdk.telemetry()
    outcomes = [FetchOutcome("miss"), FetchOutcome("miss")]
    with (
        telemetry.fetch(outcomes[0], {}),
        telemetry.fetch(outcomes[1], {}),
        telemetry.leading(outcomes),
        sdk.app.start_as_current_span("call"),
    ):
        pass
    call = sdk.span("call")
    assert call.parent is not None
    assert call.parent.span_id == outcomes[1].span.get_span_context().span_id


def test_a_closed_client_is_in_no_gauge(sdk: Sdk, start: Start) -> None:
    closed, live = start(), start()
    closed.close()
    live.wait_for(live.put("k", 2), WITHIN_S)
    live.wait_for(live.put("k", 3), WITHIN_S)

    def newest() -> bool:
        [revision] = sdk.points("veltrix.snapshot.revision").values()
        return bool(revision == live.snapshot.revision)

    wait_until(newest, WITHIN_S, reason="the live one is told of, though the other's snapshot is older")
    assert closed.snapshot.revision < live.snapshot.revision
