"""P9: `import veltrix_mw`, against `import opentelemetry.trace`, each in a fresh interpreter."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from benchmarks.harness import QUICK, Figure, ratios

MODULES = {"opentelemetry.trace": "opentelemetry.trace", "control": "opentelemetry.trace", "veltrix_mw": "veltrix_mw"}


def _seconds(module: str) -> float:
    """CPU seconds, start-up left out; the least of three after one, as anything else on the machine only adds."""
    code = f"import time; t = time.process_time(); import {module}; print(time.process_time() - t)"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as installed
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, env=env, capture_output=True, text=True, check=True) for _ in range(4)][1:]
    return min(float(run.stdout) for run in runs)


def measure() -> list[Figure]:
    samples: dict[str, list[float]] = {name: [] for name in MODULES}
    for _ in range(3 if QUICK else 9):
        for name, module in MODULES.items():
            samples[name].append(_seconds(module))
    found = ratios(samples, "opentelemetry.trace")
    ms = statistics.median(samples["veltrix_mw"]) * 1000
    return [
        Figure("P9 import", "opentelemetry.trace (A/A control)", *found["control"]),
        Figure(
            "P9 import",
            "veltrix_mw",
            *found["veltrix_mw"],
            bar=2.0,
            note=f"against opentelemetry.trace; {ms:.0f} ms here",
        ),
    ]
