"""Awaiting: what a thread finishes, waited for on an event loop: asyncio's or trio's.

Owns the bridge between futures of threads and coroutines; knows nothing of what is waited for.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["awaited", "in_thread", "running_trio"]

T = TypeVar("T")


async def awaited(future: Future[None], timeout_s: float) -> bool:
    """Whether `future` was done in time. On a loop that is neither asyncio's nor trio's it does not wait."""
    if future.done():
        return True
    trio = running_trio()
    if trio is not None:
        # The thread ends by itself, so a cancelled request may leave it behind.
        await trio.to_thread.run_sync(_waited, future, timeout_s, abandon_on_cancel=True)
        return future.done()
    import asyncio

    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return False
    woken = loop.create_future()

    def wake() -> None:
        if not woken.done():
            woken.set_result(None)

    def done(_: Future[None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody is left to wake
            loop.call_soon_threadsafe(wake)

    future.add_done_callback(done)
    try:
        await asyncio.wait_for(woken, timeout_s)
    except TimeoutError:
        return future.done()
    return True


def _waited(future: Future[None], timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        future.result(timeout_s)


async def in_thread(call: Callable[[], T]) -> T:
    """`call()`, off the event loop: asyncio's or trio's. On any other loop there is no thread to go to."""
    trio = running_trio()
    if trio is not None:
        result: T = await trio.to_thread.run_sync(call)
        return result
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return call()
    return await asyncio.to_thread(call)


def running_trio() -> Any:
    """The trio package, if it runs the calling task; it is never imported here."""
    trio = sys.modules.get("trio")
    return trio if trio is not None and trio.lowlevel.in_trio_run() else None
