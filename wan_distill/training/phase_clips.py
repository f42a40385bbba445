"""Clips of student and teacher from the same prompts and noise, over one expert's phase.

Before the hand-over latents are noisy; there both sides are compared by the x0 that their last step
heads for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wan_distill.data.first_frames import Prompt
from wan_distill.data.rollout import carry
from wan_distill.data.run import Run
from wan_distill.data.samples import SampleRequest, SampleStore
from wan_distill.maths import flow
from wan_distill.maths.flow import sigma_batch
from wan_distill.maths.sigmas import Expert, expert_sigmas
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.sample_specs import handovers, student_of, trajectories


class PhaseClips:
    """One expert's phase of the finest sampling grid, on fixed prompts and noise.

    Args:
        prompts: sample i follows prompt i modulo their number.
        count: number of samples.
    """

    def __init__(self, run: Run, expert: Expert, prompts: Sequence[Prompt], count: int):
        config = run.config
        self.run = run
        self.expert: Expert = expert
        self.prompts = tuple(prompts)
        self.rows = range(count)
        self.sigmas = expert_sigmas(config.sigmas(), expert, config.boundary_ratio)
        self.teacher = SampleStore(run, trajectories(config, count), prompts)
        self.start = self.teacher
        """Where the phase begins: at the hand-over, the distilled high expert's latents."""
        if expert == "low":
            has_high = student_of(config, "high") is not None
            steps = config.grid_steps
            spec = handovers(config, steps, has_high, complete=True, count=count)
            self.start = SampleStore(run, spec, prompts)

    def __bool__(self) -> bool:
        """Whether this expert has a step in the finest grid."""
        return len(self.sigmas) > 1

    def requests(self) -> list[SampleRequest]:
        """The stored samples that this reads."""
        rows = frozenset(self.rows)
        return [SampleRequest(self.teacher, rows), SampleRequest(self.start, rows)] if self else []

    def teacher_x0(self) -> Tensor:
        """x0 [N, C, F, H, W] of the teacher's phase, on the CPU."""
        x, end = (self.teacher.at(self.rows, [s] * len(self.rows)).cpu() for s in self.sigmas[-2:])
        return self._implied_x0(x, end)

    def student_x0(self, denoiser: Denoiser) -> Tensor:
        """x0 [N, C, F, H, W] of the student's phase, on the CPU."""
        latents = self.start.at(self.rows, [self.sigmas[0]] * len(self.rows))
        batches = carry(
            self.run,
            denoiser,
            self.expert,
            latents,
            self.start.prompts_of(self.rows),
            self.sigmas,
            role="student",
            store=self.sigmas[-2:],
        )
        implied = [
            self._implied_x0(reached[self.sigmas[-2]], reached[self.sigmas[-1]])
            for _, reached in batches
        ]
        return torch.cat(implied)

    def _implied_x0(self, x: Tensor, end: Tensor) -> Tensor:
        """Where the phase's last step, from `x` to `end`, would arrive if it went on to sigma 0."""
        sigma = sigma_batch(self.sigmas[-2], x)
        last = sigma_batch(self.sigmas[-1], x)
        return flow.x0_from_velocity(end, flow.mean_velocity(x, end, sigma, last), last)
