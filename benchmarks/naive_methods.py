"""Two naive forms of distribution matching for two experts, as rows of quality.py's table."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import WanTransformer3DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan_distill.data.run import Run
from wan_distill.data.samples import Inputs
from wan_distill.maths.randomness import generator
from wan_distill.maths.sigmas import Expert
from wan_distill.methods.base import Loss
from wan_distill.methods.dmd import PhasedDMD
from wan_distill.methods.phases import DMDBatch
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.student_files import load_student
from wan_distill.settings.config import Config
from wan_distill.settings.recipes import Role
from wan_distill.settings.sample_specs import student_of


class NaiveDMD(PhasedDMD):
    """Runs the whole sampler from noise to x0; reads no stored samples."""

    def __init__(self, config: Config, expert: Expert):
        super().__init__(config, expert)
        self.phases = {steps: config.sigmas(steps) for steps in self.phases}

    def rows_at(self, step: int, micro_batch: int) -> dict[str, list[int]]:
        return {}

    def batch_at(self, inputs: Inputs, step: int, micro_batch: int) -> DMDBatch:
        return super().batch_at(Inputs(inputs.run, {}), step, micro_batch)


class Alone(NaiveDMD):
    """Each expert is rolled out from noise to x0 alone, also at sigmas it never has at inference.

    The scores are compared in its own range.
    """

    def __init__(self, config: Config, expert: Expert):
        super().__init__(config, expert)
        self.phases = {steps: config.sigmas(steps) for steps in config.sampling_steps}

    def losses(
        self, role: Role, denoiser: Denoiser, batch: DMDBatch, rng: torch.Generator
    ) -> Iterator[Loss]:
        with patch.object(denoiser, "expert_at", lambda sigma: self.expert):
            yield from super().losses(role, denoiser, batch, rng)


class Plain(NaiveDMD):
    """One distribution matching of x0 for both experts; each learns the exit steps that it owns.

    The high expert learns before the frozen base of the low one, the low expert after the distilled
    high one. The scores are compared in the range of the expert in training.
    """

    def __init__(self, config: Config, expert: Expert):
        super().__init__(config, expert)
        self.other_name: Expert = "low" if expert == "high" else "high"
        self.other: WanTransformer3DModel | None = None
        owned = PhasedDMD(config, expert).phases
        self.exits = {steps: sigmas[:-1] for steps, sigmas in owned.items()}
        """Sampling steps -> sigmas at which steps of this expert begin."""

    def batch_at(self, inputs: Inputs, step: int, micro_batch: int) -> DMDBatch:
        if self.other is None:
            self.other = self._load_other(inputs.run)
        batch = super().batch_at(inputs, step, micro_batch)
        exits = self.exits[len(batch.sigmas) - 1]
        rng = generator(self.config.seed, self.expert, "plain exit", step)
        sigma = exits[int(torch.randint(len(exits), (1,), generator=rng))]
        return dataclasses.replace(batch, exit=batch.sigmas.index(sigma))

    def losses(
        self, role: Role, denoiser: Denoiser, batch: DMDBatch, rng: torch.Generator
    ) -> Iterator[Loss]:
        denoiser.experts.setdefault(self.other_name, self.other)
        yield from super().losses(role, denoiser, batch, rng)

    def _load_other(self, run: Run) -> WanTransformer3DModel:
        transformer = run.teacher.load_expert(self.other_name)
        student = student_of(run.config, "high")
        if self.other_name == "high" and student is not None:
            load_student(transformer, student)
        return transformer
