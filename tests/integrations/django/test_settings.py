"""`VELTRIX`: what each setting changes, what a wrong one says, and the client that is made of them."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import Client, RequestFactory, override_settings

from django_veltrix import ConfigMiddleware, config, get_client
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, Freshness, InvalidValue, SettingsError, StaleRead, VeltrixError

URLS = "tests.integrations.django.project.urls"


@dataclass(frozen=True)
class Checkout:
    max_items: int = 50


MADE = ConfigClient("memory://", telemetry="off")


def make_client() -> ConfigClient:
    return ConfigClient("memory://", telemetry="off")


def make_nothing() -> None:
    return None


def answer(request: HttpRequest) -> HttpResponse:
    return HttpResponse(config.get("greeting", "none"))


def started(**veltrix: Any) -> ConfigClient:
    client = get_client()
    client.wait_ready()
    return client


# Each setting changes something


def test_url_and_namespace_name_the_store(site, tmp_path: Path):
    url = f"sqlite:///{tmp_path}/config.db"
    with ConfigClient(url, namespace="shop") as shop, ConfigClient(url, namespace="other") as other:
        shop.put("greeting", "of the shop")
        other.put("greeting", "of another")
        client = site(answer, veltrix={"URL": url, "NAMESPACE": "shop"})
        assert client.namespace == "shop"
        assert Client().get("/").content == b"of the shop"


def test_layers_lie_over_the_base_of_every_request(site, put):
    client = site(answer, veltrix={"URL": "memory://", "LAYERS": ["env/prod/"]})
    put(client, "greeting", "base")
    put(client, "env/prod/greeting", "prod")
    assert Client().get("/").content == b"prod"


def test_defaults_lie_under_everything(site, put):
    client = site(answer, veltrix={"URL": "memory://", "DEFAULTS": {"greeting": "default"}})
    assert Client().get("/").content == b"default"
    put(client, "greeting", "stored")
    assert Client().get("/").content == b"stored"


@pytest.mark.parametrize("model", [Checkout, f"{__name__}.Checkout"], ids=["class", "dotted path"])
def test_schemas_refuse_a_wrong_value(site, model):
    client = site(answer, veltrix={"URL": "memory://", "SCHEMAS": {"checkout/": model}})
    client.put("checkout/max_items", 3)
    with pytest.raises(InvalidValue):
        client.put("checkout/max_items", "many")


def test_last_known_good_serves_a_start_without_a_store(site, put, tmp_path: Path):
    store, folder = tmp_path / "config.db", tmp_path / "kept"
    veltrix = {"URL": f"sqlite:///{store}", "LAST_KNOWN_GOOD": str(folder)}
    with ConfigClient(f"sqlite:///{store}") as other:
        other.put("greeting", "kept")
    client = site(answer, veltrix=veltrix)
    client.close()  # writes what is due
    for file in tmp_path.glob("config.db*"):
        file.unlink()
    store.write_bytes(b"this is no database any more" * 100)
    client = site(answer, veltrix=veltrix)
    assert Client().get("/").content == b"kept"
    assert client.snapshot.origin == "disk"


def test_max_age_s_says_when_a_view_is_stale(site):
    with site(answer, veltrix={"URL": "memory://", "MAX_AGE_S": 1e-9}).pinned() as view:
        assert view.stale
    with site(answer, veltrix={"URL": "memory://", "MAX_AGE_S": 3600}).pinned() as view:
        assert not view.stale


def test_freshness_refuses_what_is_too_old(site, put):
    rule = Freshness("flags/", max_age_s=20, on_stale="fail")
    client = site(answer, veltrix={"URL": "memory://", "FRESHNESS": [rule]})
    put(client, "flags/stop", False)
    view = client.view()
    assert view["flags/stop"] is False
    client.close()  # nobody confirms it from here on
    view._snapshot._proof.at_s -= 21
    with pytest.raises(StaleRead):
        view["flags/stop"]


def test_start_timeout_s_is_the_clients(site):
    assert site(answer, veltrix={"URL": "memory://", "START_TIMEOUT_S": 1.5}).start_timeout_s == 1.5


def test_a_mirror_its_relay_and_what_that_leaves_out_reach_the_client(site, tmp_path: Path, mirror: str):
    veltrix = {"URL": f"sqlite:///{tmp_path}/config.db", "MIRROR_URL": mirror, "LAZY": ["tenants/"]}
    with ConfigClient(veltrix["URL"]) as other:
        other.put("greeting", "hello")
    never = site(answer, veltrix={**veltrix, "RELAY": "never"})
    assert never.status().relay is None
    assert "does not stand for election" in never.status().relay_missing
    client = site(answer, veltrix={**veltrix, "RELAY": "auto", "INSTANCE": "feeder"})
    wait_until(lambda: client.status().tiers[1].state == "following", 60, reason="the worker to follow the mirror")
    state = client.mirror_state()
    assert (state.relay, state.lazy) == ("feeder", ("tenants/",))
    assert Client().get("/").content == b"hello"


def test_the_environment_names_the_mirror_unless_the_settings_do(monkeypatch):
    def urls(**veltrix: Any) -> list[str]:
        with override_settings(VELTRIX={"URL": "memory://", **veltrix}):
            return [tier.url for tier in get_client().status().tiers[1:]]

    assert urls() == []
    monkeypatch.setenv("VELTRIX_MIRROR_URL", "redis://127.0.0.1:1/0")
    assert urls() == urls(MIRROR_URL="") == ["redis://127.0.0.1:1/0"]
    assert urls(MIRROR_URL="redis://127.0.0.1:2/0") == ["redis://127.0.0.1:2/0"]


def test_a_setting_that_is_none_counts_as_left_out(site):
    site(answer, veltrix={"URL": "memory://", "NAMESPACE": None, "REQUEST_LAYERS": None, "LAST_KNOWN_GOOD": None})
    assert Client().get("/").content == b"none"


# The client


@pytest.mark.parametrize("given", [MADE, f"{__name__}.MADE"], ids=["instance", "dotted path"])
def test_a_client_handed_in_is_used_and_stays_open(site, put, given):
    with MADE, override_settings(VELTRIX={"CLIENT": given}):
        assert get_client() is MADE
        revision = put(MADE, "greeting", "mine")
        with override_settings(VELTRIX={"URL": "memory://"}):
            assert get_client() is not MADE
        assert MADE.status().tiers[0].state != "stopped"
        assert MADE.snapshot.revision >= revision


@pytest.mark.parametrize("given", [make_client, f"{__name__}.make_client"], ids=["function", "dotted path"])
def test_a_client_made_by_a_function_is_closed_when_the_settings_change(given):
    with override_settings(VELTRIX={"CLIENT": given}):
        client = get_client()
        client.wait_ready()
    assert client.status().tiers[0].state == "stopped"


def test_several_threads_that_ask_first_get_one_client(put):
    calls, second = [], threading.Event()

    def make() -> ConfigClient:
        calls.append(threading.get_ident())
        if len(calls) > 1:
            second.set()
        second.wait(0.2)  # the time that another call has to come, which is not to come
        return make_client()

    with override_settings(VELTRIX={"CLIENT": make}), ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: get_client(), range(64)))
    assert (len(made), len(calls)) == (1, 1)


def test_asking_for_the_client_starts_nothing():
    with override_settings(VELTRIX={"URL": "memory://"}):
        before = set(threading.enumerate())
        client = get_client()
        ConfigMiddleware(answer)
        assert set(threading.enumerate()) == before
        assert client.status().tiers[0].state == "stopped"


def test_override_settings_makes_a_new_client_and_closes_the_old(put):
    with override_settings(VELTRIX={"URL": "memory://"}, ROOT_URLCONF=URLS):
        browser, outer = Client(), get_client()
        put(outer, "greeting", "outer")
        with override_settings(VELTRIX={"URL": "memory://", "DEFAULTS": {"greeting": "inner"}}):
            inner = get_client()
            assert browser.get("/config").json()["greeting"] == "inner"
            assert outer.status().tiers[0].state == "stopped"
            assert outer.snapshot is not None
        assert inner.status().tiers[0].state == "stopped"
        assert get_client() not in {inner, outer}


# Without a URL


@pytest.fixture
def warnings_logged(caplog):
    caplog.set_level(logging.WARNING, "django_veltrix")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "django_veltrix"]


def test_in_debug_mode_a_project_without_a_url_has_a_file_in_base_dir_and_says_so(tmp_path, warnings_logged):
    folder = tmp_path / "a project?"
    folder.mkdir()
    with override_settings(VELTRIX={}, DEBUG=True, BASE_DIR=folder, ROOT_URLCONF=URLS):
        get_client().put("greeting", "embedded")
        assert Client().get("/config").json()["greeting"] == "embedded"
        assert (folder / "veltrix.db").exists()
    assert len(warnings_logged()) == 1
    assert str(folder / "veltrix.db") in warnings_logged()[0]


def test_without_base_dir_the_file_is_in_the_working_directory(tmp_path, monkeypatch, warnings_logged):
    monkeypatch.chdir(tmp_path)
    with override_settings(VELTRIX=None, DEBUG=True, BASE_DIR=None):
        get_client().put("greeting", "embedded")
    assert (tmp_path / "veltrix.db").exists()


def test_the_environments_url_comes_before_the_file_of_debug_mode(tmp_path, monkeypatch, warnings_logged):
    monkeypatch.setenv("VELTRIX_URL", f"sqlite:///{tmp_path}/named.db")
    for debug in (True, False):
        with override_settings(VELTRIX={}, DEBUG=debug, BASE_DIR=tmp_path):
            get_client().put("greeting", "embedded")
    assert (tmp_path / "named.db").exists()
    assert not (tmp_path / "veltrix.db").exists()
    assert warnings_logged() == []


@pytest.mark.parametrize("veltrix", [None, {}, {"URL": None}, {"URL": ""}])
def test_in_production_a_project_without_a_url_does_not_start(veltrix):
    from django.core.wsgi import get_wsgi_application

    with override_settings(VELTRIX=veltrix, DEBUG=False):
        with pytest.raises(SettingsError, match=r'VELTRIX = \{"URL": "sqlite:'):
            ConfigMiddleware(answer)
        with pytest.raises(SettingsError, match="VELTRIX_URL"):
            get_wsgi_application()


# What is wrong


WRONG = [
    ([], "is a dict"),
    ({"URI": "memory://"}, "no setting 'URI'; did you mean 'URL'"),
    ({"url": "memory://"}, "no setting 'url'; did you mean 'URL'"),
    ({"COLOUR": 1}, "no setting 'COLOUR'; it takes CLIENT, DEFAULTS,"),
    ({"URL": 5}, r"\['URL'\] is a str .*, not int"),
    ({"URL": "memry://"}, "did you mean memory"),
    ({"URL": "memory://", "NAMESPACE": 5}, "not int"),
    ({"URL": "memory://", "NAMESPACE": "two words"}, "VELTRIX"),
    ({"URL": "memory://", "LAYERS": "env/prod/"}, "list of prefixes"),
    ({"URL": "memory://", "LAYERS": ["env"]}, "VELTRIX: "),
    ({"URL": "memory://", "DEFAULTS": ["a"]}, "dict of key to value"),
    ({"URL": "memory://", "DEFAULTS": {"a b": 1}}, "VELTRIX: "),
    ({"URL": "memory://", "SCHEMAS": 5}, "a dict of prefix"),
    ({"URL": "memory://", "SCHEMAS": {"a/": "no.such.Model"}}, r"\['SCHEMAS'\]: .*dotted path"),
    ({"URL": "memory://", "LAST_KNOWN_GOOD": 5}, "path of a folder"),
    ({"URL": "memory://", "TELEMETRY": "loud"}, "not a level"),
    ({"URL": "memory://", "MAX_AGE_S": 0}, "max_age_s is a positive number"),
    ({"URL": "memory://", "FRESHNESS": "flags/"}, r"\['FRESHNESS'\] is a list such as \[Freshness"),
    ({"URL": "memory://", "FRESHNESS": ["flags/"]}, "freshness is a sequence such as"),
    ({"URL": "memory://", "START_TIMEOUT_S": "5"}, "start_timeout_s is a positive number"),
    ({"URL": "memory://", "REVISION_HEADER": "yes"}, "True or False"),
    ({"URL": "memory://", "REQUEST_LAYERS": "no.such.function"}, r"\['REQUEST_LAYERS'\]: .*dotted path"),
    ({"URL": "memory://", "REQUEST_LAYERS": 5}, "a function of a request"),
    ({"URL": "memory://", "REQUEST_PREFETCH": 5}, r"\['REQUEST_PREFETCH'\] is a function of a request that gives keys"),
    ({"URL": "memory://", "ON_INVALID_LAYER": "shrug"}, "'reject' or 'ignore'"),
    ({"CLIENT": 5}, "a function that makes one"),
    ({"CLIENT": "nodots"}, r"\['CLIENT'\]: .*dotted path"),
    ({"CLIENT": make_nothing}, "made a NoneType"),
    ({"CLIENT": MADE, "URL": "memory://", "LAYERS": []}, "URL, LAYERS would change nothing"),
]


@pytest.mark.parametrize(("veltrix", "says"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_a_wrong_setting_ends_the_server_at_its_start_and_says_what_to_write(veltrix, says):
    with override_settings(VELTRIX=veltrix), pytest.raises(SettingsError, match=says):
        ConfigMiddleware(answer)


def test_an_error_of_settings_is_one_of_the_librarys():
    with override_settings(VELTRIX={"URL": 5}), pytest.raises(VeltrixError):
        get_client()


def test_after_wrong_settings_right_ones_work(site, put):
    with override_settings(VELTRIX={"URL": 5}), pytest.raises(SettingsError):
        get_client()
    put(site(answer), "greeting", "again")
    assert ConfigMiddleware(answer)(RequestFactory().get("/")).content == b"again"
