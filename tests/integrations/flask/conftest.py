"""What the tests of `flask_veltrix` share: a client that is up, and a way to change what it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask

from flask_veltrix import Veltrix
from veltrix_mw import ConfigClient, Put

Change = Callable[..., int]


def change(client: ConfigClient, values: dict[str, Any]) -> int:
    """Write `values` as one revision, and return it when this process serves it."""
    revision = client.write([Put(key, value) for key, value in values.items()])
    client.wait_for(revision)
    return revision


@pytest.fixture
def client() -> Iterator[ConfigClient]:
    """A client on a store of its own, at revision 1: `limit` is 1, and 10 below `tenants/acme/`."""
    with ConfigClient("memory://") as client:
        client.wait_ready()
        change(client, {"limit": 1, "tenants/acme/limit": 10})
        yield client


@pytest.fixture
def app(client: ConfigClient) -> Flask:
    """An app with Veltrix and no routes, as it runs in production."""
    app = Flask(__name__)
    Veltrix(app, client=client)
    return app
