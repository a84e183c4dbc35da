"""Bare ASGI and WSGI apps under real servers with two workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.serving import Server, serve
from tests.support.serving_checks import (
    KEY,
    check_that_a_change_reaches_each_worker_and_no_stream_in_flight,
    check_that_it_ended_cleanly,
)
from veltrix_mw import ConfigClient


@pytest.mark.parametrize(
    ("app", "server"), [("bare_asgi", "uvicorn"), ("bare_asgi", "granian"), ("bare_wsgi", "gunicorn")]
)
def test_a_change_reaches_each_worker_a_stream_keeps_its_revision_and_sigterm_ends_it(
    app: str, server: Server, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'config.db'}"
    with ConfigClient(url) as writer:
        writer.put(KEY, 41)
        with serve(
            f"tests.support.apps.{app}:app", server=server, asgi=app == "bare_asgi", env={"VELTRIX_URL": url}
        ) as served:
            check_that_a_change_reaches_each_worker_and_no_stream_in_flight(served, writer, tmp_path)
            check_that_it_ended_cleanly(served)


@pytest.mark.parametrize("options", [["--lifespan", "off"], ["--lifespan", "on"]])
def test_uvicorn_serves_it_with_and_without_the_lifespan(options: list[str], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'config.db'}"
    with ConfigClient(url) as writer:
        writer.put(KEY, 41)
    with serve(
        "tests.support.apps.bare_asgi:app",
        server="uvicorn",
        workers=1,
        asgi=True,
        env={"VELTRIX_URL": url},
        options=options,
    ) as served:
        assert served.get()["value"] == 41
        check_that_it_ended_cleanly(served, frozenset({0, -15}))
