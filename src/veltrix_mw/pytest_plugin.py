"""The pytest plugin: fixtures for tests of apps that read config. Loaded by pytest, by entry point.

Owns the fixtures; pytest loads it in every project that has the library installed, so it imports no more than
being a part of the package does until one of them is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from veltrix_mw.client import ConfigClient


class Overrider(Protocol):
    """The type of the `config_override` fixture."""

    def __call__(self, values: dict[str, Any], /) -> None:
        """Fix these values until the test ends."""
        ...


@pytest.fixture
def config_override() -> Iterator[Overrider]:
    """`config_override({"checkout/max_items": 3})` fixes values until the test ends."""
    from veltrix_mw.testing import override_config

    with ExitStack() as stack:

        def override(values: dict[str, Any], /) -> None:
            stack.enter_context(override_config(values))

        yield override


@pytest.fixture
def config_client() -> Iterator[ConfigClient]:
    """A started client on an empty in-memory store of its own, closed when the test ends."""
    from veltrix_mw import ConfigClient

    with ConfigClient("memory://", telemetry="off") as client:
        client.wait_ready()
        yield client
