"""The dashboard and the alert rules: they ask for what the code emits, and fire when they should.

What is emitted is read from a scrape: a client in use, OpenTelemetry's own exporter for Prometheus. What is asked for
is read from the expressions; `promtool` parses them, and runs the alerts over made-up series.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import create_autospec

import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.redis_servers import redis_server
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient
from veltrix_mw import client as client_module
from veltrix_mw.instruments import Instruments

ROOT: Final = Path(__file__).parent.parent
DASHBOARD: Final[dict[str, Any]] = json.loads((ROOT / "docs/monitoring/veltrix-dashboard.json").read_text())
PANELS: Final[list[dict[str, Any]]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS_FILE: Final = ROOT / "docs/monitoring/veltrix-alerts.yml"
WITHIN_S: Final = 30.0
OF_TARGETS: Final = frozenset({"job", "instance"})  # Prometheus gives these to all that it scrapes

Scrape = Mapping[str, Mapping[str, frozenset[str]]]
"""Names of samples, their labels, and the labels' values."""


@dataclass(frozen=True, slots=True)
class Use:
    """An expression, and the labels that are shown of its result."""

    where: str
    expr: str
    shown: frozenset[str] = frozenset()

    @property
    def metrics(self) -> set[str]:
        bare = re.sub(r"\b(?:by|without|on|ignoring)\s*\([^)]*\)", "", re.sub(r"\{[^}]*\}", "", self.expr))
        return set(re.findall(r"\b(veltrix_\w+)", bare))

    @property
    def grouped(self) -> set[str]:
        """The labels by which results are grouped or matched."""
        groups = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", self.expr)
        return {label.strip() for group in groups for label in group.split(",")}

    @property
    def chosen(self) -> list[tuple[str, str, str]]:
        """Each matcher: the metric, its label, and the value."""
        return [
            (metric, label, value)
            for metric, matchers in re.findall(r"\b(veltrix_\w+)\{([^}]*)\}", self.expr)
            for label, value in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', matchers)
        ]


def _alerts() -> list[dict[str, Any]]:
    rules = importlib.import_module("ruamel.yaml").YAML(typ="safe").load(ALERTS_FILE)
    return [rule for group in rules["groups"] for rule in group["rules"]]


ALERTS: Final = _alerts()


def _uses() -> list[Use]:
    found = [
        Use(panel["title"], target["expr"], frozenset(re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"])))
        for panel in PANELS
        for target in panel["targets"]
    ]
    for alert in ALERTS:
        shown = frozenset(re.findall(r"\$labels\.(\w+)", " ".join(alert["annotations"].values())))
        found.append(Use(alert["alert"], alert["expr"], shown))
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            expr, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            assert variable["query"]["query"] == variable["definition"]
            found.append(Use(f"${variable['name']}", expr, frozenset({label})))
    return found


USES: Final = _uses()


@pytest.fixture(scope="module")
def scrape() -> Iterator[Scrape]:
    """What Prometheus is shown of a client that does all there is to measure."""
    meters, tracers = MeterProvider([PrometheusMetricReader()], shutdown_on_exit=False), TracerProvider()
    with (
        redis_server() as redis,
        ConfigClient(
            "memory://",
            namespace="shop",
            mirror=f"redis://127.0.0.1:{redis.port}/0",
            lazy=("tenants/",),
            meter_provider=meters,
            tracer_provider=tracers,
        ) as client,
    ):
        client.wait_ready(WITHIN_S)
        client.wait_for(client.put("checkout/max_items", 50), WITHIN_S)
        client.wait_for(client.put("tenants/ann/limit", 7), WITHIN_S)
        with tracers.get_tracer("shop").start_as_current_span("GET /"), client.pinned() as view:
            view.fetch("tenants/ann/limit")
            assert view["checkout/max_items"] == 50
        wait_until(lambda: client.status().relay is not None, WITHIN_S, reason="the relay to be there")
        found: dict[str, dict[str, set[str]]] = {}
        for family in text_string_to_metric_families(generate_latest(REGISTRY).decode()):
            for sample in family.samples:
                labels = found.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
        yield {
            name: {label: frozenset(values) for label, values in labels.items()}
            for name, labels in found.items()
            if name.startswith("veltrix_")
        }
    meters.shutdown()


def _instruments() -> list[str]:
    """The name of each instrument that the code makes."""
    meter = create_autospec(Meter)
    Instruments(meter)
    made = [call for call in meter.mock_calls if call[0].startswith("create_")]
    return [call.args[0] if call.args else call.kwargs["name"] for call in made]


def _shows(sample: str, instrument: str) -> bool:
    """Whether a sample of that name is one of the instrument's."""
    name = instrument.replace(".", "_")
    return re.fullmatch(rf"{name}(_seconds)?(_total|_bucket|_sum|_count)?", sample) is not None


INSTRUMENTS: Final = [name for name in _instruments() if name.startswith("veltrix.")]


def test_there_are_instruments_and_expressions_to_compare() -> None:
    assert "veltrix.relay.held" in INSTRUMENTS
    assert {use.where for use in USES} >= {"Views", "VeltrixStale", "$namespace"}


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_every_instrument_is_scraped(instrument: str, scrape: Scrape) -> None:
    assert any(_shows(name, instrument) for name in scrape)


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_the_dashboard_shows_every_instrument(instrument: str) -> None:
    shown = {name for panel in PANELS for target in panel["targets"] for name in Use("", target["expr"]).metrics}
    assert any(_shows(name, instrument) for name in shown), f"no panel shows {instrument}"


@pytest.mark.parametrize("use", USES, ids=lambda use: use.where)
def test_what_an_expression_asks_for_is_there(use: Use, scrape: Scrape) -> None:
    assert use.metrics
    assert use.metrics <= scrape.keys(), f"{use.where} asks for what nobody emits"
    for metric in use.metrics:
        labels = scrape[metric].keys() | OF_TARGETS
        assert use.grouped | use.shown <= labels, f"{use.where}: {metric} has no such label"
    for metric, label, value in use.chosen:
        assert label in scrape[metric].keys() | OF_TARGETS, f"{use.where}: {metric} has no label {label}"
        assert value.startswith("$") or value in scrape[metric][label], f"{use.where}: no {label} is ever {value!r}"


@pytest.mark.parametrize("use", USES, ids=lambda use: use.where)
def test_a_label_that_is_shown_is_one_that_the_result_has(use: Use) -> None:
    if re.match(r"\s*(?:max|min|sum|count|histogram_quantile)\b", use.expr):
        assert use.shown <= use.grouped, f"{use.where}: aggregated away"


def test_panels_have_what_grafana_needs_and_a_reader_wants() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert at["x"] + at["w"] <= 24, f"{panel['title']} is wider than the dashboard"
        taken |= cells
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


def test_the_variables_that_are_used_are_the_ones_there_are() -> None:
    there = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert {name for name in used if not name.startswith("__")} == there


def test_each_alert_says_what_is_wrong_and_what_to_do() -> None:
    assert [alert["alert"] for alert in ALERTS] == [
        "VeltrixStale",
        "VeltrixRejected",
        "VeltrixNoRelay",
        "VeltrixPropagationSlow",
    ]
    for alert in ALERTS:
        assert alert["labels"]["severity"] == "warning"
        assert alert["annotations"].keys() == {"summary", "description"}
        page = (ROOT / "docs/monitoring.md").read_text()
        assert f"| `{alert['alert']}` |" in page


def test_alert_and_dashboard_call_old_what_the_client_calls_old() -> None:
    (stale,) = (alert["expr"] for alert in ALERTS if alert["alert"] == "VeltrixStale")
    assert re.findall(r"> (\d+)\s*$", stale) == [f"{client_module.MAX_AGE_S:.0f}"]
    for title in ("Oldest snapshot", "Age of the snapshot"):
        (panel,) = (panel for panel in PANELS if panel["title"] == title)
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert [step["value"] for step in steps] == [None, client_module.MAX_AGE_S]


def test_slow_begins_at_a_bound_of_the_histogram(scrape: Scrape) -> None:
    (slow,) = (alert["expr"] for alert in ALERTS if alert["alert"] == "VeltrixPropagationSlow")
    (limit,) = re.findall(r"> (\d+)\s*$", slow)
    assert f"{limit}.0" in scrape["veltrix_propagation_duration_seconds_bucket"]["le"]


def _promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alert_rules_are_rules_of_prometheus() -> None:
    _promtool("check", "rules", ALERTS_FILE)


def test_each_alert_fires_when_it_should_and_not_when_it_should_not() -> None:
    _promtool("test", "rules", ROOT / "tests/alert_rules.yml")
    tried = (ROOT / "tests/alert_rules.yml").read_text()
    assert [alert["alert"] for alert in ALERTS if alert["alert"] not in tried] == []


def test_what_panels_ask_for_is_promql(tmp_path: Path) -> None:
    """Each expression as a rule, with Grafana's variables filled in."""
    values = {"$__rate_interval": "1m", "$job": ".*", "$namespace": ".*"}
    rules = []
    for number, expr in enumerate(target["expr"] for panel in PANELS for target in panel["targets"]):
        filled = re.sub(r"\$\w+", lambda found: values[found[0]], expr)
        rules.append({"record": f"panel_{number}", "expr": filled})
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    _promtool("check", "rules", tmp_path / "rules.yml")
