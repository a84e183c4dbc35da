"""etcd's JSON gateway: one call to one member, or one stream of watches there, over HTTP/1.1.

Owns what is said in HTTP, and what a member's answer that is none of etcd's means. Knows nothing of which member is
chosen or who the user is (`etcd_members`), nor of how a connection is made (`etcd_dialing`).
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Sequence
from typing import TypeVar

import msgspec
from urllib3.util import ssl_wrap_socket

from veltrix_mw.settings import Host, shown
from veltrix_mw.stores.etcd_dialing import Dialer, no_etcd, wants_tls
from veltrix_mw.stores.etcd_members import ATTEMPT_S, Failed, Refused
from veltrix_mw.stores.etcd_messages import (
    Answer,
    Message,
    Method,
    WatchCreate,
    Watched,
    decode,
    encode,
    encode_creates,
)
from veltrix_mw.stores.etcd_pool import Pool
from veltrix_mw.stores.etcd_stream import Connection, LineStream, NotHttp, Response, Unanswered
from veltrix_mw.stores.tls import Tls

__all__ = ["Gateway"]

_WATCH_PATH = "/v3/watch"

A = TypeVar("A", bound=Answer)


def _wrapped(raw: socket.socket, context: ssl.SSLContext, name: str) -> socket.socket:
    return ssl_wrap_socket(raw, ssl_context=context, server_hostname=name)


class Gateway:
    """The transport over etcd's JSON gateway.

    Thread-safe; usable after a fork. Opens nothing before the first call.
    """

    def __init__(self, tls: Tls | None = None) -> None:
        self._dialer = Dialer(tls, wrap=_wrapped)
        self.pool = Pool[Connection]()

    def call(
        self,
        host: Host,
        method: Method[A],
        request: Message,
        *,
        token: str,
        begun_by_s: float,
        by_s: float,
        once: bool,
    ) -> A:
        body = encode(request)
        said = self._head(host, method.path, body, token) + body
        while True:
            epoch = self.pool.epoch
            used = self.pool.borrow(host)
            connection = used or self._dialer.connect(host, min(begun_by_s, time.monotonic() + ATTEMPT_S))
            try:
                response, answer = connection.exchange(said, begun_by_s=begun_by_s, by_s=by_s)
            except Unanswered as exc:
                connection.close()
                if used and not once and not isinstance(exc.reason, TimeoutError):
                    continue  # closed by the other side at the same moment: no sign that the member failed
                raise self._dialer.failure(exc.reason, host, by_s) from exc
            except OSError as exc:
                connection.close()
                if used and not isinstance(exc, TimeoutError):
                    continue
                failed = self._dialer.failure(exc, host, by_s)
                failed.may_have_run = False
                raise failed from exc
            except BaseException:
                connection.close()
                raise
            if response.reusable:
                self.pool.give_back(host, connection, epoch)
            else:
                connection.close()
            if response.status != 200:
                raise self._refusal(response, answer, host, by_s)
            try:
                return self._first(answer, method, host) if method.is_stream else decode(answer, method.answer)
            except ValueError as exc:
                raise no_etcd(host) from exc

    def watch(self, host: Host, creates: Sequence[WatchCreate], *, token: str, by_s: float) -> GatewayStream:
        body = encode_creates(list(creates))
        connection = self._dialer.connect(host, by_s)
        try:
            connection.send(self._head(host, _WATCH_PATH, body, token) + body, by_s)
            response, begun = Response(), b""
            while not response.begun:
                piece = connection.receive(by_s)
                begun += response.feed(piece)
                if not piece:
                    response.end()
            if response.status != 200:
                while not response.done and (piece := connection.receive(by_s)):
                    begun += response.feed(piece)
                raise self._refusal(response, begun, host, by_s)
            return GatewayStream(LineStream(connection, response, begun))
        except (OSError, NotHttp) as exc:
            connection.close()
            raise self._dialer.failure(exc, host, by_s) from exc
        except BaseException:
            connection.close()
            raise

    def drop(self, host: Host | None = None) -> None:
        self.pool.drop(host)

    @staticmethod
    def _first(body: bytes, method: Method[A], host: Host) -> A:
        """The one message of a stream."""
        if not body:
            raise Failed(f"etcd at {shown(host)} ended the stream without an answer")  # it lost its leader
        said = decode(body, _First)
        if said.error is not None:
            raise Refused(said.error.message)
        return decode(bytes(said.result), method.answer)

    @staticmethod
    def _head(host: Host, path: str, body: bytes, token: str) -> bytes:
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {shown(host)}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Grpc-Metadata-hasleader: true",
        ]
        if token:
            lines.append(f"Authorization: {token}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    # --- what went wrong

    def _refusal(self, response: Response, body: bytes, host: Host, by_s: float) -> Exception:
        """What an answer other than 200 means."""
        where = shown(host)
        try:
            said = decode(body, _Refusal)
        except ValueError:
            if b"HTTP request to an HTTPS server" in body:
                return wants_tls(host)
            if response.status == 404 and (failed := self._not_found(host, by_s)):
                return failed
            return Failed(
                f"what answers at {where} is no etcd (HTTP status {response.status}); name its client port "
                "(2379 by default)"
            )
        return Refused(said.message or said.error)

    def _not_found(self, host: Host, by_s: float) -> Failed | None:
        """What a server of etcd's is that knows no gateway; None where it is none of etcd's."""
        where = shown(host)
        if b'"peerURLs"' in (self._page(host, "/members", by_s) or b""):
            why = (
                f"what listens at {where} is etcd's peer port, where members speak to each other; name the client port "
                "(2379 by default)"
            )
            return Failed(why, may_have_run=False, in_vain=True)
        version = self._page(host, "/version", by_s)
        if version is None:
            why = f"what answers at {where} has no gateway of etcd's (HTTP status 404); check the port, and its load"
            return Failed(why, may_have_run=False, is_late=True)
        if b'"etcdserver"' not in version:
            return None
        why = (
            f"etcd at {where} has its gRPC gateway off; start it with --enable-grpc-gateway=true, which is its "
            "default, or add ?transport=grpc to the URL"
        )
        return Failed(why, may_have_run=False, in_vain=True)

    def _page(self, host: Host, path: str, by_s: float) -> bytes | None:
        """What a GET is answered with, empty where there is no such page; None where no answer came."""
        answered = self._dialer.page(host, path, deadline_s=min(by_s, time.monotonic() + ATTEMPT_S))
        if answered is None:
            return None
        response, body = answered
        return body if response.status == 200 else b""


class GatewayStream:
    """A stream of watches, a line of JSON a message."""

    is_dropped = False  # a fork closes it in the child alone

    def __init__(self, lines: LineStream) -> None:
        self._lines = lines

    def receive(self, by_s: float) -> list[Watched]:
        try:
            return [self._message(line) for line in self._lines.receive(by_s)]
        except (OSError, NotHttp) as exc:
            raise EOFError("the stream broke off") from exc

    @staticmethod
    def _message(line: bytes) -> Watched:
        try:
            said = decode(line, _Line)
        except ValueError as exc:
            raise NotHttp("a line of the watch is no message") from exc
        if said.error is not None:
            raise Refused(said.error.message)
        return said.result or Watched()

    def is_amid(self, now_s: float) -> bool:
        return self._lines.is_amid(now_s)

    def interrupt(self) -> None:
        self._lines.interrupt()

    def close(self) -> None:
        self._lines.close()


class _Refusal(Answer, frozen=True):
    """The body of an error, of any version."""

    message: str = ""
    error: str = ""


class _StreamError(Answer, frozen=True):
    message: str = ""


class _First(Answer, frozen=True):
    """A stream of one message."""

    result: msgspec.Raw = msgspec.Raw(b"{}")
    error: _StreamError | None = None


class _Line(Answer, frozen=True):
    """One line of a stream."""

    result: Watched | None = None
    error: _StreamError | None = None
