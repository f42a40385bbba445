#!/usr/bin/env python
"""Quality against transformer evaluations: what each part of the default job is worth.

    python benchmarks/frontier.py                      every recipe, the embedded teacher: hours
    python benchmarks/frontier.py --rows trajectory short --seeds 0 1
    python benchmarks/frontier.py --teacher_path DIR   another teacher, in another --result_dir

An evaluation is one forward of a transformer for one sample; a backward counts two, and what it
computes again counts again, as hooks on the transformers' blocks see it. `solving` is what all
solved samples took that a recipe reads, whichever recipe solved them. `checks` only look at the
student and are no part of `total`. All recipes of a seed share one folder of solved samples, and
refinements one first stage. A row that is in RESULT_DIR is not run again, so several commands may
make rows of one folder at the same time. Other flags go to train_distillation.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from imitation import Imitation, ImitationRecipe
from naive_methods import NaiveDMD, Plain
from sample_costs import Meter, SampleCosts
from scatter import Point, scatter

import train_distillation
from wan_distill.methods import METHODS
from wan_distill.settings import recipes
from wan_distill.settings.command_line import parse_args

FIRST = "trajectory"
PUBLISHED = ("--method", "dmd", "--real_score", "guided")
MIDDLE = ("--method", "trajectory", "--max_train_steps", "300", "--train_batch_size", "8")
# The counts of large teachers.
SHORT = (
    *("--method", "trajectory", "--max_train_steps", "130"),
    *("--num_trajectories", "256", "--train_batch_size", "8"),
)
# What the second stage of one job has by default, and --init_student_from alone has not.
PAIRED = ("--real_score", "paired")


@dataclass(frozen=True)
class Recipe:
    """How one student is trained."""

    flags: tuple[str, ...]
    after: str | None = None
    """the recipe whose student it begins with"""
    method: type[NaiveDMD] | None = None
    """takes the place of PhasedDMD"""


def refined(*flags: str, after: str = FIRST, expert: str = "low") -> Recipe:
    """The default's refinement, of the low expert unless another is named."""
    return Recipe(("--method", "dmd", "--expert", expert, *PAIRED, *flags), after)


def with_samples(count: int, *flags: str) -> Recipe:
    """A first stage of 300 updates of 8 clips, on so many samples."""
    return Recipe((*MIDDLE, "--num_trajectories", str(count), *flags))


def imitating(updates: int, *flags: str, after: str | None = None) -> Recipe:
    """On-policy imitation, each update of 8 samples at each of the expert's two steps."""
    counts = ("--max_train_steps", str(updates), "--train_batch_size", "8")
    return Recipe(("--method", "imitation", *counts, *flags), after)


RECIPES = {
    FIRST: Recipe(("--method", "trajectory")),
    "trajectory + low (the default)": refined(),
    "trajectory + low, samples": refined("--real_score", "samples"),
    "trajectory + low, guided": refined("--real_score", "guided"),
    "trajectory + low, from student": refined("--critic_from_student"),
    "trajectory + low, critic 2 to 1": refined("--critic_updates", "2"),
    "trajectory + low, critic 5 to 1": refined("--critic_updates", "5"),
    "trajectory + low, 90 updates": refined("--max_train_steps", "90"),
    "trajectory + both": refined(expert="both"),
    # As many evaluations as the refinement.
    "trajectory + low, imitation": imitating(
        *(76, "--expert", "low", "--learning_rate", "5e-4"), after=FIRST
    ),
    "trajectory, 40 Euler steps": Recipe(("--method", "trajectory", "--teacher_solver", "euler")),
    "short": Recipe(SHORT),
    "short, 128 samples": Recipe((*SHORT, "--num_trajectories", "128")),
    "short + low": refined("--num_trajectories", "256", after="short"),
    "300 updates, 32 samples": with_samples(32),
    "300 updates, 64 samples": with_samples(64),
    "300 updates, 128 samples": with_samples(128),
    "300 updates, 256 samples": with_samples(256),
    "300 updates, 512 samples": with_samples(512),
    "300 updates, 1024 samples": with_samples(1024),
    "300 updates, 2048 samples": with_samples(2048),
    "300 updates of 16 clips, 256 samples": with_samples(256, "--train_batch_size", "16"),
    # As many evaluations as both stages.
    "imitation": imitating(260),
    "Phased DMD, guided": Recipe((*PUBLISHED, "--critic_updates", "5")),
    "DMD2, guided": Recipe(
        (*PUBLISHED, "--critic_updates", "5", "--diversity_weight", "0"), method=Plain
    ),
}
COLUMNS = {
    "name": ("recipe", "{}"),
    "seed": ("seed", "{}"),
    "gap_closed": ("gap closed", "{:.3f}"),
    "interval": ("95 % interval", "{0[0]:.3f} to {0[1]:.3f}"),
    "excess": ("excess", "{:.2f}"),
    "obeys": ("obeys / teacher's", "{:.3f}"),
    "motion": ("motion", "{:.3f}"),
    "diversity": ("diversity", "{:.3f}"),
    "solving": ("solving", "{:,.0f}"),
    "training": ("training", "{:,.0f}"),
    "total": ("total", "{:,.0f}"),
    "checks": ("checks", "{:,.0f}"),
    "seconds": ("seconds", "{:.0f}"),
}


class Frontier:
    """The rows of one folder: makes those that are missing."""

    def __init__(self, root: Path, extra: list[str]):
        self.root = root
        self.extra = extra

    def folder(self, name: str, seed: int) -> Path:
        words = re.sub("[^a-z0-9]+", "-", name.lower())
        return self.root / f"{words}-{seed}"

    def row(self, name: str, seed: int) -> dict[str, Any]:
        """The numbers of one recipe; trains and measures its student where they are not there."""
        folder = self.folder(name, seed)
        file = folder / "frontier.json"
        if file.exists():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
        recipe = RECIPES[name]
        flags = [*recipe.flags, "--output_dir", str(folder), "--seed", str(seed)]
        flags += ["--samples_dir", str(self.root / f"samples-{seed}"), "--no-save_merged"]
        before: dict[str, Any] = dict(training=0, checks=0, seconds=0, used={})
        if recipe.after:
            before = self.row(recipe.after, seed)
            flags += ["--init_student_from", str(self.folder(recipe.after, seed))]
        costs = SampleCosts(self.root / f"samples-{seed}" / "costs")
        meter = Meter(costs)
        started = time.perf_counter()
        replaced = {"dmd": recipe.method} if recipe.method else {}
        with (
            patch.dict(METHODS, {"imitation": Imitation} | replaced),
            patch.dict(recipes.RECIPES, {"imitation": ImitationRecipe()}),
        ):
            with meter.measuring():
                code = train_distillation.main([*flags, *self.extra, "--no-evaluate"])
            seconds = time.perf_counter() - started
            if code or train_distillation.main([*flags, *self.extra, "--evaluate_only"]):
                raise SystemExit(f"{name}: did not finish; run again to go on")
        used = {key: sorted(rows) for key, rows in meter.used().items()}
        both = [before["used"], used]
        rows = {key: set().union(*(u.get(key, []) for u in both)) for key in {*both[0], *both[1]}}
        solving = sum(costs.of(key, len(found))[0] for key, found in rows.items() if found)
        training = meter.evaluations - meter.solving - meter.checking + before["training"]
        line = dict(
            name=name,
            seed=seed,
            **self._quality(folder),
            solving=solving,
            training=training,
            total=solving + training,
            checks=meter.checking + before["checks"],
            seconds=seconds + before["seconds"],
            used={key: sorted(found) for key, found in rows.items()},
        )
        file.write_text(json.dumps(line), encoding="utf-8")
        return line

    def _quality(self, folder: Path) -> dict[str, Any]:
        result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        student = next(r for r in result["rows"] if r["sampler"].startswith("student"))
        teacher = next(r for r in result["rows"] if r["paired_distance"] == 0)
        obeys = student["obeys"] / teacher["obeys"] if teacher.get("obeys") else None
        return dict(
            gap_closed=result["gap_closed"],
            interval=result["gap_closed_interval"],
            excess=student["excess"],
            obeys=obeys,
            motion=student["motion"],
            diversity=student["diversity"],
        )

    def write(self, lines: list[dict[str, Any]]) -> str:
        """Writes table and plot. Returns the table."""
        text = table(lines)
        (self.root / "frontier.md").write_text(text, encoding="utf-8")
        points = []
        for line in lines:
            low, high = line["interval"]
            label = f"{line['name']}, seed {line['seed']}"
            points.append(Point(line["total"], line["gap_closed"], low, high, label))
        picture = scatter(points, "transformer evaluations", "gap closed")
        (self.root / "frontier.svg").write_text(picture, encoding="utf-8")
        return text


def table(lines: list[dict[str, Any]]) -> str:
    """The rows as Markdown, the best first."""
    present = {key: column for key, column in COLUMNS.items() if lines[0][key] is not None}
    rows = [[title for title, _ in present.values()], ["---"] * len(present)]
    for line in sorted(lines, key=lambda line: -line["gap_closed"]):
        rows.append([form.format(line[key]) for key, (_, form) in present.items()])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--result_dir", default="outputs/frontier")
    args, extra = parser.parse_known_args()
    parse_args(extra)  # refuses a misspelt flag now, not after an hour
    frontier = Frontier(Path(args.result_dir), extra)
    for seed in args.seeds:
        for name in args.rows:
            frontier.row(name, seed)
            done = [
                frontier.row(each, number)
                for number in args.seeds
                for each in RECIPES
                if (frontier.folder(each, number) / "frontier.json").exists()
            ]
            print(f"\n{frontier.write(done)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
