"""Flow-form consistency distillation inside each student step: no critic, the lowest memory.

Phased consistency models (arXiv 2405.18407) on the guided teacher's ODE: within the student step
that ends at sigma_e the student's velocity must imply the same end point from neighbouring points
of one teacher path,

    f(x, sigma) = x - (sigma - sigma_e) * v(x, sigma)
    f(x_n, sigma_n) = sg f(x_{n+1}, sigma_{n+1})

with x_{n+1} one guided Euler step of the teacher from x_n, and f(x, sigma_e) = x. Since each path
ends at the next *student* sigma, the Euler sampler of inference is exact for it.

x_n lies on the teacher's own path: where the step begins it is the stored solution, from which the
sampler of inference starts this step too, and on the way to the step's end it is on the chord
between the two. A guided sampler never passes through samples with fresh noise, which are the usual
choice; students of them were less diverse (docs/methods_measured.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_distill.data.samples import Inputs
from wan_distill.maths import flow
from wan_distill.maths.randomness import generator
from wan_distill.maths.sigmas import expert_of, sigma_grid
from wan_distill.methods.base import Loss, Method
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.recipes import Role


@dataclass(frozen=True)
class ConsistencyBatch:
    """One micro-batch: both ends of one student step."""

    x_start: Tensor
    """[B, C, F, H, W] at points[0]."""
    x_end: Tensor
    """[B, C, F, H, W] at points[-1]."""
    condition: Condition
    negative: Tensor
    """[1, L, D]."""
    points: tuple[float, ...]
    """The solver's sigmas inside the step, its ends included."""


class Consistency(Method[ConsistencyBatch]):
    """One expert, along the guided teacher's stored solutions."""

    def rows_at(self, step: int, micro_batch: int) -> dict[str, list[int]]:
        return {"trajectories": self._rows(micro_batch)}

    def batch_at(self, inputs: Inputs, step: int, micro_batch: int) -> ConsistencyBatch:
        """One student step for the whole update."""
        config = self.config
        start, end = self._student_step(step)
        inside = points_inside(start, end, config.solver_points, config.flow_shift)
        # The high expert's last step ends beyond its boundary: from its own lowest point it goes
        # straight there.
        owned = (s for s in inside[:-1] if expert_of(s, config.boundary_ratio) == self.expert)
        samples = inputs.samples["trajectories"]
        rows = self._rows(micro_batch)
        return ConsistencyBatch(
            x_start=samples.at(rows, [start] * len(rows)),
            x_end=samples.at(rows, [end] * len(rows)),
            condition=samples.condition(rows),
            negative=inputs.run.negative,
            points=(*owned, end),
        )

    def losses(
        self, role: Role, denoiser: Denoiser, batch: ConsistencyBatch, rng: torch.Generator
    ) -> Iterator[Loss]:
        """Pseudo-Huber distance (arXiv 2310.14189) of the two end points."""
        points = torch.tensor(batch.points, dtype=torch.float64)
        n = torch.randint(len(points) - 1, (len(batch.x_start),), generator=rng)
        sigma, nearer = points[n], points[n + 1]
        start, end = points[0], points[-1]
        along = flow.per_sample((start - sigma) / (start - end), batch.x_start)
        x = torch.lerp(batch.x_start, batch.x_end, along)
        scale = self.config.guidance(self.expert)
        with torch.no_grad():
            velocity = denoiser.guided_velocity(x, sigma, batch.condition, batch.negative, scale)
            x_nearer = flow.euler_step(x, velocity, sigma, nearer)
            there = self._end_point(denoiser, x_nearer, nearer, start, end, batch.condition)
        here = self._end_point(denoiser, x, sigma, start, end, batch.condition)
        yield Loss(pseudo_huber(here - there, self.config.huber_c))

    def _end_point(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigma: Tensor,
        start: Tensor,
        end: Tensor,
        condition: Condition,
    ) -> Tensor:
        """f(x, sigma), which is x itself where sigma has reached the end."""
        # At the end the velocity has no weight: it is asked for at a sigma that belongs to this
        # expert.
        owned = torch.where(sigma <= end, start, sigma)
        velocity = denoiser.velocity(x, owned, condition, role="student")
        return flow.euler_step(x, velocity, sigma, end.expand_as(sigma))

    def _student_step(self, step: int) -> tuple[float, float]:
        """(sigma, next sigma) of the student step that update `step` learns."""
        config = self.config
        rng = generator(config.seed, self.expert, "stretch", step)
        phases = list(config.phases(self.expert).values())
        sigmas = phases[int(torch.randint(len(phases), (1,), generator=rng))]
        i = int(torch.randint(len(sigmas) - 1, (1,), generator=rng))
        return sigmas[i], sigmas[i + 1]

    def _rows(self, micro_batch: int) -> list[int]:
        key = (self.config.seed, "x0", self.expert)
        return self.stored_rows(key, micro_batch)


def points_inside(start: float, end: float, solver_points: int, shift: float) -> tuple[float, ...]:
    """Two student sigmas, and between them the points of a grid of `solver_points`, shifted as the
    student's is.
    """
    grid = sigma_grid(solver_points, shift)
    return (start, *(s for s in grid if end + 1e-9 < s < start - 1e-9), end)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """sqrt(d^2 + c^2) - c, elementwise mean."""
    return ((difference.square() + c**2).sqrt() - c).mean()
