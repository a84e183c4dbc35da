"""A request's view: the same from the first hook to the last byte, whichever way the request came in."""

from __future__ import annotations

import contextvars
import threading
from collections import UserList
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from flask import Blueprint, Flask, Response, abort, copy_current_request_context, g, request, stream_with_context
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client, EnvironBuilder

from flask_veltrix import Veltrix, config
from tests.integrations.flask.conftest import change
from veltrix_mw import ConfigClient, NoCurrentView, View, carry_view, current_view, override_config


def test_every_name_for_the_view_says_the_same(app: Flask, client: ConfigClient) -> None:
    @app.get("/")
    def index() -> dict[str, Any]:
        assert g.config is current_view() is request.environ["veltrix.view"]
        assert isinstance(g.config, View)
        return {"limit": config["limit"], "g": g.config["limit"], "get": config.get("none", 7), "n": len(config)}

    assert app.test_client().get("/").json == {"limit": 1, "g": 1, "get": 7, "n": 2}


def test_a_change_is_seen_by_the_next_request_and_not_by_the_one_in_flight(app: Flask, client: ConfigClient) -> None:
    @app.get("/")
    def index() -> list[int]:
        before = config["limit"]
        change(client, {"limit": before + 1})
        return [before, config["limit"], g.config["limit"], current_view()["limit"]]

    assert app.test_client().get("/").json == [1, 1, 1, 1]
    assert app.test_client().get("/").json == [2, 2, 2, 2]


def test_before_and_after_request_functions_blueprints_and_url_processors_read_the_same_view(
    client: ConfigClient,
) -> None:
    app, seen = Flask(__name__), []

    @app.before_request
    def registered_first() -> None:
        seen.append(g.config)

    Veltrix(app, client=client)
    pages = Blueprint("pages", __name__)

    @app.url_value_preprocessor
    def preprocess(*_: object) -> None:
        seen.append(config._get_current_object())  # type: ignore[attr-defined]
        change(client, {"limit": 5})

    @pages.before_request
    def before() -> None:
        seen.append(g.config)

    @pages.after_request
    def after(response: Response) -> Response:
        seen.append(g.config)
        return response

    @app.teardown_request
    def end(_: object) -> None:
        seen.append(g.config)

    @pages.get("/page")
    def page() -> str:
        return str(config["limit"])

    app.register_blueprint(pages)
    assert app.test_client().get("/page").text == "1"
    assert len(seen) == 5
    assert len({id(view) for view in seen}) == 1


def test_error_handlers_and_500_responses_read_config(app: Flask) -> None:
    @app.get("/fails")
    def fails() -> str:
        raise RuntimeError

    @app.get("/missing")
    def missing() -> str:
        abort(404)

    @app.errorhandler(500)
    @app.errorhandler(404)
    def handle(error: Any) -> tuple[list[int], int]:
        return [config["limit"], g.config["limit"], current_view()["limit"]], error.code

    for path in ("/fails", "/missing", "/no-such-route"):
        assert app.test_client().get(path).json == [1, 1, 1], path


def test_an_error_that_leaves_the_app_leaves_no_view_behind(app: Flask) -> None:
    app.testing = True

    @app.get("/")
    def fails() -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        app.test_client().get("/")
    with pytest.raises(NoCurrentView):
        current_view()


@pytest.mark.parametrize("with_context", [True, False])
def test_a_streamed_body_keeps_its_view_to_the_last_byte(app: Flask, client: ConfigClient, with_context: bool) -> None:
    @app.get("/")
    def stream() -> Response:
        def lines() -> Any:
            for _ in range(2):
                # A plain generator has neither g nor an app, but the view all the same.
                yield f"{config['limit']} {current_view()['limit']} {g.config['limit'] if with_context else ''}\n"

        return Response(stream_with_context(lines()) if with_context else lines())

    response = app.test_client().get("/")
    body = iter(response.response)
    first = next(body)
    change(client, {"limit": 2})
    assert next(body) == first
    assert next(body, None) is None
    response.close()
    with pytest.raises(NoCurrentView):
        current_view()


def test_a_body_iterated_and_closed_in_other_threads_and_contexts_keeps_its_view(
    app: Flask, client: ConfigClient
) -> None:
    seen: list[int] = []

    class Body:
        def __iter__(self) -> Any:
            yield str(config["limit"])
            yield str(current_view()["limit"])

        def close(self) -> None:
            seen.append(config["limit"])

    app.add_url_rule("/", view_func=lambda: Response(Body()))
    body = app.wsgi_app(EnvironBuilder().get_environ(), lambda *_: print)
    iterator = iter(body)
    change(client, {"limit": 2})
    with ThreadPoolExecutor() as pool:
        assert pool.submit(next, iterator).result(10) == b"1"
    assert contextvars.Context().run(next, iterator) == b"1"
    contextvars.Context().run(body.close)  # type: ignore[attr-defined]
    assert seen == [1]


def test_teardown_that_runs_twice_harms_nothing(app: Flask, client: ConfigClient) -> None:
    torn: list[int] = []
    app.teardown_request(lambda _: torn.append(config["limit"]))  # type: ignore[arg-type,return-value]

    @app.get("/")
    def stream() -> Response:
        return Response(stream_with_context(str(config["limit"]) for _ in range(2)))

    assert app.test_client().get("/").text == "11"
    assert torn == [1, 1]
    change(client, {"limit": 2})
    assert app.test_client().get("/").text == "22"


def test_an_abandoned_stream_does_not_decide_what_later_requests_read(app: Flask, client: ConfigClient) -> None:
    @app.get("/stream")
    def stream() -> Response:
        return Response(stream_with_context(str(config["limit"]) for _ in range(3)))

    @app.get("/")
    def index() -> list[int]:
        return [config["limit"], g.config["limit"], current_view()["limit"]]

    abandoned = app.wsgi_app(EnvironBuilder("/stream").get_environ(), lambda *_: print)
    iterator = iter(abandoned)
    assert next(iterator) == b"1"  # from now on its contexts stay on this thread
    for limit in (2, 3):
        change(client, {"limit": limit})
        assert app.test_client().get("/").json == [limit] * 3
    assert next(iterator) == b"1"
    abandoned.close()  # type: ignore[attr-defined]


def test_a_request_under_an_app_context_that_was_pushed_before_reads_its_own_view(
    app: Flask, client: ConfigClient
) -> None:
    app.add_url_rule("/", view_func=lambda: [config["limit"], g.config["limit"]])
    with app.app_context():
        assert app.test_client().get("/").json == [1, 1]
        change(client, {"limit": 2})
        assert app.test_client().get("/").json == [2, 2]
        change(client, {"limit": 3})
        assert config["limit"] == 3  # not the last request's


def test_a_test_client_that_keeps_its_contexts_shows_the_view_of_its_last_request(
    app: Flask, client: ConfigClient
) -> None:
    app.add_url_rule("/", view_func=lambda: str(config["limit"]))
    with app.test_client() as browser:
        assert browser.get("/").text == "1"
        change(client, {"limit": 2})
        assert config["limit"] == g.config["limit"] == 1
        assert browser.get("/").text == "2"
        assert config["limit"] == g.config["limit"] == 2


def test_a_bare_test_request_context_pins_at_its_first_read(app: Flask, client: ConfigClient) -> None:
    with app.test_request_context():
        assert config["limit"] == 1
        change(client, {"limit": 2})
        assert config["limit"] == 1
    with app.test_request_context():
        assert config["limit"] == 2


def test_a_request_that_is_dispatched_without_wsgi_has_its_view_and_lets_it_go(
    app: Flask, client: ConfigClient
) -> None:
    @app.get("/")
    def index() -> list[int]:
        return [config["limit"], g.config["limit"], current_view()["limit"]]

    with app.test_request_context():
        assert app.full_dispatch_request().json == [1, 1, 1]
        change(client, {"limit": 2})
        assert app.full_dispatch_request().json == [1, 1, 1]  # still the same request
    with pytest.raises(NoCurrentView):
        current_view()
    with app.test_request_context():
        app.preprocess_request()
        assert config["limit"] == g.config["limit"] == 2


def test_an_app_context_alone_reads_the_newest_view_or_the_one_that_is_pinned(app: Flask, client: ConfigClient) -> None:
    with app.app_context():
        assert config["limit"] == 1
        change(client, {"limit": 2})
        assert config["limit"] == 2
        with client.pinned():
            change(client, {"limit": 3})
            assert config["limit"] == 2
        assert config["limit"] == 3


def test_an_app_context_waits_for_the_first_list() -> None:
    app = Flask(__name__)
    app.config["VELTRIX_URL"] = "memory://"
    Veltrix(app)
    with app.app_context():
        assert len(config) == 0  # and no NotReady
    app.extensions["veltrix"].client.close()


def test_outside_of_flask_the_error_says_what_to_do(app: Flask) -> None:
    with pytest.raises(NoCurrentView, match=r"app\.app_context\(\)"):
        config["limit"]
    assert repr(config) == "<LocalProxy unbound>"
    assert not config
    with Flask("bare").app_context(), pytest.raises(NoCurrentView, match=r"Veltrix\(app\)"):
        config["limit"]


def test_async_views_and_hooks_read_the_requests_view(app: Flask, client: ConfigClient) -> None:
    @app.before_request
    async def before() -> None:
        g.seen = current_view()

    @app.get("/")
    async def index() -> list[int]:
        assert current_view() is g.config is g.seen
        change(client, {"limit": 2})
        return [config["limit"], current_view()["limit"]]

    assert app.test_client().get("/").json == [1, 1]


def test_threads_are_given_the_view_by_flasks_own_helper_and_by_carry_view(app: Flask, client: ConfigClient) -> None:
    @app.get("/")
    def index() -> list[int]:
        change(client, {"limit": config["limit"] + 1})
        with ThreadPoolExecutor(1) as pool:
            copied = pool.submit(copy_current_request_context(lambda: config["limit"])).result(10)
            carried = pool.submit(carry_view(lambda: (config["limit"], current_view()["limit"]))).result(10)
        return [copied, *carried, config["limit"], current_view()["limit"]]

    assert app.test_client().get("/").json == [1] * 5
    with app.test_request_context():
        assert app.full_dispatch_request().json == [2] * 5
        assert current_view()["limit"] == 2  # the copy's teardown ended nothing here
    with pytest.raises(NoCurrentView):
        current_view()


def test_requests_on_many_threads_each_read_one_revision(app: Flask, client: ConfigClient) -> None:
    change(client, {"a": 0, "b": 0})
    done = threading.Event()

    @app.get("/")
    def index() -> Response:
        return Response(f"{config['a']} {view['a']} {view['b']} " for view in (config, g.config))

    def write() -> None:
        for value in range(1, 30):
            change(client, {"a": value, "b": value})
        done.set()

    def ask() -> int:
        asked = 0
        while not done.is_set():
            assert len(set(app.test_client().get("/").text.split())) == 1
            asked += 1
        return asked

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        pool.submit(write).result(60)
        assert sum(one.result(10) for one in asking) > 0


def test_each_app_reads_its_own_client_also_mounted_and_nested(client: ConfigClient) -> None:
    with ConfigClient("memory://") as inner_client:
        inner_client.wait_ready()
        change(inner_client, {"limit": 100})
        extension = Veltrix()
        outer, inner = Flask("outer"), Flask("inner")
        extension.init_app(outer, client=client)
        extension.init_app(inner, client=inner_client)
        for app in (outer, inner):
            app.add_url_rule("/", view_func=lambda: str([config["limit"], g.config["limit"], current_view()["limit"]]))

        @inner.get("/stream")
        def stream() -> Response:
            return Response(str(config["limit"]) for _ in range(2))

        @outer.get("/through")
        def through() -> list[Any]:
            answer = Response.from_app(inner, {**request.environ, "PATH_INFO": "/"})
            same = Response.from_app(inner, request.environ)  # not found; its view must not become ours
            with inner.app_context():
                within = [config["limit"]]
                change(inner_client, {"limit": 101})
                within.append(config["limit"])
            return [answer.get_data(True), same.status_code, within, config["limit"], current_view()["limit"]]

        outer.wsgi_app = DispatcherMiddleware(outer.wsgi_app, {"/inner": inner})  # type: ignore[method-assign]
        browser = Client(outer)
        assert browser.get("/").text == "[1, 1, 1]"
        assert browser.get("/inner/").text == "[100, 100, 100]"
        assert browser.get("/inner/stream").text == "100100"
        assert browser.get("/through").json == ["[100, 100, 100]", 404, [100, 101], 1, 1]


def test_an_app_mounted_before_it_is_wrapped_reads_its_own_client(client: ConfigClient) -> None:
    with ConfigClient("memory://") as inner_client:
        inner_client.wait_ready()
        change(inner_client, {"limit": 100})
        outer, inner = Flask("outer"), Flask("inner")
        outer.wsgi_app = DispatcherMiddleware(outer.wsgi_app, {"/inner": inner})  # type: ignore[method-assign]
        Veltrix(outer, client=client)
        Veltrix(inner, client=inner_client)
        inner.add_url_rule("/", view_func=lambda: Response(str(config["limit"]) for _ in range(2)))
        assert Client(outer).get("/inner/").text == "100100"


def test_override_config_reaches_requests_streams_and_app_contexts(app: Flask, client: ConfigClient) -> None:
    @app.get("/")
    def index() -> Response:
        return Response(str(view["limit"]) for view in (config, g.config, current_view()))

    with override_config({"limit": 42}):
        assert app.test_client().get("/").text == "424242"
        with app.app_context():
            assert config["limit"] == 42
    assert app.test_client().get("/").text == "111"


def test_files_and_complete_bodies_are_sent_as_they_are(client: ConfigClient, tmp_path: Any) -> None:
    app = Flask(__name__, static_folder=str(tmp_path), static_url_path="/static")
    Veltrix(app, client=client, layers=lambda _: ["tenants/acme/"])
    (tmp_path / "page.txt").write_bytes(b"x" * 100_000)

    class Wrapper:
        def __init__(self, file: Any, size: int = 8192) -> None:
            self.file = file

    environ = EnvironBuilder("/static/page.txt").get_environ()
    environ["wsgi.file_wrapper"] = Wrapper
    body = app(environ, lambda *_: print)
    assert isinstance(body, Wrapper)  # as gunicorn asks
    body.file.close()
    answer = app.test_client().head("/static/page.txt")
    assert answer.content_length == 100_000
    answer.close()


@pytest.mark.parametrize("kind", [list, tuple, UserList])
def test_a_body_made_by_a_middleware_inside_keeps_its_type_or_its_length(
    client: ConfigClient, kind: Callable[[Any], Any]
) -> None:
    app = Flask(__name__)
    app.add_url_rule("/", view_func=lambda: str(config["limit"]))
    inside = app.wsgi_app

    def gathering(environ: Any, start_response: Any) -> Any:
        with closing(inside(environ, start_response)) as body:
            return kind([b"".join(body)])

    app.wsgi_app = gathering  # type: ignore[assignment,method-assign]
    Veltrix(app, client=client, layers=lambda _: ["tenants/acme/"])
    body: Any = app(EnvironBuilder().get_environ(), lambda *_: print)
    assert [*body] == [b"10"]
    assert len(body) == 1
    assert kind is UserList or type(body) is kind


def test_the_revision_header_is_sent_when_the_app_asks_for_it(client: ConfigClient) -> None:
    app = Flask(__name__)
    app.config["VELTRIX_REVISION_HEADER"] = True
    Veltrix(app, client=client, layers=lambda _: ["tenants/acme/"])

    @app.get("/")
    def index() -> str:
        change(client, {"limit": 2})
        return str(config.revision)

    answer = app.test_client().get("/")
    assert (answer.headers["X-Config-Revision"], answer.text) == ("1", "1")
