"""The example does what its docstring says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from flask import Flask

from tests.integrations.flask.conftest import change
from tests.support.serving import ROOT, serve
from veltrix_mw import ConfigClient


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flask:
    monkeypatch.setenv("VELTRIX_URL", f"sqlite:///{tmp_path}/shop.db")
    spec = importlib.util.spec_from_file_location("flask_app", ROOT / "examples" / "flask_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app: Flask = module.app
    return app


def test_the_limit_is_changed_while_the_shop_runs(shop: Flask) -> None:
    client: ConfigClient = shop.extensions["veltrix"].client
    browser = shop.test_client()
    with client:
        change(client, {"checkout/max_items": 50})
        assert browser.post("/checkout", data={"items": 60}).status == "409 CONFLICT"
        change(client, {"checkout/max_items": 80})
        assert browser.post("/checkout", data={"items": 60}).json == {"bought": 60}
        assert "At most 80 items" in browser.get("/").text
        assert "The corner shop" in browser.get("/").text
        assert browser.get("/config").json["origin"] == "sqlite"  # type: ignore[index]


def test_it_is_served_as_its_docstring_says(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shop.db"
    with ConfigClient(url) as client:
        client.put("checkout/max_items", 3)
    with serve("examples.flask_app:app", server="gunicorn", env={"VELTRIX_URL": url}) as served:
        served.until_each_worker("checkout/max_items", 3)
        with ConfigClient(url) as client:
            client.put("checkout/max_items", 4)
        served.until_each_worker("checkout/max_items", 4)
