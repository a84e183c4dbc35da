"""Dialing a member of etcd: a connection to it, and what is wrong where there is none.

Owns telling from a connection's failure what somebody has to mend. Knows nothing of calls, users or which member is
chosen. Whatever a transport speaks, its members are dialled, and their faults told, in here.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from typing import Final

from veltrix_mw.settings import Host, shown
from veltrix_mw.stores.dialing import NameTimeout, dial
from veltrix_mw.stores.etcd_members import ATTEMPT_S, CertificateRefused, Failed, Late
from veltrix_mw.stores.etcd_stream import Connection, NotHttp, Response, Unanswered
from veltrix_mw.stores.tls import Tls, Verdict, reason_of, verdict_of

__all__ = ["HTTP_1", "HTTP_2", "Dialer", "no_etcd", "wants_tls"]

HTTP_1: Final = "http/1.1"
HTTP_2: Final = "h2"


Wrap = Callable[[socket.socket, ssl.SSLContext, str], socket.socket]


def _wrapped(raw: socket.socket, context: ssl.SSLContext, name: str) -> socket.socket:
    return context.wrap_socket(raw, server_hostname=name)


class Dialer:
    """Connects to members, each time anew.

    What it raises is `Failed`, or `UnusableFile` where files of ours cannot be used.
    """

    def __init__(self, tls: Tls | None, *, wrap: Wrap = _wrapped) -> None:
        """`wrap` makes TLS of a connected socket."""
        self.tls = tls
        self._wrap = wrap

    def connect(self, host: Host, by_s: float, *, protocol: str = HTTP_1) -> Connection:
        """A connection on which `protocol` may be spoken; where it fails, nothing was said on it."""
        name, port = host
        context = self.tls.context() if self.tls else None
        if context:
            context.set_alpn_protocols([protocol])

        def secured(raw: socket.socket) -> socket.socket:
            assert context is not None
            return self._wrap(raw, context, name)

        try:
            return Connection(dial(name, port, by_s, finish=secured if context else None))
        except OSError as exc:
            failed = self.failure(exc, host, by_s, greets=True)
            failed.may_have_run = False
            raise failed from exc

    # --- what went wrong

    @staticmethod
    def _speaks_tls(host: Host, by_s: float) -> bool:
        """Whether TLS is what a server wants that ends plain connections without a word, as etcd does."""
        finish = Tls().blind_context().wrap_socket
        try:
            dial(*host, min(by_s, time.monotonic() + ATTEMPT_S / 2), finish=finish).close()
        except ssl.SSLError as exc:
            return "ALERT" in reason_of(exc)  # it minds who we are, in TLS
        except OSError:
            return False
        return True

    @staticmethod
    def _speaks_redis(host: Host, by_s: float) -> bool:
        """Whether Redis answers there, which ends a connection at the first line of HTTP/1, without a word."""
        by_s = min(by_s, time.monotonic() + ATTEMPT_S)
        try:
            with contextlib.closing(Connection(dial(*host, by_s))) as connection:
                connection.send(b"PING\r\n", by_s)
                return connection.receive(by_s).startswith((b"+PONG\r\n", b"-NOAUTH ", b"-DENIED ", b"-LOADING "))
        except OSError:
            return False

    def failure(self, cause: Exception, host: Host, by_s: float, *, greets: bool = False) -> Failed:
        """What a connection's error means; asked of the server, if need be, until `by_s`.

        `greets`: it came while the connection was made. There a server without TLS ends it, etcd without a word.
        """
        where = shown(host)
        match cause:
            case ssl.SSLCertVerificationError():
                return Failed(_about_certificate(cause, where, self.tls), may_have_run=False, in_vain=True)
            case ssl.SSLError() if verdict_of(cause) in {Verdict.CERTIFICATE_WANTED, Verdict.CERTIFICATE_REFUSED}:
                has_one = self.tls is not None and self.tls.cert
                minds = "refused this client's certificate" if has_one else "asks for a client certificate"
                return CertificateRefused(
                    f"etcd at {where} {minds} ({reason_of(cause)}); give one that its CA signed: cert= and key=",
                    may_have_run=False,
                    in_vain=True,
                )
            case ssl.SSLError() if "ALERT" in reason_of(cause):
                return Failed(f"etcd at {where} ended the TLS handshake ({reason_of(cause)}); its log says why")
            case ssl.SSLError() if greets:
                return Failed(
                    f"etcd at {where} does not speak TLS ({reason_of(cause)}); write etcd:// instead of etcds://, or "
                    "start it with --cert-file and --key-file",
                    may_have_run=False,
                    in_vain=True,
                )
            case ssl.SSLError():
                return Failed(f"etcd at {where} ended the TLS connection ({reason_of(cause)}); its log says why")
            case NotHttp(begin=begin) if begin[:1] == b"-" and self._speaks_redis(host, by_s):
                return _redis(host)
            case NotHttp(begin=b"") | ConnectionResetError() if self.tls is None and self._speaks_redis(host, by_s):
                return _redis(host)
            case NotHttp(begin=b"") | ConnectionResetError() if self.tls is None and self._speaks_tls(host, by_s):
                return wants_tls(host)
            case NotHttp() if self.tls is None and cause.begin[:1] in {b"\x15", b"\x16"}:
                return wants_tls(host)
            case NotHttp() if cause.begin:
                return no_etcd(host)
            case socket.gaierror():
                return Failed(
                    f"the name {host[0]!r} cannot be resolved; check it, and this machine's DNS",
                    may_have_run=False,
                    in_vain=True,
                )
            case NameTimeout():
                return Failed(
                    f"the name {host[0]!r} was not resolved in time; check this machine's DNS",
                    may_have_run=False,
                    is_late=True,
                )
            case ConnectionRefusedError():
                return Failed(
                    f"nothing listens at {where}; is etcd running there, and is that its client port?",
                    may_have_run=False,
                    in_vain=True,
                )
            case TimeoutError():
                return Late(host)
            case OSError() if cause.strerror:
                return Failed(f"etcd at {where} cannot be reached ({cause.strerror}); check address and network")
            case _:
                return Failed(f"etcd at {where} ended the connection")

    def page(self, host: Host, path: str, *, deadline_s: float) -> tuple[Response, bytes] | None:
        """What that member answers a GET with, whatever the status; None where no answer came."""
        request = f"GET {path} HTTP/1.1\r\nHost: {shown(host)}\r\nConnection: close\r\n\r\n"
        try:
            connection = self.connect(host, deadline_s)
        except Failed:
            return None
        try:
            return connection.exchange(request.encode("latin-1"), begun_by_s=deadline_s, by_s=deadline_s)
        except (OSError, Unanswered):
            return None
        finally:
            connection.close()


def no_etcd(host: Host) -> Failed:
    return Failed(f"what answers at {shown(host)} is no etcd; name its client port (2379 by default)")


def _redis(host: Host) -> Failed:
    return Failed(
        f"what answers at {shown(host)} is Redis, not etcd; name etcd's client port (2379 by default), or write redis://",
        may_have_run=False,
        in_vain=True,
    )


def wants_tls(host: Host) -> Failed:
    return Failed(
        f"etcd at {shown(host)} speaks TLS only; write etcds:// instead of etcd://", may_have_run=False, in_vain=True
    )


def _about_certificate(exc: ssl.SSLCertVerificationError, where: str, tls: Tls | None) -> str:
    what = f"the certificate of etcd at {where}"
    match verdict_of(exc):
        case Verdict.SERVER_EXPIRED:
            return f"{what} has expired; renew it there"
        case Verdict.SERVER_OF_OTHER_NAME:
            return f"{what} is for other names; add this one to it, or use one that it names"
        case Verdict.SERVER_NOT_YET_VALID:
            return f"{what} is not valid yet; check the clocks of both machines"
    trusted = f"by the CA in {tls.ca}" if tls and tls.ca else "by a CA that this system trusts"
    return f"{what} is not signed {trusted} ({exc.verify_message}); give the file of the right one: ca="
