"""Flow-form consistency distillation inside each student step: no critic, the lowest memory.

Phased consistency models (arXiv 2405.18407) on the guided teacher's ODE: within the student step
that ends at sigma_e the student's velocity must imply the same end point from neighbouring points
of one teacher path,

    f(x, sigma) = x - (sigma - sigma_e) * v(x, sigma),      f(x_n, sigma_n) = sg f(x_{n+1}, sigma_{n+1}),

with x_{n+1} one guided Euler step of the teacher from x_n, and f(x, sigma_e) = x. Ending each
stretch at the next *student* sigma makes the Euler sampler of inference exact for it.

x_n lies on the teacher's own path: where the step begins it is the stored solution, which is what
the sampler of inference starts this step from, and on the way to the step's end it is on the chord
between the two. Samples noised anew, as is usual, are not what a guided sampler passes through;
students of them were less diverse (docs/methods.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from wan_distill.data.run import Sources
from wan_distill.data.samples import trajectories
from wan_distill.maths import flow
from wan_distill.maths.randomness import generator, keyed_order
from wan_distill.maths.sigmas import Expert, expert_of, sigma_grid, steps_of
from wan_distill.methods.base import Loss
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.recipes import Role


class Consistency:
    """One expert, along the guided teacher's stored solutions."""

    roles: tuple[Role, ...] = ("student",)

    def __init__(self, expert: Expert, sources: Sources):
        self.config = sources.config
        self.expert = expert
        self.sources = sources
        self.samples = sources.solved(trajectories)

    def role_at(self, step: int) -> Role:
        return "student"

    def drawn_at(self, step: int) -> int:
        return step

    def updates(self, student_updates: int) -> int:
        return student_updates

    def batch_at(self, step: int, micro_batch: int):
        """Both ends of one student step, prompt, and the solver's points inside, the same for the
        whole update.
        """
        config, size = self.config, self.config.train_batch_size
        rng = generator(config.seed, self.expert, "stretch", step)
        counts = [
            n
            for n in config.sampling_steps
            if steps_of(self.expert, config.sigmas(n), config.boundary)
        ]
        count = counts[int(torch.randint(len(counts), (1,), generator=rng))]
        steps = steps_of(self.expert, config.sigmas(count), config.boundary)
        i = steps[int(torch.randint(len(steps), (1,), generator=rng))]
        rows = [
            keyed_order(
                config.seed,
                "x0",
                self.expert,
                position=micro_batch * size + j,
                size=len(self.samples),
            )
            for j in range(size)
        ]
        points = points_inside(
            *config.sigmas(count)[i : i + 2], config.solver_points, config.flow_shift
        )
        # The last step of the high expert ends beyond its boundary: from its own lowest point it
        # goes straight there.
        points = (
            *(s for s in points[:-1] if expert_of(s, config.boundary) == self.expert),
            points[-1],
        )
        start, end = (
            self.samples.at(rows, [sigma] * size) for sigma in config.sigmas(count)[i : i + 2]
        )
        return start, end, self.samples.prompt(rows), points

    def loss(self, role: Role, denoiser: Denoiser, batch, rng: torch.Generator) -> Loss:
        """Pseudo-Huber distance (arXiv 2310.14189) of the two end points."""
        x_start, x_end, prompt, points = batch
        points = torch.tensor(points, dtype=torch.float64)
        n = torch.randint(len(points) - 1, (len(x_start),), generator=rng)
        sigma, nearer, start, end = points[n], points[n + 1], points[0], points[-1]
        along = flow.per_sample((start - sigma) / (start - end), x_start)
        x = torch.lerp(x_start, x_end, along)
        with torch.no_grad():
            velocity = denoiser.guided_velocity(
                x, sigma, prompt, self.sources.negative, self.config.guidance(self.expert)
            )
            x_nearer = flow.euler_step(x, velocity, sigma, nearer)
            there = self._end_point(denoiser, x_nearer, nearer, start, end, prompt)
        here = self._end_point(denoiser, x, sigma, start, end, prompt)
        return Loss(pseudo_huber(here - there, self.config.huber_c))

    def _end_point(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigma: Tensor,
        start: Tensor,
        end: Tensor,
        prompt: Tensor,
    ) -> Tensor:
        """f(x, sigma), which is x itself where sigma has reached the end."""
        # At the end the velocity has no weight: it is asked for at a sigma that belongs to this
        # expert.
        owned = torch.where(sigma <= end, start, sigma)
        velocity = denoiser.velocity(x, owned, prompt, role="student")
        return flow.euler_step(x, velocity, sigma, end.expand_as(sigma))


def points_inside(start: float, end: float, solver_points: int, shift: float) -> tuple[float, ...]:
    """Two student sigmas, and between them the points of a grid of `solver_points`, shifted as the
    student's is.
    """
    grid = sigma_grid(solver_points, shift)
    return (start, *(s for s in grid if end + 1e-9 < s < start - 1e-9), end)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """sqrt(d^2 + c^2) - c, elementwise mean."""
    return ((difference.square() + c**2).sqrt() - c).mean()
