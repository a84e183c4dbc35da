"""A bare WSGI app."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs

from tests.support.apps.answers import line, report, wait_for
from veltrix_mw import ConfigClient
from veltrix_mw.wsgi import VIEW_KEY, ConfigMiddleware


def bare(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "application/json")])
    view = environ[VIEW_KEY]
    if environ["PATH_INFO"] != "/stream":
        return [json.dumps(report(view)).encode()]

    def parts() -> Iterator[bytes]:
        yield line(view)
        wait_for(parse_qs(environ["QUERY_STRING"])["fifo"][0])
        yield line(view)

    return parts()


app = ConfigMiddleware(bare, client=ConfigClient())
