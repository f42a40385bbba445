"""The evaluation's table in words."""

from __future__ import annotations

from typing import Any

from wan_distill.settings.config import BASELINE_STEPS

COLUMNS = {
    "sampler": ("sampler", "{}"),
    "evaluations": ("evals", "{}"),
    "frechet": ("Fréchet", "{:.2f}"),
    "excess": ("excess", "{:.3f}"),
    "obeys": ("obeys", "{:.3f}"),
    "steadiness": ("steady", "{:.3f}"),
    "paired_distance": ("paired", "{:.3f}"),
    "motion": ("motion", "{:.3f}"),
    "optical_flow": ("flow", "{:.3f}"),
    "first_frame": ("first frame", "{:.3f}"),
    "departure": ("departure", "{:.3f}"),
    "saturation": ("saturation", "{:.3f}"),
    "sharpness": ("sharpness", "{:.3f}"),
    "diversity": ("diversity", "{:.3f}"),
    "luminance_drift": ("luminance", "{:+.4f}"),
    "seconds_per_sample": ("s/sample", "{:.4f}"),
}


def cells(result: dict[str, Any]) -> list[list[str]]:
    """The titles, then one row per sampler, of the columns that this evaluation has."""
    present = {key: column for key, column in COLUMNS.items() if key in result["rows"][0]}
    rows = [[form.format(row[key]) for key, (_, form) in present.items()] for row in result["rows"]]
    return [[title for title, _ in present.values()], *rows]


def summary(result: dict[str, Any]) -> str:
    """The one line below the table."""
    if "sentence" in result:
        return f"{result['sentence']} {result['samples']} clips of {result['prompts']} prompts."
    closed = ", ".join(
        f"{value:.3f} in {n} steps" for n, value in result["gap_closed_by_steps"].items()
    )
    if "gap_closed_interval" in result:  # not in files of earlier versions
        low, high = result["gap_closed_interval"]
        closed += f", 95 % interval {low:.3f} to {high:.3f}"
    return (
        f"gap closed: {closed} (1 = as close to the teacher as the teacher is to itself, 0 = its "
        f"own {BASELINE_STEPS} unguided steps; floor {result['floor']:.2f}; {result['samples']} "
        "samples a side)"
    )


def as_markdown(result: dict[str, Any]) -> str:
    """The table and its summary."""
    rows = cells(result)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join([*lines, "", summary(result)])
