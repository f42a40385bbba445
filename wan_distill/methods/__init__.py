"""Objectives: what each role learns. One file a method; to add one, write its class and name it in `make_method`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from wan_distill.config import Config
from wan_distill.data import PromptBank
from wan_distill.denoiser import Denoiser, Role
from wan_distill.schedule import Expert


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
        """The update whose inputs and random draws this one uses: itself, or an earlier one that it repeats. Pure."""

    def updates(self, student_updates: int) -> int:
        """Updates of all roles together that give the student `student_updates` updates."""

    def batch_at(self, step: int, micro_batch: int):
        """The inputs of one global micro-batch of update `step`, on the training device. Pure."""

    def loss(self, role: Role, denoiser: Denoiser, batch, rng: torch.Generator) -> Loss:
        """The loss of `role`. All noise and sigmas come from `rng`."""


@dataclass(frozen=True)
class Sources:
    """What methods draw their inputs from."""

    config: Config
    teacher: object
    bank: PromptBank
    prompts: list[str]
    negative: Tensor
    runtime: object

    def solved(self, kind):
        """Stored samples of a kind (see trajectories.py), complete: what is missing is solved now."""
        samples = kind(self.config, self.teacher, self.bank, self.prompts, self.runtime)
        samples.solve(self.negative)
        return samples


def make_method(expert: Expert, sources: Sources) -> Method:
    """The objective that `--method` names, for one expert; its stored inputs are solved first."""
    from wan_distill.methods.consistency import Consistency
    from wan_distill.methods.dmd import PhasedDMD
    from wan_distill.methods.trajectory import Trajectory

    methods = {"trajectory": Trajectory, "dmd": PhasedDMD, "consistency": Consistency}
    return methods[sources.config.method](expert, sources)
