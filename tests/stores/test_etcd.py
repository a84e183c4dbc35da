"""The etcd store: the contract, and what is its own, on real servers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.stores.contract import Harness, SharedStoreContract
from tests.support.etcd_servers import etcd
from veltrix_mw.stores.etcd import EtcdStore

_numbers = itertools.count()


class EtcdHarness(Harness):
    """One server; a fresh one for the next namespace where history was forgotten, as that goes for the whole server."""

    keeps_records = False

    def __init__(self) -> None:
        super().__init__()
        self._servers = contextlib.ExitStack()
        self.server = self._servers.enter_context(etcd())
        self._has_forgotten = False

    def spec(self, **options: Any) -> dict[str, Any]:
        options = {"hosts": self.server.hosts, "namespace": self.namespace, **options}
        return {"store": "veltrix_mw.stores.etcd:EtcdStore", "options": options}

    def make(self, **options: Any) -> EtcdStore:
        return EtcdStore(self.server.hosts, namespace=self.namespace, **options)

    def renamed(self) -> None:
        super().renamed()
        if self._has_forgotten:
            self._servers.close()
            self.server = self._servers.enter_context(etcd())
            self._has_forgotten = False

    def forget(self, oldest: int) -> None:
        self.server.compact(oldest)
        self._has_forgotten = True

    def close(self) -> None:
        super().close()
        self._servers.close()


@pytest.fixture
def harness() -> Iterator[EtcdHarness]:
    harness = EtcdHarness()
    yield harness
    harness.close()


class TestEtcdStore(SharedStoreContract):
    """The contract over `EtcdStore`."""
