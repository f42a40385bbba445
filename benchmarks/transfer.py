#!/usr/bin/env python
"""Do the rules for the learning rate and the batch carry over from teacher to teacher?

    python benchmarks/transfer.py TEACHER [TEACHER ...] --max_train_steps 200 --eval_samples 256

Each teacher gets the first stage of the default job several times: with the rule's learning rate
and with 1/4 to 4 times that, then with the rule's batch and with 1/2 and 2 times that, at an equal
number of samples. All runs of a teacher share its samples. A row is one student, measured as
`train_distillation.py --evaluate` does; a star marks the best of a sweep, and rows whose intervals
overlap cannot be told apart. Rows that are in RESULT_DIR are not run again; several commands with
folders of their own can run at the same time. Other flags go to train_distillation.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scatter import Point, scatter

import train_distillation
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
BATCHES = (0.5, 2.0)  # beside the rule's, whose row is that of the rule's rate


@dataclass(frozen=True)
class Trial:
    """One student: the rule's settings, with one of them changed."""

    teacher: str
    rate: float
    """times the rule's learning rate"""
    batch: float
    """times the rule's batch; the number of updates is divided by it"""
    flags: tuple[str, ...]
    values: dict[str, float]
    """the settings as numbers, for the table"""

    @property
    def name(self) -> str:
        return f"{self.teacher}-rate-{self.rate:g}-batch-{self.batch:g}"

    def is_of(self, row: dict[str, Any]) -> bool:
        return bool(row["name"] == self.name)


def rule_of(teacher: str, extra: list[str]) -> Config:
    """What the rules choose for `teacher`."""
    config = parse_args(["--teacher_path", teacher, "--method", "trajectory", *extra])
    return resolve(config, read_teacher(config))


def trials(teacher: str, extra: list[str]) -> Iterator[Trial]:
    """Both sweeps of one teacher, the rule's own row first."""
    rule = rule_of(teacher, extra)
    changes = [(rate, 1.0) for rate in sorted(RATES, key=lambda rate: rate != 1)]
    changes += [(1.0, batch) for batch in BATCHES]
    for rate, batch in changes:
        values = dict(
            learning_rate=rule.learning_rate * rate,
            train_batch_size=max(1, round(rule.train_batch_size * batch)),
            max_train_steps=max(1, round(rule.max_train_steps / batch)),
        )
        flags = tuple(f"--{name}={value}" for name, value in values.items())
        yield Trial(Path(teacher).name, rate, batch, flags, values)


def measured(trial: Trial, teacher: str, root: Path, extra: list[str]) -> dict[str, Any]:
    """Trains one student and measures it. Returns its row."""
    folder = root / trial.name
    flags = ["--teacher_path", teacher, "--method", "trajectory", *extra, *trial.flags]
    flags += ["--output_dir", str(folder), "--samples_dir", str(root / trial.teacher)]
    if train_distillation.main([*flags, "--evaluate", "--no-save_merged"]) != 0:
        raise SystemExit(f"{trial.name} did not finish")
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    (student,) = (row for row in result["rows"] if row["sampler"].startswith("student"))
    (teachers,) = (row for row in result["rows"] if row["paired_distance"] == 0)
    return dict(
        name=trial.name,
        teacher=trial.teacher,
        rate=trial.rate,
        batch=trial.batch,
        **trial.values,
        gap_closed=result["gap_closed"],
        interval=result["gap_closed_interval"],
        **{key: student[key] for key in ("excess", "motion", "diversity")},
        obeys=student["obeys"] / teachers["obeys"] if teachers.get("obeys") else math.nan,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; a star marks the best of each sweep."""
    titles = "teacher, rate / rule, batch / rule, learning rate, batch, updates, gap closed, "
    titles += "95 % interval, excess, obeys / teacher's, motion, diversity"
    lines = ["| " + " | ".join(titles.split(", ")) + " |", "|" + "---|" * 12]
    for row in rows:
        own = [other for other in rows if other["teacher"] == row["teacher"]]
        rates = [other["gap_closed"] for other in own if other["batch"] == 1]
        batches = [other["gap_closed"] for other in own if other["rate"] == 1]
        low, high = row["interval"]
        cells = [
            row["teacher"],
            f"{row['rate']:g}{' *' * (row['batch'] == 1 and row['gap_closed'] == max(rates))}",
            f"{row['batch']:g}{' *' * (row['rate'] == 1 and row['gap_closed'] == max(batches))}",
            f"{row['learning_rate']:.2e}",
            f"{row['train_batch_size']:g}",
            f"{row['max_train_steps']:g}",
            f"{row['gap_closed']:.3f}",
            f"{low:.3f} to {high:.3f}",
            *(f"{row[key]:.3f}" for key in ("excess", "obeys", "motion", "diversity")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]]) -> str:
    """Gap closed against the learning rate in units of the rule's, as SVG."""
    points = []
    for row in rows:
        low, high = row["interval"]
        if row["batch"] == 1:
            points.append(Point(row["rate"], row["gap_closed"], low, high, row["teacher"]))
    return scatter(points, "learning rate / the rule's", "gap closed")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teachers", nargs="+", help="folders of teachers")
    parser.add_argument("--result_dir", type=Path, default=Path("outputs/transfer"))
    args, extra = parser.parse_known_args()
    root: Path = args.result_dir
    root.mkdir(parents=True, exist_ok=True)
    file = root / "transfer.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    wanted = [(teacher, trial) for teacher in args.teachers for trial in trials(teacher, extra)]
    for teacher, trial in wanted:
        if any(trial.is_of(row) for row in rows):
            continue
        rows.append(measured(trial, teacher, root, extra))
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        (root / "transfer.md").write_text(table(rows), encoding="utf-8")
        (root / "transfer.svg").write_text(plot(rows), encoding="utf-8")
        print(f"\n{table(rows)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
