"""The sampling loop outside training: solving, checking, previews and evaluation share it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from wan_distill.data.first_frames import Prompt
from wan_distill.data.run import Run
from wan_distill.maths.flow import SOLVERS, Velocity
from wan_distill.maths.sigmas import Expert
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.recipes import Role
from wan_distill.system.runtime import to_device

Latents = dict[float, Tensor]
"""sigma -> latents [B, C, F, H, W] on the CPU."""


def velocity_of(
    run: Run, denoiser: Denoiser, expert: Expert, condition: Condition, *, role: Role, guided: bool
) -> Velocity:
    """The velocity field of `role` in `expert`'s range.

    Args:
        guided: with the teacher's guidance; `role` must then be the teacher.
    """
    scale = run.config.guidance(expert)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        if guided:
            return denoiser.guided_velocity(x, sigma, condition, run.negative, scale)
        return denoiser.velocity(x, sigma, condition, role=role)

    return velocity


@torch.no_grad()
def carry(
    run: Run,
    denoiser: Denoiser,
    expert: Expert,
    latents: Tensor,
    prompts: Sequence[Prompt],
    sigmas: Sequence[float],
    *,
    role: Role,
    guided: bool = False,
    solver: str = "euler",
    store: Collection[float] = (),
    advance: Callable[[int], object] = lambda samples: None,
) -> Iterator[tuple[slice, Latents]]:
    """Integrates `latents` along `sigmas`, `--sample_batch_size` samples at a time.

    Args:
        denoiser: holds `expert`, which owns all of `sigmas` but the last.
        latents: [N, C, F, H, W] at sigmas[0].
        prompts: one per sample.
        solver: a name in `flow.SOLVERS`.
        store: the sigmas whose latents are wanted; those of the last one always are.
        advance: gets the number of samples after each step, for a progress bar.

    Yields, for one batch after the other, its place among the N samples and its latents.
    """
    size = run.config.sample_batch_size
    for start in range(0, len(latents), size):
        batch = slice(start, start + size)
        x = to_device(latents[batch], run.runtime.device)
        condition = run.condition(prompts[batch])
        velocity = velocity_of(run, denoiser, expert, condition, role=role, guided=guided)
        reached: Latents = {sigmas[0]: latents[batch].cpu()} if sigmas[0] in store else {}
        steps = SOLVERS[solver](velocity, x, sigmas)
        for sigma, here in zip(sigmas[1:], steps, strict=True):
            advance(len(here))
            if sigma in store or sigma == sigmas[-1]:
                reached[sigma] = here.cpu()
        yield batch, reached
