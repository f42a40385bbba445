#!/usr/bin/env python
"""How exactly do solvers integrate the guided teacher? Error against evaluations, as a table.

    python benchmarks/solvers.py                       the embedded teacher, minutes on a CPU
    python benchmarks/solvers.py --teacher_path DIR    another

The error is the mean root mean square difference of clean latents to those of `REFERENCE` steps of
Adams-Bashforth, from the same noise and prompts. Other flags go to train_distillation.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_distillation import encode_prompts
from wan_distill.data import Run, split_prompts
from wan_distill.data.rollout import carry
from wan_distill.maths.randomness import keyed_noise
from wan_distill.maths.sigmas import expert_sigmas, insert_sigmas, sigma_grid
from wan_distill.model import Teacher
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve
from wan_distill.system.runtime import Runtime

REFERENCE = 320
USUAL = ("euler", 12.0, 40)  # Wan's own
TRIED = [
    *(("euler", 12.0, steps) for steps in (20, 30, 40, 80)),
    *(("euler", 5.0, steps) for steps in (20, 40)),
    *(("ab2", 5.0, steps) for steps in (12, 16, 20, 30, 40)),
]


def solve(run: Run, noise: Tensor, solver: str, sigmas: tuple[float, ...]) -> Tensor:
    """Clean latents [N, C, F, H, W] of the guided teacher."""
    latents = noise.clone()
    prompts = [run.prompts[i % len(run.prompts)] for i in range(len(noise))]
    for expert in run.info.experts:
        owned = expert_sigmas(sigmas, expert, run.config.boundary_ratio)
        denoiser = run.denoiser(expert, run.teacher.load_expert(expert))
        carried = carry(
            run,
            denoiser,
            expert,
            latents.clone(),
            prompts,
            owned,
            role="teacher",
            guided=True,
            solver=solver,
        )
        for batch, reached in carried:
            latents[batch] = reached[owned[-1]]
    return latents


def open_run(output_dir: str, flags: list[str]) -> Run:
    """A run of the held-out prompts of the teacher that `flags` name, encoded.

    Args:
        output_dir: where `flags` give none.
    """
    config = parse_args(["--output_dir", output_dir, *flags])
    info = read_teacher(config)
    config = resolve(config, info)
    runtime = Runtime(config)
    teacher = Teacher(info, config, runtime)
    _, prompts = split_prompts(config, info)
    embeddings, _ = encode_prompts(config, teacher, [*prompts, config.negative_prompt], runtime)
    return Run(config, teacher, embeddings, tuple(prompts), runtime)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=64)
    args, extra = parser.parse_known_args()
    run = open_run("outputs/solvers", extra)
    config = run.config
    shape = run.latent_shape
    noise = torch.stack([keyed_noise(shape, "solvers", i) for i in range(args.clips)])
    exact = solve(run, noise, "ab2", sigma_grid(REFERENCE, config.flow_shift))
    print("| solver | shift | steps | error | of 40 Euler steps |", "| --- " * 5 + "|", sep="\n")
    usual = _errors(run, noise, exact, *USUAL)
    for solver, shift, steps in TRIED:
        errors = _errors(run, noise, exact, solver, shift, steps)
        ratio = errors.mean() / usual.mean()
        # Of the mean of differences between errors of the same clips.
        uncertain = (errors - ratio * usual).std() / len(errors) ** 0.5 / usual.mean()
        row = f"| {solver} | {shift:g} | {steps} | {errors.mean():.3f} |"
        print(f"{row} {ratio:.2f} ± {uncertain:.2f} |", flush=True)
    return 0


def _errors(
    run: Run, noise: Tensor, exact: Tensor, solver: str, shift: float, steps: int
) -> Tensor:
    """Root mean square of each clip's error [N]."""
    sigmas = insert_sigmas(run.config.sigmas(), sigma_grid(steps, shift))
    return (solve(run, noise, solver, sigmas) - exact).square().flatten(1).mean(1).sqrt()


if __name__ == "__main__":
    sys.exit(main())
