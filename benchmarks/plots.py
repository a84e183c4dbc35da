"""Plots of figures as SVG text: horizontal bars on a log scale, with the spread and the bar that is meant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from benchmarks.harness import Figure

_ROW, _LEFT, _WIDTH, _TOP = 26, 300, 420, 46


def bars(title: str, figures: Sequence[Figure]) -> str:
    """One SVG: a row a figure. Ratios on a logarithmic axis, as rivals differ by orders of magnitude."""
    values = [value for figure in figures for value in (figure.ratio, figure.bar or figure.ratio, 1.0) if value > 0]
    low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1

    def x(value: float) -> float:
        return _LEFT + _WIDTH * (math.log10(max(value, 10**low)) - low) / (high - low)

    height = _TOP + _ROW * len(figures) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="800" height="{height}" fill="white"/>',
        f'<text x="12" y="26" font-size="16" font-weight="bold">{escape(title)}</text>',
        _upright(x(1), _TOP - 8, height - 10, 'stroke="#999" stroke-dasharray="3 3"'),
    ]
    for row, figure in enumerate(figures):
        y = _TOP + _ROW * row
        colour = {True: "#2f7d4f", False: "#b3392f", None: "#6b7a8f"}[figure.met]
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(figure.name)}</text>')
        width = max(x(figure.ratio) - _LEFT, 1)
        parts.append(f'<rect x="{_LEFT}" y="{y + 3}" width="{width:.1f}" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x(figure.ratio) + 6:.1f}" y="{y + 14}">{figure.ratio:.3g}</text>')
        if figure.bar is not None:
            parts.append(_upright(x(figure.bar), y, y + 20, 'stroke="black" stroke-width="2"'))
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _upright(x: float, top: float, bottom: float, style: str) -> str:
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" {style}/>'
