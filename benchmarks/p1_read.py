"""P1: one hot read of a setting, in units of a dict subscript."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Figure, in_turn, ratios, statement
from veltrix_mw import ConfigClient, Freshness, Put


def measure() -> list[Figure]:
    from opentelemetry.sdk.trace import TracerProvider

    plain = {f"checkout/setting-{number}": number for number in range(1000)}
    rule = Freshness("checkout/", max_age_s=20, on_stale="fail")
    with (
        ConfigClient("memory://") as client,
        ConfigClient("memory://", layers=("env/prod/",)) as layered,
        ConfigClient("memory://", freshness=(rule,)) as fresh,
    ):
        for each in (client, layered, fresh):
            each.wait_for(each.write([Put(key, value) for key, value in plain.items()]))
        view = client.view()
        tenant = layered.view(layers=("tenants/acme/", "regions/eu/"))
        tracer = TracerProvider().get_tracer("bench")
        with tracer.start_as_current_span("request"), client.pinned() as counted:
            pass
        rivals = {
            "dict subscript": statement("d['checkout/setting-7']", d=plain),
            "dict subscript (A/A control)": statement("d['checkout/setting-7']", d=dict(plain)),
            "view[key]": statement("v['checkout/setting-7']", v=view),
            "view.get(key)": statement("v.get('checkout/setting-7')", v=view),
            "view[key], 3 layers": statement("v['checkout/setting-7']", v=tenant),
            "view[key], freshness=": statement("v['checkout/setting-7']", v=fresh.view()),
            "view[key], the request's span records": statement("v['checkout/setting-7']", v=counted),
            **_others(),
        }
        found = ratios(in_turn(rivals), "dict subscript")
    bars = {"view[key]": 3.0, "view[key], freshness=": 3.0, "view[key], 3 layers": 4.0}
    return [
        Figure("P1 hot read", name, ratio, spread, bar=bars.get(name), note="in dict subscripts")
        for name, (ratio, spread) in found.items()
        if name != "dict subscript"
    ]


def _others() -> dict[str, Callable[[int], None]]:
    """Libraries that hold settings in the process's memory, each by its own idiom."""
    from dogpile.cache import make_region
    from dynaconf import Dynaconf
    from openfeature import api
    from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.json"
        path.write_text('{"default": {"setting_7": 7}}')
        dynaconf = Dynaconf(settings_files=[str(path)], environments=True)
        assert dynaconf.SETTING_7 == 7
    region = make_region().configure("dogpile.cache.memory")
    region.set("checkout/setting-7", 7)
    api.set_provider(InMemoryProvider({"setting-7": InMemoryFlag("on", {"on": 7})}))
    flags = api.get_client()
    assert flags.get_integer_value("setting-7", 0) == 7
    return {
        "dynaconf attribute": statement("s.SETTING_7", s=dynaconf),
        "dogpile.cache, memory": statement("r.get('checkout/setting-7')", r=region),
        "OpenFeature, in memory": statement("f.get_integer_value('setting-7', 0)", f=flags),
    }
