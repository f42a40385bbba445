"""Guided-trajectory distillation: regress the teacher's mean velocity between neighbouring student
sigmas.

Knowledge distillation of the guided probability-flow ODE (arXiv 2101.02388 for one step; the
multi-step form initialises CausVid, arXiv 2412.07772). The teacher's solution is known at each of
the student's sigmas ("knots"); a student step must carry the latents from one knot to the next:

    v* = (x_i - x_{i+1}) / (sigma_i - sigma_{i+1})
"""

from __future__ import annotations

import torch

from wan_distill.data.run import Sources
from wan_distill.data.samples import trajectories
from wan_distill.maths import flow
from wan_distill.maths.randomness import keyed_order
from wan_distill.maths.sigmas import Expert, steps_of
from wan_distill.methods.base import Loss
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.recipes import Role


class Trajectory:
    """One expert learns the student steps it owns at inference, from knots solved and stored
    beforehand.
    """

    roles: tuple[Role, ...] = ("student",)

    def __init__(self, expert: Expert, sources: Sources):
        self.config = config = sources.config
        self.expert = expert
        self.samples = sources.solved(trajectories)
        # (sigma, next_sigma) of every step of this expert, for each sampling grid that is trained.
        self.steps = [
            (sigmas[i], sigmas[i + 1])
            for sigmas in map(config.sigmas, config.sampling_steps)
            for i in steps_of(expert, sigmas, config.boundary)
        ]

    def role_at(self, step: int) -> Role:
        return "student"

    def drawn_at(self, step: int) -> int:
        return step

    def updates(self, student_updates: int) -> int:
        return student_updates

    def batch_at(self, step: int, micro_batch: int):
        """x, sigma, target and prompt of one micro-batch; every (sample, step) pair once per epoch."""
        size, count, kinds = self.config.train_batch_size, len(self.samples), len(self.steps)
        key = (self.config.seed, "pairs", self.expert)
        pairs = [
            keyed_order(*key, position=micro_batch * size + j, size=count * kinds)
            for j in range(size)
        ]
        rows = [pair // kinds for pair in pairs]
        steps = [self.steps[pair % kinds] for pair in pairs]
        sigma = torch.tensor([s for s, _ in steps], dtype=torch.float64)
        next_sigma = torch.tensor([s for _, s in steps], dtype=torch.float64)
        x = self.samples.at(rows, [s for s, _ in steps])
        next_x = self.samples.at(rows, [s for _, s in steps])
        return x, sigma, flow.mean_velocity(x, next_x, sigma, next_sigma), self.samples.prompt(rows)

    def loss(self, role: Role, denoiser: Denoiser, batch, rng: torch.Generator) -> Loss:
        """Mean squared error of the mean velocity, over everything."""
        x, sigma, target, prompt = batch
        velocity = denoiser.velocity(x, sigma, prompt, role=role)
        return Loss((velocity - target).square().mean())
