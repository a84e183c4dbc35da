"""A FastAPI app, its endpoints and its stream synchronous."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from starlette_veltrix import ConfigMiddleware, RequestConfig
from tests.support.apps.answers import line, report, wait_for

app = FastAPI()
app.add_middleware(ConfigMiddleware)


@app.get("/config")
def config(config: RequestConfig) -> dict[str, int]:
    return report(config)


@app.get("/stream")
def stream(config: RequestConfig, fifo: str) -> StreamingResponse:
    def parts() -> Iterator[bytes]:
        yield line(config)
        wait_for(fifo)
        yield line(config)

    return StreamingResponse(parts(), media_type="application/json")
