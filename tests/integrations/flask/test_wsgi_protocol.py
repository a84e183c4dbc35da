"""WSGI: what the app and the server see of the protocol is what PEP 3333 says, and what Flask alone gives them."""

from __future__ import annotations

import io
from typing import Any
from wsgiref.validate import validator

import pytest
from flask import Flask, Response, request
from werkzeug.test import Client, EnvironBuilder

from flask_veltrix import Veltrix, config
from veltrix_mw import ConfigClient


def make_app(client: ConfigClient | None, layers: Any = None) -> Flask:
    app = Flask(__name__)
    app.wsgi_app = validator(app.wsgi_app)  # type: ignore[arg-type,method-assign]
    if client is not None:
        app.config["VELTRIX_REVISION_HEADER"] = True
        Veltrix(app, client=client, layers=layers)
    limit = (lambda: config["limit"]) if client is not None else (lambda: 1)

    @app.get("/plain")
    def plain() -> str:
        return str(limit())

    @app.get("/stream")
    def stream() -> Response:
        return Response(str(limit()) for _ in range(3))

    @app.post("/echo")
    def echo() -> bytes:
        return request.get_data()

    @app.get("/empty")
    def empty() -> Response:
        response = Response(status=204)
        del response.headers["Content-Type"]  # Flask's own, which the validator takes for a fault
        return response

    @app.get("/fail")
    def fail() -> str:
        raise RuntimeError

    return app


ASKED = [("GET", "/plain"), ("HEAD", "/plain"), ("GET", "/stream"), ("POST", "/echo"), ("GET", "/empty")]
ASKED += [("GET", "/fail"), ("GET", "/none"), ("HEAD", "/stream"), ("OPTIONS", "/plain"), ("DELETE", "/plain")]


@pytest.mark.parametrize("layers", [None, lambda _: ["none/"], lambda _: ["../"]])
@pytest.mark.parametrize(("method", "path"), ASKED)
def test_the_validator_finds_no_fault_on_either_side(client: ConfigClient, method: str, path: str, layers: Any) -> None:
    outside = validator(make_app(client, layers))  # type: ignore[arg-type]
    answer = Client(outside).open(path, method=method, data=b"x" if method == "POST" else None, buffered=True)
    assert answer.status_code in {200, 204, 400, 404, 405, 500}


@pytest.mark.parametrize(("method", "path"), ASKED)
def test_an_answer_is_what_it_is_without_veltrix_but_for_the_header(
    client: ConfigClient, method: str, path: str
) -> None:
    answers = [
        Client(make_app(one)).open(path, method=method, data=b"x" if method == "POST" else None, buffered=True)
        for one in (client, None)
    ]
    with_veltrix, without = answers
    assert with_veltrix.headers.pop("X-Config-Revision") == "1"
    assert (with_veltrix.status, with_veltrix.data, [*with_veltrix.headers]) == (
        without.status,
        without.data,
        [*without.headers],
    )


def test_a_body_that_was_not_begun_is_closed_all_the_same(client: ConfigClient) -> None:
    app, closed = Flask(__name__), []
    Veltrix(app, client=client, layers=lambda _: ["none/"])

    class Body(io.BytesIO):
        def close(self) -> None:
            closed.append(config["limit"])
            super().close()

    app.add_url_rule("/", view_func=lambda: Response(Body()))
    app(EnvironBuilder().get_environ(), lambda *_: print).close()  # type: ignore[attr-defined]
    assert closed[0] == 1
