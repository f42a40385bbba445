"""What a method is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.recipes import Role


@dataclass(frozen=True)
class Loss:
    """A scalar to call backward on, and detached scalars worth a line in metrics.jsonl."""

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Method(Protocol):
    """One objective for one expert. Computes losses; never steps, clips, logs, saves or seeds."""

    roles: tuple[Role, ...]
    """Each gets one adapter and one optimizer."""

    def role_at(self, step: int) -> Role:
        """Who learns at this update. Pure, so that resuming needs no extra state."""

    def drawn_at(self, step: int) -> int:
        """The update whose inputs and random draws this one uses: itself, or an earlier one that it
        repeats. Pure.
        """

    def updates(self, student_updates: int) -> int:
        """Updates of all roles together that give the student `student_updates` updates."""

    def batch_at(self, step: int, micro_batch: int):
        """The inputs of one global micro-batch of update `step`, on the training device. Pure."""

    def loss(self, role: Role, denoiser: Denoiser, batch, rng: torch.Generator) -> Loss:
        """The loss of `role`. All noise and sigmas come from `rng`."""
