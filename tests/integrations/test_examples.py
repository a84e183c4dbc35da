"""The examples without a framework, and those of Starlette and FastAPI, served as their docstrings say."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.serving import Served, Server, serve
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient


def post(served: Served, path: str) -> tuple[int, Any]:
    request = urllib.request.Request(served.url + path, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.load(refused)


@pytest.mark.parametrize("app", ["starlette_app", "fastapi_app"])
def test_the_shop_takes_up_its_new_limit(app: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    with ConfigClient(url) as writer:
        writer.put("checkout/max_items", 50)
        with serve(f"examples.{app}:app", server="uvicorn", asgi=True, env={"VELTRIX_URL": url}) as served:
            assert served.get()["checkout/max_items"] == 50
            status, answer = post(served, "/checkout?items=60")
            assert status == 409
            assert "at most 50 items" in str(answer)
            writer.put("checkout/max_items", 80)
            served.until_each_worker("checkout/max_items", 80)
            status, answer = post(served, "/checkout?items=60")
            assert (status, answer["bought"]) == (200, 60)
            if app == "fastapi_app":
                wait_until(lambda: "receipt for 60 items" in served.log, 10, reason="the background task ran")
            else:
                with urllib.request.urlopen(served.url + "/countdown", timeout=20) as countdown:
                    lines = countdown.read().decode().splitlines()
                assert [line.partition(": ")[2] for line in lines] == [lines[0].partition(": ")[2]] * 4
            assert served.stop() == 0


@pytest.mark.parametrize(("app", "server"), [("asgi_app", "uvicorn"), ("wsgi_app", "gunicorn")])
def test_the_bare_shop_serves_each_tenant_its_limit(app: str, server: Server, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    with ConfigClient(url) as writer:
        writer.put("checkout/max_items", 50)
        with serve(f"examples.{app}:app", server=server, asgi=app == "asgi_app", env={"VELTRIX_URL": url}) as served:
            assert served.get()["checkout/max_items"] == 50
            writer.put("tenants/acme/checkout/max_items", 500)
            served.until_each_worker("revision", 2)
            assert served.get(headers={"X-Tenant": "acme"})["checkout/max_items"] == 500
            assert served.get(headers={"X-Tenant": "zenith"})["checkout/max_items"] == 50
            with pytest.raises(urllib.error.HTTPError) as refused:
                served.get(headers={"X-Tenant": "../acme"})
            with refused.value:
                assert refused.value.code == 400
