"""The contract over ready clients of the package `etcd3`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.stores.test_etcd import Servers, servers  # noqa: F401  # a fixture
from tests.stores.test_etcd_handed_in import OPTIONS, HandedInContract, HandedInHarness
from veltrix_mw.stores.opening import adopt_store

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def open_through_etcd3(host: str, port: int, **options: Any) -> Any:
    """A store over a client of this process's own."""
    import etcd3  # not above: importing it warns

    return adopt_store(etcd3.client(host=host, port=port, grpc_options=OPTIONS), **options)


class TestEtcd3Adopted(HandedInContract):
    @pytest.fixture
    def harness(self, servers: Servers) -> Iterator[HandedInHarness]:  # noqa: F811
        harness = HandedInHarness(servers, f"{__name__}:open_through_etcd3")
        yield harness
        harness.close()
