"""Writes the figures of `results.json` into the pages that show them: a few into README.md, all into docs/decisions.md.

Usage: python -m benchmarks.table            write the pages
       python -m benchmarks.table --check    write nothing: exits 1 where a page shows other figures
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results.json"
README: Final = ROOT / "README.md"
ALL: Final = ROOT / "docs" / "decisions.md"

_BLOCK: Final = re.compile(r"(<!-- python -m benchmarks\.table -->\n).*?(<!-- end -->\n)", re.DOTALL)

SHOWN: Final[Mapping[tuple[str, str], str]] = {
    ("P1 hot read", "view[key]"): "one read, `view[key]`, against a subscript of a plain `dict`",
    ("P1 hot read", "view[key], 3 layers"): "the same with 3 layers",
    ("P1 hot read", "dynaconf attribute"): "for comparison, against the same subscript: an attribute of dynaconf",
    ("P1 hot read", "dogpile.cache, memory"): "a read of dogpile.cache, in memory",
    ("P1 hot read", "OpenFeature, in memory"): "a read of OpenFeature, in memory",
    ("P2 attach", "ASGI, a view"): "attaching a view to an ASGI request, against the least that a middleware does "
    "(a name in the scope, a context variable)",
    ("P2 attach", "WSGI, a view"): "the same for WSGI",
    ("P4 herd", "p99 of readers, ours"): "2,000 readers in 8 processes want one cold key, etcd 60 ms away: "
    "the p99 of their waits, against one fetch",
    ("P4 herd", "p99 of readers, cashews"): "the same herd with cashews' locks",
    ("P4 herd", "p99 of readers, naive read-through"): "with a plain read-through cache",
    ("P4 herd", "p99 of readers, dogpile.cache"): "with dogpile.cache's locks",
    ("P4 herd", "authority reads, ours"): "how often that herd reads etcd (a count)",
    ("P4 herd", "authority reads, naive read-through"): "with a plain read-through cache",
    ("P5 propagation", "100 workers, etcd + Redis"): "from a write until 100 workers serve it, p99, against a bare "
    "watch, `XADD` and `XREAD`",
    ("P6 one change", "1,000,000 keys"): "applying one change at 1,000,000 keys, against 1,000 keys",
    ("P6 burst", "a view's follower"): "the longest stall of an event loop while a burst of 10,000 changes is applied, "
    "against a bare thread that reads and decodes them",
    ("P9 import", "veltrix_mw"): "`import veltrix_mw`, against `import opentelemetry.trace`",
    ("P10 authority", "reads a second, 200 workers"): "what etcd is asked by 200 workers with a mirror, against one",
    ("P12 telemetry", "ASGI, span records"): "what telemetry adds to an ASGI request that is traced, against five "
    "attributes and one record made by hand",
    ("P12 telemetry", "WSGI, span records"): "the same for a traced WSGI request",
}
"""The figures in README.md, in its words and order."""

_TOGETHER: Final = (
    "what comes while a call is under way goes together in the next, and how much that is in the worst of "
)
_READ_BY_EACH: Final = (
    "each announcement of what was filled is read by every process, and each looks and waits by itself"
)
_DECIDED: Final = (
    "the calls are those five attributes and that record, and nothing more; the rest is to decide, to count "
)

REASONS: Final[Mapping[tuple[str, str], str]] = {
    ("P4 herd", "p99 of readers, ours"): "a miss is a look at the mirror, a wish, the relay's read, its announcement "
    "and a second look, while eight processes wake their readers on two cores",
    ("P4 herd", "p99 of readers, ours, Redis as far"): "with Redis as far as etcd a miss is three trips there, one "
    "after the other: the look, the wish, the look at what was filled",
    ("P4 herd", "authority reads, ours, Redis as far"): "who is told of no fill within 0.3 s asks etcd by itself",
    ("P4 distinct", "authority calls a unit, one process"): f"{_TOGETHER}all rounds is the machine's to say",
    ("P4 distinct", "backend calls a unit, one process"): f"{_TOGETHER}all rounds is the machine's to say",
    ("P4 distinct", "authority calls a unit, 8 processes"): f"{_TOGETHER}all rounds is the machine's to say",
    ("P4 distinct", "authority calls a unit, 8 processes, Redis as far"): "as with Redis near",
    ("P4 distinct", "backend calls a unit, 8 processes"): _READ_BY_EACH,
    ("P4 distinct", "backend calls a unit, 8 processes, Redis as far"): _READ_BY_EACH,
    ("P5 propagation", "100 workers, etcd + Redis"): "each worker decodes, judges and publishes the change, where the "
    "bare chain looks at its number, and the last of them has waited for all others on two cores",
    ("P5 propagation", "20 workers, etcd alone"): "each worker decodes, judges and publishes the change, where the "
    "bare watch looks at its number, and the last of them has waited for all others on two cores",
    ("P6 burst", "a view's follower"): "it varies between runs more than it misses its aim by; a burst is applied in "
    "parts with pauses, and what holds the interpreter beyond that is not found yet",
    ("P12 telemetry", "ASGI, span records"): f"{_DECIDED}and to time the reads, and to tell before the response ends",
    ("P12 telemetry", "WSGI, span records"): f"{_DECIDED}and to time the reads",
}
"""Why an aim was not met, where it was not."""


def main() -> int:
    results = json.loads(RESULTS.read_text())
    pages = {README: _block(results, SHOWN), ALL: _block(results, None)}
    stale = []
    for page, block in pages.items():
        text = page.read_text()
        written = _BLOCK.sub(lambda found, block=block: found[1] + block + found[2], text)  # type: ignore[misc]
        if written != text:
            stale.append(page)
            if "--check" not in sys.argv:
                page.write_text(written)
    if stale and "--check" in sys.argv:
        names = ", ".join(page.name for page in stale)
        print(f"{names}: not the figures of {RESULTS.name}; run python -m benchmarks.table", file=sys.stderr)
        return 1
    return 0


def _block(results: Mapping[str, Any], words: Mapping[tuple[str, str], str] | None) -> str:
    figures = {(figure["bench"], figure["name"]): figure for figure in results["figures"]}
    shown = {key: ", ".join(key) for key in figures} if words is None else words
    lines = [
        f"From `make bench`: {results['interpreter']}, {results['rounds']} rounds, 2 cores. A figure is a ratio of two",
        "things measured in turn in one run, or a count: the median, and the quartiles in brackets.",
        "`benchmarks/results.json` has them all.",
        "",
        "| what | | aim |",
        "|---|---|---|",
        *(_row(label, figures[key]) for key, label in shown.items()),
        "",
        _noise(figures.values()),
        *_missed(figures, shown),
        "",
    ]
    return "\n".join(lines)


def _row(label: str, figure: Mapping[str, Any]) -> str:
    aim = "" if figure["bar"] is None else f" {_number(figure['bar'])}: {'met' if figure['met'] else '**not met**'}"
    low, high = map(_number, figure["spread"])
    return f"| {label} | {_number(figure['ratio'])} [{low}, {high}] |{aim} |"


def _number(value: float) -> str:
    digits = 0 if value >= 100 or value == int(value) else 2 if value >= 0.1 else 3
    return f"{value:,.{digits}f}"


def _noise(figures: Iterable[Mapping[str, Any]]) -> str:
    again = [figure["ratio"] for figure in figures if "A/A" in figure["name"]]
    return f"A reference measured against itself gave {min(again):.2f} to {max(again):.2f}: that much is noise."


def _missed(figures: Mapping[tuple[str, str], Mapping[str, Any]], shown: Mapping[tuple[str, str], str]) -> list[str]:
    missed = [key for key in shown if figures[key]["met"] is False]
    if unexplained := [key for key in missed if key not in REASONS]:
        raise SystemExit(f"say in REASONS of {__file__} why these missed their aim: {unexplained}")
    reasons = [f"- {shown[key]}: {REASONS[key]}." for key in missed]
    return ["", "Of the aims that were not met:", "", *reasons] if missed else []


if __name__ == "__main__":
    sys.exit(main())
