"""Charts of metrics.jsonl: the places of lines and labels, drawn as SVG by `page.html`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NOT_CHARTED = {"expert", "step", "seconds"}
# A chart in pixels, and its margins for numbers.
WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 44, 6, 8, 18
EXPERT_LABEL = 28  # pixels that the word "high" needs


@dataclass(frozen=True)
class Curve:
    """One expert's part of a chart; `start` and `label` are pixels from the left."""

    expert: str
    points: str
    start: float
    label: float


@dataclass(frozen=True)
class Chart:
    """One quantity over the updates of all experts, one expert after the other."""

    name: str
    curves: list[Curve]
    smallest: str
    largest: str
    updates: int
    width: int = WIDTH
    height: int = HEIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def charts(lines: list[dict[str, Any]]) -> list[Chart]:
    """A chart for each quantity of metrics.jsonl: losses first, then what the monitor measured."""
    names = sorted(
        {name for line in lines for name in line} - NOT_CHARTED,
        key=lambda name: (not name.endswith("_loss"), not name.startswith("monitor"), name),
    )
    return [chart(name, lines) for name in names]


def chart(name: str, lines: list[dict[str, Any]]) -> Chart:
    """The chart of one quantity; an expert's updates begin where the previous expert's end."""
    starts: dict[str, int] = {}
    total = 0
    for expert in dict.fromkeys(line["expert"] for line in lines):
        starts[expert] = total
        total += max(line["step"] for line in lines if line["expert"] == expert)
    values = [line[name] for line in lines if name in line]
    smallest, largest = min(values), max(values)

    def across(updates: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * updates / total, 1)

    def down(value: float) -> float:
        share = (value - smallest) / (largest - smallest or 1.0)
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share, 1)

    curves = [
        Curve(
            expert,
            points=" ".join(
                f"{across(start + line['step'])},{down(line[name])}"
                for line in lines
                if line["expert"] == expert and name in line
            ),
            start=across(start),
            label=min(across(start) + 3, WIDTH - EXPERT_LABEL),
        )
        for expert, start in starts.items()
    ]
    label = name.replace("_", " ")
    return Chart(label, curves, f"{smallest:.3g}", f"{largest:.3g}", total)
