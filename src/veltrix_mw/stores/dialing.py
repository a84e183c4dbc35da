"""Dialing: a TCP connection to a named host, by a deadline.

Owns name resolution and the sharing of the time over a host's addresses. Knows no protocol that is spoken over it, but
lets a caller finish a connection (a TLS handshake) within an address's share.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401  # `getaddrinfo` would import it in the follower's thread, maybe during a fork
import os
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from veltrix_mw.background import BackgroundThread, Signal

__all__ = ["NameTimeout", "addresses_of", "dial"]

_Address = tuple[int, int, int, str, Any]
_LEAST_S: Final = 0.001


class NameTimeout(TimeoutError):
    """The resolver did not answer in time."""


class _Lookup:
    """One question to the resolver; answered once, in a thread that may outlive who asked."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self.done = Signal()
        self.addresses: list[_Address] = []
        self.failure: OSError | None = None

    def run(self, ended: Callable[[], None]) -> None:
        try:
            self.addresses = list(socket.getaddrinfo(self._host, self._port, 0, socket.SOCK_STREAM))
        except OSError as exc:
            self.failure = exc
        except UnicodeError:  # a name that cannot be one: IDNA's rules, not the resolver's
            self.failure = socket.gaierror(socket.EAI_NONAME, "it is no host name")
        finally:
            ended()
            self.done.set()


# What is being asked now. The resolver cannot be told to give up: whoever asks the same meanwhile waits for the same
# thread, so that a resolver that hangs costs one thread a name. By process: a fork leaves the threads behind.
_asking: dict[tuple[int, str, int], _Lookup] = {}


def addresses_of(host: str, port: int, deadline_s: float) -> list[_Address]:
    """What the resolver says of `host`, by `deadline_s` (monotonic); raises `NameTimeout`, or its `OSError`."""
    with contextlib.suppress(OSError, UnicodeError):  # no number: a name
        return list(socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST))
    asked = os.getpid(), host, port
    lookup = _Lookup(host, port)
    shared = _asking.setdefault(asked, lookup)
    if shared is lookup:
        try:
            BackgroundThread(target=lookup.run, args=(lambda: _asking.pop(asked, None),), name="veltrix-lookup").start()
        except BaseException:
            _asking.pop(asked, None)
            raise
    if not shared.done.wait(max(0.0, deadline_s - time.monotonic())):
        raise NameTimeout(host)
    if shared.failure is not None:
        raise shared.failure
    return shared.addresses


def dial(
    host: str, port: int, deadline_s: float, *, finish: Callable[[socket.socket], socket.socket] | None = None
) -> socket.socket:
    """A connection to the first of the host's addresses that takes one, by `deadline_s` (monotonic).

    Each address gets an equal share of the time that is left. `finish` makes of a connected socket what is returned; it
    is called with the share as the socket's timeout, and where it raises `OSError` the next address is tried. Raises
    the last address's `OSError`; `TimeoutError` is one.
    """
    addresses = addresses_of(host, port, deadline_s)
    failure: OSError | None = None
    for at, (family, kind, protocol, _, address) in enumerate(addresses):
        now_s = time.monotonic()
        until_s = now_s + (deadline_s - now_s) / (len(addresses) - at)
        if until_s - now_s <= 0:
            raise failure or TimeoutError()
        raw = socket.socket(family, kind, protocol)
        try:
            raw.settimeout(until_s - now_s)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.connect(address)
            if finish is None:
                return raw
            raw.settimeout(max(_LEAST_S, until_s - time.monotonic()))
            return finish(raw)
        except OSError as exc:
            raw.close()
            _close_left(exc)
            failure = exc
        except BaseException:
            raw.close()
            raise
    raise failure or OSError(f"{host} has no address")


def _close_left(exc: OSError) -> None:
    """Close what a TLS handshake left open: where the other side is gone, `ssl` raises, and forgets its socket."""
    step = exc.__traceback__
    while step is not None:
        left = step.tb_frame.f_locals.get("self")
        if isinstance(left, socket.socket):
            left.close()
        step = step.tb_next
