"""Writes the figures of `results.json` into the pages that show them: README.md, docs/telemetry.md and, all of them,
docs/decisions.md.

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
TELEMETRY: Final = ROOT / "docs" / "telemetry.md"

_BLOCK: Final = re.compile(r"(<!-- python -m benchmarks\.table -->\n).*?(<!-- end -->\n)", re.DOTALL)

SHOWN: Final[Mapping[tuple[str, str], str]] = {
    ("P1 hot read", "view[key]"): "one read, `view[key]`, against a subscript of a plain `dict`",
    ("P1 hot read", "view[key], 3 layers"): "the same with 3 layers",
    ("P1 hot read", "view[key], the request's span records"): "the same in a request whose span records",
    ("P1 hot read", "dynaconf attribute"): "for comparison, against the same subscript: an attribute of dynaconf",
    ("P1 hot read", "dogpile.cache, memory"): "a read of dogpile.cache, in memory",
    ("P1 hot read", "OpenFeature, in memory"): "a read of OpenFeature, in memory",
    ("P2 attach", "ASGI, a view"): "attaching a view to an ASGI request, against the least that a middleware does "
    "(a name in the scope, a context variable)",
    ("P2 attach", "WSGI, a view"): "the same for a WSGI request",
    ("P4 herd", "p99 of readers, ours"): "2,000 readers in 8 processes want one cold key, etcd 60 ms away: "
    "the p99 of their waits, against one fetch",
    ("P4 herd", "p99 of readers, ours, Redis as far"): "the same with Redis as far away",
    ("P4 herd", "p99 of readers, cashews"): "for comparison: that herd with cashews' locks, Redis near",
    ("P4 herd", "p99 of readers, naive read-through"): "with a plain read-through cache, Redis near",
    ("P4 herd", "p99 of readers, dogpile.cache"): "with dogpile.cache's locks, Redis near (one round)",
    ("P4 herd", "authority reads, ours"): "how often that herd reads etcd, a count: the most of all rounds",
    ("P4 herd", "authority reads, cashews"): "with cashews or dogpile.cache",
    ("P4 herd", "authority reads, naive read-through"): "with a plain read-through cache",
    ("P4 distinct", "authority calls a unit, one process"): "2,000 cold keys of as many units at once: calls of etcd "
    "a key, with one process",
    ("P4 distinct", "authority calls a unit, 8 processes"): "the same with 8 processes",
    ("P4 distinct", "backend calls a unit, one process"): "calls of etcd and Redis a key, with one process",
    ("P4 distinct", "backend calls a unit, 8 processes"): "calls of etcd and Redis a key, with 8 processes",
    ("P5 propagation", "100 workers, etcd + Redis"): "from a write until 100 workers serve it, p99, against a bare "
    "watch, `XADD` and `XREAD`",
    ("P5 propagation", "20 workers, etcd alone"): "from a write until 20 workers without a mirror serve it, p99, "
    "against a bare watch",
    ("P6 one change", "1,000,000 keys"): "applying one change at 1,000,000 keys, against 1,000 keys",
    ("P6 burst", "a view's follower"): "the longest stall of an event loop while a burst of 10,000 changes is applied, "
    "against a bare thread that reads and decodes them",
    ("P9 import", "veltrix_mw"): "`import veltrix_mw`, against `import opentelemetry.trace`",
    ("P10 authority", "reads a second, 200 workers"): "what etcd is asked by 200 workers with a mirror, against one "
    "worker (one window)",
    ("P12 telemetry", "ASGI, span records"): "what telemetry adds to a traced ASGI request, against five attributes "
    "and one record made by hand",
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

COSTS: Final[Mapping[tuple[str, str], str]] = {
    (
        "P12 telemetry",
        "a look-up, span does not record",
    ): "a look-up at the default level where the request's span does not record, against one without an SDK",
    ("P12 telemetry", "a look-up, span records"): "a look-up where it records: counted and timed",
    ("P12 telemetry", "a look-up, level lookups"): "a look-up at level `lookups`: a span",
    ("P12 telemetry", "ASGI, off"): "an ASGI request at level `off`, against the default level without an SDK",
    ("P12 telemetry", "WSGI, off"): "the same for a WSGI request",
    ("P12 telemetry", "ASGI, span does not record"): "an ASGI request whose span does not record, against level `off`",
    ("P12 telemetry", "WSGI, span does not record"): "the same for a WSGI request",
    ("P12 telemetry", "ASGI, span records"): "what is added to an ASGI request whose span records, against five "
    "attributes and one record made by hand, which is all that is told",
    ("P12 telemetry", "WSGI, span records"): "the same for a WSGI request",
}
"""The figures in docs/telemetry.md."""

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
    ("P6 burst", "a view's follower"): "it varies much between runs; a burst is applied in "
    "parts with pauses, and what holds the interpreter beyond that is not found yet",
    ("P12 telemetry", "ASGI, span records"): f"{_DECIDED}and to time the reads, and to tell before the response ends",
    ("P12 telemetry", "WSGI, span records"): f"{_DECIDED}and to time the reads",
}
"""Why an aim was not met, where it was not."""


def main() -> int:
    results = json.loads(RESULTS.read_text())
    pages = {README: _block(results, SHOWN), ALL: _block(results, None), TELEMETRY: _block(results, COSTS)}
    stale = []
    for page, block in pages.items():
        text = page.read_text()
        if not _BLOCK.search(text):
            raise SystemExit(
                f"{page.name} has no place for the figures: <!-- python -m benchmarks.table -->, <!-- end -->"
            )
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
        f"From `make bench`: {results['interpreter']}, {results['cores']} cores, {results['rounds']} rounds (7 where a",
        "fleet is measured). A figure is a ratio of two things measured in turn in one run, the median and",
        "in brackets the quartiles; of calls it is the most of all rounds, with the fewest and the most.",
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
    again = [figure for figure in figures if "A/A" in figure["name"]]
    medians = [figure["ratio"] for figure in again]
    quartiles = [bound for figure in again for bound in figure["spread"]]
    return (
        f"A reference measured against itself gave {min(medians):.2f} to {max(medians):.2f}, with quartiles from "
        f"{min(quartiles):.2f} to {max(quartiles):.2f}: that much is noise."
    )


def _missed(figures: Mapping[tuple[str, str], Mapping[str, Any]], shown: Mapping[tuple[str, str], str]) -> list[str]:
    missed = [key for key in shown if figures[key]["met"] is False]
    if unexplained := [key for key in missed if key not in REASONS]:
        raise SystemExit(f"say in REASONS of {__file__} why these missed their aim: {unexplained}")
    reasons = [f"- {shown[key]}: {REASONS[key]}." for key in missed]
    return ["", "Of the aims that were not met:", "", *reasons] if missed else []


if __name__ == "__main__":
    sys.exit(main())
