"""`flask veltrix ...`: the CLI's verbs on the app's store, from a module that costs the `flask` command nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_veltrix import Veltrix
from flask_veltrix.commands import group
from tests.support.serving import ROOT
from veltrix_mw import ConfigClient


def run(app: Flask, *arguments: str) -> Any:
    return app.test_cli_runner().invoke(group, arguments)


@pytest.fixture
def shop(tmp_path: Path) -> Flask:
    app = Flask("shop")
    app.config.update(VELTRIX_URL=f"sqlite:///{tmp_path}/c.db", VELTRIX_NAMESPACE="shop")
    Veltrix(app)
    return app


def stored(app: Flask, key: str, namespace: str = "shop") -> Any:
    with ConfigClient(app.config["VELTRIX_URL"], namespace=namespace) as client:
        return client.read([key])[key].value


def test_a_command_reads_and_writes_the_apps_store_in_its_namespace(shop: Flask) -> None:
    put = run(shop, "put", "checkout/max_items", "80")
    assert put.exit_code == 0, put.output
    assert stored(shop, "checkout/max_items") == 80
    got = run(shop, "get", "checkout/max_items")
    assert got.exit_code == 0, got.output
    assert "80" in got.output


def test_options_of_the_cli_go_through_and_the_last_one_wins(shop: Flask) -> None:
    put = run(shop, "--namespace", "other", "put", "limit", "1")
    assert put.exit_code == 0, put.output
    assert stored(shop, "limit", "other") == 1


def test_a_client_that_was_handed_in_names_its_store(tmp_path: Path) -> None:
    app = Flask("shop")
    url = f"sqlite:///{tmp_path}/c.db"
    with ConfigClient(url, namespace="mine") as client:
        Veltrix(app, client=client)
        put = run(app, "put", "limit", "1")
        assert put.exit_code == 0, put.output
        app.config["VELTRIX_URL"] = url
        assert stored(app, "limit", "mine") == 1


def test_the_apps_mirror_is_the_commands(tmp_path: Path, mirror: str) -> None:
    url = f"sqlite:///{tmp_path}/c.db"
    app, handed_in, bare = Flask("shop"), Flask("other"), Flask("bare")
    app.config.update(VELTRIX_URL=url, VELTRIX_MIRROR_URL=mirror)
    Veltrix(app)
    Veltrix(handed_in, client=ConfigClient(url, mirror=mirror))
    Veltrix(bare, client=ConfigClient(url))
    assert run(app, "put", "limit", "1").exit_code == 0
    for each, arguments, tiers in [(app, (), 2), (handed_in, (), 2), (bare, (), 1), (app, ("--mirror", ""), 1)]:
        told = json.loads(run(each, *arguments, "status", "--json").stdout)["tiers"]
        assert [tier["url"] for tier in told] == [url, mirror][:tiers]


def test_the_apps_lazy_prefixes_are_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("veltrix_mw.cli.main", lambda arguments, **_: given.append(arguments))
    for lazy in ([], ["users/", "tenants/"]):
        app = Flask("shop")
        app.config.update(VELTRIX_URL="sqlite:///c.db", VELTRIX_LAZY=lazy)
        Veltrix(app)
        assert run(app, "relay").exit_code == 0
    store = ["--url", "sqlite:///c.db", "--mirror", "", "--namespace", "default"]
    assert given == [[*store, "relay"], [*store, "--lazy", "tenants/", "--lazy", "users/", "relay"]]


def test_help_is_the_clis_own(shop: Flask) -> None:
    helped = run(shop, "--help")
    assert helped.exit_code == 0
    assert "rollback" in helped.output


def test_an_error_ends_the_command_with_the_clis_exit_code(shop: Flask) -> None:
    failed = run(shop, "put", "not a key!", "1")
    alone = subprocess.run(
        [sys.executable, "-c", "from veltrix_mw.cli import main; main()", "put", "not a key!", "1"],
        env=_env(VELTRIX_URL=shop.config["VELTRIX_URL"]),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert failed.exit_code == alone.returncode != 0


def flask(source: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The `flask` command on an app's module."""
    (folder / "shop.py").write_text(f"from flask import Flask\nfrom flask_veltrix import Veltrix\n{source}\n")
    command = [sys.executable, "-m", "flask", "--app", "shop", "veltrix", *arguments]
    return subprocess.run(command, env=_env(), cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_an_app_without_a_url_has_a_doctor_that_says_so_and_other_commands_say_it_in_a_line(tmp_path: Path) -> None:
    app = "app = Flask('shop')\nVeltrix(app)"
    seen = flask(app, tmp_path, "doctor", "--json")
    first = json.loads(seen.stdout)["checks"][0]
    assert (seen.returncode, seen.stderr) == (1, "")
    assert (first["part"], first["check"], first["state"]) == ("authority", "url", "fail")
    assert "no config store is named: pass a URL or set VELTRIX_URL" in first["text"]
    for verb in (["status"], ["get", "limit"]):
        told = flask(app, tmp_path, *verb)
        assert (told.returncode, told.stdout) == (2, "")
        assert told.stderr.startswith("error: no config store is named: pass a URL or set VELTRIX_URL")
        assert told.stderr.count("\n") == 1
    named = flask(app, tmp_path, "--url", f"sqlite:///{tmp_path}/c.db", "put", "limit", "1")
    assert (named.returncode, named.stderr) == (0, "")


def test_an_app_with_wrong_settings_is_told_without_a_traceback(tmp_path: Path) -> None:
    told = flask("app = Flask('shop')\napp.config['VELTRIX_URLL'] = 'x'\nVeltrix(app)", tmp_path, "doctor")
    assert told.returncode == 2
    assert told.stderr.endswith(
        "Error: VELTRIX_URLL in app.config is no setting of veltrix; did you mean VELTRIX_URL?\n"
    )
    assert "Traceback" not in told.stderr


def test_an_app_without_veltrix_is_told_to_add_it() -> None:
    failed = run(Flask("bare"), "get", "limit")
    assert failed.exit_code == 2
    assert "Veltrix(app)" in failed.output


def test_loading_the_command_imports_neither_the_library_nor_the_cli() -> None:
    code = "import sys, flask_veltrix.commands; print([name for name in sys.modules if name.startswith('veltrix_mw')])"
    ran = subprocess.run([sys.executable, "-c", code], env=_env(), capture_output=True, timeout=60, check=True)
    assert ran.stdout.strip() == b"[]"


def test_the_package_has_the_names_it_says_and_no_other() -> None:
    package = import_module("flask_veltrix")
    assert package.__all__ == ["Veltrix", "config"]
    assert all(hasattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match="veltrix_nonsense"):
        _ = package.veltrix_nonsense


def _env(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "integrations")])
    return {**os.environ, "PYTHONPATH": paths, **more}
