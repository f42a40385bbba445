#!/usr/bin/env python
"""Every method on the embedded teacher, and two naive ones, in one table.

    python benchmarks/quality.py         all recipes at 1, 2, 4 and 8 steps: hours on a CPU
    python benchmarks/quality.py --sampling_steps 4 --recipes trajectory dmd trajectory+dmd

The table shows what phases and warm starts improve. Each line is one student, trained with the
defaults. `trained` counts transformer evaluations of single samples in solving, rollouts, scores,
checks and updates, a backward as two. `seconds` are those of the whole run but the evaluation.
The first recipe that needs teacher samples solves them; their cost is part of every line that uses
them. The line of a warm start counts only what it adds to the run it begins with. The table is
RESULT_DIR/quality.md; a line that is already in it is not run again. Other flags go to
train_distillation.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from naive_methods import Alone, NaiveDMD, Plain
from sample_costs import Meter, SampleCosts

import train_distillation
from wan_distill.methods import METHODS
from wan_distill.results.table import COLUMNS
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.config import Config

# As it is often done: the guided score, no diversity loss, and no checks of the student.
NAIVE_FLAGS = (
    *("--method", "dmd", "--real_score", "guided"),
    *("--diversity_weight", "0", "--monitor_steps", "0"),
)
# What the default job's second stage has; --init_student_from alone refines both experts.
SECOND_STAGE = ("--method", "dmd", "--expert", "low", "--real_score", "paired")
SHARED = ("evaluation", "trajectories")  # folders of teacher samples that all recipes can use


@dataclass(frozen=True)
class TrainingRecipe:
    """How one line of the table is trained."""

    flags: tuple[str, ...]
    after: str | None = None
    """the recipe whose student it begins with"""
    method: type[NaiveDMD] | None = None
    """takes the place of PhasedDMD"""


RECIPES = {
    "trajectory": TrainingRecipe(("--method", "trajectory")),
    "consistency": TrainingRecipe(("--method", "consistency")),
    "dmd": TrainingRecipe(("--method", "dmd")),
    "trajectory+dmd": TrainingRecipe(SECOND_STAGE, after="trajectory"),
    "dmd, guided score": TrainingRecipe(("--method", "dmd", "--real_score", "guided")),
    "naive: alone": TrainingRecipe(NAIVE_FLAGS, method=Alone),
    "naive: plain": TrainingRecipe(NAIVE_FLAGS, method=Plain),
}
# With a single expert there is none to refine, and plain and alone are the same.
TWO_EXPERTS = ("trajectory+dmd", "naive: plain")


def share(source: Path, target: Path) -> None:
    """Copies the teacher samples of `source` to `target`, where there are any."""
    for kind in SHARED:
        if (source / kind).exists():
            shutil.copytree(source / kind, target / kind, dirs_exist_ok=True)


def run(name: str, steps: int, root: Path, extra: list[str]) -> dict[str, Any]:
    """Trains and measures one student. Returns its line of the table."""
    recipe = RECIPES[name]
    folder = root / f"{name.replace(': ', '-')}-{steps}"
    flags = [*recipe.flags, "--sampling_steps", str(steps), "--output_dir", str(folder)]
    flags += ["--no-save_merged", *extra]
    if recipe.after:
        flags += ["--init_student_from", str(root / f"{recipe.after}-{steps}")]
    share(root, folder)
    meter = Meter(SampleCosts(root / "sample_costs"))
    started = time.perf_counter()
    with meter.measuring(), patch.dict(METHODS, {"dmd": recipe.method} if recipe.method else {}):
        code = train_distillation.main([*flags, "--no-evaluate"])
    seconds = time.perf_counter() - started
    if code != 0:
        raise SystemExit(f"{name} in {steps} steps did not finish")
    if train_distillation.main([*flags, "--evaluate_only"]) != 0:
        raise SystemExit(f"{name} in {steps} steps could not be measured")
    share(folder, root)
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    (student,) = (row for row in result["rows"] if row["sampler"] == f"student {steps}")
    earlier, earlier_seconds = meter.taken_over()
    return dict(
        recipe=name,
        **student,
        gap_closed=result["gap_closed"],
        trained=round(meter.evaluations + earlier),
        seconds=round(seconds + earlier_seconds),
    )


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as Markdown."""
    columns = dict(
        recipe=("recipe", "{}"),
        steps=("steps", "{}"),
        gap_closed=("gap closed", "{:.3f}"),
        **{k: v for k, v in COLUMNS.items() if k != "sampler" and k in lines[0]},
        trained=("trained", "{:,}"),
        seconds=("seconds", "{}"),
    )
    rows = [[title for title, _ in columns.values()], ["---"] * len(columns)]
    rows += [[form.format(line[key]) for key, (_, form) in columns.items()] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--sampling_steps", default="1,2,4,8")
    parser.add_argument("--result_dir", default="outputs/quality")
    args, extra = parser.parse_known_args()
    parse_args(extra)  # refuses a misspelt flag now, not after an hour
    root = Path(args.result_dir)
    root.mkdir(parents=True, exist_ok=True)
    file = root / "quality.json"
    lines = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    done = {(line["recipe"], line["steps"]) for line in lines}
    for steps in map(int, args.sampling_steps.split(",")):
        experts = Config(sampling_steps=(steps,), boundary_ratio=0.875).experts
        for name in args.recipes:
            if (name, steps) in done or (name in TWO_EXPERTS and experts == ("high",)):
                continue
            lines.append(run(name, steps, root, extra))
            file.write_text(json.dumps(lines, indent=1), encoding="utf-8")
            (root / "quality.md").write_text(table(lines), encoding="utf-8")
            print(f"\n{table(lines)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
