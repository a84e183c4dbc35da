"""The network probe: whether servers can be found, reached and believed, before any of their own protocol is spoken.

Owns names, connections and certificates; knows no store. Sends nothing but a TLS handshake, and keeps none open.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from veltrix_mw.findings import Said, Step, fail, ok, warn
from veltrix_mw.settings import Host, shown
from veltrix_mw.stores.dialing import NameTimeout, addresses_of, dial
from veltrix_mw.stores.tls import Tls, UnusableFile, Verdict, reason_of, verdict_of
from veltrix_mw.words import milliseconds

__all__ = ["Fault", "NetworkProbe", "ask_each", "judged", "speaks_http"]

T = TypeVar("T")

RENEW_WITHIN_DAYS: Final = 14
"""A certificate that ends sooner is a warning: two weeks are enough to renew it, and shorter than any renewal takes."""

_NO_CHECK_TIME: Final = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, which the module ssl has no name for
_GRACE_S: Final = 0.5  # a call that ends by its deadline is let say so itself


class Fault(Exception):
    """What is wrong with one server, and what to do."""


class NetworkProbe:
    """Looks at each of `hosts`; `reached` are those that passed every check so far.

    `plain` is the URL's scheme without TLS.
    """

    def __init__(self, hosts: Sequence[Host], *, tls: Tls | None, plain: str) -> None:
        self.reached: list[Host] = list(hosts)
        self._tls = tls
        self._plain = plain

    @property
    def steps(self) -> tuple[Step, ...]:
        return (
            Step("name", self._name, needs=("url",)),
            Step("connection", self._connection, needs=("name",)),
            Step("tls", self._certificates, needs=("connection",)),
        )

    def _name(self, by_s: float) -> Said:
        def ask(host: Host) -> str:
            name = host[0]
            try:
                found = addresses_of(*host, by_s)
            except NameTimeout as exc:
                raise Fault(f"the name {name} was not resolved in time: look at this machine's DNS") from exc
            except OSError as exc:
                raise Fault(
                    f"the name {name} cannot be resolved ({reason_of(exc)}): correct the host in the URL, or this "
                    "machine's DNS or /etc/hosts"
                ) from exc
            addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
            return name if addresses == [name] else f"{name} is {', '.join(addresses)}"

        return self._judged(ask_each(self.reached, ask, by_s), join=", ")

    def _connection(self, by_s: float) -> Said:
        def ask(host: Host) -> str:
            begun_s = time.monotonic()
            try:
                dial(*host, by_s).close()
            except ConnectionRefusedError as exc:
                raise Fault(
                    f"nothing listens at {shown(host)}: is the server running there, and is that its port?"
                ) from exc
            except TimeoutError as exc:
                raise Fault(
                    f"{shown(host)} did not take a connection in time: is that its address, and does a firewall let "
                    "this machine through?"
                ) from exc
            except OSError as exc:
                raise Fault(f"{shown(host)} cannot be reached ({reason_of(exc)}): check address and network") from exc
            return f"{shown(host)} in {milliseconds(time.monotonic() - begun_s)}"

        return self._judged(ask_each(self.reached, ask, by_s), join=", ")

    def _certificates(self, by_s: float) -> Said:
        if self._tls is None:
            return ok(f"not used: {self._plain}:// speaks without")
        tls = self._tls
        results = ask_each(self.reached, lambda host: self._certificate(host, tls, by_s), by_s)
        said = self._judged({host: _text_of(result) for host, result in results.items()})
        ends = [result.ends_s for result in results.values() if isinstance(result, _Certificate)]
        if ends and min(ends) < time.time() + RENEW_WITHIN_DAYS * 86400:
            return warn(f"{said.text}; it ends soon: renew it now")
        return said

    def _certificate(self, host: Host, tls: Tls, by_s: float) -> _Certificate:
        where = shown(host)
        try:
            with _secured(host, tls.context(), by_s) as connection:
                return _Certificate.of(connection.getpeercert() or {})
        except UnusableFile as exc:
            raise Fault(str(exc)) from exc
        except ssl.SSLCertVerificationError as exc:
            raise Fault(self._not_believed(exc, host, tls, by_s)) from exc
        except ssl.SSLError as exc:
            reason = reason_of(exc).lower()
            match verdict_of(exc):
                case Verdict.CERTIFICATE_WANTED | Verdict.CERTIFICATE_REFUSED if not tls.cert:
                    text = f"{where} asks for a client certificate ({reason}): give cert=FILE and key=FILE"
                case Verdict.CERTIFICATE_WANTED | Verdict.CERTIFICATE_REFUSED:
                    text = (
                        f"{where} refused this client's certificate ({reason}): give one that its CA signed, cert=FILE "
                        "and key=FILE"
                    )
                case _ if "alert" in reason:
                    text = f"{where} ended the TLS handshake ({reason}): its log says why"
                case _:
                    text = f"{where} does not speak TLS ({reason}): write {self._plain}://, or name its TLS port"
            raise Fault(text) from exc
        except TimeoutError as exc:
            raise Fault(
                f"{where} took the connection and did not answer the TLS handshake in time: is it stopped, or "
                f"overloaded? If that port is one without TLS, write {self._plain}://"
            ) from exc
        except OSError as exc:
            raise Fault(
                f"{where} ended the TLS handshake ({reason_of(exc)}): is it a TLS port? If not, write {self._plain}://"
            ) from exc

    def _not_believed(self, exc: ssl.SSLCertVerificationError, host: Host, tls: Tls, by_s: float) -> str:
        presented = self._presented(host, tls, by_s)
        what = f"the certificate of {shown(host)} ({presented})" if presented else f"the certificate of {shown(host)}"
        match verdict_of(exc):
            case Verdict.SERVER_EXPIRED:
                return f"{what} has expired: renew it on the server; or is this machine's clock wrong?"
            case Verdict.SERVER_NOT_YET_VALID:
                return f"{what} is not valid yet: check the clocks of both machines"
            case Verdict.SERVER_OF_OTHER_NAME:
                return f"{what} is for other names than {host[0]}: add it there, or name the server as it says"
        trusted = f"by the CA in {tls.ca}" if tls.ca else "by a CA that this system trusts"
        return f"{what} is not signed {trusted} ({exc.verify_message}): name the file of its CA, ca=FILE"

    @staticmethod
    def _presented(host: Host, tls: Tls, by_s: float) -> str:
        """The certificate that a server shows, whatever is wrong with it; empty where it cannot be had."""
        # Only what the module ssl verified is taken apart by it: so the certificate is had, then trusted.
        with suppress(OSError, ValueError, UnusableFile):
            with _secured(host, tls.blind_context(), by_s) as connection:
                seen = ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True) or b"")
            trusting = tls.blind_context()
            trusting.verify_mode = ssl.CERT_REQUIRED
            trusting.verify_flags = ssl.VerifyFlags(ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME)
            trusting.load_verify_locations(cadata=seen)
            with _secured(host, trusting, by_s) as connection:
                return _Certificate.of(connection.getpeercert() or {}).text
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


def speaks_http(host: Host, tls: Tls | None, by_s: float) -> bool:
    """Whether a web server answers there, or etcd."""
    context = None if tls is None else tls.blind_context()
    finish = None if context is None else lambda raw: context.wrap_socket(raw, server_hostname=host[0])
    try:
        with dial(*host, by_s, finish=finish) as connection:
            connection.settimeout(max(0.1, by_s - time.monotonic()))
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return connection.recv(16).startswith(b"HTTP/")
    except (OSError, UnusableFile):
        return False


@contextmanager
def _secured(host: Host, context: ssl.SSLContext, by_s: float) -> Iterator[ssl.SSLSocket]:
    """A connection over TLS, for the length of the block."""
    with dial(*host, by_s, finish=lambda raw: context.wrap_socket(raw, server_hostname=host[0])) as connection:
        assert isinstance(connection, ssl.SSLSocket)
        yield connection


def ask_each(hosts: Sequence[Host], ask: Callable[[Host], T], by_s: float) -> dict[Host, T | Fault]:
    """What `ask` returns or raises for each host, all asked at once; one that does not end by `by_s` is left alone.

    What is raised and is no `Fault` is raised here.
    """
    results: dict[Host, T | Exception] = {}

    def run(host: Host) -> None:
        try:
            results[host] = ask(host)
        except Exception as exc:  # noqa: BLE001  # handed on to the caller's thread
            results[host] = exc

    # Threads of our own: an executor would wait at the exit for a handshake whose bytes come one by one.
    threads = [threading.Thread(target=run, args=(host,), daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, by_s + _GRACE_S - time.monotonic()))
    answered: dict[Host, T | Fault] = {}
    for host in hosts:
        result = results.get(host, Fault(f"{shown(host)} did not answer in time: is it stopped, or overloaded?"))
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
