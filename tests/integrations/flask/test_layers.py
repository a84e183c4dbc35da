"""Layers that a request asks for: laid before the app runs, at the revision that the request has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask, Response, abort, g, request, session
from werkzeug.test import EnvironBuilder

from flask_veltrix import Veltrix, config
from tests.integrations.flask.conftest import change
from veltrix_mw import ConfigClient, NoCurrentView, SettingsError, current_view
from veltrix_mw.wsgi import ConfigMiddleware

ACME = {"X-Tenant": "acme"}


def tenant_layers(asked: Any) -> list[str]:
    tenant = asked.headers.get("X-Tenant")
    return [f"tenants/{tenant}/"] if tenant else []


def make_app(client: ConfigClient, **options: Any) -> Flask:
    app = Flask(__name__)
    app.secret_key = "s"
    Veltrix(app, client=client, **{"layers": tenant_layers, **options})

    @app.get("/")
    def index() -> Response:
        def body() -> Iterator[str]:
            yield f"{config['limit']} {request.environ['veltrix.view']['limit']}"
            yield f"{g.config['limit']} {current_view()['limit']}"

        return Response(" ".join(body()))

    @app.get("/stream")
    def stream() -> Response:
        return Response(f"{current_view()['limit']} {config['limit']} " for _ in range(2))

    return app


@pytest.mark.parametrize("path", ["/", "/stream"])
def test_a_request_reads_its_own_layers_by_every_name_and_in_its_stream(client: ConfigClient, path: str) -> None:
    app = make_app(client)
    assert set(app.test_client().get(path, headers=ACME).text.split()) == {"10"}
    assert set(app.test_client().get(path).text.split()) == {"1"}
    with pytest.raises(NoCurrentView):
        current_view()


def test_a_layer_lies_over_the_revision_that_was_pinned_when_the_request_came(client: ConfigClient) -> None:
    def changing_layers(asked: Any) -> list[str]:
        change(client, {"limit": 2, "tenants/acme/limit": 20})
        return tenant_layers(asked)

    app = make_app(client, layers=changing_layers)
    assert app.test_client().get("/", headers=ACME).text == "10 10 10 10"


def test_layers_are_asked_once_with_the_real_request_its_route_its_session_and_the_base_to_read(
    client: ConfigClient,
) -> None:
    asked = []

    def layers(asking: Any) -> list[str]:
        asked.append(
            (asking is request._get_current_object(), asking.view_args, session.get("none"), config["limit"])  # type: ignore[attr-defined]
        )
        return [f"tenants/{asking.view_args['tenant']}/"]

    app = make_app(client, layers=layers)
    app.add_url_rule("/<tenant>/limit", view_func=lambda tenant: f"{config['limit']} {config['limit']}")
    assert app.test_client().get("/acme/limit").text == "10 10"
    assert asked == [(True, {"tenant": "acme"}, None, 1)]


def test_hooks_registered_before_veltrix_and_url_processors_read_the_layers_too(client: ConfigClient) -> None:
    app, seen = Flask(__name__), []
    app.before_request(lambda: seen.append(config["limit"]))
    Veltrix(app, client=client, layers=tenant_layers)
    app.url_value_preprocessor(lambda *_: seen.append(config["limit"]))
    app.add_url_rule("/", view_func=lambda: "")
    app.test_client().get("/", headers=ACME)
    assert seen == [10, 10]


@pytest.mark.parametrize("wrong", ["../x", "a//b", "", "é", "x" * 600])
def test_a_layer_that_is_none_is_answered_400_before_the_app_runs_and_not_shown(
    client: ConfigClient, wrong: str
) -> None:
    app = make_app(client, layers=lambda _: [wrong])
    app.before_request(lambda: pytest.fail("the app ran"))
    app.register_error_handler(400, lambda _: pytest.fail("the app ran"))
    answer = app.test_client().get("/")
    assert answer.status_code == 400
    assert answer.text == "the request names a config layer that is not valid"


def test_reading_config_before_the_refusal_does_not_lift_it(client: ConfigClient) -> None:
    app = make_app(client, layers=lambda _: ["../"])

    @app.url_value_preprocessor
    def read(*_: object) -> None:
        for _ in range(2):
            try:
                config["limit"]
            except Exception:
                continue
            pytest.fail("a layer was skipped")

    assert app.test_client().get("/").status_code == 400


def test_ignore_drops_what_is_no_layer_and_keeps_the_rest(client: ConfigClient) -> None:
    app = make_app(client, layers=lambda _: iter(["../", "tenants/acme/"]), on_invalid_layer="ignore")
    assert app.test_client().get("/").text == "10 10 10 10"
    assert client.dropped_layers == 1


def test_layers_may_refuse_a_request_in_the_apps_own_words(client: ConfigClient) -> None:
    app = make_app(client, layers=lambda _: abort(404, "no such tenant"))
    app.register_error_handler(404, lambda error: (f"{error.description}", 404))
    assert app.test_client().get("/").text == "no such tenant"


def test_a_function_that_returns_one_str_is_a_fault_of_the_app_not_of_the_request(client: ConfigClient) -> None:
    app = make_app(client, layers=lambda _: "tenants/acme/")
    app.testing = True
    with pytest.raises(SettingsError, match="sequence of prefixes"):
        app.test_client().get("/")


def test_layers_hold_in_a_bare_test_request_context_and_without_wsgi(client: ConfigClient) -> None:
    app = make_app(client)
    with app.test_request_context(headers=ACME):
        assert config["limit"] == 10
        assert app.full_dispatch_request().get_data(as_text=True) == "10 10 10 10"


def test_an_environ_that_a_middleware_sends_twice_is_pinned_twice(client: ConfigClient) -> None:
    app = make_app(client)
    environ = EnvironBuilder("/stream", headers=ACME).get_environ()
    for limit in (10, 30):
        change(client, {"tenants/acme/limit": limit})
        assert set(b"".join(app(environ, lambda *_: print)).split()) == {b"%d" % limit}


def test_an_app_that_is_wrapped_by_hand_as_well_reads_layers_and_one_revision(client: ConfigClient) -> None:
    app = make_app(client)
    app.wsgi_app = ConfigMiddleware(app.wsgi_app, client=client)  # type: ignore[method-assign]
    assert app.test_client().get("/", headers=ACME).text == "10 10 10 10"
    assert set(app.test_client().get("/stream", headers=ACME).text.split()) == {"10"}


@pytest.mark.parametrize("path", ["/", "/stream"])
def test_layers_lie_over_those_of_the_core_middleware_around_it_each_time_it_sends_the_request(
    client: ConfigClient, path: str
) -> None:
    app = make_app(client)
    seen: list[bytes] = []

    def twice(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        for _ in range(2):
            change(client, {"tenants/acme/limit": 11, "regions/eu/limit": 6})
            body: Any = app(environ, start_response)
            seen.extend(b"".join(body).split())
            body.close()
            assert environ["veltrix.view"] is current_view()
            assert environ["veltrix.view"]["limit"] == 5
        return []

    wrapped = ConfigMiddleware(twice, client=client, layers=lambda _: ["regions/eu/"])
    for headers, limit in (({}, b"5"), (ACME, b"10")):
        change(client, {"tenants/acme/limit": 10, "regions/eu/limit": 5})
        wrapped(EnvironBuilder(path, headers=headers).get_environ(), lambda *_: print)
        assert seen == [limit] * 8
        seen.clear()


def test_a_policy_or_a_layers_argument_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(SettingsError, match="on_invalid_layer"):
        Veltrix(on_invalid_layer="drop")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="VELTRIX_LAYERS"):
        Veltrix(layers=["tenants/acme/"])  # type: ignore[arg-type]
