"""How things are measured: the rivals in turn, in one run, round after round; ratios, medians and their spread.

Owns the arithmetic of a fair comparison; knows nothing of what is compared. An A/A control (the reference against
itself) runs beside every comparison: what it shows is noise.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

QUICK = bool(os.environ.get("QUICK"))
ROUNDS = 5 if QUICK else 11
ROUND_S = 0.02 if QUICK else 0.1
"""Seconds that one rival runs in one round: long against a timer's resolution, short against the machine's moods."""

# Seconds are seconds of this thread's own CPU time (`time.thread_time`): what others do on the machine is left out.


@dataclass
class Figure:
    """One line of the table: what was measured, as a ratio to the reference of the same round."""

    bench: str
    name: str
    ratio: float  # median over the rounds
    spread: tuple[float, float]  # the lower and upper quartile
    bar: float | None = None  # what we mean to reach; None where there is none
    at_least: bool = False  # whether the bar is a floor
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.ratio >= self.bar if self.at_least else self.ratio <= self.bar

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def ratios(samples: Mapping[str, list[float]], reference: str) -> dict[str, tuple[float, tuple[float, float]]]:
    """Each name's ratio to the reference, round by round: median and quartiles."""
    found = {}
    for name, values in samples.items():
        each = [value / base for value, base in zip(values, samples[reference], strict=True)]
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
        found[name] = (statistics.median(each), (low, high))
    return found


def in_turn(
    rivals: Mapping[str, Callable[[int], None]], *, rounds: int = ROUNDS, round_s: float = ROUND_S
) -> dict[str, list[float]]:
    """Seconds a call for each rival, one sample a round; `rivals` take the number of calls to make.

    The order turns from round to round, so that nobody always comes after the same neighbour.
    """
    counts = {}
    for name, run in rivals.items():
        calls = 1
        while (took_s := _timed(run, calls)) < round_s / 8:
            calls *= 2 if took_s > round_s / 64 else 8
        counts[name] = max(1, int(calls * round_s / max(took_s, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    names = list(rivals)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            samples[name].append(_timed(rivals[name], counts[name]) / counts[name])
    return samples


def _timed(run: Callable[[int], None], calls: int) -> float:
    gc.collect()
    gc.disable()
    try:
        begun = time.thread_time()
        run(calls)
        return time.thread_time() - begun
    finally:
        gc.enable()


def statement(code: str, **names: Any) -> Callable[[int], None]:
    """A rival that runs `code` as a statement, in a loop without a call around it."""
    source = f"def run(_n):\n    for _ in range(_n):\n        {code}\n"
    scope = dict(names)
    # As locals, which is how a handler has its view: a global look-up would be measured along.
    bound = ", ".join(f"{name}={name}" for name in names)
    exec(source.replace("(_n)", f"(_n, {bound})", 1), scope)
    run: Callable[[int], None] = scope["run"]
    return run
