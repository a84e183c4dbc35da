"""The plugin that looks for planted secrets finds them, wherever they are told."""

from __future__ import annotations

import logging
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import trace

from tests.support.planted import PASSWORD, TENANT, VALUE, secret_in, take
from tests.support.sdk import Sdk
from tests.support.serving import ROOT
from veltrix_mw import Conflict, KeyMissing, StoreUnavailable
from veltrix_mw.snapshot import Entry

LEAKING = """
import logging
from tests.support.planted import PASSWORD, TENANT, VALUE
from tests.support.sdk import Sdk
from veltrix_mw import InvalidValue

def ours(sdk):
    return sdk.tracer_provider.get_tracer("veltrix_mw")

def test_clean():
    ours(Sdk()).start_span("veltrix.fetch", attributes={"veltrix.prefix": "tenants/"}).end()

def test_value_in_a_span():
    ours(Sdk()).start_span("veltrix.fetch", attributes={"veltrix.found": VALUE}).end()

def test_password_in_the_log():
    logging.getLogger("veltrix_mw").error("no answer of redis://ops:%s@h", PASSWORD)

def test_tenant_in_a_metric():
    sdk = Sdk()
    sdk.meter_provider.get_meter("veltrix_mw").create_counter("veltrix.x").add(1, {"key": f"tenants/{TENANT}/limit"})
    sdk.close()

def test_value_in_an_error():
    InvalidValue(f"not an integer: {VALUE}")
"""


@pytest.fixture
def sdk() -> Iterator[Sdk]:
    made = Sdk()
    yield made
    made.close()
    take()


def run(tests: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "tests.support.planted", "-p", "no:cacheprovider"]
    command += [f"--rootdir={tests}", str(tests)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)


def test_a_test_that_tells_a_secret_fails(tmp_path: Path) -> None:
    (tmp_path / "test_leaking.py").write_text(LEAKING)
    done = run(tmp_path)
    passed, failed = (
        {line.partition("::")[2].split()[0] for line in done.stdout.splitlines() if line.startswith(outcome)}
        for outcome in ("PASSED", "FAILED")
    )
    assert passed == {"test_clean"}, done.stdout + done.stderr
    assert failed == {
        "test_value_in_a_span", "test_password_in_the_log", "test_tenant_in_a_metric", "test_value_in_an_error",
    }  # fmt: skip


def test_what_is_told_after_the_last_test_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_late.py").write_text("def test_clean(): pass")
    (tmp_path / "conftest.py").write_text(
        "from tests.support.planted import VALUE\nfrom veltrix_mw import InvalidValue\n"
        "def pytest_runtest_logfinish(): InvalidValue(VALUE)\n"
    )
    done = run(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert VALUE in done.stdout


@pytest.mark.parametrize("text", [VALUE, f'"{VALUE}"', f'{{"k": "{VALUE}"}}', f"redis://ops:{PASSWORD}@h"])
def test_a_secret_is_found_also_in_base64(text: str) -> None:
    assert secret_in(f"about {text} this")
    assert secret_in(f"about {b64encode(text.encode()).decode()} this")
    assert secret_in(f"about {text.encode()!r} this")
    assert secret_in("redis://ops:password@h, hunt, aHVudA==") is None


def test_every_part_of_a_span_is_looked_at(sdk: Sdk) -> None:
    tracer = sdk.tracer_provider.get_tracer("veltrix_mw")
    with tracer.start_as_current_span("veltrix.fetch"):
        pass
    assert take() == []
    with tracer.start_as_current_span(f"HMGET {VALUE}"):
        pass
    with tracer.start_as_current_span("veltrix.fetch") as span:
        span.set_attribute("veltrix.keys", [VALUE])
    with tracer.start_as_current_span("veltrix.fetch") as span:
        span.add_event("exception", {"exception.message": VALUE})
    with tracer.start_as_current_span("veltrix.fetch") as span:
        span.set_status(trace.StatusCode.ERROR, VALUE)
    link = trace.Link(span.get_span_context(), {"told": VALUE})
    with tracer.start_as_current_span("veltrix.fetch", links=[link]):
        pass
    assert [leak.split(":")[0] for leak in take()] == [f"span HMGET {VALUE}", *["span veltrix.fetch"] * 4]


def test_a_tenant_may_be_named_by_a_lookup_and_the_servers_own_url_alone(sdk: Sdk) -> None:
    tracer = sdk.tracer_provider.get_tracer("veltrix_mw")
    key = f"tenants/{TENANT}/limit"
    tracer.start_span("veltrix.lookup", attributes={"veltrix.key": key}).end()
    sdk.app.start_span(f"GET /{TENANT}", attributes={"url.path": f"/{TENANT}"}).end()
    assert take() == []
    tracer.start_span("veltrix.fetch", attributes={"veltrix.prefix": key}).end()
    sdk.app.start_span("GET /", attributes={"veltrix.key": key}).end()
    assert [leak.split(":")[0] for leak in take()] == ["span veltrix.fetch", "span GET /"]


def test_a_metric_of_others_may_name_a_tenant_and_no_secret(sdk: Sdk) -> None:
    theirs = sdk.meter_provider.get_meter("app").create_counter("requests")
    theirs.add(1, {"tenant": TENANT})
    sdk.metrics()
    assert take() == []
    theirs.add(1, {"limit": VALUE})
    sdk.metrics()
    assert [leak.split(":")[0] for leak in take()] == ["metric requests"]


def test_metrics_that_no_test_reads_are_looked_at_in_the_end() -> None:
    sdk = Sdk()
    sdk.meter_provider.get_meter("veltrix_mw").create_counter("veltrix.x").add(1, {"key": TENANT})
    assert take() == []
    sdk.close()
    assert [leak.split(":")[0] for leak in take()] == ["metric veltrix.x"]


def test_the_log_is_ours_alone_with_all_fields() -> None:
    logging.getLogger("app").error(VALUE)
    logging.getLogger("veltrix_mw_of_others").error(VALUE)
    assert take() == []
    logging.getLogger("veltrix_mw").error("away", extra={"reason": VALUE})
    logging.getLogger("veltrix_mw.part").error("away: %s", VALUE)
    assert [leak.split(":")[0] for leak in take()] == ["log line"] * 2


def test_an_error_is_looked_at_when_it_is_made_whoever_catches_it() -> None:
    for error in (StoreUnavailable("away"), Conflict("other", key="k", current=Entry(VALUE, 1))):
        assert isinstance(error.args, tuple)
    assert take() == []
    made = KeyMissing(VALUE), Conflict(VALUE, key="k", current=Entry(1, 1))
    assert [str(error) for error in made] == [VALUE, VALUE]
    assert [leak.split(":")[0] for leak in take()] == ["error KeyMissing", "error Conflict"]
