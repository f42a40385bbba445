"""The page's first screen: how good, how fast, what it cost, is it healthy; in one sentence too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wan_distill.planning.wording import duration
from wan_distill.results.progress import Segment, values_of_check
from wan_distill.results.samplers import samplers
from wan_distill.settings.config import BASELINE_STEPS, Config
from wan_distill.system.console import about
from wan_distill.system.spent import device_seconds
from wan_distill.training.health import warnings


@dataclass(frozen=True)
class Tile:
    """One number with its meaning; `mark` is "good", "bad" or "plain"."""

    title: str
    value: str
    words: str
    mark: str = "plain"


Evaluation = dict[str, Any] | None


def tiles(
    config: Config, segments: Sequence[Segment], evaluation: Evaluation, spent: dict[str, Any]
) -> list[Tile]:
    """The four tiles."""
    return [
        quality(segments, evaluation),
        speed(config, evaluation),
        cost(config, spent),
        health(config, segments, evaluation),
    ]


# ---------------------------------------------------------------------------------------- how good


def quality(segments: Sequence[Segment], evaluation: Evaluation) -> Tile:
    """How near the student comes to its teacher."""
    if evaluation is None:
        return _distance_so_far(segments)
    pairs = evaluation["kind"] == "pairs"
    value = evaluation["nearer" if pairs else "gap_closed"]
    ends = evaluation.get("nearer_interval" if pairs else "gap_closed_interval")
    what = "of the gap to its teacher is closed"
    if pairs:
        what = f"nearer to its teacher than the teacher's {BASELINE_STEPS} guided steps"
    words = f"{what}."
    if ends:
        low, high = map(_percent, ends)
        words = f"{what} (95 % interval: {low} to {high})."
    needed = evaluation.get("samples_needed", 0)
    if evaluation["samples"] < needed:
        words += f" Too few samples to be sure: {evaluation['samples']} of {needed}."
        return Tile("Quality", _percent(value), words)
    if not pairs and value > 1:
        words += " Above 100 %: it cannot be told from its teacher."
    return Tile("Quality", _percent(value), words, "good" if beats_yardstick(evaluation) else "bad")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _distance_so_far(segments: Sequence[Segment]) -> Tile:
    checks = [line for s in segments[-1:] for line in s.lines if "monitor_score" in line]
    if not checks:
        return Tile("Quality", "not yet", "Measured at the end, against its teacher.")
    now, first = checks[-1]["monitor_score"], checks[0]["monitor_score"]
    words = f"distance to the teacher at the last check; it began at {first:.2g}, 0 is the goal."
    return Tile("Quality so far", f"{now:.2g}", words)


def rows_by_kind(evaluation: dict[str, Any]) -> tuple[dict, dict, dict]:
    """(the teacher's row, its own few guided steps, the finest student's)."""
    rows = evaluation["rows"]
    return rows[0], rows[1], rows[-1]


def beats_yardstick(evaluation: dict[str, Any]) -> bool:
    """Whether the student is nearer to its teacher than the teacher's own few guided steps."""
    _, few, student = rows_by_kind(evaluation)
    measure = "frechet" if "frechet" in few else "paired_distance"
    return bool(student[measure] < few[measure])


# ---------------------------------------------------------------------------------------- how fast


def speed(config: Config, evaluation: Evaluation) -> Tile:
    """Evaluations and, where they were measured, seconds."""
    rows = samplers(config)
    teacher, student = (row.evaluations(config) for row in (rows.paired, rows.students[-1]))
    words = f"fewer evaluations: {student} instead of {teacher} for a clip."
    if evaluation is not None:
        long, _, own = (row["seconds_per_sample"] for row in rows_by_kind(evaluation))
        words += (
            f" Measured, adapters merged: {long / own:.1f} × as fast, {own:.2g} s instead of "
            f"{long:.2g} s."
        )
    return Tile("Speed", f"{teacher / student:.3g} ×", words)


# ------------------------------------------------------------------------------------ what it cost


def cost(config: Config, spent: dict[str, Any]) -> Tile:
    """GPU-hours and dollars so far."""
    seconds = sum(spent.get("seconds", {}).values())
    if not spent:
        return Tile("Cost", "unknown", "This run did not write down what it took.")
    count, device = spent["processes"], spent["device"]
    so_far = "" if spent["finished"] else " so far"
    if not spent["gpu"]:
        return Tile(
            f"Cost{so_far}",
            f"{seconds / 60:.0f} minutes" if 600 < seconds < 3600 else duration(seconds),
            f"on {count} × {device}: no GPU-hours, no dollars.",
        )
    hours, price = device_seconds(spent) / 3600, config.gpu_hour_price
    words = f"${hours * price:,.2f} at ${price:g} an hour, on {count} × {device}."
    return Tile(f"Cost{so_far}", f"{hours:.3g} GPU-hours", words)


# --------------------------------------------------------------------------------- is it healthy


def health(config: Config, segments: Sequence[Segment], evaluation: Evaluation) -> Tile:
    """Of the exported student: by the evaluation, or else by the check of those weights; of one
    that still learns: by its last check.
    """
    title = "Health"
    unmoved = [s for s in segments if s.exported == 0]
    kept = [s.title for s in unmoved if s.config.is_second_stage]
    if stuck := [s.title for s in unmoved if not s.config.is_second_stage]:
        words = f"Training brought it no nearer to the teacher than it began: {'; '.join(stuck)}."
        return Tile(title, "No progress", words, "bad")
    if evaluation is not None:
        values, where = _values_of(rows_by_kind(evaluation)[2]), "exported student"
        problems = warnings(values, config)
    else:
        segment, line = _last_check(segments)
        if segment is None:
            return Tile(title, "Not checked", "The student has not been checked yet.")
        values, where = values_of_check(line), segment.at(line)
        problems = segment.problems(line)
        if segment.exported is not None and line.get("monitor_updates") == segment.exported:
            where += ", exported"
    if problems:
        words = f"{where.capitalize()}: {' '.join(problems)}"
        return Tile(title, "Warning", words, "bad")
    measures = [f"{name} {values[name]:.2f}" for name in ("motion", "diversity") if name in values]
    words = f"{', '.join(measures)} (1 = the teacher's), brightness {values['luminance']:+.3f}."
    if kept:
        words += f" The first stage's student is exported, brought no nearer by: {'; '.join(kept)}."
    return Tile(title, "Healthy", f"{where.capitalize()}: {words}", "good")


def _values_of(row: dict[str, Any]) -> dict[str, float]:
    """A row of the evaluation in the words of a check."""
    names = ("motion", "diversity", "saturation", "departure", "first_frame")
    known = {name: row[name] for name in names if name in row}
    return known | dict(luminance=row["luminance_drift"])


def _last_check(segments: Sequence[Segment]) -> tuple[Segment | None, dict[str, Any]]:
    """The check of the exported weights of the last expert that has one, or else its last check;
    None where there is none.
    """
    for segment in reversed(segments):
        checks = [line for line in segment.lines if "monitor_luminance" in line]
        exported = [line for line in checks if line.get("monitor_updates") == segment.exported]
        if segment.exported is not None and exported:
            return segment, exported[-1]
        if checks:
            return segment, checks[-1]
    return None, {}


# ------------------------------------------------------------------------------------ one sentence


def sentence(
    config: Config, segments: Sequence[Segment], evaluation: Evaluation, spent: dict[str, Any]
) -> str:
    """What this is, in plain words."""
    rows = samplers(config)
    teacher, few, student = (
        row.evaluations(config) for row in (rows.paired, rows.few_guided, rows.students[-1])
    )
    what = f"It makes a clip with {student} evaluations where its teacher needs {teacher}"
    if evaluation is None:
        return f"{_doing(segments, spent)} {what.replace('makes', 'will make')}."
    nearer = "nearer to" if beats_yardstick(evaluation) else "farther from"
    return (
        f"{what}, and its clips are {nearer} the teacher's than what the teacher itself makes with "
        f"{few}."
    )


def _doing(segments: Sequence[Segment], spent: dict[str, Any]) -> str:
    """What the run does now."""
    if spent.get("finished"):
        return "The student is trained and was not measured."
    if not segments:
        return f"The run is at work: {spent.get('now') or 'starting'}{_left(spent)}."
    last = segments[-1]
    planned = last.config.max_train_steps
    doing = f"{last.title}, {last.student_updates} of {planned} updates of the student"
    if spent.get("now") is None:
        return f"The run was stopped: {doing}. Run the same command to go on."
    return f"In training: {doing}{_left(spent)}."


def _left(spent: dict[str, Any]) -> str:
    """How long the whole job still takes, where that is known."""
    return "" if spent.get("left") is None else f"; {about(spent['left'])} left in all"
