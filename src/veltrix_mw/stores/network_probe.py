"""The network probe: whether servers can be found, reached and believed, before any of their own protocol is spoken.

Owns names, connections and certificates; knows no store. Sends nothing but a TLS handshake, and keeps none open.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from veltrix_mw.findings import Said, Step, fail, ok, warn

__all__ = ["Fault", "Host", "NetworkProbe", "TlsFiles", "ask_each", "judged", "shown", "tls_context"]

Host = tuple[str, int]
T = TypeVar("T")

RENEW_WITHIN_DAYS: Final = 14
"""A certificate that ends sooner is a warning: two weeks are enough to renew it, and shorter than any renewal takes."""

_NO_CHECK_TIME: Final = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, which the module ssl has no name for
_GRACE_S: Final = 0.5  # a call that ends by its deadline is let say so itself


class Fault(Exception):
    """What is wrong with one server, and what to do."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Files in PEM: whom to trust (None: whom the system trusts), and who we are."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None


class NetworkProbe:
    """Looks at each of `hosts`; `reached` are those that passed every check so far.

    `plain` and `secure` are the URL's scheme without and with TLS.
    """

    def __init__(
        self, hosts: Sequence[Host], *, tls: TlsFiles | None, plain: str, secure: str, timeout_s: float
    ) -> None:
        self.reached: list[Host] = list(hosts)
        self._tls = tls
        self._plain = plain
        self._secure = secure
        self._timeout_s = timeout_s

    @property
    def steps(self) -> tuple[Step, ...]:
        return (
            Step("name", self._name, needs=("url",)),
            Step("connection", self._connection, needs=("name",)),
            Step("tls", self._certificates, needs=("connection",)),
        )

    def _name(self) -> Said:
        def ask(host: Host) -> str:
            try:
                found = socket.getaddrinfo(*host, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as exc:
                why = getattr(exc, "strerror", None) or type(exc).__name__
                raise Fault(
                    f"the name {host[0]} cannot be resolved ({why}): correct the host in the URL, or this machine's "
                    "DNS or /etc/hosts"
                ) from exc
            addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
            return host[0] if addresses == [host[0]] else f"{host[0]} is {', '.join(addresses)}"

        late = "the name {name} was not resolved in time: look at this machine's DNS"
        return self._judged(ask_each(self.reached, ask, self._timeout_s, late=late), join=", ")

    def _connection(self) -> Said:
        def ask(host: Host) -> str:
            begun_s = time.monotonic()
            try:
                socket.create_connection(host, timeout=self._timeout_s).close()
            except ConnectionRefusedError as exc:
                raise Fault(
                    f"nothing listens at {shown(host)}: is the server running there, and is that its port?"
                ) from exc
            except TimeoutError as exc:
                raise Fault(
                    f"{shown(host)} did not take a connection within {self._timeout_s:g} s: is that its address, and "
                    "does a firewall let this machine through?"
                ) from exc
            except OSError as exc:
                raise Fault(
                    f"{shown(host)} cannot be reached ({exc.strerror or type(exc).__name__}): check address and network"
                ) from exc
            return f"{shown(host)} in {(time.monotonic() - begun_s) * 1000:.1f} ms"

        return self._judged(ask_each(self.reached, ask, self._timeout_s), join=", ")

    def _certificates(self) -> Said:
        if self._tls is None:
            return ok(f"not used: {self._plain}:// speaks without")
        tls = self._tls
        results = ask_each(self.reached, lambda host: self._certificate(host, tls), 3 * self._timeout_s)
        said = self._judged({host: _text_of(result) for host, result in results.items()})
        ends = [result.ends_s for result in results.values() if isinstance(result, _Certificate)]
        if ends and min(ends) < time.time() + RENEW_WITHIN_DAYS * 86400:
            return warn(f"{said.text}; it ends soon: renew it now")
        return said

    def _certificate(self, host: Host, tls: TlsFiles) -> _Certificate:
        where = shown(host)
        try:
            with (
                socket.create_connection(host, timeout=self._timeout_s) as raw,
                tls_context(tls).wrap_socket(raw, server_hostname=host[0]) as secured,
            ):
                return _Certificate.of(secured.getpeercert() or {})
        except ssl.SSLCertVerificationError as exc:
            raise Fault(self._not_believed(exc, host, tls)) from exc
        except ssl.SSLError as exc:
            reason = (exc.reason or "").upper()
            if "ALERT" in reason:
                raise Fault(
                    f"{where} refused this client's certificate ({reason.lower()}): give one that its CA signed, "
                    "cert=FILE and key=FILE"
                ) from exc
            raise Fault(
                f"{where} does not speak TLS ({reason.lower() or 'closed'}): write {self._plain}://, or name its TLS "
                "port"
            ) from exc
        except TimeoutError as exc:
            raise Fault(
                f"{where} took the connection and did not answer the TLS handshake within {self._timeout_s:g} s: is it "
                f"stopped, or overloaded? If that port is one without TLS, write {self._plain}://"
            ) from exc
        except OSError as exc:
            raise Fault(
                f"{where} ended the TLS handshake ({exc.strerror or type(exc).__name__}): is it a TLS port? If not, "
                f"write {self._plain}://"
            ) from exc

    def _not_believed(self, exc: ssl.SSLCertVerificationError, host: Host, tls: TlsFiles) -> str:
        presented = self._presented(host, tls)
        what = f"the certificate of {shown(host)} ({presented})" if presented else f"the certificate of {shown(host)}"
        match exc.verify_code:
            case 10:  # X509_V_ERR_CERT_HAS_EXPIRED
                return f"{what} has expired: renew it on the server; or is this machine's clock wrong?"
            case 9:
                return f"{what} is not valid yet: check the clocks of both machines"
            case 62 | 63 | 64:  # host, e-mail or address mismatch
                return f"{what} is for other names than {host[0]}: add it there, or name the server as it says"
        trusted = f"by the CA in {tls.ca}" if tls.ca else "by a CA that this system trusts"
        return f"{what} is not signed {trusted} ({exc.verify_message}): name the file of its CA, ca=FILE"

    def _presented(self, host: Host, tls: TlsFiles) -> str:
        """The certificate that a server shows, whatever is wrong with it; empty where it cannot be had."""
        # Only what the module ssl verified is taken apart by it: so the certificate is had, then trusted.
        blind = tls_context(tls, verified=False)
        with suppress(OSError, ValueError, Fault):
            with (
                socket.create_connection(host, timeout=self._timeout_s) as raw,
                blind.wrap_socket(raw, server_hostname=host[0]) as secured,
            ):
                seen = ssl.DER_cert_to_PEM_cert(secured.getpeercert(binary_form=True) or b"")
            trusting = tls_context(tls, verified=False)
            trusting.verify_mode = ssl.CERT_REQUIRED
            trusting.verify_flags = ssl.VerifyFlags(ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME)
            trusting.load_verify_locations(cadata=seen)
            with (
                socket.create_connection(host, timeout=self._timeout_s) as raw,
                trusting.wrap_socket(raw, server_hostname=host[0]) as secured,
            ):
                return _Certificate.of(secured.getpeercert() or {}).text
        return ""

    def _judged(self, results: Mapping[Host, str | Fault], *, join: str = "; ") -> Said:
        self.reached, said = judged(results, join=join)
        return said


@dataclass(frozen=True, slots=True)
class _Certificate:
    """A certificate in words, and when it ends (Unix time)."""

    text: str
    ends_s: float

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> _Certificate:
        ends_s = ssl.cert_time_to_seconds(said["notAfter"]) if "notAfter" in said else 0.0
        until = datetime.fromtimestamp(ends_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        names = ", ".join(f"{kind}:{name}" for kind, name in said.get("subjectAltName", ())) or "no names"
        subject, issuer = _common_name(said.get("subject", ())), _common_name(said.get("issuer", ()))
        verb = "was valid until" if ends_s < time.time() else "valid until"
        return cls(f"{subject} for {names}, signed by {issuer}, {verb} {until}", ends_s)


def _common_name(parts: Sequence[Sequence[tuple[str, str]]]) -> str:
    named = [pair for part in parts for pair in part]
    common = [value for name, value in named if name == "commonName"]
    return (common or [value for _, value in named] or ["nobody"])[-1]


def _text_of(result: _Certificate | Fault) -> str | Fault:
    return result.text if isinstance(result, _Certificate) else result


def tls_context(tls: TlsFiles, *, verified: bool = True) -> ssl.SSLContext:
    """What a store's own connections use. Raises `Fault` for files that cannot be used."""
    if verified:
        try:
            context = ssl.create_default_context(cafile=tls.ca)
        except OSError as exc:
            raise Fault(
                f"the CA file {tls.ca} cannot be used ({exc.strerror or type(exc).__name__}): name a readable PEM file"
            ) from exc
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if tls.cert:
        try:
            context.load_cert_chain(tls.cert, tls.key)
        except OSError as exc:
            raise Fault(
                f"the client certificate {tls.cert} with the key {tls.key or tls.cert} cannot be used "
                f"({exc.strerror or type(exc).__name__}): name readable PEM files that belong together"
            ) from exc
    return context


def shown(host: Host) -> str:
    return f"[{host[0]}]:{host[1]}" if ":" in host[0] else f"{host[0]}:{host[1]}"


def ask_each(
    hosts: Sequence[Host],
    ask: Callable[[Host], T],
    timeout_s: float,
    *,
    late: str = "{host} did not answer in time: is it stopped, or overloaded?",
) -> dict[Host, T | Fault]:
    """What `ask` returns or raises for each host, all asked at once; one that does not end in time is left alone.

    `late` says what that means, of `{host}` or its `{name}`. What is raised and is no `Fault` is raised here.
    """
    results: dict[Host, T | Exception] = {}

    def run(host: Host) -> None:
        try:
            results[host] = ask(host)
        except Exception as exc:  # noqa: BLE001  # handed on to the caller's thread
            results[host] = exc

    # Threads of our own: resolving a name has no deadline, and an executor would wait for it at the exit.
    threads = [threading.Thread(target=run, args=(host,), daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    end_s = time.monotonic() + timeout_s + _GRACE_S
    for thread in threads:
        thread.join(max(0.0, end_s - time.monotonic()))
    answered: dict[Host, T | Fault] = {}
    for host in hosts:
        result = results.get(host, Fault(late.format(host=shown(host), name=host[0])))
        if isinstance(result, Exception) and not isinstance(result, Fault):
            raise result
        answered[host] = result
    return answered


def judged(results: Mapping[Host, str | Fault], *, join: str = "; ") -> tuple[list[Host], Said]:
    """The hosts that are well, and what to say of all: a failure where none is, a warning where some are not."""
    well = [host for host, result in results.items() if not isinstance(result, Fault)]
    faults = list(dict.fromkeys(str(result) for result in results.values() if isinstance(result, Fault)))
    texts = list(dict.fromkeys(str(result) for result in results.values() if not isinstance(result, Fault)))
    if not faults:
        return well, ok(join.join(texts))
    if not well:
        return well, fail("; ".join(faults))
    return well, warn(f"{len(well)} of {len(results)} members are well, the others not: {'; '.join(faults)}")
