"""A scatter plot with a logarithmic axis, drawn as SVG; for frontier.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 900, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 300, 30, 50
LINE = 18  # pixels of a line of the legend
TICKS = 5


class Point(NamedTuple):
    """One row: its place, the interval of its height, and its label."""

    x: float
    y: float
    low: float
    high: float
    label: str


def scatter(points: Sequence[Point], across: str, up: str) -> str:
    """The points as an SVG picture, numbered as in the legend beside it, the highest first.

    Args:
        across, up: what the axes show.
    """
    ends = [math.log(p.x) for p in points]
    left, right = min(ends) - 0.1, max(ends) + 0.1
    bottom, top = min(p.low for p in points), max(p.high for p in points)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log(x) - left) / (right - left)
        height = (y - bottom) / (top - bottom or 1.0)
        return (
            round(LEFT + (WIDTH - LEFT - RIGHT) * share, 1),
            round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * height, 1),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="{HEIGHT - 12}">{escape(across)} (logarithmic)</text>',
        f'<text x="8" y="{TOP - 16}">{escape(up)}</text>',
    ]
    for i in range(TICKS):
        x = math.exp(left + (right - left) * i / (TICKS - 1))
        y = bottom + (top - bottom) * i / (TICKS - 1)
        px, py = place(x, y)
        parts.append(f'<text x="{px - 20}" y="{HEIGHT - BOTTOM + 18}">{x:,.0f}</text>')
        parts.append(f'<text x="20" y="{py}">{y:.3f}</text>')
        parts.append(f'<path d="M{LEFT} {py}H{WIDTH - RIGHT}" stroke="#ddd"/>')
    for number, point in enumerate(sorted(points, key=lambda point: -point.y), start=1):
        x, y = place(point.x, point.y)
        low, high = place(point.x, point.low)[1], place(point.x, point.high)[1]
        parts.append(f'<path d="M{x} {low}V{high}" stroke="#999"/>')
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="#1f5fbf"/>')
        parts.append(f'<text x="{x + 6}" y="{y - 3}">{number}</text>')
        parts.append(
            f'<text x="{WIDTH - RIGHT + 20}" y="{TOP + LINE * number}">{number}  '
            f"{escape(point.label)}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
