"""TLS: files that cannot be used, and what a handshake that failed means."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest

from tests.support.redis_servers import Certificates
from veltrix_mw.errors import AuthFailed
from veltrix_mw.stores.tls import Tls, UnusableFile, Verdict, verdict_of


def failed(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, reason)
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("reason", "verdict"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", Verdict.CERTIFICATE_WANTED),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", Verdict.CERTIFICATE_WANTED),
        ("SSLV3_ALERT_CERTIFICATE_EXPIRED", Verdict.CERTIFICATE_REFUSED),
        ("SSLV3_ALERT_BAD_CERTIFICATE", Verdict.CERTIFICATE_REFUSED),
        ("TLSV1_ALERT_UNKNOWN_CA", Verdict.CERTIFICATE_REFUSED),
        ("TLSV1_ALERT_PROTOCOL_VERSION", Verdict.OTHER),
        ("TLSV1_ALERT_INTERNAL_ERROR", Verdict.OTHER),
        ("WRONG_VERSION_NUMBER", Verdict.NOT_TLS),
        ("UNEXPECTED_EOF_WHILE_READING", Verdict.OTHER),
    ],
)
def test_only_some_alerts_are_about_the_certificate_that_was_shown(reason: str, verdict: Verdict) -> None:
    assert verdict_of(failed(reason)) is verdict


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (10, Verdict.SERVER_EXPIRED),
        (9, Verdict.SERVER_NOT_YET_VALID),
        (62, Verdict.SERVER_OF_OTHER_NAME),
        (63, Verdict.SERVER_OF_OTHER_NAME),
        (64, Verdict.SERVER_OF_OTHER_NAME),
        (20, Verdict.SERVER_NOT_SIGNED),
        (18, Verdict.SERVER_NOT_SIGNED),
    ],
)
def test_why_a_server_is_not_believed_is_told_apart(code: int, verdict: Verdict) -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code = code
    assert verdict_of(error) is verdict


def test_a_key_with_a_passphrase_is_named_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path, "ours")
    cert, key = certificates.issue("client")
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(UnusableFile, match=r"the key .*locked\.key is encrypted; give one without a passphrase"):
        Tls(str(certificates.ca), str(cert), str(locked)).context()


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    ours, others = Certificates(tmp_path, "ours"), Certificates(tmp_path, "others")
    cert, key = map(str, ours.issue("client"))
    _, wrong_key = map(str, others.issue("other"))
    (tmp_path / "no.pem").write_text("no certificate")
    Tls(str(ours.ca), cert, key).context()
    for tls, named in (
        (Tls(ca=str(tmp_path / "none.pem")), "the CA file .*none.pem cannot be used"),
        (Tls(ca=str(tmp_path / "no.pem")), "the CA file .*no.pem cannot be used"),
        (Tls(str(ours.ca), cert, wrong_key), "client.pem with the key .*other.key cannot be used.*KEY_VALUES_MISMATCH"),
        (Tls(str(ours.ca), key), "the client certificate .*client.key"),
    ):
        with pytest.raises(UnusableFile, match=named) as caught:
            tls.context()
        assert isinstance(caught.value, AuthFailed)
