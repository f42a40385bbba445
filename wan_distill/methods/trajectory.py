"""Guided-trajectory distillation: regress the teacher's mean velocity between neighbouring student
sigmas, at the latents that the student itself reaches.

Knowledge distillation of the guided probability-flow ODE (arXiv 2101.02388 for one step; the
multi-step form initialises CausVid, arXiv 2412.07772). The teacher's solution x_i is stored at each
of the student's sigmas. The student samples its phase from the same noise, as at inference; from
where it is at sigma_i, y_i, its step must lead to where the teacher is at sigma_{i+1}:

    v* = (y_i - x_{i+1}) / (sigma_i - sigma_{i+1})
    y_{i+1} = y_i - (sigma_i - sigma_{i+1}) * sg v(y_i, sigma_i)

with y_0 the noise, or where the distilled high expert hands over. So each step makes good what the
steps before it fell short of (dataset aggregation, arXiv 1011.0686, on stored solutions), and each
evaluation both learns and leads on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_distill.data.samples import Inputs
from wan_distill.maths import flow
from wan_distill.maths.randomness import generator
from wan_distill.maths.sigmas import Expert
from wan_distill.methods.base import Loss, Method
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.config import Config
from wan_distill.settings.recipes import Role

TRAJECTORIES = "trajectories"


@dataclass(frozen=True)
class TrajectoryBatch:
    """One micro-batch of walks through a phase."""

    x: Tensor
    """[B, C, F, H, W] at sigmas[0]"""
    sigmas: tuple[float, ...]
    """the phase's, of one sampling grid, its end included"""
    teacher: list[Tensor]
    """the teacher's latents [B, C, F, H, W] at sigmas[1:]"""
    condition: Condition


class Trajectory(Method[TrajectoryBatch]):
    """One expert learns the student steps it owns at inference, from stored teacher samples."""

    def __init__(self, config: Config, expert: Expert):
        super().__init__(config, expert)
        self.phases = config.phases(expert)

    def rows_at(self, step: int, micro_batch: int) -> dict[str, list[int]]:
        rows = self._rows(micro_batch)
        return dict.fromkeys((TRAJECTORIES, self._source(self._grid(step))), rows)

    def batch_at(self, inputs: Inputs, step: int, micro_batch: int) -> TrajectoryBatch:
        """One sampling grid for the whole update; every stored sample comes once per epoch."""
        count = self._grid(step)
        sigmas, rows = self.phases[count], self._rows(micro_batch)
        samples, source = (inputs.samples[p] for p in (TRAJECTORIES, self._source(count)))
        x = source.at(rows, [sigmas[0]] * len(rows))
        teacher = [samples.at(rows, [sigma] * len(rows)) for sigma in sigmas[1:]]
        return TrajectoryBatch(x, sigmas, teacher, samples.condition(rows))

    def losses(
        self, role: Role, denoiser: Denoiser, batch: TrajectoryBatch, rng: torch.Generator
    ) -> Iterator[Loss]:
        """Mean squared error of the mean velocity, over everything, step by step."""
        x = batch.x
        for i, reached in enumerate(batch.teacher):
            sigma, next_sigma = (flow.sigma_batch(s, x) for s in batch.sigmas[i : i + 2])
            velocity = denoiser.velocity(x, sigma, batch.condition, role=role)
            target = flow.mean_velocity(x, reached, sigma, next_sigma)
            yield Loss((velocity - target).square().mean() / len(batch.teacher))
            x = flow.euler_step(x, velocity.detach(), sigma, next_sigma)

    def _grid(self, step: int) -> int:
        """Sampling steps of an update; keyed by it alone, so that all ranks agree."""
        rng = generator(self.config.seed, self.expert, "grid", step)
        return list(self.phases)[int(torch.randint(len(self.phases), (1,), generator=rng))]

    def _source(self, count: int) -> str:
        """The stored samples that a phase of `count` sampling steps begins with."""
        return f"inputs {count}" if self.expert == "low" else TRAJECTORIES

    def _rows(self, micro_batch: int) -> list[int]:
        """The stored samples of a global micro-batch."""
        key = (self.config.seed, "trajectories", self.expert)
        return self.stored_rows(key, micro_batch)
