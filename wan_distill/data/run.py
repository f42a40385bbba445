"""What travels together through a run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from wan_distill.data.embeddings import PromptBank
from wan_distill.settings.config import Config


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
