"""One update of each role on random inputs, before hours are spent on solving: if memory runs out,
it does so now.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from wan_distill.data.run import Run
from wan_distill.data.samples import Inputs
from wan_distill.maths.randomness import generator
from wan_distill.maths.sigmas import Expert
from wan_distill.methods import make_method
from wan_distill.methods.base import Method
from wan_distill.model.adapters import make_roles
from wan_distill.model.checkpointing import recompute_blocks
from wan_distill.model.condition import Condition
from wan_distill.model.vae import decode
from wan_distill.settings.recipes import Role, recipe_of
from wan_distill.training.learner import Learner, make_learners


class RandomSamples:
    """Stands in for a `SampleStore`: latents and conditions of the right shapes, on the device."""

    def __init__(self, run: Run):
        self.run = run

    def at(self, rows: Sequence[int], sigmas: Sequence[float]) -> Tensor:
        """Normal noise [B, C, F, H, W]."""
        device = self.run.runtime.device
        return torch.randn(len(rows), *self.run.latent_shape, device=device)

    def condition(self, rows: Iterable[int]) -> Condition:
        """Of some prompt, once per row."""
        return self.run.condition([self.run.prompts[0] for _ in rows])


def random_inputs(run: Run, expert: Expert) -> Inputs:
    """The inputs of `--method` with random samples in place of stored ones."""
    purposes = recipe_of(run.config).samples(run.config, expert, distilled=False)
    samples: dict[str, Any] = {purpose: RandomSamples(run) for purpose in purposes}
    return Inputs(run, samples)


def rehearse(run: Run, expert: Expert) -> None:
    """Makes one update of each role, optimizer step included, and decodes one clip where clips will
    be shown. Nothing of it remains.

    Raises torch.OutOfMemoryError where the device is too small.
    """
    config, runtime = run.config, run.runtime
    method = make_method(config, expert)
    transformer = run.teacher.load_expert(expert)
    parameters = make_roles(transformer, method.roles, config, expert)
    recompute_blocks(transformer, config)
    denoiser = run.denoiser(expert, transformer, config.whole_student)
    learners = make_learners(method, parameters, config)
    hold_moments(learners.values())
    inputs = random_inputs(run, expert)
    steps = {first_step(method, role): role for role in method.roles}
    for step, role in sorted(steps.items()):  # in training's own order
        batch = method.batch_at(inputs, method.draws_of(step), 0)
        total = torch.zeros((), device=runtime.device)
        with denoiser.training(role):
            for loss in method.losses(role, denoiser, batch, generator("rehearsal")):
                loss.value.backward()
                total += loss.value.detach()
        learners[role].update(runtime, total)
    if config.validation_steps or config.monitor_steps:
        decode(run.teacher.load_vae(), torch.zeros(1, *run.latent_shape))


def hold_moments(learners: Iterable[Learner]) -> None:
    """Makes the optimizers' moments, so that the first update takes as much memory as later ones:
    otherwise each role's appear after its own.
    """
    for learner in learners:
        for parameter in learner.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)


def first_step(method: Method[Any], role: Role) -> int:
    """The first update of `role`."""
    return next(step for step in range(method.updates(1)) if method.role_at(step) == role)
