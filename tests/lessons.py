"""One expert with all that its training loop works with, for tests of methods and learners."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from wan_distill.data.run import Run
from wan_distill.data.samples import Inputs, SampleRequest, SampleStore, open_inputs
from wan_distill.data.solving import solve_missing
from wan_distill.maths.sigmas import Expert
from wan_distill.methods import make_method
from wan_distill.methods.base import Loss, Method
from wan_distill.model.adapters import make_roles
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.recipes import Role
from wan_distill.training.learner import Learner, make_learners


class Lesson(NamedTuple):
    """What the training loop of one expert works with."""

    method: Method[Any]
    inputs: Inputs
    denoiser: Denoiser
    learners: dict[Role, Learner]

    def batch(self, step: int) -> Any:
        """The batch of update `step`, of one micro-batch."""
        drawn = self.method.draws_of(step)
        return self.method.batch_at(self.inputs, drawn, drawn)

    def learn(self, role: Role, batch: Any, rng: torch.Generator) -> list[Loss]:
        """Gradients of all parts of the loss, one after the other, as `update` computes them."""
        parts = []
        with self.denoiser.training(role):
            for part in self.method.losses(role, self.denoiser, batch, rng):
                part.value.backward()
                parts.append(part)
        return parts

    def loss(self, role: Role, batch: Any, rng: torch.Generator) -> float:
        """The whole loss, without any gradient."""
        with torch.no_grad():
            parts = list(self.method.losses(role, self.denoiser, batch, rng))
        return sum(float(part.value) for part in parts)


def solved_inputs(run: Run, expert: Expert) -> Inputs:
    """The inputs of one expert, every sample of theirs solved."""
    inputs = open_inputs(run, expert)
    stores = inputs.samples.values()
    solve_missing(run, [SampleRequest(store, frozenset(range(len(store)))) for store in stores])
    return inputs


def make_lesson(run: Run, expert: Expert, moved: float = 0.0) -> Lesson:
    """One expert as `train` prepares it; `moved` gives its adapters an effect of that size."""
    config = run.config
    method = make_method(config, expert)
    inputs = solved_inputs(run, expert)
    transformer = run.teacher.load_expert(expert)
    parameters = make_roles(transformer, method.roles, config, expert)
    for seed, role in enumerate(method.roles):
        for p in parameters[role].values():
            p.data += moved * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    denoiser = run.denoiser(expert, transformer)
    return Lesson(method, inputs, denoiser, make_learners(method, parameters, config))


def rows_of(x: torch.Tensor, store: SampleStore, sigma: float) -> list[int]:
    """Which of the stored samples `x` [B, C, F, H, W] are, by their latents at `sigma`."""
    stored = [store.at([i], [sigma])[0] for i in range(len(store))]
    return [next(i for i, latents in enumerate(stored) if torch.equal(latents, row)) for row in x]
