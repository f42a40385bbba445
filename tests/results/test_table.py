"""The table of the evaluation on the page: its yardstick, and what is better or worse than it."""

from __future__ import annotations

import pytest

from wan_distill.results.table import marked_cells, remarks

ROW = dict(evaluations=8, frechet=500.0, motion=0.9, luminance_drift=-0.02, seconds_per_sample=0.1)


def table(**student: float) -> dict:
    rows = [
        ROW | dict(sampler="teacher 40 guided", frechet=100.0, motion=1.0, luminance_drift=0.0),
        ROW | dict(sampler="teacher 4 guided"),
        ROW | dict(sampler="teacher 4 unguided", frechet=900.0),
        ROW | dict(sampler="student 4", evaluations=4) | student,
    ]
    return marked_cells(dict(rows=rows))


@pytest.mark.parametrize(
    ("name", "column", "better", "worse"),
    [
        ("frechet", "Fréchet", 499.0, 501.0),  # 0 is best
        ("motion", "motion", 1.05, 0.85),  # 1 is best, and 1.2 is worse than 0.9
        ("motion", "motion", 0.95, 1.2),
        ("luminance_drift", "luminance", 0.01, 0.03),  # 0 is best, on either side
    ],
)
def test_a_student_is_compared_with_the_yardstick_by_what_is_best(name, column, better, worse):
    for value, mark in ((better, "better"), (worse, "worse"), (ROW[name], "")):
        found = table(**{name: value})
        place = [title for title, _ in found["columns"]].index(column)
        *others, student = found["rows"]
        assert student["cells"][place][1] == mark
        assert not any(cell[1] for row in others for cell in row["cells"])


def test_what_has_no_best_value_has_no_mark_and_every_column_is_explained():
    found = table(seconds_per_sample=0.05)
    assert [row["kind"] for row in found["rows"]] == ["teacher", "yardstick", "few", "student"]
    titles = [title for title, _ in found["columns"]]
    cells = found["rows"][-1]["cells"]
    assert [cells[titles.index(title)][1] for title in ("sampler", "evals", "s/sample")] == [""] * 3
    assert all(words for title, words in found["columns"] if title != "sampler")


def test_nothing_above_one_stands_without_a_remark():
    values = dict(samples=64, samples_needed=256, components=64)
    few, above = remarks(values | dict(gap_closed=1.26))
    assert "64 samples are too few" in few and "cannot be told apart" in above
    assert remarks(values | dict(gap_closed=0.9, samples=256)) == []
