"""The way to etcd: its JSON gateway, on whichever member answers.

Owns members and failover, connecting and TLS, user and token, deadlines, and what etcd's errors mean. Knows nothing of
namespaces, keys or positions: requests go in as `etcd_messages`, answers come out so, and a transport over gRPC would
have the same two methods.

Every call is made to a member that has a leader (`hasleader`): one that is cut off says so at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from random import SystemRandom
from typing import Final, TypeVar

from urllib3.util import ssl_wrap_socket

from veltrix_mw.errors import AuthFailed, Compacted, InvalidValue, Overloaded, StoreError, StoreUnavailable
from veltrix_mw.protocols import CertificateFault, Leaderless, NotLetIn, NotPermitted, Silent
from veltrix_mw.settings import Host
from veltrix_mw.settings import shown as _told
from veltrix_mw.stores.dialing import NameTimeout, dial
from veltrix_mw.stores.etcd_messages import (
    Answer,
    Authenticate,
    Authenticated,
    Header,
    Message,
    WatchCreate,
    Watched,
    decode,
    encode,
    encode_creates,
)
from veltrix_mw.stores.etcd_stream import (
    Connection,
    LineStream,
    NotHttp,
    Response,
    Unanswered,
    outside_forks,
)
from veltrix_mw.stores.tls import Tls, Verdict, reason_of, verdict_of

__all__ = ["CompactedAt", "FutureRevision", "Gateway", "WatchStream"]

_ATTEMPT_S: Final = 1.0  # a member that takes longer to begin an answer is left; each round gives it twice the time
_PREFERRED_AFTER_S: Final = 60.0  # how long after a failover the member of first choice is tried again, at least
_MAX_IDLE: Final = 4  # connections kept for the next call: a follower and a few writers at once
_PAUSE_FIRST_S: Final = 0.05  # between rounds over all members, doubled each time, with full jitter
_PAUSE_MOST_S: Final = 0.5

_TOKEN_REFUSED: Final = ("invalid auth token", "revision of auth store is old", "user name is empty")

_log = logging.getLogger("veltrix_mw")

_random: Final = SystemRandom()  # not the module's generator, which an application may have seeded for itself

T = TypeVar("T")
A = TypeVar("A", bound=Answer)


class FutureRevision(ValueError):
    """The revision asked for does not exist yet."""


class _Failed(Exception):
    """One member did not serve; another may. `may_have_run`: the request could have been carried out all the same."""

    kind: type[StoreError] = StoreUnavailable  # what it is where all members fail so

    def __init__(self, why: str, *, may_have_run: bool = True, in_vain: bool = False, is_late: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.may_have_run = may_have_run
        self.in_vain = in_vain  # asking it again soon would not help
        self.is_late = is_late


class _TokenRefused(Exception):
    """The member does not take the token: it ran out, or users were changed, or there was none."""


class _Here:
    """What belongs to one process: connections, the token, which member is used.

    `lock` protects all of it.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        # Each process an order of its own, so that members share the load and one's failure does not move all to one.
        self.order = sorted(hosts, key=lambda host: hashlib.blake2b(f"{host}{self.pid}".encode()).digest())
        self.used = self.order[0]
        self.return_at_s = 0.0
        self.failed_at_s: dict[Host, float] = {}
        self.idle: dict[Host, list[Connection]] = {host: [] for host in hosts}
        self.epoch = 0
        self.token = ""
        self.is_open = False  # etcd asks nobody who it is: it has no authentication enabled

    def round(self, now_s: float) -> list[Host]:
        """Every member once: the one in use first, or the preferred one when it is time to look at it again."""
        with self.lock:
            first = self.used
            if first != self.order[0] and now_s >= self.return_at_s:
                first = self.order[0]
                self.return_at_s = now_s + _PREFERRED_AFTER_S * _random.uniform(1, 2)
            start = self.order.index(first)
            return self.order[start:] + self.order[:start]

    def served(self, host: Host, now_s: float) -> None:
        with self.lock:
            if self.used != host:
                self.used = host
                self.return_at_s = now_s + _PREFERRED_AFTER_S * _random.uniform(1, 2)

    def failed(self, host: Host, now_s: float) -> None:
        with self.lock:
            self.failed_at_s[host] = now_s
            if self.used == host and len(self.order) > 1:
                self.used = self.order[(self.order.index(host) + 1) % len(self.order)]
                self.return_at_s = now_s + _PREFERRED_AFTER_S * _random.uniform(1, 2)
            doomed, self.idle[host] = self.idle[host], []
        for connection in doomed:
            connection.close()

    def borrow(self, host: Host) -> Connection | None:
        with self.lock:
            while self.idle[host]:
                connection = self.idle[host].pop()
                if connection.is_at_rest():
                    return connection
                connection.close()
        return None

    def give_back(self, host: Host, connection: Connection, epoch: int) -> None:
        with self.lock:
            if epoch == self.epoch and len(self.idle[host]) < _MAX_IDLE:
                self.idle[host].append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self.lock:
            self.epoch += 1
            doomed = [connection for each in self.idle.values() for connection in each]
            self.idle = {host: [] for host in self.idle}
        for connection in doomed:
            connection.close()


class WatchStream:
    """An open stream of watches, all of them created.

    Used by one thread, but for `interrupt`.
    """

    def __init__(self, stream: LineStream, host: Host, gateway: Gateway) -> None:
        self._stream = stream
        self._gateway = gateway
        self._early: list[Watched] = []  # came before the last one was created
        self.host = host
        self.opened_at_s = time.monotonic()
        self.header = Header()

    def receive(self, by_s: float) -> list[Watched]:
        """The next messages, none where none came by then.

        Raises `Compacted`, `AuthFailed`, or `StoreUnavailable` at the stream's end, however it ended.
        """
        early, self._early = self._early, []
        if early:
            return early
        try:
            lines = self._stream.receive(by_s)
            return [self._gateway._message(line, self.host) for line in lines]
        except (EOFError, OSError, NotHttp, _Failed) as exc:
            # Also where it ended in good order: etcd 3.4 ends so when the member lost its leader.
            raise StoreUnavailable(f"etcd at {_told(self.host)} ended the watch; watch again") from exc
        except _TokenRefused as exc:
            raise StoreUnavailable(f"etcd at {_told(self.host)} no longer takes the token; watch again") from exc

    def await_created(self, number: int, by_s: float) -> None:
        created = 0
        messages: list[Watched] = []
        while created < number:
            lines = self._stream.receive(by_s)
            if not lines:
                raise TimeoutError("the watch was not created in time")
            for message in (self._gateway._message(line, self.host) for line in lines):
                if message.created:
                    created += 1
                    self.header = message.header
                else:
                    messages.append(message)
        self._early = messages

    @property
    def is_left(self) -> bool:
        """Whether its member failed a call since: the stream may be half open, and silent for ever."""
        return self._gateway._here().failed_at_s.get(self.host, 0.0) > self.opened_at_s

    def is_amid(self, now_s: float) -> bool:
        """Whether a message is on its way, and pieces of it keep coming."""
        return bool(self._early) or self._stream.is_amid(now_s)

    def interrupt(self) -> None:
        """End a `receive` in another thread."""
        self._stream.interrupt()

    def close(self) -> None:
        self._stream.close()


class Gateway:
    """Calls to an etcd cluster.

    A call ends by its deadline, goes to the next member when one fails, and is never carried out twice where it says
    `once`. Thread-safe; usable after a fork. Opens nothing before the first call.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        *,
        tls: Tls | None = None,
        user: str | None = None,
        password: str | None = None,
        timeout_s: float = 2.0,
        remedy: str = "grant it",
    ) -> None:
        """`timeout_s` is how long members are tried in turn while none answers, also where a call has longer.

        `remedy` says what to do where a permission is missing.
        """
        self._hosts = tuple(dict.fromkeys((host, port) for host, port in hosts))
        self._tls = tls
        self._user = user
        self._password = password
        self._timeout_s = timeout_s
        self._remedy = remedy
        self._process = _Here(self._hosts)
        self._served = threading.local()

    # --- the seam

    @property
    def served_in_s(self) -> float | None:
        """How long the member took that served this thread's last call; those tried in vain before it do not count."""
        return getattr(self._served, "in_s", None)

    @property
    def is_open(self) -> bool:
        """Whether etcd checked neither user nor password, as its authentication is off; known once a call was made."""
        return self._here().is_open

    def call(self, path: str, request: Message, kind: type[A], *, deadline_s: float, once: bool = False) -> A:
        """POST `request` to `path`. `once`: it must not be carried out twice, and its caller reads again if unsure.

        Raises `Compacted`, `FutureRevision`, `InvalidValue` (too large), `AuthFailed`, `Overloaded`, and
        `StoreUnavailable` when no member served.
        """
        body = encode(request)

        def attempt(here: _Here, host: Host, begun_by_s: float) -> A:
            by_s = max(begun_by_s, deadline_s)
            begun_s = time.monotonic()
            raw = self._post(here, host, path, body, begun_by_s=by_s if once else begun_by_s, by_s=by_s, once=once)
            self._served.in_s = time.monotonic() - begun_s
            return _decoded(raw, kind, host)

        return self._on_some_member(attempt, deadline_s, once=once)

    def watch(self, creates: Sequence[WatchCreate], *, deadline_s: float) -> WatchStream:
        """One stream with all of these watches; its first messages tell what began too early. Raises as `call`."""
        body = encode_creates(list(creates))

        def attempt(here: _Here, host: Host, begun_by_s: float) -> WatchStream:
            return self._watch(here, host, body, len(creates), begun_by_s)

        return self._on_some_member(attempt, deadline_s, once=False)

    def close(self) -> None:
        """Close every connection that is not in use. Idempotent; a later call opens anew."""
        self._here().close()

    # --- members

    def _here(self) -> _Here:
        here = self._process
        if here.pid != os.getpid():
            # A child, and one that no hook told so: what it inherited is not its own.
            inherited, here = here, _Here(self._hosts)
            self._process = here
            for connections in inherited.idle.values():
                for connection in connections:
                    connection.close()
        return here

    def _on_some_member(self, attempt: Callable[[_Here, Host, float], T], deadline_s: float, *, once: bool) -> T:
        """Try the members in turn until one serves; at least each once if time allows."""
        started_s = time.monotonic()
        give_up_s = min(deadline_s, started_s + self._timeout_s)
        failures: dict[Host, _Failed] = {}
        patience_s, pause_s = _ATTEMPT_S, _PAUSE_FIRST_S
        with outside_forks(deadline_s):
            here = self._here()
            while True:
                for host in here.round(time.monotonic()):
                    begun_by_s = min(give_up_s, time.monotonic() + patience_s)
                    try:
                        answer = self._as_user(here, host, attempt, begun_by_s)
                    except _Failed as failed:
                        here.failed(host, time.monotonic())
                        if host not in failures or not failed.is_late:
                            failures[host] = failed  # what a last, short attempt misses says less
                        if once and failed.may_have_run:
                            raise StoreUnavailable(
                                f"{failed.why}; the write's fate is unknown: read again, then write again if need be"
                            ) from failed
                    else:
                        here.served(host, time.monotonic())
                        return answer
                    if time.monotonic() >= give_up_s:
                        raise self._unavailable(failures)
                if all(failed.in_vain for failed in failures.values()):
                    raise self._unavailable(failures)
                pause = _random.uniform(0, min(pause_s, max(0.0, give_up_s - time.monotonic())))
                threading.Event().wait(pause)
                pause_s, patience_s = min(2 * pause_s, _PAUSE_MOST_S), 2 * patience_s

    def _unavailable(self, failures: dict[Host, _Failed]) -> StoreError:
        reasons = list(dict.fromkeys(failed.why for failed in failures.values()))
        text = reasons[0] if len(reasons) == 1 else f"no member of etcd served: {'; '.join(reasons)}"
        kinds = {failed.kind for failed in failures.values()}
        return (kinds.pop() if len(kinds) == 1 else StoreUnavailable)(text)

    # --- users

    def _as_user(self, here: _Here, host: Host, attempt: Callable[[_Here, Host, float], T], begun_by_s: float) -> T:
        """Attempt it; once more with a new token where the one there was is refused."""
        if self._user and not here.token and not here.is_open:
            self._authenticate(here, host, begun_by_s)
        token = here.token
        try:
            return attempt(here, host, begun_by_s)
        except _TokenRefused:
            if not self._user:
                raise NotLetIn(
                    f"etcd at {_told(host)} asks for a user; give user and password: etcd://USER:PASSWORD@..."
                ) from None
        with here.lock:
            if here.token == token:
                here.token = ""
        self._authenticate(here, host, begun_by_s)
        try:
            return attempt(here, host, begun_by_s)
        except _TokenRefused as exc:
            raise _Failed(f"etcd at {_told(host)} does not take the token that it gave", may_have_run=False) from exc

    def _authenticate(self, here: _Here, host: Host, by_s: float) -> None:
        request = encode(Authenticate(self._user or "", self._password or ""))
        try:
            raw = self._post(
                here, host, "/v3/auth/authenticate", request, begun_by_s=by_s, by_s=by_s, once=False, anonymous=True
            )
        except _AuthOff:
            # No user is needed, and none is used until one is asked for.
            with here.lock:
                is_known, here.is_open = here.is_open, True
            if not is_known:
                _log.warning(
                    "veltrix.user_unused: etcd at %s has authentication off and checked neither user nor password; "
                    "turn it on (etcdctl auth enable), or leave user and password out",
                    _told(host),
                )
            return
        except _TokenRefused as exc:
            # "revision of auth store is old": users are being changed at this moment.
            raise _Failed(f"etcd at {_told(host)} is changing its users", may_have_run=False) from exc
        except _Failed as failed:
            failed.may_have_run = False
            raise
        token = _decoded(raw, Authenticated, host).token
        with here.lock:
            here.token, here.is_open = token, False

    # --- one member

    def _post(
        self,
        here: _Here,
        host: Host,
        path: str,
        body: bytes,
        *,
        begun_by_s: float,
        by_s: float,
        once: bool,
        anonymous: bool = False,
    ) -> bytes:
        """One exchange with one member; returns the body of a good answer."""
        request = self._head(here, host, path, body, anonymous=anonymous) + body
        while True:
            epoch = here.epoch
            used = here.borrow(host)
            connection = used or self._connected(host, min(begun_by_s, time.monotonic() + _ATTEMPT_S))
            try:
                response, answer = connection.exchange(request, begun_by_s=begun_by_s, by_s=by_s)
            except Unanswered as exc:
                connection.close()
                if used and not once and not isinstance(exc.reason, TimeoutError):
                    continue  # closed by the other side at the same moment: no sign that the member failed
                raise self._failure(exc.reason, host, by_s) from exc
            except OSError as exc:
                connection.close()
                if used and not isinstance(exc, TimeoutError):
                    continue
                failed = self._failure(exc, host, by_s)
                failed.may_have_run = False
                raise failed from exc
            except BaseException:
                connection.close()
                raise
            if response.reusable:
                here.give_back(host, connection, epoch)
            else:
                connection.close()
            if response.status != 200:
                raise self._refusal(response, answer, host, by_s)
            return answer

    def _watch(self, here: _Here, host: Host, body: bytes, number: int, by_s: float) -> WatchStream:
        connection = self._connected(host, by_s)
        try:
            connection.send(self._head(here, host, "/v3/watch", body) + body, by_s)
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
            stream = WatchStream(LineStream(connection, response, begun), host, self)
            stream.await_created(number, by_s)
            return stream
        except (OSError, NotHttp, EOFError) as exc:
            connection.close()
            raise self._failure(exc, host, by_s) from exc
        except BaseException:
            connection.close()
            raise

    def _head(self, here: _Here, host: Host, path: str, body: bytes, *, anonymous: bool = False) -> bytes:
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {_told(host)}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Grpc-Metadata-hasleader: true",
        ]
        if here.token and not anonymous:
            lines.append(f"Authorization: {here.token}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _connected(self, host: Host, by_s: float) -> Connection:
        name, port = host
        context = self._tls.context() if self._tls else None
        if context:
            context.set_alpn_protocols(["http/1.1"])

        def secured(raw: socket.socket) -> socket.socket:
            return ssl_wrap_socket(raw, ssl_context=context, server_hostname=name)

        try:
            return Connection(dial(name, port, by_s, finish=secured if context else None))
        except OSError as exc:
            failed = self._failure(exc, host, by_s)
            failed.may_have_run = False
            raise failed from exc

    # --- what went wrong

    @staticmethod
    def _speaks_tls(host: Host, by_s: float) -> bool:
        """Whether TLS is what a server wants that ends plain connections without a word, as etcd does."""
        finish = Tls().blind_context().wrap_socket
        try:
            dial(*host, min(by_s, time.monotonic() + _ATTEMPT_S / 2), finish=finish).close()
        except ssl.SSLError as exc:
            return "ALERT" in reason_of(exc)  # it minds who we are, in TLS
        except OSError:
            return False
        return True

    @staticmethod
    def _speaks_redis(host: Host, by_s: float) -> bool:
        """Whether Redis answers there, which ends a connection without a word at the first line of HTTP."""
        by_s = min(by_s, time.monotonic() + _ATTEMPT_S)
        try:
            with contextlib.closing(Connection(dial(*host, by_s))) as connection:
                connection.send(b"PING\r\n", by_s)
                return connection.receive(by_s).startswith((b"+PONG\r\n", b"-NOAUTH ", b"-DENIED ", b"-LOADING "))
        except OSError:
            return False

    def _failure(self, cause: Exception, host: Host, by_s: float) -> _Failed:
        """What a connection's error means; asked of the server, if need be, until `by_s`."""
        where = _told(host)
        match cause:
            case ssl.SSLCertVerificationError():
                return _Failed(_about_certificate(cause, where, self._tls), may_have_run=False, in_vain=True)
            case ssl.SSLError() if verdict_of(cause) in {Verdict.CERTIFICATE_WANTED, Verdict.CERTIFICATE_REFUSED}:
                shown = self._tls is not None and self._tls.cert
                minds = "refused this client's certificate" if shown else "asks for a client certificate"
                return _CertificateRefused(
                    f"etcd at {where} {minds} ({reason_of(cause)}); give one that its CA signed: cert= and key=",
                    may_have_run=False,
                    in_vain=True,
                )
            case ssl.SSLError() if "ALERT" in reason_of(cause):
                return _Failed(f"etcd at {where} ended the TLS handshake ({reason_of(cause)}); its log says why")
            case ssl.SSLError():
                return _Failed(
                    f"etcd at {where} does not speak TLS ({reason_of(cause)}); write etcd:// instead of etcds://, or "
                    "start it with --cert-file and --key-file",
                    may_have_run=False,
                    in_vain=True,
                )
            case NotHttp(begin=b"") | ConnectionResetError() if self._tls is None and self._speaks_redis(host, by_s):
                return _Failed(
                    f"what answers at {where} is Redis, not etcd; name etcd's client port (2379 by default), or write "
                    "redis://",
                    may_have_run=False,
                    in_vain=True,
                )
            case NotHttp(begin=b"") | ConnectionResetError() if self._tls is None and self._speaks_tls(host, by_s):
                return _Failed(_wants_tls(where), may_have_run=False, in_vain=True)
            case NotHttp() if self._tls is None and cause.begin[:1] in {b"\x15", b"\x16"}:
                return _Failed(_wants_tls(where), may_have_run=False, in_vain=True)
            case NotHttp() if cause.begin:
                return _Failed(f"what answers at {where} is no etcd; name its client port (2379 by default)")
            case socket.gaierror():
                return _Failed(
                    f"the name {host[0]!r} cannot be resolved; check it, and this machine's DNS",
                    may_have_run=False,
                    in_vain=True,
                )
            case NameTimeout():
                return _Failed(
                    f"the name {host[0]!r} was not resolved in time; check this machine's DNS",
                    may_have_run=False,
                    is_late=True,
                )
            case ConnectionRefusedError():
                return _Failed(
                    f"nothing listens at {where}; is etcd running there, and is that its client port?",
                    may_have_run=False,
                    in_vain=True,
                )
            case TimeoutError():
                return _Late(f"etcd at {where} did not answer in time", is_late=True)
            case OSError() if cause.strerror:
                return _Failed(f"etcd at {where} cannot be reached ({cause.strerror}); check address and network")
            case _:
                return _Failed(f"etcd at {where} ended the connection")

    def _refusal(self, response: Response, body: bytes, host: Host, by_s: float) -> Exception:
        """What an answer other than 200 means."""
        where = _told(host)
        try:
            said = decode(body, _Refusal)
        except ValueError:
            if b"HTTP request to an HTTPS server" in body:
                return _Failed(_wants_tls(where), may_have_run=False, in_vain=True)
            if response.status == 404 and (failed := self._not_found(host, by_s)):
                return failed
            return _Failed(
                f"what answers at {where} is no etcd (HTTP status {response.status}); name its client port "
                "(2379 by default)"
            )
        return self._said(said.message or said.error, where)

    def _not_found(self, host: Host, by_s: float) -> _Failed | None:
        """What a server of etcd's is that knows no gateway; None where it is none of etcd's."""
        where = _told(host)
        if b'"peerURLs"' in (self._page(host, "/members", by_s) or b""):
            why = (
                f"what listens at {where} is etcd's peer port, where members speak to each other; name the client port "
                "(2379 by default)"
            )
            return _Failed(why, may_have_run=False, in_vain=True)
        version = self._page(host, "/version", by_s)
        if version is None:
            why = f"what answers at {where} has no gateway of etcd's (HTTP status 404); check the port, and its load"
            return _Failed(why, may_have_run=False, is_late=True)
        if b'"etcdserver"' not in version:
            return None
        why = (
            f"etcd at {where} has its gRPC gateway off; start it with --enable-grpc-gateway=true, which is its default"
        )
        return _Failed(why, may_have_run=False, in_vain=True)

    def _page(self, host: Host, path: str, by_s: float) -> bytes | None:
        """What a GET is answered with, empty where there is no such page; None where no answer came."""
        answered = self.page(host, path, deadline_s=min(by_s, time.monotonic() + _ATTEMPT_S))
        if answered is None:
            return None
        response, body = answered
        return body if response.status == 200 else b""

    def page(self, host: Host, path: str, *, deadline_s: float) -> tuple[Response, bytes] | None:
        """What that member answers a GET with, whatever the status; None where no answer came."""
        request = f"GET {path} HTTP/1.1\r\nHost: {_told(host)}\r\nConnection: close\r\n\r\n"
        try:
            connection = self._connected(host, deadline_s)
        except _Failed:
            return None
        try:
            return connection.exchange(request.encode("latin-1"), begun_by_s=deadline_s, by_s=deadline_s)
        except (OSError, Unanswered):
            return None
        finally:
            connection.close()

    def _said(self, message: str, where: str) -> Exception:
        """What an error of etcd's own means, by its text: the gateway's codes are too few."""
        short = message.removeprefix("etcdserver: ")
        if any(
            text in message for text in ("invalid auth token", "revision of auth store is old", "user name is empty")
        ):
            return _TokenRefused(short)
        if "authentication is not enabled" in message:
            return _AuthOff(short)
        if "authentication failed" in message:
            return NotLetIn(f"etcd at {where} refused user {self._user!r} with this password; check both")
        if "permission denied" in message:
            who = f"user {self._user!r}" if self._user else "this client"
            return NotPermitted(f"etcd at {where} does not permit this to {who}; {self._remedy}")
        if "CommonName" in message:
            return AuthFailed(
                f"etcd at {where} takes no client certificate with a common name through its gateway while it has "
                "users; use one without, and user and password"
            )
        if "has been compacted" in message:
            return Compacted("etcd no longer keeps the history asked for; list again")
        if "future revision" in message:
            return FutureRevision("there is no such revision yet")
        if "request is too large" in message or "too many operations" in message:
            return InvalidValue(f"etcd at {where} refused the write ({short}); write it in several revisions")
        if "database space exceeded" in message:
            return StoreUnavailable(
                f"etcd at {where} takes no writes, its space is used up; compact, then: etcdctl defrag; "
                "etcdctl alarm disarm; or raise --quota-backend-bytes"
            )
        if "too many requests" in message:
            return Overloaded(f"etcd at {where} has too many requests waiting; try again later")
        if "no leader" in message:
            return _WithoutLeader(f"etcd at {where} said: {short}", may_have_run=False)
        return _Failed(f"etcd at {where} said: {short}")

    def _message(self, line: bytes, host: Host) -> Watched:
        """The message of a watch in a line of its stream; raises what it says went wrong."""
        try:
            said = decode(line, _Line)
        except ValueError as exc:
            raise NotHttp("a line of the watch is no message") from exc
        if said.error is not None:
            raise self._said(said.error.message, _told(host))
        message = said.result or Watched()
        if not message.canceled:
            return message
        # Before anything else: a watch that is refused is said to be created, too.
        if message.compact_revision:
            raise CompactedAt(message.compact_revision)
        if not message.cancel_reason:
            raise _Failed(f"etcd at {_told(host)} canceled the watch")
        raise self._said(message.cancel_reason.rpartition("desc = ")[2], _told(host))


class CompactedAt(Compacted):
    """A watch would begin before `revision`, the oldest that is kept."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"etcd keeps no history before revision {revision}; list again")
        self.revision = revision


class _CertificateRefused(_Failed):
    kind = CertificateFault


class _WithoutLeader(_Failed):
    kind = Leaderless


class _Late(_Failed):
    kind = Silent


class _AuthOff(Exception):
    """A user was given, and etcd has none."""


class _Refusal(Answer, frozen=True):
    """The body of an error, of any version."""

    message: str = ""
    error: str = ""


class _StreamError(Answer, frozen=True):
    message: str = ""


class _Line(Answer, frozen=True):
    """One line of a stream."""

    result: Watched | None = None
    error: _StreamError | None = None


def _decoded(raw: bytes, kind: type[A], host: Host) -> A:
    try:
        return decode(raw, kind)
    except ValueError as exc:
        raise _Failed(f"what answers at {_told(host)} is no etcd; name its client port (2379 by default)") from exc


def _wants_tls(where: str) -> str:
    return f"etcd at {where} speaks TLS only; write etcds:// instead of etcd://"


def _about_certificate(exc: ssl.SSLCertVerificationError, where: str, tls: Tls | None) -> str:
    if exc.verify_code == 10:  # X509_V_ERR_CERT_HAS_EXPIRED
        return f"the certificate of etcd at {where} has expired; renew it there"
    if exc.verify_code in {62, 63, 64}:  # host, e-mail or address mismatch
        return f"the certificate of etcd at {where} is for other names; add this one to it, or use one that it names"
    if exc.verify_code == 9:  # not yet valid
        return f"the certificate of etcd at {where} is not valid yet; check the clocks of both machines"
    trusted = f"by the CA in {tls.ca}" if tls and tls.ca else "by a CA that this system trusts"
    return (
        f"the certificate of etcd at {where} is not signed {trusted} ({exc.verify_message}); give the file of the "
        "right one: ca="
    )
