"""What the served project answers: which worker, which revision, which value; and two streams that can be held up."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from django.http import HttpRequest, JsonResponse, StreamingHttpResponse
from django.urls import path

from django_veltrix import config
from tests.support.waiting import wait_until
from veltrix_mw import current_view


def read(request: HttpRequest) -> JsonResponse:
    view = request.config
    return JsonResponse({"pid": os.getpid(), "revision": view.revision, "greeting": view.get("greeting")})


def _part() -> bytes:
    assert current_view().revision == config.revision
    return f"{os.getpid()} {config.revision} {config.get('greeting')}\n".encode()


def stream(request: HttpRequest) -> StreamingHttpResponse:
    """One part, then nothing until the file named by the query is there, then the last part."""

    def parts(gate: Path) -> Iterator[bytes]:
        yield _part()
        wait_until(gate.exists, 20, reason="the test lets the stream go on")
        yield _part()

    return StreamingHttpResponse(parts(Path(request.GET["gate"])), content_type="text/plain")


async def stream_async(request: HttpRequest) -> StreamingHttpResponse:
    """The same, on the event loop."""

    async def parts(gate: Path) -> AsyncIterator[bytes]:
        yield _part()
        await asyncio.to_thread(wait_until, gate.exists, 20, reason="the test lets the stream go on")
        yield _part()

    return StreamingHttpResponse(parts(Path(request.GET["gate"])), content_type="text/plain")


urlpatterns = [path("config", read), path("stream", stream), path("stream-async", stream_async)]
