"""Guided-trajectory distillation: regress the teacher's mean velocity between neighbouring student
sigmas.

Knowledge distillation of the guided probability-flow ODE (arXiv 2101.02388 for one step; the
multi-step form initialises CausVid, arXiv 2412.07772). The teacher's solution is stored at each of
the student's sigmas; a student step must carry the latents from one of them to the next:

    v* = (x_i - x_{i+1}) / (sigma_i - sigma_{i+1})

The low expert's first step begins where the distilled high expert hands over, and leads to where
the teacher is from the same noise: it makes good what the high one fell short of (dataset
aggregation, arXiv 1011.0686, on stored solutions).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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

TRAJECTORIES = "trajectories"


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


class Step(NamedTuple):
    """One step of the student, in one of its sampling grids."""

    begin: float
    end: float
    """sigmas"""
    source: str
    """the stored samples that it begins with, by their purpose"""


class Trajectory(Method[TrajectoryBatch]):
    """One expert learns the student steps it owns at inference, from stored teacher samples."""

    def __init__(self, config: Config, expert: Expert):
        super().__init__(config, expert)
        self.steps: list[Step] = []
        for count in config.sampling_steps:
            sigmas = config.sigmas(count)
            owned = steps_of(expert, sigmas, config.boundary_ratio)
            for i in owned:
                handed_over = expert == "low" and i == owned[0]
                source = f"inputs {count}" if handed_over else TRAJECTORIES
                self.steps.append(Step(sigmas[i], sigmas[i + 1], source))

    def rows_at(self, step: int, micro_batch: int) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {TRAJECTORIES: []}
        for row, i in self._pairs(micro_batch):
            rows[TRAJECTORIES].append(row)
            if (source := self.steps[i].source) != TRAJECTORIES:
                rows.setdefault(source, []).append(row)
        return rows

    def batch_at(self, inputs: Inputs, step: int, micro_batch: int) -> TrajectoryBatch:
        """Every (sample, step) pair comes once per epoch."""
        samples = inputs.samples[TRAJECTORIES]
        chosen = [(row, self.steps[i]) for row, i in self._pairs(micro_batch)]
        rows, ends = [row for row, _ in chosen], [step.end for _, step in chosen]
        x = torch.cat([inputs.samples[s.source].at([row], [s.begin]) for row, s in chosen])
        sigma = torch.tensor([step.begin for _, step in chosen], dtype=torch.float64)
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
