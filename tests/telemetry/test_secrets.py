"""A tour through all that tells of values and credentials, on each real server; what is found fails it by itself.

`tests/support/planted.py` looks. Here is what it looks at: writes and reads that fail in every way, with a password in
each URL, while spans, metrics and the whole log are had. The tour shows that all of it was told.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import pytest

from tests.support.etcd_servers import etcd
from tests.support.planted import PASSWORD, TENANT, VALUE
from tests.support.proxy import Proxy
from tests.support.redis_servers import redis_server
from tests.support.sdk import Sdk
from tests.support.waiting import wait_until
from veltrix_mw import AuthFailed, ConfigClient, Conflict, HeldBack, InvalidValue, KeyMissing, StoreUnavailable

WITHIN_S = 30.0
LIMIT, BAD, LOST = (f"tenants/{TENANT}{which}/limit" for which in ("", "-bad", "-lost"))
SCHEMAS: Final = {"n": int, LIMIT: int, BAD: int}


@dataclass(frozen=True)
class Servers:
    etcd: Proxy
    redis: Proxy

    def urls(self, store: str, password: str) -> dict[str, str]:
        redis = f"redis://:{password}@127.0.0.1:{self.redis.port}/0"
        if store == "redis":
            return {"url": f"{redis}?namespace=redis"}
        transport = "?transport=grpc" if store == "grpc" else ""
        url = f"etcd://shop:{password}@127.0.0.1:{self.etcd.port}/{store}{transport}"
        return {"url": url, "mirror": redis} if store == "mirrored" else {"url": url}


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with (
        etcd(options=["--bcrypt-cost=4"]) as cluster,
        redis_server("--requirepass", PASSWORD) as redis,
        ExitStack() as closing,
    ):
        cluster.turn_auth_on(shop=PASSWORD)
        cluster.grant("shop", "")
        gates = [Proxy(port) for port in (cluster.hosts[0][1], redis.port)]
        for gate in gates:
            closing.callback(gate.close)
        yield Servers(*gates)


@pytest.mark.parametrize("store", ["redis", "gateway", "grpc", "mirrored"])
def test_nothing_that_fails_tells_a_value_a_password_or_a_tenant(
    store: str, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "veltrix_mw")
    sdk = Sdk()
    shared: dict[str, Any] = {"tracer_provider": sdk.tracer_provider, "meter_provider": sdk.meter_provider}
    right = {**servers.urls(store, PASSWORD), **shared, "lazy": ("tenants/",), "fetch_timeout_s": 2.0}
    writer = ConfigClient(telemetry="lookups", **right)
    worker = ConfigClient(schemas=SCHEMAS, **right)
    heard: list[int] = []

    def failing(_changes: object, snapshot: Any) -> None:
        heard.append(snapshot.revision)
        raise RuntimeError(f"cannot take {snapshot['n']} of {VALUE}")

    with writer, worker, sdk.app.start_as_current_span("GET /"):
        writer.put("n", 1)
        worker.wait_for(writer.put(LIMIT, 5), WITHIN_S)
        worker.subscribe("", failing)
        assert worker.view().fetch(LIMIT) == 5
        worker.wait_for(writer.put("n", 2), WITHIN_S)
        wait_until(lambda: heard, WITHIN_S, reason="a callback fails")
        for key in ("n", LIMIT, BAD):  # none of them the integer that it must be
            last = writer.put(key, {VALUE: [VALUE]})
        for client in (writer, worker):
            client.wait_for(last, WITHIN_S)
        assert (worker.view()["n"], worker.view()[LIMIT]) == (2, 5)
        with pytest.raises(HeldBack):
            worker.view().fetch(BAD)
        with writer.pinned() as view:
            assert view.fetch(BAD) == {VALUE: (VALUE,)}
            with pytest.raises(KeyMissing):
                view[f"{BAD}/none"]
        with pytest.raises(Conflict):
            writer.put("n", VALUE, expected=1)
        with pytest.raises(InvalidValue):
            writer.put("n", [VALUE, float("inf")])
        refused = ConfigClient(**servers.urls(store, f"{PASSWORD}-of-old"), **shared)
        with refused, pytest.raises(AuthFailed):
            refused.put("n", VALUE)
        for gate in (servers.etcd, servers.redis):
            gate.refuse()
        try:
            with pytest.raises(StoreUnavailable):
                worker.view().fetch(LOST)
            with pytest.raises(StoreUnavailable):
                writer.put(LOST, VALUE)
            wait_until(lambda: "veltrix.store_failed" in caplog.text, WITHIN_S, reason="it is told that it is away")
        finally:
            for gate in (servers.etcd, servers.redis):
                gate.heal()
    spans, metrics = {span.name.split()[0] for span in sdk.spans()}, sdk.metrics()
    sdk.close()
    assert {"veltrix.fetch", "veltrix.lookup", "veltrix.refresh", "veltrix.write"} < spans
    assert {"veltrix.fetch.duration", "veltrix.refresh.duration", "veltrix.rejected"} <= metrics.keys()
    for event in ("veltrix.rejected", "veltrix.store_failed", "veltrix.subscriber_failed"):
        assert event in caplog.text
