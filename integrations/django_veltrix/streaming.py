"""Streamed bodies: the request's view is current while each part is made.

Owns what happens to a `StreamingHttpResponse` after the middleware has returned it; knows no settings.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

from django.http import StreamingHttpResponse
from django.http.response import HttpResponseBase

from veltrix_mw import Pinned

__all__ = ["carry", "is_streamed"]


def is_streamed(response: HttpResponseBase) -> bool:
    """Whether the body is still to be made, part by part.

    A file is not: assigning the content of a `FileResponse` would make it forget its file, and with it
    `wsgi.file_wrapper` and the file's closing. A `FileResponse` over a generator has no file, and is.
    """
    return response.streaming and getattr(response, "file_to_stream", None) is None


def carry(response: HttpResponseBase, pinned: Pinned) -> None:
    """Make `pinned` current around each step of the body and around its closing, then report it, once.

    Around each step, not from first to last: a body is iterated after the middleware, in whichever context and
    thread the server likes, and may be closed in another.
    """
    streamed = cast("StreamingHttpResponse", response)
    parts: Any = streamed.streaming_content
    streamed.streaming_content = _AsyncParts(parts, pinned) if streamed.is_async else _Parts(parts, pinned)
    close = streamed.close

    def closing() -> None:
        pinned.__enter__()
        try:
            close()
        finally:
            pinned.leave()
            pinned.report()

    streamed.close = closing  # type: ignore[method-assign]


class _Parts:
    """The parts of a body that is iterated synchronously."""

    __slots__ = ("_parts", "_pinned")

    def __init__(self, parts: Iterator[bytes], pinned: Pinned) -> None:
        self._parts = parts
        self._pinned = pinned

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        pinned = self._pinned
        pinned.__enter__()
        try:
            return next(self._parts)
        finally:
            pinned.leave()


class _AsyncParts:
    """The parts of a body that is iterated asynchronously."""

    __slots__ = ("_parts", "_pinned")

    def __init__(self, parts: AsyncIterator[bytes], pinned: Pinned) -> None:
        self._parts = parts
        self._pinned = pinned

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        pinned = self._pinned
        pinned.__enter__()
        try:
            return await anext(self._parts)
        finally:
            pinned.leave()
