"""Charts of metrics.jsonl: the places of lines, ticks and marks, drawn as SVG by `page.html`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from wan_distill.results.axes import span, ticks
from wan_distill.results.progress import Segment
from wan_distill.training.health import COLLAPSED, FROZEN, OVEREXPOSED, OVERSATURATED

NOT_CHARTED = {"expert", "step", "seconds", "student_updates", "monitor_updates"}
# A chart in pixels, and its margins: for numbers, for the names of the phases, for updates.
WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 24, 22
CHARACTER = 6.4  # pixels of an average character of 11-pixel text


@dataclass(frozen=True)
class About:
    """What a reader is told about one quantity."""

    title: str
    words: str
    target: float | None = None
    """the teacher's own value"""
    limit: float | None = None
    """where a warning begins"""


KNOWN = {
    "monitor_score": About(
        "Distance to the teacher",
        "Energy distance of the student's clips to the teacher's at each check. 0: as close as the "
        "teacher is to itself.",
        target=0.0,
    ),
    "student_loss": About(
        "Loss of the student",
        "What training lowers. In distribution matching it says little about quality.",
    ),
    "monitor_motion": About(
        "Motion", f"1: moves as the teacher does. Below {FROZEN} it freezes.", 1.0, FROZEN
    ),
    "monitor_diversity": About(
        "Diversity",
        "How much clips of one prompt differ. 1: as the teacher's. Below "
        f"{COLLAPSED} it collapses.",
        1.0,
        COLLAPSED,
    ),
    "monitor_saturation": About(
        "Saturation",
        f"1: colours as strong as the teacher's. Above {OVERSATURATED} it over-exposes.",
        1.0,
        OVERSATURATED,
    ),
    "monitor_luminance": About(
        "Brightness",
        f"Difference to the teacher's. Above {OVEREXPOSED} it over-exposes.",
        0.0,
        OVEREXPOSED,
    ),
}


@dataclass(frozen=True)
class Curve:
    """One expert's part of a chart in one stage."""

    expert: str
    points: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Band:
    """Where one expert trains in one stage; `name` is empty where it would not fit."""

    expert: str
    name: str
    x: float
    width: float


@dataclass(frozen=True)
class Mark:
    """A vertical line at one update."""

    kind: str
    x: float
    words: str


@dataclass(frozen=True)
class Chart:
    """One quantity over the updates of the whole job."""

    key: str
    about: About
    curves: list[Curve]
    bands: list[Band]
    marks: list[Mark]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    target: float | None
    limit: float | None
    hover: str
    """JSON: [[x, y, words], ...] for each point, from left to right"""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass
class Charts:
    """Those that a reader needs, and the rest."""

    main: list[Chart] = field(default_factory=list)
    more: list[Chart] = field(default_factory=list)


def charts(segments: Sequence[Segment]) -> Charts:
    """A chart for each quantity of metrics.jsonl."""
    names = {name for segment in segments for line in segment.lines for name in line}
    found = Charts()
    for name in [*KNOWN, *sorted(names - set(KNOWN) - NOT_CHARTED)]:
        if name in names:
            (found.main if name in KNOWN else found.more).append(chart(name, segments))
    return found


def chart(name: str, segments: Sequence[Segment]) -> Chart:
    """The chart of one quantity; a segment's updates begin where the previous one's end."""
    about = KNOWN.get(name) or About(name.replace("_", " ").capitalize(), "")
    total = max(1, sum(segment.updates for segment in segments))
    values = [line[name] for s in segments for line in s.lines if name in line]
    shown = [value for value in values if math.isfinite(value)]
    lines = [edge for edge in (about.target, about.limit) if edge is not None]
    low, high = span([*shown, *lines])

    def across(updates: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * updates / total, 1)

    def down(value: float) -> float:
        share = (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share, 1)

    curves: list[Curve] = []
    hover: list[tuple[float, float, str]] = []
    for segment in segments:
        points = [
            (across(segment.start + step_of(line, name)), down(line[name]), line)
            for line in segment.lines
            if name in line and math.isfinite(line[name])
        ]
        places = [(x, y) for x, y, _ in points]
        if places:
            path = " ".join(f"{x},{y}" for x, y in places)
            dots = places if name.startswith("monitor") or len(places) == 1 else []
            curves.append(Curve(segment.expert, path, dots))
        hover += [(x, y, f"{segment.at(line)}: {line[name]:.4g}") for x, y, line in points]
    return Chart(
        name,
        about,
        curves,
        bands(segments, across),
        [Mark(kind, across(at), words) for kind, at, words in marks(segments)],
        [(across(tick), f"{tick:g}") for tick in ticks(0, total, whole=True)],
        [(down(tick), f"{tick:g}") for tick in ticks(low, high)],
        None if about.target is None else down(about.target),
        None if about.limit is None else down(about.limit),
        json.dumps(hover),
    )


def bands(segments: Sequence[Segment], across: Any) -> list[Band]:
    """A band for each segment, with the longest of its names that fits."""
    found = []
    for segment in segments:
        x, end = across(segment.start), across(segment.start + segment.updates)
        short = segment.title.replace(" expert", "")
        names = (segment.title, short, segment.expert, segment.expert[0].upper(), "")
        fitting = next(n for n in names if CHARACTER * len(n) + 6 <= end - x or not n)
        found.append(Band(segment.expert, fitting, x, round(end - x, 1)))
    return found


def marks(segments: Sequence[Segment]) -> list[tuple[str, float, str]]:
    """(kind, update of the whole job, words) of each warning and of each exported student."""
    found: list[tuple[str, float, str]] = []
    for segment in segments:
        for line in segment.lines:
            at = segment.start + step_of(line, "monitor_score")
            if problems := segment.problems(line):
                found.append(("warning", at, f"{segment.at(line)}: {' '.join(problems)}"))
            if segment.exported is not None and line.get("monitor_updates") == segment.exported:
                found.append(("exported", at, f"{segment.at(line)}: these weights are exported"))
    return found


def step_of(line: dict[str, Any], name: str) -> int:
    """The update of all roles at which a value was measured: a check before training stands in the
    first line after it.
    """
    is_first = name.startswith("monitor") and line.get("monitor_updates") == 0
    return 0 if is_first else int(line["step"])
