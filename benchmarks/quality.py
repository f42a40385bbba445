#!/usr/bin/env python
"""Every method on the embedded teacher, and two naive ones, in one table: what phases and warm
starts are worth.

    python benchmarks/quality.py                                     all recipes at 1, 2, 4 and 8 steps: hours on a CPU
    python benchmarks/quality.py --sampling_steps 4 --recipes trajectory dmd trajectory+dmd

Each line is one student of its own, trained with the defaults. `trained` counts transformer
forwards of single samples (inputs, rollouts, scores and updates; a backward costs two more),
`seconds` all of the run but the evaluation. The teacher's samples are solved by the first recipe
that needs them; what they took is counted in every line that uses them, but not in that of a warm
start, which says what it adds to the run it begins with. A table in RESULT_DIR/quality.md; a line
that is already there is not run again. Other flags go to train_distillation.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_distillation
from wan_distill.data.samples import StoredSamples, distilled_high
from wan_distill.maths.randomness import generator
from wan_distill.methods import registry
from wan_distill.methods.dmd import Batch, PhasedDMD
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.student_files import load_student
from wan_distill.results.evaluation import COLUMNS
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.config import Config

# As others do it: the guided score, and nobody who looks.
NAIVE_FLAGS = [
    "--method",
    "dmd",
    "--real_score",
    "guided",
    "--diversity_weight",
    "0",
    "--monitor_steps",
    "0",
]
# name -> flags; `after` names the recipe whose student it begins with.
RECIPES = {
    "trajectory": dict(flags=["--method", "trajectory"]),
    "consistency": dict(flags=["--method", "consistency"]),
    "dmd": dict(flags=["--method", "dmd"]),
    "trajectory+dmd": dict(flags=["--method", "dmd"], after="trajectory"),
    "dmd, guided score": dict(flags=["--method", "dmd", "--real_score", "guided"]),
    "naive: alone": dict(flags=NAIVE_FLAGS),
    "naive: plain": dict(flags=NAIVE_FLAGS),
}


class Alone(PhasedDMD):
    """Naive: each expert is rolled from pure noise to x0 by itself, over sigmas it never sees at
    inference.
    """

    def __init__(self, expert, sources):
        super().__init__("high", sources)
        self.expert = expert
        self.phases = {n: self.config.sigmas(n) for n in self.config.sampling_steps}

    def loss(self, role, denoiser: Denoiser, batch: Batch, rng: torch.Generator):
        denoiser.expert_at = lambda sigma: self.expert
        return super().loss(role, denoiser, batch, rng)


class Plain(PhasedDMD):
    """Naive: one DMD of x0 for the whole sampler; the expert in training learns where the exit step
    is its own.

    The high expert learns before the low one's frozen base, the low one behind the distilled high
    one; scores are taken in the expert's own range.
    """

    def __init__(self, expert, sources):
        super().__init__(expert, sources)
        other = "low" if expert == "high" else "high"
        self.other = sources.teacher.load_expert(other)
        if expert == "low":
            load_student(self.other, distilled_high(sources.config))
        self.owned = {n: sigmas[:-1] for n, sigmas in self.phases.items()}
        self.phases = {n: self.config.sigmas(n) for n in self.phases}
        self.inputs = {}

    def batch_at(self, step: int, micro_batch: int) -> Batch:
        batch = super().batch_at(step, micro_batch)
        count = len(batch.sigmas) - 1
        rng = generator(self.config.seed, self.expert, "plain exit", step)
        sigma = self.owned[count][int(torch.randint(len(self.owned[count]), (1,), generator=rng))]
        return dataclasses.replace(batch, exit=batch.sigmas.index(sigma))

    def loss(self, role, denoiser: Denoiser, batch: Batch, rng: torch.Generator):
        denoiser.experts.setdefault("low" if self.expert == "high" else "high", self.other)
        return super().loss(role, denoiser, batch, rng)


SHARED = ("evaluation", "trajectories")  # folders of teacher samples, alike for every recipe
NAIVE = {"naive: alone": Alone, "naive: plain": Plain}


def run(recipe: str, steps: int, root: Path, extra: list[str]) -> dict:
    """Trains and measures one student; its line of the table."""
    folder = root / f"{recipe.replace(': ', '-')}-{steps}"
    flags = [
        *RECIPES[recipe]["flags"],
        "--sampling_steps",
        str(steps),
        "--output_dir",
        str(folder),
        "--no-save_merged",
        *extra,
    ]
    if "after" in RECIPES[recipe]:
        flags += ["--init_student_from", str(root / f"{RECIPES[recipe]['after']}-{steps}")]
    for kind in SHARED:
        shutil.copytree(root / kind, folder / kind, dirs_exist_ok=True) if (
            root / kind
        ).exists() else None

    counted, forward, make, solve = (
        [0],
        Denoiser._forward,
        registry.make_method,
        StoredSamples.solve,
    )
    costs, met = (
        root / "solved.json",
        set(),
    )  # folder of solved samples -> [forwards, seconds] they took
    known = json.loads(costs.read_text(encoding="utf-8")) if costs.exists() else {}
    taken_over = [0, 0.0]

    def counting(self, transformer, x, sigma, prompt):
        counted[0] += len(x)
        return forward(self, transformer, x, sigma, prompt)

    def naive(expert, sources):
        return NAIVE[recipe](expert, sources) if recipe in NAIVE else make(expert, sources)

    def solving(self, negative):
        before, started, name = counted[0], time.perf_counter(), self.folder.name
        solve(self, negative)
        if (
            counted[0] > before
        ):  # noted at once: the run may be interrupted before its line is written
            spent = [counted[0] - before, time.perf_counter() - started]
            known[name] = [a + b for a, b in zip(known.get(name, [0, 0]), spent, strict=True)]
            costs.write_text(json.dumps(known), encoding="utf-8")
        elif name not in met and folder in self.folder.parents:
            taken_over[:] = (a + b for a, b in zip(taken_over, known[name], strict=True))
        met.add(name)

    Denoiser._forward, registry.make_method, StoredSamples.solve = counting, naive, solving
    try:
        started = time.perf_counter()
        if train_distillation.main([*flags, "--no-evaluate"]) != 0:
            raise SystemExit(f"{recipe} in {steps} steps did not finish")
        trained, seconds = counted[0] + taken_over[0], time.perf_counter() - started + taken_over[1]
        if train_distillation.main([*flags, "--evaluate_only"]) != 0:
            raise SystemExit(f"{recipe} in {steps} steps could not be measured")
    finally:
        Denoiser._forward, registry.make_method, StoredSamples.solve = forward, make, solve
    for kind in SHARED:
        shutil.copytree(folder / kind, root / kind, dirs_exist_ok=True) if (
            folder / kind
        ).exists() else None
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    (student,) = [row for row in result["rows"] if row["sampler"] == f"student {steps}"]
    return dict(
        recipe=recipe,
        **student,
        gap_closed=result["gap_closed"],
        trained=trained,
        seconds=round(seconds),
    )


def table(lines: list[dict]) -> str:
    """The lines as markdown."""
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
    ours, extra = parser.parse_known_args()
    parse_args(extra)  # a typo is told now, not after an hour
    root = Path(ours.result_dir)
    root.mkdir(parents=True, exist_ok=True)
    file = root / "quality.json"
    lines = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for steps in map(int, ours.sampling_steps.split(",")):
        for recipe in ours.recipes:
            if recipe == "naive: plain" and Config(
                sampling_steps=(steps,), boundary_ratio=0.875
            ).experts == ("high",):
                continue  # a single step has a single expert
            if any((line["recipe"], line["steps"]) == (recipe, steps) for line in lines):
                continue
            lines.append(run(recipe, steps, root, extra))
            file.write_text(json.dumps(lines, indent=1), encoding="utf-8")
            (root / "quality.md").write_text(table(lines), encoding="utf-8")
            print(f"\n{table(lines)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
