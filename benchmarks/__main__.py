"""Runs the measurements, prints one table, and writes `results.json` and the plots that the docs show."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.harness import QUICK, ROUNDS, Figure
from benchmarks.plots import bars

HERE = Path(__file__).parent
ALL = ("p1_read", "p2_attach", "p4_herd", "p5_propagate", "p6_apply", "p9_import", "p10_load", "p12_telemetry")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("only", nargs="*", choices=[*ALL, []], help="some of the measurements; default all")
    parser.add_argument("--output", type=Path, default=HERE, help="the folder for results.json and the plots")
    chosen = parser.parse_args()
    interpreter = f"{platform.python_implementation()} {platform.python_version()}"
    how = f"{ROUNDS} rounds{' (QUICK)' if QUICK else ''}: ratios, medians [quartiles]"
    print(f"{interpreter} on {platform.machine()}, {how}\n")
    figures: list[Figure] = []
    for name in chosen.only or ALL:
        for figure in import_module(f"benchmarks.{name}").measure():
            figures.append(figure)
            print(_line(figure), flush=True)
    if chosen.only:
        return
    chosen.output.mkdir(parents=True, exist_ok=True)
    results = {
        "interpreter": interpreter,
        "quick": QUICK,
        "rounds": ROUNDS,
        "cores": len(os.sched_getaffinity(0)),
        "figures": [figure.as_json() for figure in figures],
    }
    (chosen.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for bench in dict.fromkeys(figure.bench for figure in figures):
        svg = bars(bench, [figure for figure in figures if figure.bench == bench])
        (chosen.output / f"{bench.split()[0].lower()}-{bench.split()[-1]}.svg").write_text(svg)
    missed = [figure for figure in figures if figure.met is False]
    if missed:
        print("\nBars not met: " + "; ".join(f"{figure.bench}, {figure.name}" for figure in missed), file=sys.stderr)


def _line(figure: Figure) -> str:
    low, high = figure.spread
    bar = (
        ""
        if figure.bar is None
        else f"  bar {'>=' if figure.at_least else '<='} {figure.bar:g}: {'met' if figure.met else 'NOT MET'}"
    )
    return f"{figure.bench:<14} {figure.name:<40} {figure.ratio:>9.2f} [{low:.2f}, {high:.2f}]{bar}  {figure.note}"


if __name__ == "__main__":
    main()
