"""What a client says of its tiers, in the log and in its status: a file as the authority, and Redis as its mirror."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.redis_servers import RedisServer, redis_server
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient

WITHIN_S = 30.0


@pytest.fixture(scope="module")
def _server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def redis(_server: RedisServer) -> RedisServer:
    """A Redis that is up and holds nothing."""
    _server.run("FLUSHALL")
    return _server


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store that one key was written to."""
    url = f"sqlite:///{tmp_path}/c.db"
    with ConfigClient(url) as client:
        client.put("k", 1)
    return url


def mirror_url(server: RedisServer) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


def told(caplog: pytest.LogCaptureFixture, event: str) -> list[tuple[str, str]]:
    """The level and the text of each record of that event."""
    return [(one.levelname, one.getMessage()) for one in list(caplog.records) if one.getMessage().startswith(event)]


def follows(client: ConfigClient, role: str) -> bool:
    return any(tier.role == role and tier.state == "following" for tier in client.status().tiers)


def test_a_mirror_that_never_worked_is_told_once_and_its_coming_is_no_warning(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "veltrix_mw")
    with redis_server() as server:
        server.kill()
        with ConfigClient(url, mirror=mirror_url(server)) as client:
            client.wait_ready(WITHIN_S)
            wait_until(lambda: follows(client, "authority"), WITHIN_S, reason="the authority to be followed")
            ((level, text),) = told(caplog, "veltrix.failover")
            assert level == "WARNING"
            assert "the mirror is not followed, and the authority is: " in text
            assert str(server.port) in text
            server.start()
            wait_until(lambda: follows(client, "mirror"), WITHIN_S, reason="the mirror to be followed")
    _, (level, text) = told(caplog, "veltrix.failover")
    assert (level, "the mirror is well, and followed from here on" in text) == ("INFO", True)
