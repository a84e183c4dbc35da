"""Calls to etcd through its members, as the tests of each transport make them."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import grpc

from tests.support.etcd_servers import Certificates
from veltrix_mw.stores.etcd_gateway import Gateway
from veltrix_mw.stores.etcd_grpc import Grpc
from veltrix_mw.stores.etcd_members import Members, Transport, WatchStream
from veltrix_mw.stores.etcd_messages import RANGE, TRANSACT, Operation, Range, Ranged, Transaction, WatchCreate
from veltrix_mw.stores.tls import Tls

WITHIN_S: Final = 10.0

TRANSPORTS: Final[Mapping[str, Callable[[Tls | None], Transport]]] = {"gateway": Gateway, "grpc": Grpc}

MakeMembers = Callable[..., Members]


def read(members: Members, key: bytes = b"shop/a", *, within_s: float = WITHIN_S, revision: int = 0) -> Ranged:
    return members.call(RANGE, Range(key, revision=revision), deadline_s=time.monotonic() + within_s)


def write(members: Members, key: bytes = b"shop/a", value: bytes = b"1", *, within_s: float = WITHIN_S) -> int:
    asked = Transaction([Operation.put(key, value)])
    return members.call(TRANSACT, asked, deadline_s=time.monotonic() + within_s, once=True).header.revision


def watch(members: Members, key: bytes = b"shop/a", start: int = 1) -> WatchStream:
    return members.watch([WatchCreate(key, start_revision=start, watch_id=1)], deadline_s=time.monotonic() + WITHIN_S)


def receive(stream: WatchStream) -> Any:
    messages = stream.receive(time.monotonic() + WITHIN_S)
    assert messages, "nothing came"
    return messages


def closed_port() -> tuple[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return "127.0.0.1", int(bound.getsockname()[1])


def is_listening(host: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(host, timeout=1):
        return True
    return False


def tls_of(certificates: Certificates, *, is_client: bool = False) -> Tls:
    cert, key = (str(certificates.client_cert), str(certificates.client_key)) if is_client else (None, None)
    return Tls(str(certificates.ca), cert, key)


class Generators(grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor):  # type: ignore[misc]
    """Makes a plain generator of each stream, which has no `cancel`, as OpenTelemetry's instrumentation does."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Iterator[Any]:
        return self._read(continuation, details, request)

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Iterator[Any]:
        return self._read(continuation, details, requests)

    def _read(self, continuation: Any, details: Any, asked: Any) -> Iterator[Any]:
        self.made.append(details.method)
        yield from continuation(details, asked)
