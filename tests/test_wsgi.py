"""The WSGI middleware, between a server and an app that are both watched: what a request sees, and who notices."""

from __future__ import annotations

import contextvars
import gc
import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.support.waiting import wait_until
from veltrix_mw import (
    ConfigClient,
    KeyMissing,
    NoCurrentView,
    NotReady,
    Put,
    SettingsError,
    View,
    carry_view,
    current_view,
)
from veltrix_mw.wsgi import VIEW_KEY, ConfigMiddleware

Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[bytes], object]]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

TEXT = [("Content-Type", "text/plain")]


@pytest.fixture
def client() -> Iterator[ConfigClient]:
    with ConfigClient("memory://") as client:
        client.wait_for(client.put("checkout/max_items", 41))
        yield client


def request(**more: Any) -> Environ:
    environ: Environ = {}
    setup_testing_defaults(environ)
    environ["QUERY_STRING"] = ""
    environ.update(more)
    return environ


class Server:
    """A WSGI server: starts the response at the first part, as they all do, and keeps what is sent."""

    def __init__(self) -> None:
        self.status = ""
        self.headers: list[tuple[str, str]] = []
        self.parts: list[bytes] = []
        self.starts = 0

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        assert exc_info is not None or not self.status
        self.status, self.headers = status, headers
        self.starts += 1
        return self.parts.append

    def run(self, app: App, environ: Environ) -> list[bytes]:
        body = app(environ, self.start_response)
        try:
            for part in body:
                assert self.status
                self.parts.append(part)
        finally:
            if hasattr(body, "close"):
                body.close()
        return self.parts


def run(app: App, environ: Environ | None = None) -> list[bytes]:
    return Server().run(app, request() if environ is None else environ)


def read() -> bytes:
    return b"%d" % current_view()["checkout/max_items"]


class Parts:
    """An iterable with a close, which reads config at each step."""

    def __init__(self) -> None:
        self.closed: list[bytes] = []
        self.left = 2

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if not self.left:
            raise StopIteration
        self.left -= 1
        return read()

    def close(self) -> None:
        self.closed.append(read())


class SizedParts(Parts):
    def __len__(self) -> int:
        return 2


def as_list(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", TEXT)
    return [read(), read()]


def as_tuple(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", TEXT)
    return (read(), read())


def as_generator(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", TEXT)
    return (read() for _ in range(2))


def as_generator_function(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    view = environ[VIEW_KEY]
    assert view is current_view(), "all of it runs at the first step"
    start_response("200 OK", TEXT)
    yield read()
    yield read()


def as_iterator(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", TEXT)
    return Parts()


def as_sized(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", TEXT)
    return SizedParts()


def by_write(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    write = start_response("200 OK", TEXT)
    write(read())
    write(read())
    return []


def write_and_iterate(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", TEXT)(read())
    return iter([read()])


def restarted(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", TEXT)
    try:
        raise RuntimeError("half way")
    except RuntimeError:
        start_response("500 Internal Server Error", TEXT, sys.exc_info())
    return [read(), read()]


def restarted_in_the_body(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", TEXT)
    try:
        raise RuntimeError("half way")
    except RuntimeError:
        start_response("500 Internal Server Error", TEXT, sys.exc_info())
    yield read()
    yield read()


SHAPES = [
    as_list,
    as_tuple,
    as_generator,
    as_generator_function,
    as_iterator,
    as_sized,
    by_write,
    write_and_iterate,
    restarted,
    restarted_in_the_body,
]


def empty(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("204 No Content", [])
    return []


def empty_iterator(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("204 No Content", [])
    return iter([])


# What a request sees


@pytest.mark.parametrize("app", SHAPES)
def test_every_shape_of_app_reads_its_view_to_the_last_byte(client: ConfigClient, app: App) -> None:
    assert run(ConfigMiddleware(app, client=client)) == [b"41", b"41"]
    with pytest.raises(NoCurrentView):
        current_view()


@pytest.mark.parametrize("revision_header", [False, True])
@pytest.mark.parametrize("app", [*SHAPES, empty, empty_iterator])
def test_the_validator_finds_no_fault_on_either_side(client: ConfigClient, app: App, revision_header: bool) -> None:
    inner = cast("App", validator(cast("Any", app)))
    middleware = ConfigMiddleware(inner, client=client, revision_header=revision_header)
    outer = cast("App", validator(cast("Any", middleware)))
    server = Server()
    expected = [] if app in {empty, empty_iterator} else [b"41", b"41"]
    assert server.run(outer, request()) == expected
    if revision_header:
        assert ("X-Config-Revision", str(client.snapshot.revision)) in server.headers
    gc.collect()  # the validator complains of an iterator that was not closed when it is collected


def test_a_body_in_flight_keeps_its_revision_and_the_next_request_sees_the_change(client: ConfigClient) -> None:
    wrapped = ConfigMiddleware(as_generator, client=client)
    body = iter(wrapped(request(), Server().start_response))
    seen = [next(body)]
    client.wait_for(client.put("checkout/max_items", 80))
    seen.append(next(body))
    assert seen == [b"41", b"41"]
    assert run(wrapped) == [b"80", b"80"]


def test_the_environ_is_the_servers_own_with_one_name_more(client: ConfigClient) -> None:
    environ = request()
    before = dict(environ)
    seen: list[Any] = []

    def app(inner: Environ, start_response: StartResponse) -> Iterable[bytes]:
        seen.extend((inner, start_response))
        return empty(inner, start_response)

    server = Server()
    start = server.start_response
    ConfigMiddleware(app, client=client)(environ, start)
    assert seen[0] is environ
    assert seen[1] is start
    assert isinstance(environ.pop(VIEW_KEY), View)
    assert environ == before


def test_a_middleware_without_a_client_is_refused() -> None:
    with pytest.raises(SettingsError, match="client is a ConfigClient, not NoneType"):
        ConfigMiddleware(as_list, client=None)  # type: ignore[arg-type]


# What the server sees of the body


class MarkedList(list[bytes]):
    """A list of another type: its iteration is its own."""

    def __iter__(self) -> Iterator[bytes]:
        return (read() for _ in range(len(self)))


@pytest.mark.parametrize("body", [[b"a"], [], (b"a", b"b")], ids=["list", "empty list", "tuple"])
def test_a_complete_body_goes_back_untouched(client: ConfigClient, body: Iterable[bytes]) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", TEXT)
        return body

    assert ConfigMiddleware(app, client=client)(request(), Server().start_response) is body


def test_the_servers_file_wrapper_goes_back_untouched_whether_a_class_or_a_function(client: ConfigClient) -> None:
    file = io.BytesIO(b"content")

    class GetitemWrapper:
        """What gunicorn has: it is no iterator, and is recognized by its type."""

        def __init__(self, filelike: io.BytesIO, block: int = 8192) -> None:
            self.filelike = filelike

        def __getitem__(self, key: int) -> bytes:
            raise IndexError

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", TEXT)
        wrapped.append(environ["wsgi.file_wrapper"](file))
        return cast("Iterable[bytes]", wrapped[-1])

    wrapped: list[Any] = []
    middleware = ConfigMiddleware(app, client=client)
    for wrapper in (FileWrapper, GetitemWrapper, lambda filelike, block=8192: filelike):
        environ = request(**{"wsgi.file_wrapper": wrapper})
        assert middleware(environ, Server().start_response) is wrapped[-1]


def test_a_body_that_knows_its_length_still_does_and_others_still_do_not(client: ConfigClient) -> None:
    sized = ConfigMiddleware(as_sized, client=client)(request(), Server().start_response)
    unsized = ConfigMiddleware(as_iterator, client=client)(request(), Server().start_response)
    assert len(sized) == 2  # type: ignore[arg-type]
    assert not hasattr(unsized, "__len__")


def test_what_else_the_apps_body_has_is_reached_through_ours(client: ConfigClient) -> None:
    class Response(Parts):
        status_code = 404

        def __bytes__(self) -> bytes:
            return b"whole"

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", TEXT)
        return Response()

    body: Any = ConfigMiddleware(app, client=client)(request(), Server().start_response)
    assert body.status_code == 404
    assert bytes(body) == b"whole"
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = body.other


def test_a_list_of_another_type_is_iterated_with_the_view(client: ConfigClient) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", TEXT)
        return MarkedList([b"", b""])

    assert run(ConfigMiddleware(app, client=client)) == [b"41", b"41"]


@pytest.mark.parametrize("kind", [Parts, SizedParts])
def test_a_body_is_closed_once_by_the_servers_close_and_not_before(client: ConfigClient, kind: type[Parts]) -> None:
    parts = kind()

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", TEXT)
        return parts

    body: Any = ConfigMiddleware(app, client=client)(request(), Server().start_response)
    assert list(body) == [b"41", b"41"]
    assert parts.closed == []
    body.close()
    assert parts.closed == [b"41"]


def test_a_body_that_was_never_iterated_is_closed_all_the_same(client: ConfigClient) -> None:
    parts = Parts()

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", TEXT)
        return parts

    cast("Any", ConfigMiddleware(app, client=client)(request(), Server().start_response)).close()
    assert parts.closed == [b"41"]
    assert parts.left == 2


def test_a_generator_is_closed_with_the_view(client: ConfigClient) -> None:
    closed: list[bytes] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", TEXT)
        try:
            yield b"part"
        finally:
            closed.append(read())

    body: Any = ConfigMiddleware(app, client=client)(request(), Server().start_response)
    assert next(iter(body)) == b"part"
    client.wait_for(client.put("checkout/max_items", 80))
    body.close()
    assert closed == [b"41"]


def test_a_body_may_be_iterated_in_one_thread_and_closed_in_another(client: ConfigClient) -> None:
    parts = Parts()

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", TEXT)
        return parts

    body: Any = ConfigMiddleware(app, client=client)(request(), Server().start_response)
    client.wait_for(client.put("checkout/max_items", 80))
    seen: list[Any] = []

    def elsewhere(step: Callable[[], Any]) -> None:
        def act() -> None:
            seen.append(step())
            with pytest.raises(NoCurrentView):
                current_view()
            ended.append(True)

        ended: list[bool] = []
        thread = threading.Thread(target=act)
        thread.start()
        thread.join(20)
        assert ended == [True]

    elsewhere(lambda: next(iter(body)))
    seen.append(contextvars.Context().run(next, body))
    elsewhere(body.close)
    assert seen == [b"41", b"41", None]
    assert parts.closed == [b"41"]


def test_steps_of_two_bodies_taken_in_turn_keep_their_views_apart(client: ConfigClient) -> None:
    wrapped = ConfigMiddleware(as_generator, client=client)
    one = iter(wrapped(request(), Server().start_response))
    client.wait_for(client.put("checkout/max_items", 80))
    two = iter(wrapped(request(), Server().start_response))
    assert [next(one), next(two), next(one), next(two)] == [b"41", b"80", b"41", b"80"]


# What the app raises


def _raising(where: str, failure: BaseException) -> App:
    class Body:
        def __iter__(self) -> Iterator[bytes]:
            if where == "iter":
                raise failure
            return self

        def __next__(self) -> bytes:
            if where == "next":
                raise failure
            raise StopIteration

        def close(self) -> None:
            if where == "close":
                raise failure

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if where == "call":
            raise failure
        start_response("200 OK", TEXT)
        return Body()

    return app


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
@pytest.mark.parametrize("where", ["call", "iter", "next", "close"])
def test_what_the_app_raises_reaches_the_server_as_it_is(
    client: ConfigClient, where: str, kind: type[BaseException]
) -> None:
    failure = kind("the app's own")
    with pytest.raises(kind) as raised:
        run(ConfigMiddleware(_raising(where, failure), client=client))
    assert raised.value is failure
    assert raised.value.__context__ is None
    with pytest.raises(NoCurrentView):
        current_view()


# Options


def test_the_revision_header_is_added_to_the_apps_headers(client: ConfigClient) -> None:
    server = Server()
    server.run(ConfigMiddleware(restarted, client=client, revision_header=True), request())
    assert server.starts == 2
    assert server.headers == [*TEXT, ("X-Config-Revision", str(client.snapshot.revision))]
    assert TEXT == [("Content-Type", "text/plain")], "the app's own list is not changed"


def by_header(environ: Environ) -> list[str]:
    return environ.get("HTTP_X_LAYER", "").split(",") if "HTTP_X_LAYER" in environ else []


def test_a_requests_layers_lie_over_the_base(client: ConfigClient) -> None:
    client.wait_for(client.put("tenants/acme/checkout/max_items", 7))
    wrapped = ConfigMiddleware(as_generator, client=client, layers=by_header)
    assert run(wrapped, request(HTTP_X_LAYER="tenants/acme/")) == [b"7", b"7"]
    assert run(wrapped) == [b"41", b"41"]


@pytest.mark.parametrize("layer", ["tenants/acme", "../", "/", ""])
def test_a_layer_that_is_no_prefix_is_answered_400_before_the_app_runs(client: ConfigClient, layer: str) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        raise AssertionError("the app ran")

    wrapped = cast("App", validator(cast("Any", ConfigMiddleware(app, client=client, layers=by_header))))
    server, environ = Server(), request(HTTP_X_LAYER=layer)
    (body,) = server.run(wrapped, environ)
    assert server.status == "400 Bad Request"
    assert ("Content-Length", str(len(body))) in server.headers
    assert VIEW_KEY not in environ


def test_the_refusal_of_a_head_request_has_no_body(client: ConfigClient) -> None:
    wrapped = ConfigMiddleware(as_list, client=client, layers=by_header)
    server = Server()
    assert server.run(wrapped, request(REQUEST_METHOD="HEAD", HTTP_X_LAYER="../")) == []
    assert server.status == "400 Bad Request"


def test_an_invalid_layer_can_be_dropped_and_the_valid_ones_stay(client: ConfigClient) -> None:
    client.wait_for(client.put("tenants/acme/checkout/max_items", 7))
    wrapped = ConfigMiddleware(as_list, client=client, layers=by_header, on_invalid_layer="ignore")
    assert run(wrapped, request(HTTP_X_LAYER="../,tenants/acme/")) == [b"7", b"7"]
    assert client.dropped_layers == 1
    run(wrapped, request(HTTP_X_LAYER="../,x,tenants/acme/"))
    assert client.dropped_layers == 3


def test_an_unknown_layer_policy_is_refused(client: ConfigClient) -> None:
    with pytest.raises(SettingsError, match="on_invalid_layer"):
        ConfigMiddleware(as_list, client=client, on_invalid_layer="drop")  # type: ignore[arg-type]


# Wrapped more than once


@pytest.mark.parametrize("app", SHAPES)
def test_wrapped_twice_a_request_has_one_view(client: ConfigClient, app: App) -> None:
    inner = ConfigMiddleware(app, client=client)

    def between(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        client.wait_for(client.put("checkout/max_items", 80))
        return inner(environ, start_response)

    assert run(ConfigMiddleware(between, client=client)) == [b"41", b"41"]


@pytest.mark.parametrize("app", SHAPES)
def test_two_clients_nested_each_give_their_part_their_own_view(client: ConfigClient, app: App) -> None:
    seen: list[tuple[bytes, Any]] = []
    environ = request()

    def note() -> None:
        seen.append((read(), environ[VIEW_KEY]["checkout/max_items"]))

    with ConfigClient("memory://") as other:
        other.wait_for(other.put("checkout/max_items", 5))
        inner = ConfigMiddleware(app, client=other)

        def between(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
            note()
            body = inner(environ, start_response)
            try:
                yield from body
            finally:
                if hasattr(body, "close"):
                    body.close()
            note()

        assert run(ConfigMiddleware(between, client=client), environ) == [b"5", b"5"]
    assert seen == [(b"41", 41), (b"41", 41)]


def test_an_app_that_raises_under_a_nested_client_leaves_the_outer_view(client: ConfigClient) -> None:
    environ = request()
    with ConfigClient("memory://") as other:
        inner = ConfigMiddleware(_raising("call", RuntimeError("the app's own")), client=other)

        def between(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
            with pytest.raises(RuntimeError):
                inner(environ, start_response)
            assert environ[VIEW_KEY] is current_view()
            return as_list(environ, start_response)

        assert run(ConfigMiddleware(between, client=client), environ) == [b"41", b"41"]


@pytest.fixture
def layered(client: ConfigClient) -> ConfigClient:
    """Regions are the outer layers, tenants the inner ones."""
    settings = {"regions/eu/checkout/max_items": 5, "regions/eu/both": "eu", "tenants/acme/both": "acme"}
    client.wait_for(client.write([Put(key, value) for key, value in settings.items()]))
    return client


def eu(environ: Environ) -> list[str]:
    return ["regions/eu/"]


def acme(environ: Environ) -> list[str]:
    return ["tenants/acme/"]


@pytest.mark.parametrize("streamed", [False, True])
def test_inner_layers_lie_over_outer_ones_at_one_revision_and_for_the_inner_part_alone(
    layered: ConfigClient, streamed: bool
) -> None:
    client, seen = layered, list[Any]()

    def note() -> Any:
        assert environ[VIEW_KEY] is current_view()
        return current_view()["checkout/max_items"], current_view()["both"]

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", TEXT)
        parts = (b"%d %s" % (note()[0], note()[1].encode()) for _ in range(2))
        return parts if streamed else list(parts)

    inner = ConfigMiddleware(app, client=client, layers=acme)

    def between(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(note())
        client.wait_for(client.write([Put("regions/eu/checkout/max_items", 6), Put("tenants/acme/both", "new")]))
        body: Any = inner(environ, start_response)
        parts = list(body)
        if streamed:
            body.close()
        seen.append(note())
        return parts

    environ = request()
    assert run(ConfigMiddleware(between, client=client, layers=eu), environ) == [b"5 acme", b"5 acme"]
    assert seen == [(5, "eu"), (5, "eu")]


def test_inner_layers_that_the_outer_middleware_laid_already_change_nothing(layered: ConfigClient) -> None:
    seen: list[View] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(current_view())
        return empty(environ, start_response)

    def between(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(current_view())
        return inner(environ, start_response)

    inner = ConfigMiddleware(app, client=layered, layers=acme)
    run(ConfigMiddleware(between, client=layered, layers=acme))
    assert seen[0] is seen[1]


def test_an_inner_layer_that_is_no_prefix_is_answered_400_and_the_outer_part_keeps_its_view(
    layered: ConfigClient,
) -> None:
    inner = ConfigMiddleware(_raising("call", AssertionError("the app ran")), client=layered, layers=lambda _: ["../"])

    def between(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        body = inner(environ, start_response)
        assert environ[VIEW_KEY] is current_view()
        assert current_view()["both"] == "eu"
        return body

    server = Server()
    server.run(ConfigMiddleware(between, client=layered, layers=eu), request())
    assert server.status == "400 Bad Request"


def test_an_inner_app_that_raises_below_its_own_layers_leaves_the_outer_view(layered: ConfigClient) -> None:
    inner = ConfigMiddleware(_raising("call", RuntimeError("the app's own")), client=layered, layers=acme)

    def between(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        with pytest.raises(RuntimeError):
            inner(environ, start_response)
        assert environ[VIEW_KEY] is current_view()
        assert current_view()["both"] == "eu"
        return empty(environ, start_response)

    run(ConfigMiddleware(between, client=layered, layers=eu))


@pytest.mark.parametrize("outer", [False, True])
def test_an_inner_middleware_sends_its_header_and_an_outer_one_does_not_repeat_it(
    client: ConfigClient, outer: bool
) -> None:
    server = Server()
    inner = ConfigMiddleware(as_generator, client=client, revision_header=True)
    assert server.run(ConfigMiddleware(inner, client=client, revision_header=outer), request()) == [b"41", b"41"]
    assert server.headers == [*TEXT, ("X-Config-Revision", str(client.snapshot.revision))]


@pytest.mark.parametrize("app", SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"layers": acme}, {"revision_header": True}], ids=["plain", "layers", "header"]
)
def test_an_environ_that_is_sent_again_is_a_new_request(client: ConfigClient, app: App, options: Any) -> None:
    wrapped = ConfigMiddleware(app, client=client, **options)
    environ = request()
    assert run(wrapped, environ) == [b"41", b"41"]
    client.wait_for(client.put("checkout/max_items", 80))
    assert run(wrapped, environ) == [b"80", b"80"]
    with pytest.raises(NoCurrentView):
        current_view()


def test_the_reads_of_an_inner_middleware_are_the_requests_reads_told_once() -> None:
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    with ConfigClient("memory://", tracer_provider=tracers, meter_provider=meters) as client:
        client.wait_for(client.put("checkout/max_items", 41))
        inner = ConfigMiddleware(as_generator, client=client, layers=acme)

        def between(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
            read()
            return inner(environ, start_response)

        with tracers.get_tracer("server").start_as_current_span("request"):
            run(ConfigMiddleware(between, client=client))
        (span,) = [span for span in exporter.get_finished_spans() if span.name == "request"]
        assert (span.attributes or {})["veltrix.lookup.count"] == 3
        data: Any = reader.get_metrics_data()
        found = {metric.name: metric for metric in data.resource_metrics[0].scope_metrics[0].metrics}
        assert [point.count for point in found["veltrix.lookup.duration"].data.data_points] == [1]
    meters.shutdown()


# Threads


def test_a_thread_of_the_apps_own_needs_carry_view(client: ConfigClient) -> None:
    seen: list[bytes] = []

    def bare() -> None:
        with pytest.raises(NoCurrentView, match="carry_view"):
            current_view()
        seen.append(b"none")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        for target in (bare, carry_view(lambda: seen.append(read()))):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join(20)
        return empty(environ, start_response)

    run(ConfigMiddleware(app, client=client))
    assert seen == [b"none", b"41"]


def test_concurrent_requests_each_see_one_revision_while_a_writer_writes(client: ConfigClient) -> None:
    """Two keys are always written together; no request may see them differ, not even across its streamed body."""
    client.wait_for(client.write([Put("pair/left", 0), Put("pair/right", 0)]))
    ended, revisions, faults = threading.Event(), set[int](), []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        left = current_view()["pair/left"]
        start_response("200 OK", TEXT)
        if current_view()["pair/right"] != left:
            faults.append("in the app")
        for _ in range(5):
            view = current_view()
            if not view["pair/left"] == view["pair/right"] == environ[VIEW_KEY]["pair/left"] == left:
                faults.append("in the body")
            yield b""
        revisions.add(current_view().revision)

    def serve() -> None:
        # Until requests have seen 20 revisions: then the writer surely wrote in the midst of them.
        deadline_s = time.monotonic() + 40
        while len(revisions) < 20 and not faults and time.monotonic() < deadline_s:
            run(wrapped)

    def write() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            client.write([Put("pair/left", number), Put("pair/right", number)])

    wrapped = ConfigMiddleware(app, client=client)
    writer, servers = threading.Thread(target=write), [threading.Thread(target=serve) for _ in range(4)]
    for thread in (writer, *servers):
        thread.start()
    for thread in servers:
        thread.join(60)
    ended.set()
    writer.join(20)
    assert faults == []
    assert len(revisions) >= 20


# The first request


def test_the_first_request_starts_the_client_and_waits_for_its_first_list(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'config.db'}"
    with ConfigClient(url) as writer:
        writer.put("checkout/max_items", 41)
    client = ConfigClient(url)
    wrapped = ConfigMiddleware(as_generator, client=client)
    assert client.status().tiers[0].state == "stopped", "wrapping starts nothing"
    try:
        assert run(wrapped) == [b"41", b"41"]
    finally:
        client.close()


def test_a_store_that_is_away_fails_no_request_and_is_served_when_it_comes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'config.db'}"
    client = ConfigClient(url, start_timeout_s=0.1, defaults={"other": 1})

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", TEXT)
        try:
            return [read()]
        except (NotReady, KeyMissing):  # an empty file is there a moment before its first key
            return [b"%d" % current_view()["other"]]

    wrapped = ConfigMiddleware(app, client=client)
    try:
        assert run(wrapped) == [b"1"]
        with ConfigClient(url) as writer:
            writer.put("checkout/max_items", 41)
        wait_until(lambda: run(wrapped) == [b"41"], 10, reason="the value is served")
    finally:
        client.close()
