"""Templates: `veltrix` reads the request's view."""

from __future__ import annotations

import re
from typing import Any

import pytest
from flask import Flask, Response, render_template, render_template_string, stream_template_string
from jinja2 import DictLoader, StrictUndefined, UndefinedError

from flask_veltrix import Veltrix
from tests.integrations.flask.conftest import change
from veltrix_mw import ConfigClient, HeldBack, NotReady


def test_a_template_reads_values_properties_and_methods_of_the_requests_view(app: Flask, client: ConfigClient) -> None:
    page = "{{ veltrix['limit'] }} {{ veltrix.get('none', 7) }} {{ veltrix.revision }} {{ 'limit' in veltrix }}"
    page += " {{ veltrix|list|length }} {{ veltrix|length }}"

    @app.get("/")
    def index() -> str:
        change(client, {"limit": 2})
        return render_template_string(page)

    assert app.test_client().get("/").text == "1 7 1 True 2 2"


def test_a_streamed_template_keeps_the_view(app: Flask, client: ConfigClient) -> None:
    @app.get("/")
    def index() -> Response:
        return Response(stream_template_string("{% for _ in range(9) %}{{ veltrix['limit'] }}{% endfor %}"))

    response = app.test_client().get("/")
    change(client, {"limit": 2})
    assert response.text == "1" * 9


def test_macros_imported_without_context_read_it_too(app: Flask) -> None:
    app.jinja_options = {
        "loader": DictLoader(
            {
                "macros.html": "{% macro limit() %}{{ veltrix['limit'] }}{% endmacro %}",
                "page.html": "{% from 'macros.html' import limit %}{{ limit() }}",
            }
        )
    }
    app.add_url_rule("/", view_func=lambda: render_template("page.html"))
    assert app.test_client().get("/").text == "1"


def test_a_template_rendered_by_a_command_reads_the_newest(app: Flask, client: ConfigClient) -> None:
    with app.app_context():
        change(client, {"limit": 2})
        assert render_template_string("{{ veltrix['limit'] }}") == "2"


def test_the_apps_own_name_wins(app: Flask) -> None:
    app.jinja_env.globals["veltrix"] = "ours"
    with app.app_context():
        assert render_template_string("{% macro m() %}{{ veltrix }}{% endmacro %}{{ m() }}", veltrix="mine") == "mine"
        assert app.jinja_env.from_string("{{ veltrix }}").render() == "ours"


def test_a_missing_key_is_undefined_as_the_app_has_it(app: Flask) -> None:
    with app.app_context():
        assert render_template_string("{{ veltrix['none'] }}|{{ veltrix['none']|default(3) }}") == "|3"
    strict = Flask("strict")
    strict.config["VELTRIX_URL"] = "memory://"
    strict.jinja_options = {"undefined": StrictUndefined}
    Veltrix(strict)
    with strict.app_context(), pytest.raises(UndefinedError):
        render_template_string("{{ veltrix['none'] }}")
    strict.extensions["veltrix"].client.close()


def test_a_key_that_is_held_back_does_not_look_absent(app: Flask) -> None:
    with ConfigClient("memory://held", telemetry="off") as writer:
        writer.put("limit", "many")
        held = Flask("held")
        held.config.update(VELTRIX_URL="memory://held", VELTRIX_SCHEMAS={"limit": {"type": "integer"}})
        Veltrix(held)
        with held.app_context(), held.extensions["veltrix"].client:
            for page in ("{{ %s }}", "{%% if %s %%}{%% endif %%}", "{{ %s + 1 }}", "{{ %s.name }}"):
                with pytest.raises(HeldBack, match="held back"):
                    render_template_string(page % "veltrix['limit']")


def test_a_view_that_is_not_ready_says_so_in_a_template(tmp_path: Any) -> None:
    (tmp_path / "no.db").write_bytes(b"this is no database, whatever its name says" * 100)
    app = Flask("early")
    app.config.update(VELTRIX_URL=f"sqlite:///{tmp_path}/no.db", VELTRIX_START_TIMEOUT_S=0.05)
    Veltrix(app)
    with app.app_context(), app.extensions["veltrix"].client, pytest.raises(NotReady, match=re.escape("limit")):
        render_template_string("{{ veltrix['limit'] }}")
