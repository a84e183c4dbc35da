"""TLS: whose certificate is believed, which one is shown, and what a handshake that failed means.

Owns the files, the verdicts and what the other side said at the end; opens no connection and knows no store, so the
words are each store's own.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from veltrix_mw.protocols import CertificateFault

__all__ = ["Tls", "UnusableFile", "Verdict", "reason_of", "send_all", "verdict_of"]


class UnusableFile(CertificateFault):
    """A file of TLS cannot be read, or holds something else. Correct the file, or the URL that names it."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM: whom to trust (None: whom the system trusts), and who we are.

    They are read anew for each context, and stores make one for each connection, of which there are few: files that
    were replaced are used from the next connection on.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    def context(self) -> ssl.SSLContext:
        """What to connect with. Raises `UnusableFile`."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as exc:
            raise UnusableFile(
                f"the CA file {self.ca} cannot be used ({reason_of(exc)}); name a readable PEM file: ca=FILE"
            ) from exc
        return self._presenting(context)

    def blind_context(self) -> ssl.SSLContext:
        """What to look at a server with whose certificate nobody believed: nothing is to be said over it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return self._presenting(context)

    def _presenting(self, context: ssl.SSLContext) -> ssl.SSLContext:
        if self.cert:
            key = self.key or self.cert

            def refuse() -> str:
                # Without an answer here OpenSSL would ask for the passphrase on the terminal, and wait there.
                raise UnusableFile(
                    f"the key {key} is encrypted; give one without a passphrase that only this user may read: "
                    f"openssl pkey -in {key} -out FILE, then key=FILE"
                )

            try:
                context.load_cert_chain(self.cert, self.key, password=refuse)
            except OSError as exc:
                raise UnusableFile(
                    f"the client certificate {self.cert} with the key {key} cannot be used "
                    f"({reason_of(exc)}); name readable PEM files that belong together: cert=FILE and key=FILE"
                ) from exc
        return context


class Verdict(Enum):
    """What a failed handshake says."""

    SERVER_EXPIRED = auto()
    SERVER_NOT_YET_VALID = auto()  # or a clock is wrong
    SERVER_OF_OTHER_NAME = auto()
    SERVER_NOT_SIGNED = auto()  # by nobody who is trusted
    CERTIFICATE_WANTED = auto()  # ours, and none was shown
    CERTIFICATE_REFUSED = auto()  # ours
    NOT_TLS = auto()  # the other side speaks something else
    OTHER = auto()


# By X509_V_ERR_*: expired; not yet valid; the host, an e-mail or an address does not match.
_OF_SERVER: Final = {
    10: Verdict.SERVER_EXPIRED,
    9: Verdict.SERVER_NOT_YET_VALID,
    62: Verdict.SERVER_OF_OTHER_NAME,
    63: Verdict.SERVER_OF_OTHER_NAME,
    64: Verdict.SERVER_OF_OTHER_NAME,
}


def verdict_of(error: ssl.SSLError) -> Verdict:
    """By what is wrong with the server's certificate, the alert that it sent, or what came in its place."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _OF_SERVER.get(error.verify_code, Verdict.SERVER_NOT_SIGNED)
    reason = reason_of(error).upper()
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
        return Verdict.CERTIFICATE_WANTED
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        return Verdict.CERTIFICATE_REFUSED
    if reason in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"}:
        return Verdict.NOT_TLS
    return Verdict.OTHER


def reason_of(error: OSError) -> str:
    """What the module ssl, else the system, calls it."""
    return getattr(error, "reason", None) or error.strerror or type(error).__name__


def send_all(sock: socket.socket, data: bytes) -> None:
    """Send all of it, over TLS or plainly. Raises `OSError`; over TLS what the other side said as it closed."""
    try:
        sock.sendall(data)
    except (ConnectionError, ssl.SSLEOFError):  # which of them: a matter of the moment
        if isinstance(sock, ssl.SSLSocket):
            sock.recv(1)  # what was said raises, in place of this
        raise
