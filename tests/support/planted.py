"""A pytest plugin: no secret that a test planted comes into a span, a metric, a log line or an error, in the whole run.

Owns what is planted and where it is looked for. The test in which something is found fails, be it about something else:
what a thread of the background tells between two tests fails the next one, or the run. `tests/conftest.py` loads it.

Looked for in what this process tells. What runs in another process looks by itself (`watching`), or its test does.
"""

from __future__ import annotations

import functools
import logging
import re
from base64 import b64encode
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import pytest

from veltrix_mw import VeltrixError

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricsData
    from opentelemetry.sdk.trace import ReadableSpan

__all__ = ["PASSWORD", "TENANT", "VALUE", "secret_in", "take", "watching"]

VALUE: Final = "hunter2-value"
PASSWORD: Final = "hunter2-password"
TENANT: Final = "acme"
"""Tenants whose name has it are in no metric of ours, and in no span but `veltrix.lookup`, which names the key."""

_MARK: Final = b"hunter"
_AROUND: Final = 80  # characters of what is shown of a find, on each side


def _in_base64(word: bytes) -> Iterator[str]:
    """The word as it stands in the base64 of a longer text: etcd's gateway writes values so. One for each offset."""
    for offset in range(3):
        written = b64encode(bytes(offset) + word).decode()
        yield written[-(-offset * 8 // 6) : (offset + len(word)) * 8 // 6]  # the characters that are the word's alone


_SECRET: Final = re.compile(
    "|".join(
        [
            _MARK.decode(),
            *map(re.escape, _in_base64(_MARK)),
            # What tests wrote into values and URLs before there were constants for it.
            *("s3cret", "wr0ng", "v4lue", "planted-value", r"\bpw\b", r"\bsecret-\d", "not-the-secret"),
            r"\b(?:admin|finder|relay|root|worker|writer)-password\b",
        ]
    )
)

_leaks: Final[list[str]] = []  # threads of all kinds append


def secret_in(text: str) -> str | None:
    """What is around the first planted secret in the text."""
    found = _SECRET.search(text)
    return found and text[max(0, found.start() - _AROUND) : found.end() + _AROUND]


def take() -> list[str]:
    """What was found since the last time."""
    taken = _leaks[:]
    del _leaks[: len(taken)]
    return taken


def _look(where: str, told: object, tenants_in: object = "") -> None:
    text = repr(told)
    shown = secret_in(text)
    if shown is None and TENANT in repr(tenants_in):
        shown = repr(tenants_in)
    if shown is not None:
        _leaks.append(f"{where}: {shown}")


def _look_at_error(error: VeltrixError) -> None:
    _look(f"error {type(error).__name__}", error.args)


def _look_at_record(record: logging.LogRecord) -> None:
    if record.name.partition(".")[0] == "veltrix_mw":
        _look("log line", (record.getMessage(), record.__dict__))


def _look_at_span(span: ReadableSpan) -> None:
    attributes = dict(span.attributes or {})
    told = (
        span.name,
        attributes,
        span.status.description,
        [(event.name, dict(event.attributes or {})) for event in span.events],
        [dict(link.attributes or {}) for link in span.links],
    )
    scope = span.instrumentation_scope
    if scope is None or scope.name != "veltrix_mw":  # a server's own has the URL; ours are those of our names
        named: object = {name: value for name, value in attributes.items() if name.startswith("veltrix.")}
    else:
        named = "" if span.name == "veltrix.lookup" else told
    _look(f"span {span.name}", told, named)


def _look_at_metrics(data: MetricsData | None) -> None:
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                told = (metric.name, metric.description, [dict(at.attributes or {}) for at in metric.data.data_points])
                _look(f"metric {metric.name}", told, told if scope.scope.name == "veltrix_mw" else "")


@contextmanager
def watching() -> Iterator[None]:
    """Look at all that this process tells meanwhile; `take` has what was found."""
    with pytest.MonkeyPatch.context() as patch:

        def after(owner: type, name: str, look: Callable[..., object]) -> None:
            """Call `look(result, *arguments)` after the method."""
            method = getattr(owner, name)

            @functools.wraps(method)
            def watched(*arguments: Any, **options: Any) -> Any:
                result = method(*arguments, **options)
                look(result, *arguments)
                return result

            patch.setattr(owner, name, watched)

        def made(error: VeltrixError, *arguments: object) -> None:
            super(VeltrixError, error).__init__(*arguments)
            _look_at_error(error)

        patch.setattr(VeltrixError, "__init__", made)
        after(logging.Logger, "handle", lambda _, _logger, record: _look_at_record(record))
        if find_spec("opentelemetry.sdk"):  # the environment of etcd3 is without
            from opentelemetry.sdk.metrics.export import InMemoryMetricReader
            from opentelemetry.sdk.trace import SynchronousMultiSpanProcessor

            # Every provider's, so whatever a test exports to. Metrics nobody asked for are looked at in the end.
            after(SynchronousMultiSpanProcessor, "on_end", lambda _, _processor, span: _look_at_span(span))
            after(InMemoryMetricReader, "get_metrics_data", lambda data, _reader: _look_at_metrics(data))
            after(InMemoryMetricReader, "shutdown", lambda _, reader, *_timeout: reader.get_metrics_data())
        yield


def _fail() -> None:
    if leaks := take():
        pytest.fail("what no one may tell was told:\n" + "\n".join(leaks), pytrace=False)


_watch: Final = watching()


def pytest_configure() -> None:
    _watch.__enter__()


def pytest_unconfigure() -> None:
    _watch.__exit__(None, None, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    result = yield
    _fail()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, Any, Any]:
    result = yield
    _fail()
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What was told after the last test."""
    if leaks := take():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print("\nwhat no one may tell was told:", *leaks, sep="\n")
