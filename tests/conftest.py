"""Fixtures for every test: an environment that is the tests' own, and ports."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from hypothesis import settings

from tests.support.ports import free_port as _free_port
from veltrix_mw import events

pytest_plugins = ["tests.support.planted"]

# The same examples each time: what a run finds must not depend on its day. `--hypothesis-profile=default` explores.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# The package has an environment of its own, where these alone are run: scripts/suite.sh.
collect_ignore = [] if find_spec("etcd3") else ["etcd3"]

# A shell that is not interactive lets what it runs in the background ignore SIGINT, and so every process of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_environment() -> Iterator[None]:
    """What a developer exported decides nothing here, nor in processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name.startswith(("VELTRIX_", "OTEL_")):
                patch.delenv(name)
        yield


@pytest.fixture(autouse=True)
def _each_event_told_at_once() -> Iterator[None]:
    """What one test had told keeps back no line of another."""
    events.reset()
    yield
    events.reset()


@pytest.fixture
def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on."""
    return _free_port()
