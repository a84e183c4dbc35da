"""The etcd store over gRPC: the contract and all that is tested of the store over the gateway."""

from __future__ import annotations

import pytest

from tests.stores.test_etcd import *  # noqa: F403  # its tests, and their fixtures but for this one


@pytest.fixture
def transport() -> str:
    return "grpc"
