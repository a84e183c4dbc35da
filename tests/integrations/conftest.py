"""What the tests of all frameworks share: a Redis to be a mirror."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.redis_servers import RedisServer, redis_server


@pytest.fixture(scope="session")
def _mirror_server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def mirror(_mirror_server: RedisServer) -> str:
    """The URL of a mirror that holds nothing."""
    _mirror_server.run("FLUSHALL")
    return f"redis://127.0.0.1:{_mirror_server.port}/0"
