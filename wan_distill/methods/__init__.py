"""Objectives: what each role learns. One file a method; to add one, write its class and name it in `METHODS`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from wan_distill.config import Config
from wan_distill.denoiser import Denoiser, Role


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

    def updates(self, student_updates: int) -> int:
        """Updates of all roles together that give the student `student_updates` updates."""

    def batch_at(self, micro_batch: int):
        """The inputs of one global micro-batch, on the training device. Pure."""

    def loss(self, role: Role, denoiser: Denoiser, batch, rng: torch.Generator) -> Loss:
        """The loss of `role`. All noise and sigmas come from `rng`."""


def make_method(config: Config, expert: str, trajectories) -> Method:
    """The objective that `--method` names, for one expert."""
    from wan_distill.methods.trajectory import Trajectory

    return {"trajectory": Trajectory}[config.method](config, expert, trajectories)
