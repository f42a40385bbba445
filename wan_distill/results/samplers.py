"""The rows of the evaluation's table: who samples, along which sigmas, from which noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wan_distill.maths.sigmas import Expert, sigma_grid
from wan_distill.settings.config import BASELINE_STEPS, Config


@dataclass(frozen=True)
class Sampler:
    """One way to make samples: who, along which sigmas, guided or not, from which noise."""

    name: str
    role: Literal["teacher", "student"]
    sigmas: tuple[float, ...]
    guided: bool
    noise: Literal["paired", "independent"] = "paired"

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def evaluations(self, config: Config) -> int:
        """Transformer evaluations per sample."""
        return config.evaluations(self.sigmas, self.guided)

    def step_evaluations(self, config: Config, expert: Expert) -> int:
        """Transformer evaluations per sample and step of `expert`."""
        return config.guided_evaluations(expert) if self.guided else 1


@dataclass(frozen=True)
class Samplers:
    """The rows of the table by what they are for; two of them may be the same sampler."""

    independent: Sampler
    """The teacher from other noise: what everything is compared with."""
    paired: Sampler
    """The teacher from the student's noise."""
    few_guided: Sampler
    few_unguided: Sampler
    students: tuple[Sampler, ...]

    @property
    def table(self) -> list[Sampler]:
        """What the table shows, in its order."""
        return [self.paired, self.few_guided, self.few_unguided, *self.students]


def samplers(config: Config) -> Samplers:
    """The rows for one run."""
    long = config.teacher_sigmas()
    short = sigma_grid(BASELINE_STEPS, config.flow_shift)
    few = f"teacher {BASELINE_STEPS} guided"
    if len(long) == len(short):  # --teacher_steps 4: same steps, other sigmas
        few += f", shift {config.flow_shift:g}"
    return Samplers(
        independent=Sampler("teacher, independent", "teacher", long, True, noise="independent"),
        paired=Sampler(f"teacher {len(long) - 1} guided", "teacher", long, True),
        few_guided=Sampler(few, "teacher", short, True),
        few_unguided=Sampler(f"teacher {BASELINE_STEPS} unguided", "teacher", short, False),
        students=tuple(
            Sampler(f"student {n}", "student", config.sigmas(n), False)
            for n in config.sampling_steps
        ),
    )
