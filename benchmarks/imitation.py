#!/usr/bin/env python
"""On-policy imitation, a method of the benchmarks alone: the teacher goes on from where the student
is. A row of frontier.py.

    python benchmarks/imitation.py           how exactly a few guided evaluations make one step

No critic and no stored teacher samples. The student samples; at each latents that it reaches, the
guided teacher is integrated from there to the student's next sigma, and the student learns the
mean velocity on the way (dataset aggregation, arXiv 1011.0686, for a sampler). Where the high
expert's last step crosses the boundary, the teacher's low expert goes on, as in its own sampling:
both are in memory then.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from solvers import open_run
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from wan_distill.data import Run
from wan_distill.data.samples import Inputs
from wan_distill.maths import flow
from wan_distill.maths.flow import Velocity, sigma_batch
from wan_distill.maths.randomness import keyed_noise
from wan_distill.maths.sigmas import Expert
from wan_distill.methods.base import Loss
from wan_distill.methods.phases import DMDBatch, PhasedMethod
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.config import Config
from wan_distill.settings.defaults import TRAJECTORY, Default
from wan_distill.settings.recipes import Recipe, Role, UpdateCost
from wan_distill.settings.sample_specs import SampleSpec, handovers

# Runge-Kutta methods of Ralston (1962): where each later stage lies, as shares of the step, and
# the weights of all. Each stage follows the velocity of the one before; none is at the step's end.
RALSTON = {
    2: ((2 / 3,), (1 / 4, 3 / 4)),
    3: ((1 / 2, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
}
# (stages, such steps) from one student sigma to the next; the low expert's are longer.
ASKED: dict[Expert, tuple[int, int]] = {"high": (3, 1), "low": (2, 2)}
EXACT = (3, 16)
TRIED = ((2, 1), (3, 1), (2, 2), (3, 2))


def integrate(
    velocity: Velocity, x: Tensor, sigma: float, end: float, stages: int, count: int
) -> Tensor:
    """The latents at `end`, from `x` [B, C, F, H, W] at `sigma`, by `count` steps of `stages`
    evaluations each.
    """
    levels = [sigma + (end - sigma) * i / count for i in range(count + 1)]
    for level, next_level in itertools.pairwise(levels):
        x = one_step(velocity, x, level, next_level, stages)
    return x


def one_step(velocity: Velocity, x: Tensor, sigma: float, end: float, stages: int) -> Tensor:
    """The same by one step."""
    places, weights = RALSTON[stages]
    slopes = [velocity(x, sigma_batch(sigma, x))]
    for place in places:
        step = place * (end - sigma)
        slopes.append(velocity(x + step * slopes[-1], sigma_batch(sigma + step, x)))
    slope = torch.stack([w * s for w, s in zip(weights, slopes, strict=True)]).sum(0)
    return x + (end - sigma) * slope


class ImitationRecipe(Recipe):
    """Learns from the teacher at what the student reaches."""

    defaults: Mapping[str, Default] = TRAJECTORY | {
        "diversity_weight": Default(0.0, "the regression keeps the noise's diversity")
    }

    def samples(self, config: Config, expert: Expert, distilled: bool) -> dict[str, SampleSpec]:
        if expert == "high":
            return {}
        steps = config.sampling_steps
        return {f"inputs {n}": handovers(config, n, distilled, complete=False) for n in steps}

    def costs(self, config: Config, expert: Expert) -> dict[Role, UpdateCost]:
        steps = config.grid_steps / 2
        stages, count = ASKED[expert]
        asked = stages * count * config.guided_evaluations(expert)
        return {"student": UpdateCost(steps, steps * asked, 2, config.max_train_steps)}


class Imitation(PhasedMethod):
    """One expert learns each of its steps from where it has come itself."""

    low: WanTransformer3DModel | None = None
    """the teacher's, for the end of the high expert's last step"""

    def batch_at(self, inputs: Inputs, step: int, micro_batch: int) -> DMDBatch:
        if self.expert == "high" and self.low is None and "low" in inputs.run.info.experts:
            self.low = inputs.run.teacher.load_expert("low")
        return super().batch_at(inputs, step, micro_batch)

    def losses(
        self, role: Role, denoiser: Denoiser, batch: DMDBatch, rng: torch.Generator
    ) -> Iterator[Loss]:
        """Mean squared error of the mean velocity of each step of the phase."""
        if self.low is not None:
            denoiser.experts.setdefault("low", self.low)
        x, count = batch.x, len(batch.sigmas) - 1
        for level, next_level in itertools.pairwise(batch.sigmas):
            sigma, next_sigma = sigma_batch(level, x), sigma_batch(next_level, x)
            with torch.no_grad():
                teacher = self._teacher(denoiser, batch)
                taught = integrate(teacher, x, level, next_level, *ASKED[self.expert])
            velocity = denoiser.velocity(x, sigma, batch.condition, role=role)
            target = flow.mean_velocity(x, taught, sigma, next_sigma)
            x = flow.euler_step(x, velocity.detach(), sigma, next_sigma)
            yield Loss((velocity - target).square().mean() / count)

    def _teacher(self, denoiser: Denoiser, batch: DMDBatch) -> Velocity:
        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            scale = self.config.guidance(denoiser.expert_at(sigma))
            return denoiser.guided_velocity(x, sigma, batch.condition, batch.negative, scale)

        return velocity


def errors(run: Run, clips: int) -> Iterator[tuple[int, list[float]]]:
    """(evaluations of a step, root mean square error at each step's end): all schemes begin where
    the unguided teacher's few steps arrive, as an untrained student does.
    """
    config = run.config
    denoiser = Denoiser(
        {expert: run.teacher.load_expert(expert) for expert in run.info.experts},
        config.boundary_ratio,
        run.info.expand_timesteps,
        autocast=run.runtime.autocast,
    )
    prompts = [run.prompts[i % len(run.prompts)] for i in range(clips)]
    condition = run.condition(prompts)
    noise = [keyed_noise(run.latent_shape, "imitation", i) for i in range(clips)]

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        scale = config.guidance(denoiser.expert_at(sigma))
        return denoiser.guided_velocity(x, sigma, condition, run.negative, scale)

    x = torch.stack(noise).to(run.runtime.device)
    found: list[list[float]] = [[] for _ in TRIED]
    for level, end in itertools.pairwise(config.sigmas()):
        exact = integrate(guided, x, level, end, *EXACT)
        for step_errors, how in zip(found, TRIED, strict=True):
            off = integrate(guided, x, level, end, *how) - exact
            step_errors.append(float(off.square().flatten(1).mean(1).sqrt().mean()))
        sigma = sigma_batch(level, x)
        velocity = denoiser.velocity(x, sigma, condition, role="teacher")
        x = flow.euler_step(x, velocity, sigma, sigma_batch(end, x))
    yield from ((stages * count, e) for (stages, count), e in zip(TRIED, found, strict=True))


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=16)
    args, extra = parser.parse_known_args()
    run = open_run("outputs/imitation", extra)
    ends = run.config.sigmas()[1:]
    head = ["guided evaluations", *(f"to {end:.4f}" for end in ends)]
    print(f"| {' | '.join(head)} |", "| --- " * len(head) + "|", sep="\n")
    for evaluations, off in errors(run, args.clips):
        print(f"| {evaluations} | " + " | ".join(f"{e:.4f}" for e in off) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
