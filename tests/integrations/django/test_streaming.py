"""Streamed bodies: they read the request's view to the last byte, and the server finds them as Django made them."""

from __future__ import annotations

import asyncio
import contextvars
import gzip
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import pytest
from asgiref.sync import async_to_sync
from django.core.handlers.wsgi import WSGIHandler
from django.http import FileResponse, HttpRequest, StreamingHttpResponse
from django.test import AsyncClient, Client, RequestFactory

from django_veltrix import ConfigMiddleware, config
from veltrix_mw import NoCurrentView, current_view

MIDDLEWARE = "django_veltrix.ConfigMiddleware"


def nothing_is_current() -> bool:
    try:
        current_view()
    except NoCurrentView:
        return True
    return False


def part(request: HttpRequest) -> bytes:
    """What a body reads: by three names, of which two need the view to be current."""
    assert config["greeting"] == current_view()["greeting"] == request.config["greeting"]
    return f"{config['greeting']} ".encode()


def sync_parts(request: HttpRequest, between: Callable[[], object] = lambda: None) -> Iterator[bytes]:
    yield part(request)
    between()
    yield part(request)


async def async_parts(request: HttpRequest, between: Callable[[], object] = lambda: None) -> AsyncIterator[bytes]:
    yield part(request)
    between()
    await asyncio.sleep(0)
    yield part(request)


async def collected(response: Any) -> bytes:
    return b"".join([piece async for piece in response])


def test_a_generator_under_wsgi_keeps_its_revision_and_leaves_nothing_between_the_parts(site, put):
    client = site(lambda request: StreamingHttpResponse(sync_parts(request)))
    put(client, "greeting", "before")
    response = Client().get("/")
    body = iter(response)
    assert next(body) == b"before "
    assert nothing_is_current()
    put(client, "greeting", "after")
    assert list(body) == [b"before "]
    assert nothing_is_current()


def test_an_async_generator_under_asgi_keeps_its_revision_and_leaves_nothing_between_the_parts(site, put):
    client = site(lambda request: StreamingHttpResponse(async_parts(request)))
    put(client, "greeting", "before")

    async def run() -> None:
        response = await AsyncClient().get("/")
        body = aiter(response)
        assert await anext(body) == b"before "
        assert nothing_is_current()
        await client.await_for(await client.aput("greeting", "after"))
        assert [piece async for piece in body] == [b"before "]
        assert nothing_is_current()

    asyncio.run(run())


def test_a_sync_iterator_under_asgi_reads_the_requests_view(site, put):
    client = site(lambda request: StreamingHttpResponse(sync_parts(request, lambda: put(client, "greeting", "after"))))
    put(client, "greeting", "before")

    async def run() -> bytes:
        response = await AsyncClient().get("/")
        with pytest.warns(Warning, match="must consume synchronous iterators"):
            return await collected(response)

    assert asyncio.run(run()) == b"before before "


def test_an_async_iterator_under_wsgi_reads_the_requests_view(site, put):
    client = site(lambda request: StreamingHttpResponse(async_parts(request, lambda: put(client, "greeting", "after"))))
    put(client, "greeting", "before")
    response = Client().get("/")
    with pytest.warns(Warning, match="must consume asynchronous iterators"):
        assert b"".join(response) == b"before before "


def test_a_stream_of_an_async_view_under_wsgi_and_of_a_sync_view_under_asgi_reads_the_view(site, put):
    async def view(request: HttpRequest) -> StreamingHttpResponse:
        return StreamingHttpResponse(sync_parts(request))

    put(site(view), "greeting", "hello")
    assert b"".join(Client().get("/")) == b"hello hello "


def test_a_body_is_iterated_and_closed_in_other_threads_with_its_view(site, put):
    closed = []

    def parts(request: HttpRequest) -> Iterator[bytes]:
        try:
            yield part(request)
            yield part(request)
        finally:
            closed.append(config["greeting"])

    client = site(lambda request: StreamingHttpResponse(parts(request)))
    put(client, "greeting", "hello")
    response = WSGIHandler()(RequestFactory().get("/").environ, lambda *_: None)
    steps: list[Callable[[], Any]] = [lambda: next(iter(response)), response.close]
    found: list[Any] = []
    for step in steps:
        thread = threading.Thread(
            target=contextvars.Context().run, args=(lambda step=step: found.append((step(), nothing_is_current())),)
        )
        thread.start()
        thread.join()
    assert found == [(b"hello ", True), (None, True)]
    assert closed == ["hello"]


def test_an_abandoned_body_is_closed_once_and_with_its_view(site, put):
    closed = []

    def parts(request: HttpRequest) -> Iterator[bytes]:
        try:
            yield part(request)
        finally:
            closed.append(config["greeting"])

    client = site(lambda request: StreamingHttpResponse(parts(request)))
    put(client, "greeting", "hello")
    response = WSGIHandler()(RequestFactory().get("/").environ, lambda *_: None)
    assert next(iter(response)) == b"hello "
    response.close()
    response.close()
    assert closed == ["hello"]
    assert nothing_is_current()


def test_a_body_that_raises_leaves_nothing_behind(site, put):
    def parts(request: HttpRequest) -> Iterator[bytes]:
        yield part(request)
        raise RuntimeError("of the body")

    put(site(lambda request: StreamingHttpResponse(parts(request))), "greeting", "hello")
    with pytest.raises(RuntimeError, match="of the body"):
        b"".join(Client().get("/"))
    assert nothing_is_current()


def test_an_async_body_cancelled_in_mid_part_cleans_up_with_its_view(site, put):
    closed = []

    async def run() -> None:
        waiting = asyncio.Event()

        async def parts(request: HttpRequest) -> AsyncIterator[bytes]:
            try:
                yield part(request)
                waiting.set()
                await asyncio.Event().wait()
            finally:
                closed.append(config["greeting"])

        client = await asyncio.to_thread(site, lambda request: StreamingHttpResponse(parts(request)))
        await client.await_for(await client.aput("greeting", "hello"))
        response = await AsyncClient().get("/")
        task = asyncio.create_task(collected(response))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert closed == ["hello"]


def test_gzip_further_out_compresses_what_was_read_with_the_view(site, put):
    middleware = ["django.middleware.gzip.GZipMiddleware", MIDDLEWARE]
    client = site(lambda request: StreamingHttpResponse(sync_parts(request)), MIDDLEWARE=middleware)
    put(client, "greeting", "hello")
    body = b"".join(Client().get("/", headers={"Accept-Encoding": "gzip"}))
    assert gzip.decompress(body) == b"hello hello "


def test_gzip_further_in_is_carried_too(site, put):
    middleware = [MIDDLEWARE, "django.middleware.gzip.GZipMiddleware"]
    client = site(lambda request: StreamingHttpResponse(async_parts(request)), MIDDLEWARE=middleware)
    put(client, "greeting", "hello")

    async def run() -> bytes:
        return await collected(await AsyncClient().get("/", headers={"Accept-Encoding": "gzip"}))

    assert gzip.decompress(asyncio.run(run())) == b"hello hello "


def test_listed_twice_it_carries_a_stream_all_the_same(site, put):
    client = site(lambda request: StreamingHttpResponse(sync_parts(request)), MIDDLEWARE=[MIDDLEWARE, MIDDLEWARE])
    put(client, "greeting", "hello")
    assert b"".join(Client().get("/")) == b"hello hello "


# Files


def test_a_file_is_served_by_the_servers_file_wrapper_and_closed_with_it(site, tmp_path: Path):
    source = tmp_path / "served.txt"
    source.write_bytes(b"a file")
    opened = source.open("rb")
    site(lambda request: FileResponse(opened))
    environ = {**RequestFactory().get("/").environ, "wsgi.file_wrapper": FileWrapper}
    body = WSGIHandler()(environ, lambda *_: None)
    assert isinstance(body, FileWrapper)
    assert b"".join(body) == b"a file"
    assert not opened.closed
    body.close()
    assert opened.closed


def test_a_file_stays_the_responses_own_under_both(site, tmp_path: Path):
    source = tmp_path / "served.txt"
    source.write_bytes(b"a file")
    site(lambda request: None)

    def view(request: HttpRequest) -> FileResponse:
        return FileResponse(source.open("rb"))

    async def async_view(request: HttpRequest) -> FileResponse:
        return view(request)

    request = RequestFactory().get("/")
    for response in (ConfigMiddleware(view)(request), async_to_sync(ConfigMiddleware(async_view))(request)):
        assert response.file_to_stream is not None
        assert response["Content-Length"] == "6"
        assert b"".join(response) == b"a file"
        response.close()
        assert response.file_to_stream.closed


def test_a_file_response_over_a_generator_reads_the_requests_view(site, put):
    client = site(lambda request: FileResponse(sync_parts(request), filename="parts.txt"))
    put(client, "greeting", "hello")
    response = Client().get("/")
    assert response.file_to_stream is None
    assert b"".join(response) == b"hello hello "


def test_a_body_of_bytes_is_left_alone(site):
    middleware = ConfigMiddleware(lambda request: StreamingHttpResponse([b"a", b"b"]))
    site(lambda request: None)
    response = middleware(RequestFactory().get("/"))
    assert list(response) == [b"a", b"b"]


# The protocol


@pytest.mark.parametrize("kind", ["stream", "file", "abandoned stream"])
def test_wsgiref_finds_no_fault(site, put, kind):
    def view(request: HttpRequest) -> StreamingHttpResponse:
        return FileResponse(io.BytesIO(b"a file")) if kind == "file" else StreamingHttpResponse(sync_parts(request))

    put(site(view), "greeting", "hello")
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    environ["QUERY_STRING"] = ""
    body = validator(WSGIHandler())(environ, lambda status, headers, exc_info=None: lambda _: None)
    parts = iter(body)
    next(parts)
    if kind != "abandoned stream":
        list(parts)
    body.close()
