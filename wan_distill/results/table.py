"""The evaluation's table in words."""

from __future__ import annotations

import math
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
# What the teacher's own samples have; other columns have no better and no worse.
BEST = dict(frechet=0.0, paired_distance=0.0, luminance_drift=0.0)
BEST |= dict.fromkeys(
    ("excess", "obeys", "steadiness", "motion", "optical_flow", "first_frame"), 1.0
)
BEST |= dict.fromkeys(("departure", "saturation", "sharpness", "diversity"), 1.0)
WORDS = dict(
    evaluations="evaluations of the transformer for one clip",
    frechet="distance to a second set of the teacher's clips; lower is nearer",
    excess="that distance over the teacher's own",
    obeys="share of clips that show what their prompt says",
    steadiness="how steady the moving shape is",
    paired_distance="distance to the teacher's clip from the same noise",
    motion="1 = the teacher's",
    first_frame="distance of the first frame to its picture; 1 = the teacher's",
    departure="how far clips leave the picture; 1 = the teacher's",
    optical_flow="how far what is shown moves; 1 = the teacher's",
    saturation="1 = the teacher's",
    sharpness="1 = the teacher's",
    diversity="how much clips of one prompt differ; 1 = the teacher's",
    luminance_drift="brightness minus the teacher's",
    seconds_per_sample="timed side by side, warm, adapters merged; decoding aside",
)


def cells(result: dict[str, Any]) -> list[list[str]]:
    """The titles, then one row per sampler, of the columns that this evaluation has."""
    present = {key: column for key, column in COLUMNS.items() if key in result["rows"][0]}
    rows = [[form.format(row[key]) for key, (_, form) in present.items()] for row in result["rows"]]
    return [[title for title, _ in present.values()], *rows]


def marked_cells(result: dict[str, Any]) -> dict[str, Any]:
    """The same for the page: `columns`, (title, words) each; `rows`, of `kind` "teacher",
    "yardstick", "few" or "student", with `cells`: (text, mark) each. A student's mark is "better"
    or "worse" than the yardstick, the teacher in few guided steps; otherwise it is empty.
    """
    keys = [key for key in COLUMNS if key in result["rows"][0]]
    titles, *texts = cells(result)
    rows = []
    for number, (row, text) in enumerate(zip(result["rows"], texts, strict=True)):
        is_student = row["sampler"].startswith("student")
        marks = [_mark(key, row, result["rows"][1]) if is_student else "" for key in keys]
        kind = "student" if is_student else ("teacher", "yardstick", "few")[number]
        rows.append(dict(kind=kind, cells=list(zip(text, marks, strict=True))))
    words = [WORDS.get(key, "") for key in keys]
    return dict(columns=list(zip(titles, words, strict=True)), rows=rows)


def _mark(key: str, row: dict[str, Any], yardstick: dict[str, Any]) -> str:
    """ "better" or "worse" where a row's value is nearer to the teacher's or farther from it."""
    if key not in BEST:
        return ""
    own, other = (abs(each[key] - BEST[key]) for each in (row, yardstick))
    return "better" if own < other else "worse" if own > other else ""


def summary(result: dict[str, Any]) -> str:
    """The one line below the table."""
    if "sentence" in result:
        return f"{result['sentence']} {result['samples']} clips of {result['prompts']} prompts."
    closed = ", ".join(
        f"{value:.3f} in {n} steps" for n, value in result["gap_closed_by_steps"].items()
    )
    if "gap_closed_interval" in result:  # not of two samples, nor in files of earlier versions
        low, high = result["gap_closed_interval"]
        closed += f", 95 % interval {low:.3f} to {high:.3f}"
    return (
        f"Gap closed: {closed}. 1: as good as a second set of the teacher's clips. 0: no better "
        f"than the teacher in {BASELINE_STEPS} steps without guidance. ({result['samples']} "
        f"samples per side, floor {result['floor']:.2f}.)"
    )


def remarks(result: dict[str, Any]) -> list[str]:
    """What a reader of the numbers must know, in sentences."""
    found = [
        f"Half a student: the {expert} expert is the teacher's, without guidance."
        for expert in result.get("lacking", ())
    ]
    samples, needed = result["samples"], result.get("samples_needed", 0)
    if samples < needed:
        found.append(
            f"{samples} samples are too few for {result['components']} components: these distances "
            f"are mostly noise. Give --eval_samples {needed} or more."
        )
    if result.get("gap_closed", 0.0) > 1:
        found.append(
            "A gap closed above 1 does not mean better than the teacher: on these samples student "
            "and teacher cannot be told apart."
        )
    return found


def as_markdown(result: dict[str, Any]) -> str:
    """The table, its summary, and what must be remarked."""
    rows = cells(result)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join([*lines, "", " ".join([summary(result), *remarks(result)])])


def sentence(table: list[dict[str, Any]], steps: int) -> str:
    """The comparison in words."""
    by_name = {line["sampler"]: line for line in table}
    student, few = by_name[f"student {steps}"], table[1]
    nearer = "nearer to" if student["paired_distance"] < few["paired_distance"] else "farther from"
    moves = "" if math.isnan(student["motion"]) else f"move {student['motion']:.2f} times as much, "
    return (
        f"In {steps} steps without guidance the student's clips {moves}are "
        f"{student['sharpness']:.2f} times as sharp and {student['diversity']:.2f} times as "
        f"diverse as its teacher's, and are {nearer} them (distance "
        f"{student['paired_distance']:.3f}) than the teacher's own {few['steps']} guided steps are "
        f"({few['paired_distance']:.3f})."
    )
