"""The Redis store as the authority: the contract, and what is its own: the server's faults, errors, the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.stores.contract import Harness, SharedStoreContract, here, put
from tests.support.redis_servers import RedisServer, redis_server
from veltrix_mw.stores.redis import RedisStore


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


class RedisHarness(Harness):
    """A server, emptied for each test."""

    keeps_records = False

    def __init__(self, server: RedisServer) -> None:
        super().__init__()
        self._port = server.port

    def spec(self, **options: Any) -> dict[str, Any]:
        options = {"host": "127.0.0.1", "port": self._port, "namespace": self.namespace, **options}
        return {"store": "veltrix_mw.stores.redis:RedisStore", "options": options}

    def make(self, **options: Any) -> RedisStore:
        return RedisStore("127.0.0.1", self._port, namespace=self.namespace, **options)

    def forget(self, oldest: int) -> None:
        newest = here(self.open()).revision
        put(self.open(keep_revisions=newest - oldest + 2), "forgotten", b"1")


@pytest.fixture
def harness(shared_server: RedisServer) -> Iterator[RedisHarness]:
    shared_server.run("FLUSHALL")
    harness = RedisHarness(shared_server)
    yield harness
    harness.close()


class TestRedisStore(SharedStoreContract):
    """The contract over `RedisStore`."""
