"""What two workers export to a collector over HTTP, up to the last request before SIGTERM."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.collector import collector
from tests.support.serving import Server, serve
from veltrix_mw import ConfigClient

REQUESTS = 60


@pytest.mark.parametrize(
    ("server", "app"),
    [
        ("uvicorn", "otlp_starlette"),
        ("granian", "otlp_starlette"),
        ("gunicorn", "otlp_flask"),
    ],
)
def test_nothing_is_lost_at_sigterm(server: Server, app: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    with ConfigClient(url) as writer:
        writer.put("checkout/max_items", 50)
    with collector() as collected:
        # Only the end sends: nothing was before it.
        late = {"OTEL_BSP_SCHEDULE_DELAY": "3600000", "OTEL_METRIC_EXPORT_INTERVAL": "3600000"}
        env = {"VELTRIX_URL": url, "OTEL_EXPORTER_OTLP_ENDPOINT": collected.url, "OTEL_SERVICE_NAME": "shop", **late}
        with serve(f"examples.{app}:app", server=server, asgi=app == "otlp_starlette", env=env) as served:
            pids, sent = set(), 1  # that the server answers was tried with one
            while len(pids) < 2:
                pids, sent = pids | {served.get()["pid"]}, sent + 1
            with ThreadPoolExecutor(8) as pool:
                assert set(pool.map(lambda _: served.get()["pid"], range(REQUESTS))) == pids
            assert collected.spans == []
            assert served.stop() == 0
        told = collected.attributes("GET /config")
        assert len(told) == sent + REQUESTS
        assert all(each["veltrix.origin"] == "sqlite" and each["veltrix.lookup.count"] >= 1 for each in told)
        assert all(each["http.route"] == "/config" for each in told)
        assert len(collected.attributes("veltrix.refresh")) >= 2
        assert len(collected.workers) == 2
        assert collected.count("veltrix.lookup.duration") == len(told)
        assert collected.count("veltrix.views") >= len(told)
        assert collected.unknown == []
