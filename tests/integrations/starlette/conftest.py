"""A client whose value the tests change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from veltrix_mw import ConfigClient


@pytest.fixture
def client() -> Iterator[ConfigClient]:
    """A started client that serves `checkout/max_items` as 41."""
    with ConfigClient("memory://") as client:
        client.wait_for(client.put("checkout/max_items", 41))
        yield client
