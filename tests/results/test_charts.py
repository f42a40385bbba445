"""The curves on the page: places, ticks, marks, and words that are not cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wan_distill.layout import RunFolder
from wan_distill.results.axes import ticks
from wan_distill.results.charts import BOTTOM, CHARACTER, HEIGHT, LEFT, RIGHT, WIDTH, chart, charts
from wan_distill.results.progress import Segment
from wan_distill.settings.config import Config

CONFIG = Config(method="dmd", output_dir="out")

FOLDER = RunFolder(Path("out"))
CHECK = dict(monitor_score=0.1, monitor_luminance=0.0, monitor_motion=1.0, monitor_diversity=1.0)


def job(*parts: tuple[str, list[dict]], exported: int | None = None) -> list[Segment]:
    """Segments of (expert, lines), each line given without its expert."""
    found: list[Segment] = []
    for expert, lines in parts:
        start = sum(segment.updates for segment in found)
        own = [dict(expert=expert) | line for line in lines]
        found.append(Segment(CONFIG, expert, f"{expert} expert", FOLDER, own, start, exported))
    return found


def test_one_expert_is_drawn_after_the_other():
    drawn = chart(
        "loss",
        job(
            ("high", [dict(step=n, loss=2.0) for n in (50, 100)]), ("low", [dict(step=100, loss=1)])
        ),
    )
    left, right = float(LEFT), WIDTH - float(RIGHT)
    middle = (left + right) / 2
    high, low = drawn.curves
    assert [float(p.split(",")[0]) for p in high.points.split()] == [(left + middle) / 2, middle]
    assert float(low.points.split(",")[0]) == right
    assert [(band.x, band.name) for band in drawn.bands] == [
        (left, "high expert"),
        (middle, "low expert"),
    ]
    x, _, words = json.loads(drawn.hover)[-1]
    assert x == right and words == "low expert, student update 100: 1"


def test_a_constant_and_what_is_not_finite_lie_within_the_picture():
    drawn = chart("loss", job(("high", [dict(step=n, loss=v) for n, v in ((1, 3.0), (2, 3.0))])))
    (curve,) = drawn.curves
    heights = {float(point.split(",")[1]) for point in curve.points.split()}
    assert len(heights) == 1 and 0 < heights.pop() < HEIGHT - BOTTOM
    lines = [dict(step=1, loss=float("nan")), dict(step=2, loss=1.0)]
    (curve,) = chart("loss", job(("high", lines))).curves
    assert len(curve.points.split()) == 1 and len(curve.dots) == 1


@pytest.mark.parametrize("high, low", [(600, 600), (12000, 5), (1, 1)])
def test_no_word_of_a_chart_is_cut(high, low):
    drawn = chart(
        "loss",
        job(("high", [dict(step=high, loss=-1.234e-05)]), ("low", [dict(step=low, loss=1.0)])),
    )
    for band in drawn.bands:
        assert CHARACTER * len(band.name) <= band.width
    for _, text in drawn.y_ticks:
        assert CHARACTER * len(text) <= LEFT
    assert 2 <= len(drawn.x_ticks) <= 5 and 2 <= len(drawn.y_ticks) <= 5


@pytest.mark.parametrize(
    "low, high, whole, expected",
    [
        (0, 1, False, [0, 0.5, 1]),
        (0, 740, True, [0, 200, 400, 600]),
        (0, 3, True, [0, 1, 2, 3]),
        (-0.02, 0.1, False, [0, 0.05, 0.1]),
        (0.93, 1.01, False, [0.94, 0.96, 0.98, 1.0]),
    ],
)
def test_ticks_are_round_numbers(low, high, whole, expected):
    assert ticks(low, high, whole) == pytest.approx(expected)


def test_warnings_and_exported_weights_are_marked_where_they_happened():
    """A check before training stands in the first line after it, and warns of nothing."""
    frozen = CHECK | dict(monitor_motion=0.3)
    lines = [
        dict(step=10, student_updates=5, monitor_updates=0, **frozen),
        dict(step=20, student_updates=10, monitor_updates=10, **frozen),
        dict(step=30, student_updates=15, monitor_updates=15, **CHECK),
    ]
    drawn = chart("monitor_score", job(("high", lines), exported=15))
    warning, exported = drawn.marks
    assert warning.kind == "warning" and "freezes" in warning.words
    assert exported.kind == "exported" and "update 15" in exported.words
    assert warning.x < exported.x == WIDTH - RIGHT
    assert drawn.curves[0].dots[0][0] == LEFT
    (at_start,) = [
        m for m in chart("loss", job(("high", lines), exported=0)).marks if m.kind != "warning"
    ]
    assert at_start.x == LEFT


def test_what_a_reader_needs_comes_first():
    lines = [dict(step=1, student_loss=1.0, grad=2.0, seconds=1.0, monitor_updates=1, **CHECK)]
    found = charts(job(("high", lines)))
    assert [c.key for c in found.main][:2] == ["monitor_score", "student_loss"]
    assert [c.key for c in found.more] == ["grad"]
    motion = next(c for c in found.main if c.key == "monitor_motion")
    assert motion.limit > motion.target, "0.6 is below 1"
