"""Guided-trajectory distillation: regress the teacher's mean velocity between neighbouring student
sigmas.

Knowledge distillation of the guided probability-flow ODE (arXiv 2101.02388 for one step; the
multi-step form initialises CausVid, arXiv 2412.07772). The teacher's solution is stored at each of
the student's sigmas; a student step must carry the latents from one of them to the next:

    v* = (x_i - x_{i+1}) / (sigma_i - sigma_{i+1})
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_distill.data.samples import Inputs
from wan_distill.maths import flow
from wan_distill.maths.randomness import keyed_order
from wan_distill.maths.sigmas import Expert, steps_of
from wan_distill.methods.base import Loss, Method
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.config import Config
from wan_distill.settings.recipes import Role


@dataclass(frozen=True)
class TrajectoryBatch:
    """One micro-batch of student steps."""

    x: Tensor
    """[B, C, F, H, W] where each step begins."""
    sigma: Tensor
    """[B], the sigma of each x, float64 on the CPU."""
    target: Tensor
    """[B, C, F, H, W], the mean velocity to the step's end."""
    condition: Condition


class Trajectory(Method[TrajectoryBatch]):
    """One expert learns the student steps it owns at inference, from stored teacher samples."""

    def __init__(self, config: Config, expert: Expert):
        super().__init__(config, expert)
        # (sigma, next_sigma) of every step of this expert, for each sampling grid that is trained.
        self.steps = [
            (sigmas[i], sigmas[i + 1])
            for sigmas in map(config.sigmas, config.sampling_steps)
            for i in steps_of(expert, sigmas, config.boundary_ratio)
        ]

    def rows_at(self, step: int, micro_batch: int) -> dict[str, list[int]]:
        return {"trajectories": [row for row, _ in self._pairs(micro_batch)]}

    def batch_at(self, inputs: Inputs, step: int, micro_batch: int) -> TrajectoryBatch:
        """Every (sample, step) pair comes once per epoch."""
        samples = inputs.samples["trajectories"]
        pairs = self._pairs(micro_batch)
        rows = [row for row, _ in pairs]
        begins = [self.steps[i][0] for _, i in pairs]
        ends = [self.steps[i][1] for _, i in pairs]
        x = samples.at(rows, begins)
        sigma = torch.tensor(begins, dtype=torch.float64)
        next_sigma = torch.tensor(ends, dtype=torch.float64)
        target = flow.mean_velocity(x, samples.at(rows, ends), sigma, next_sigma)
        return TrajectoryBatch(x, sigma, target, samples.condition(rows))

    def losses(
        self, role: Role, denoiser: Denoiser, batch: TrajectoryBatch, rng: torch.Generator
    ) -> Iterator[Loss]:
        """Mean squared error of the mean velocity, over everything."""
        velocity = denoiser.velocity(batch.x, batch.sigma, batch.condition, role=role)
        yield Loss((velocity - batch.target).square().mean())

    def _pairs(self, micro_batch: int) -> list[tuple[int, int]]:
        """(stored sample, step) of each element of a global micro-batch."""
        size = self.config.train_batch_size
        count = len(self.steps)
        key = (self.config.seed, "pairs", self.expert)
        total = self.config.num_trajectories * count
        positions = range(micro_batch * size, (micro_batch + 1) * size)
        pairs = [keyed_order(*key, position=position, size=total) for position in positions]
        return [divmod(pair, count) for pair in pairs]
