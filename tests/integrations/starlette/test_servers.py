"""Starlette and FastAPI under uvicorn with two workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.serving import serve
from tests.support.serving_checks import (
    KEY,
    check_that_a_change_reaches_each_worker_and_no_stream_in_flight,
    check_that_it_ended_cleanly,
)
from veltrix_mw import ConfigClient


@pytest.mark.parametrize("app", ["starlette_app", "fastapi_app"])
def test_a_change_reaches_each_worker_a_stream_keeps_its_revision_and_sigterm_ends_it(app: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'config.db'}"
    with ConfigClient(url) as writer:
        writer.put(KEY, 41)
        with serve(f"tests.support.apps.{app}:app", server="uvicorn", asgi=True, env={"VELTRIX_URL": url}) as served:
            check_that_a_change_reaches_each_worker_and_no_stream_in_flight(served, writer, tmp_path)
            check_that_it_ended_cleanly(served)
