"""Lazy keys: loaded before the view function runs, for whichever way the request came in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask

from flask_veltrix import Veltrix, config
from tests.integrations.flask.conftest import change
from veltrix_mw import ConfigClient, NotLoaded, SettingsError, current_view


@pytest.fixture
def client() -> Iterator[ConfigClient]:
    """A client that holds no tenant: `limit` is 1, and 10 below `tenants/acme/`."""
    with ConfigClient("memory://", lazy=("tenants/", "users/")) as client:
        client.wait_ready()
        change(client, {"limit": 1, "tenants/acme/limit": 10, "users/1/name": "ann"})
        yield client


def make_app(client: ConfigClient, **options: Any) -> Flask:
    app = Flask(__name__)
    Veltrix(app, client=client, **options)

    @app.get("/limit")
    def limit() -> str:
        return f"{config['limit']} {current_view()['limit']}"

    @app.get("/name")
    def name() -> str:
        return str(config["users/1/name"])

    return app


def test_layers_that_are_lazy_are_loaded(client: ConfigClient) -> None:
    app = make_app(client, layers=lambda asked: ["tenants/acme/"])
    assert app.test_client().get("/limit").text == "10 10"
    with app.test_request_context("/limit"):
        assert config["limit"] == 10


def test_and_what_prefetch_names(client: ConfigClient) -> None:
    app = make_app(client, prefetch=lambda asked: [f"users/{asked.args['user']}/name"])
    app.testing = True
    with pytest.raises(NotLoaded):
        app.test_client().get("/name?user=2")
    assert app.test_client().get("/name?user=1").text == "ann"
    assert app.test_client().get("/name?user=../x").status_code == 400


def test_an_invalid_key_can_be_ignored(client: ConfigClient) -> None:
    app = make_app(client, prefetch=lambda _: iter(["../", "users/1/name"]), on_invalid_layer="ignore")
    assert app.test_client().get("/name").text == "ann"
    assert client.dropped_layers == 1


@pytest.mark.parametrize("wrong", ["users/1/name", ["users/1/name"]])
def test_a_prefetch_that_is_none_is_the_apps_fault(client: ConfigClient, wrong: Any) -> None:
    with pytest.raises(SettingsError, match="prefetch="):
        make_app(client, prefetch=wrong)
    app = make_app(client, prefetch=lambda _: "users/1/name")
    app.testing = True
    with pytest.raises(SettingsError, match="sequence of keys"):
        app.test_client().get("/name")


def test_settings_reach_the_client() -> None:
    app = Flask(__name__)
    app.config.update(
        VELTRIX_URL="memory://", VELTRIX_LAZY=["users/"], VELTRIX_FETCH_TIMEOUT_S=0.5, VELTRIX_LAZY_MAX_BYTES=1_000_000
    )
    Veltrix(app)
    made = app.extensions["veltrix"].client
    assert (made.lazy, made.fetch_timeout_s) == (("users/",), 0.5)
