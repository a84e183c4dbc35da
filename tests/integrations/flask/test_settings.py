"""Settings: what `VELTRIX_*` changes, and what is refused at start."""

from __future__ import annotations

import logging
import math
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_veltrix import Veltrix, config
from tests.integrations.flask.conftest import change
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, Freshness, InvalidValue, NotReady, SettingsError, StaleRead


def make_app(**settings: Any) -> Flask:
    app = _with(Flask(__name__), **settings)
    Veltrix(app)
    return app


def client_of(app: Flask) -> ConfigClient:
    client: ConfigClient = app.extensions["veltrix"].client
    return client


def test_url_and_namespace_name_the_store(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/c.db"
    with ConfigClient(url, namespace="shop") as other:
        other.put("limit", 7)
    app = make_app(url=url, namespace="shop")
    app.add_url_rule("/", view_func=lambda: str(config["limit"]))
    with client_of(app):
        assert app.test_client().get("/").text == "7"


def test_the_environment_names_the_store_if_the_settings_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VELTRIX_URL", "memory://")
    assert client_of(make_app()).status().tiers[0].name == "memory"
    assert client_of(make_app(url="sqlite:///x.db")).status().tiers[0].name == "sqlite"


def test_defaults_layers_and_schemas_reach_the_client() -> None:
    app = make_app(
        url="memory://",
        defaults={"limit": 5},
        layers=["env/prod/"],
        schemas={"limit": {"type": "integer"}},
        telemetry="off",
    )
    with client_of(app) as client, app.app_context():
        assert config["limit"] == 5
        with pytest.raises(InvalidValue):
            client.put("limit", "many")
        change(client, {"env/prod/limit": 6})
        assert config["limit"] == 6


def test_age_start_timeout_and_last_known_good_reach_the_client(tmp_path: Path) -> None:
    (tmp_path / "no.db").write_bytes(b"this is no database, whatever its name says" * 100)
    app = make_app(
        url=f"sqlite:///{tmp_path}/no.db",
        start_timeout_s=0.05,
        max_age_s=1e-9,
        last_known_good=str(tmp_path / "kept"),
        defaults={"limit": 5},
    )
    with client_of(app) as client, app.app_context():
        assert client.start_timeout_s == 0.05
        assert config["limit"] == 5
        assert config.stale
        assert config.age_s == math.inf
        with pytest.raises(NotReady):
            config["other"]
    with client_of(make_app(url="memory://", last_known_good=str(tmp_path / "kept"))) as client:
        client.wait_ready()
        change(client, {"limit": 1})
    assert list((tmp_path / "kept").iterdir())


def test_freshness_reaches_the_client_and_reads_are_refused_by_it() -> None:
    rule = Freshness("flags/", max_age_s=20, on_stale="fail")
    app = make_app(url="memory://", freshness=[rule])
    client = client_of(app)
    change(client, {"flags/stop": False, "limit": 1})
    view = client.view()
    assert view["flags/stop"] is False
    client.close()  # nobody confirms it from here on
    view._snapshot._proof.at_s -= 21
    with pytest.raises(StaleRead):
        view["flags/stop"]
    assert view["limit"] == 1


def test_a_mirror_its_relay_and_what_that_leaves_out_reach_the_client(tmp_path: Path, mirror: str) -> None:
    url = f"sqlite:///{tmp_path}/c.db"
    reader = make_app(url=url, mirror_url=mirror, lazy=["tenants/"], relay="never")
    feeder = make_app(url=url, mirror_url=mirror, lazy=["tenants/"], instance="feeder")
    with client_of(reader) as reads, client_of(feeder) as feeds:
        feeds.put("limit", 7)
        wait_until(lambda: reads.status().relay == "feeder", 60, reason="the relay to be seen by the other app")
        wait_until(lambda: reads.status().tiers[1].state == "following", 60, reason="the mirror to be followed")
        state = feeds.mirror_state()
        assert state is not None
        assert (state.relay, state.lazy) == ("feeder", ("tenants/",))
        with reader.app_context():
            assert config["limit"] == 7


def test_an_app_whose_relay_is_never_feeds_no_mirror(tmp_path: Path, mirror: str) -> None:
    with client_of(make_app(url=f"sqlite:///{tmp_path}/c.db", mirror_url=mirror, relay="never")) as client:
        client.put("limit", 7)
        client.wait_ready()
        assert client.status().relay is None
        assert "does not stand for election" in client.status().relay_missing


def test_the_environment_names_the_mirror_unless_the_settings_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def urls(**settings: Any) -> list[str]:
        return [tier.url for tier in client_of(make_app(url="memory://", **settings)).status().tiers[1:]]

    assert urls() == []
    monkeypatch.setenv("VELTRIX_MIRROR_URL", "redis://127.0.0.1:1/0")
    assert urls() == ["redis://127.0.0.1:1/0"]
    assert urls(mirror_url="redis://127.0.0.1:2/0") == ["redis://127.0.0.1:2/0"]
    assert urls(mirror_url="") == []


def test_a_setting_that_is_none_is_left_to_its_default() -> None:
    app = make_app(url="memory://", namespace=None, max_age_s=None, start_timeout_s=None)
    assert client_of(app).start_timeout_s == 5
    Veltrix(client=client_of(app)).init_app(_with(Flask("other"), url=None))


def _with(app: Flask, **settings: Any) -> Flask:
    app.config.from_mapping({f"VELTRIX_{name.upper()}": value for name, value in settings.items()})
    return app


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ur": "memory://"}, "did you mean VELTRIX_URL?"),
        ({"url": "memory://", "max_age": 3}, "did you mean VELTRIX_MAX_AGE_S?"),
        ({"url": "memory://", "zzz": 3}, "VELTRIX_NAMESPACE"),
        ({"url": "memory://", "revision_header": "yes"}, "VELTRIX_REVISION_HEADER is True or False"),
        ({"url": "memory://", "telemetry": "all"}, "telemetry"),
        ({"url": "memory://", "max_age_s": "15"}, "max_age_s"),
        ({"url": "memory://", "layers": "env/prod/"}, "sequence of prefixes"),
        ({"url": "memory://", "freshness": ["flags/"]}, "freshness is a sequence such as"),
        ({"url": "mysql://x"}, "mysql"),
        ({"url": "memory://", "mirror": "redis://h"}, "did you mean VELTRIX_MIRROR_URL?"),
        ({"url": "memory://", "mirror_url": "sqlite:///m.db"}, "a mirror is a Redis"),
        ({"url": "memory://", "mirror_url": "redis://h/0?namespace=other"}, "namespace"),
        ({"url": "memory://", "relay": "always"}, "relay is 'auto' or 'never'"),
        ({"url": "memory://", "lazy": "tenants/"}, "lazy is a sequence of prefixes"),
        ({"url": "memory://", "lazy": ["tenants"]}, "lazy"),
    ],
)
def test_a_wrong_or_unknown_setting_is_refused_with_what_to_write(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        make_app(**settings)


def test_production_without_a_url_is_refused_with_the_embedded_form() -> None:
    with pytest.raises(SettingsError, match=re.escape('app.config["VELTRIX_URL"] = "sqlite:////')):
        make_app()


def test_debug_mode_falls_back_to_a_file_in_the_apps_folder_says_so_and_a_read_creates_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "my shop, 100%25 #1?"
    folder.mkdir()
    app = Flask("shop", root_path=str(folder))
    app.debug = True
    app.config["VELTRIX_START_TIMEOUT_S"] = 0.05
    with caplog.at_level(logging.WARNING, "flask_veltrix"):
        Veltrix(app)
    assert "veltrix.debug_store" in caplog.text
    with client_of(app) as client, app.app_context():
        with pytest.raises(NotReady, match="the first write creates it"):
            config["limit"]
        assert list(folder.iterdir()) == []
        change(client, {"limit": 3})
        assert config["limit"] == 3
        assert (folder / "veltrix.db").exists()


def test_debug_mode_with_a_url_uses_the_url(caplog: pytest.LogCaptureFixture) -> None:
    app = Flask("shop")
    app.debug = True
    app.config["VELTRIX_URL"] = "memory://"
    Veltrix(app)
    assert client_of(app).status().tiers[0].name == "memory"
    assert caplog.text == ""


def test_settings_that_a_given_client_would_ignore_are_refused(client: ConfigClient) -> None:
    app = Flask(__name__)
    app.config.update(VELTRIX_URL="memory://", VELTRIX_TELEMETRY="off")
    with pytest.raises(SettingsError, match="VELTRIX_TELEMETRY, VELTRIX_URL would change nothing"):
        Veltrix(app, client=client)
    with pytest.raises(SettingsError, match="client is a ConfigClient"):
        Veltrix(Flask(__name__), client="memory://")  # type: ignore[arg-type]


def test_an_app_is_initialized_once_and_an_extension_serves_many_apps(client: ConfigClient) -> None:
    extension = Veltrix(client=client)
    first, second = Flask("first"), Flask("second")
    second.config["VELTRIX_REVISION_HEADER"] = True
    extension.init_app(first)
    extension.init_app(second)
    with pytest.raises(SettingsError, match="once for each app"):
        extension.init_app(first)
    assert client_of(first) is client_of(second) is client
    assert first not in vars(extension).values()
    with ConfigClient("memory://") as own:
        third = Flask("third")
        extension.init_app(third, client=own)
        assert client_of(third) is own


def test_each_app_made_from_settings_has_a_client_of_its_own() -> None:
    extension, apps = Veltrix(), [Flask("one"), Flask("two")]
    for app in apps:
        app.config["VELTRIX_URL"] = "memory://"
        extension.init_app(app)
    one, two = map(client_of, apps)
    with one, two:
        for client in (one, two):
            client.wait_ready()
        change(one, {"limit": 1})
        change(two, {"limit": 2})
        for app, limit in zip(apps, (1, 2), strict=True):
            with app.app_context():
                assert config["limit"] == limit


def test_init_app_starts_nothing_replaces_no_config_and_makes_no_template_environment(tmp_path: Path) -> None:
    threads = threading.enumerate()
    app = Flask(__name__)
    before = app.config
    app.config["VELTRIX_URL"] = f"sqlite:///{tmp_path}/c.db"
    Veltrix(app)
    assert app.config is before
    assert type(app.config) is type(Flask("other").config)
    assert "jinja_env" not in vars(app)
    assert threading.enumerate() == threads
    assert list(tmp_path.iterdir()) == []
    app.config["TEMPLATES_AUTO_RELOAD"] = True
    assert app.jinja_env.auto_reload


def test_an_app_that_served_a_request_takes_no_veltrix_any_more(client: ConfigClient) -> None:
    app = Flask(__name__)
    app.test_client().get("/")
    with pytest.raises(AssertionError, match="setup"):
        Veltrix(app, client=client)
    assert "veltrix" not in app.extensions
