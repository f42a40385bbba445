"""The evaluation's table in words."""

from __future__ import annotations

from typing import Any

BASELINE_STEPS = 4  # of the teacher's own few-step rows
COLUMNS = {
    "sampler": ("sampler", "{}"),
    "evaluations": ("evals", "{}"),
    "frechet": ("Fréchet", "{:.2f}"),
    "paired_distance": ("paired", "{:.3f}"),
    "motion": ("motion", "{:.3f}"),
    "diversity": ("diversity", "{:.3f}"),
    "luminance_drift": ("luminance", "{:+.4f}"),
    "seconds_per_sample": ("s/sample", "{:.4f}"),
}


def as_markdown(result: dict[str, Any]) -> str:
    """The table, and the one line below it."""
    cells = [[title for title, _ in COLUMNS.values()]]
    cells += [
        [form.format(row[key]) for key, (_, form) in COLUMNS.items()] for row in result["rows"]
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    closed = ", ".join(
        f"{value:.3f} in {n} steps" for n, value in result["gap_closed_by_steps"].items()
    )
    summary = (
        f"gap closed: {closed} (1 = as close to the teacher as the teacher is to itself, 0 = its "
        f"own {BASELINE_STEPS} unguided steps; floor {result['floor']:.2f}; {result['samples']} "
        "samples a side)"
    )
    return "\n".join([*lines, "", summary])
