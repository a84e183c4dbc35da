"""Draws the traces of a herd as docs/_static/herd.svg, from spans that examples/slow_read.py emitted.

    .venv/bin/python -m scripts.trace_picture SPANS.jsonl > docs/_static/herd.svg

A row for each span, below its request; the bar is when it ran. An arrow is a span's link: from who waited, to whom.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, Final

__all__ = ["Bar", "bars_of", "picture"]

_WIDTH: Final = 760
_LEFT: Final = 236  # where the time begins
_RIGHT: Final = _WIDTH - 24
_TOP: Final = 62
_ROW: Final = 22
_BAR: Final = 13
_PART: Final = 8  # between two requests
_TICKS: Final = 5
_KINDS: Final = {"SpanKind.SERVER": "server", "SpanKind.CLIENT": "client"}

_STYLE: Final = """
    .page { fill: #ffffff; stroke: #d0d7de; }
    .text { fill: #1f2328; }
    .faint { fill: #57606a; font-size: 12px; }
    .grid { stroke: #d0d7de; }
    .server { fill: #8c959f; }
    .leader { fill: #0a5dc2; }
    .follower { fill: #9cc7f5; }
    .client { fill: #bf5b04; }
    .link { fill: none; stroke: #0a5dc2; stroke-width: 1.2; }
    .head { fill: #0a5dc2; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #15191f; stroke: #3d444d; }
      .text { fill: #eef1f5; }
      .faint { fill: #a9b3be; }
      .grid { stroke: #3d444d; }
      .leader { fill: #79b8ff; }
      .follower { fill: #2f5f94; }
      .client { fill: #f0883e; }
      .link { stroke: #79b8ff; }
      .head { fill: #79b8ff; }
    }
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """A span of the picture; `begins_s` counts from the first request's beginning."""

    span_id: str
    depth: int
    name: str
    kind: str  # server, leader, follower, client
    begins_s: float
    took_s: float
    links: Sequence[str]


def bars_of(spans: Sequence[Mapping[str, Any]]) -> list[list[Bar]]:
    """Each request's spans, top down; the requests by when they began."""
    requests = sorted((span for span in spans if span["kind"] == "SpanKind.SERVER"), key=_begin_s)
    first_s = _begin_s(requests[0])

    def below(span: Mapping[str, Any], depth: int) -> Iterator[Bar]:
        begins_s = _begin_s(span)
        took_s = _s(span["end_time"]) - begins_s
        links = [link["context"]["span_id"] for link in span["links"]]
        name = span["name"]
        if name == "veltrix.fetch":
            name += f"  {span['attributes']['veltrix.result']}"
        kind = _KINDS.get(span["kind"]) or ("follower" if links else "leader")
        yield Bar(span["context"]["span_id"], depth, name, kind, begins_s - first_s, took_s, links)
        children = [other for other in spans if other["parent_id"] == span["context"]["span_id"]]
        for child in sorted(children, key=_begin_s):
            yield from below(child, depth + 1)

    return [list(below(request, 0)) for request in requests]


def picture(requests: Sequence[Sequence[Bar]]) -> str:
    """The SVG."""
    bars = [bar for request in requests for bar in request]
    whole_s = max(bar.begins_s + bar.took_s for bar in bars)
    tick_s = _round(whole_s / _TICKS)

    def x(at_s: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * at_s / whole_s

    rows: dict[str, float] = {}
    at = float(_TOP)
    for request in requests:
        for bar in request:
            rows[bar.span_id] = at
            at += _ROW
        at += _PART
    height = round(at + 8)
    drawn = [
        f'<rect class="page" x="1" y="1" width="{_WIDTH - 2}" height="{height - 2}" rx="10"/>',
        '<text class="text" x="20" y="28">Requests that need one tenant at the same time</text>',
    ]
    for number in range(int(whole_s / tick_s) + 1):
        there = x(number * tick_s)
        drawn.append(f'<line class="grid" x1="{there:.1f}" x2="{there:.1f}" y1="{_TOP - 8}" y2="{height - 14}"/>')
        text = f"{1000 * number * tick_s:g} ms"
        drawn.append(f'<text class="faint" x="{there:.1f}" y="{_TOP - 14}" text-anchor="middle">{text}</text>')
    for bar in bars:
        top = rows[bar.span_id]
        style = "text" if bar.depth == 0 else "faint"
        label = escape(bar.name)
        drawn.append(f'<text class="{style}" x="{20 + 14 * bar.depth}" y="{top + 11:.1f}">{label}</text>')
        width = max(1.5, x(bar.begins_s + bar.took_s) - x(bar.begins_s))
        title = f"<title>{label}: {1000 * bar.took_s:.1f} ms</title>"
        drawn.append(
            f'<rect class="{bar.kind}" x="{x(bar.begins_s):.1f}" y="{top:.1f}" '
            f'width="{width:.1f}" height="{_BAR}" rx="2">{title}</rect>'
        )
    begins_s = {bar.span_id: bar.begins_s for bar in bars}
    for bar in bars:
        for other in (link for link in bar.links if link in rows):
            here, there = (x(bar.begins_s), rows[bar.span_id] + _BAR / 2), (x(begins_s[other]), rows[other] + _BAR)
            bend = min(here[0], there[0]) - 14
            drawn.append(
                f'<path class="link" marker-end="url(#arrow)" '
                f'd="M{here[0]:.1f} {here[1]:.1f}C{bend:.1f} {here[1]:.1f} {there[0]:.1f} {there[1] + 26:.1f} '
                f'{there[0]:.1f} {there[1] + 2:.1f}"/>'
            )
    followers = sum(bar.kind == "follower" for bar in bars)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img"
     aria-labelledby="title description"
     font-family="system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif" font-size="13">
  <title id="title">A herd on one slow read, in its traces</title>
  <desc id="description">{len(requests)} requests need the same lazy unit. One fetch leads and has it read from the
    store; the fetches of {followers} others wait for it, and each links to it.</desc>
  <style>{_STYLE}  </style>
  <defs>
    <marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">
      <path class="head" d="M0 0 8 4 0 8z"/>
    </marker>
  </defs>
  {chr(10).join(drawn).replace(chr(10), chr(10) + "  ")}
</svg>
"""


def _begin_s(span: Mapping[str, Any]) -> float:
    return _s(span["start_time"])


def _s(written: str) -> float:
    return datetime.fromisoformat(written).timestamp()


def _round(step_s: float) -> float:
    """The next larger of 1, 2, 5, 10, ... milliseconds."""
    rounded = 0.001
    for factor in (2, 2.5, 2) * 6:
        if rounded >= step_s:
            break
        rounded *= factor
    return rounded


def main() -> None:
    """Read the file that is named, and write the picture."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.trace_picture SPANS.jsonl > docs/_static/herd.svg")
    try:
        spans = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    except (OSError, ValueError) as exc:
        sys.exit(f"{sys.argv[1]}: {exc}: name a file that examples/slow_read.py wrote")
    if not any(span["kind"] == "SpanKind.SERVER" for span in spans):
        sys.exit(f"{sys.argv[1]} has no span of a request: name a file that examples/slow_read.py wrote")
    sys.stdout.write(picture(bars_of(spans)))


if __name__ == "__main__":
    main()
