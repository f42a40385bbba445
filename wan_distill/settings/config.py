"""Every setting of a run in one frozen dataclass, from which the command line is derived.

Settings left at None are filled in by `resolve.resolve_stages`, which knows what suits the teacher
at hand; the types are those of the resolved values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_distill.layout import RunFolder
from wan_distill.maths.sigmas import Expert, expert_sigmas, insert_sigmas, sigma_grid
from wan_distill.settings.job import SECOND_STAGE_FLAGS, STAGES, JobSettings
from wan_distill.settings.learning import LearningSettings
from wan_distill.settings.operation import OperationSettings

# Wan's own negative prompt (Wan2.2, wan/configs/shared_config.py); the teacher was tuned to be
# guided away from it.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


BASELINE_STEPS = 4  # of the teacher's own few-step rows in the evaluation


@dataclass(frozen=True)
class Config(OperationSettings, LearningSettings, JobSettings):  # fields begin with the last base
    """Settings of one run, and the schedules that follow from them."""

    # ------------------------------------------------------------------------------ the student

    @property
    def grid_steps(self) -> int:
        """Steps of the finest grid; the coarser ones of a many-step student are nested in it."""
        return max(self.sampling_steps)

    def sigmas(self, steps: int | None = None) -> tuple[float, ...]:
        """The student's sigmas for `steps` sampling steps, terminal 0 included."""
        return sigma_grid(steps or self.grid_steps, self.flow_shift)

    def phases(self, expert: Expert) -> dict[int, tuple[float, ...]]:
        """Sampling steps -> the sigmas of the expert's phase, its end included. Where it has none
        of the steps, their number is left out.
        """
        owned = {
            n: expert_sigmas(self.sigmas(n), expert, self.boundary_ratio)
            for n in self.sampling_steps
        }
        return {n: sigmas for n, sigmas in owned.items() if sigmas}

    @property
    def experts(self) -> tuple[Expert, ...]:
        """Experts to distil, in order."""
        if self.boundary_ratio is None:
            return ("high",)
        if self.expert != "both":
            return ("high",) if self.expert == "high" else ("low",)
        # A single step belongs to the high expert: the low one then has nothing to learn.
        return ("high", "low") if self.phases("low") else ("high",)

    @property
    def is_second_stage(self) -> bool:
        """Whether this refines the student of an earlier stage of the same job."""
        if self.init_student_from is None:
            return False
        job, begins_with = RunFolder(Path(self.output_dir)), Path(self.init_student_from)
        return any(begins_with == job.stage(first).path for first, *_ in STAGES.values())

    def flag(self, setting: str) -> str:
        """The name of the command-line flag that changes `setting` of this stage."""
        return SECOND_STAGE_FLAGS.get(setting, setting) if self.is_second_stage else setting

    @property
    def method_title(self) -> str:
        """The methods of this job that made the student, in order."""
        if not self.is_second_stage:
            return self.method
        return f"{Path(self.init_student_from or '').name}+{self.method}"

    @property
    def whole_student(self) -> bool:
        """Whether all weights of a shallower student are trained, instead of adapters."""
        return self.student_layers is not None

    # ------------------------------------------------------------------------------ the teacher

    def teacher_sigmas(self) -> tuple[float, ...]:
        """The teacher's own sampling, which students are judged by, with the student's sigmas among
        its points.
        """
        return insert_sigmas(self.sigmas(), self.teacher_grid)

    @property
    def teacher_grid(self) -> tuple[float, ...]:
        return sigma_grid(self.teacher_steps, self.teacher_shift)

    def solver_sigmas(self, visited: tuple[float, ...]) -> tuple[float, ...]:
        """The points at which training samples are solved, with those of `visited` among them."""
        grid = self.teacher_grid
        if self.teacher_solver != "euler":
            grid = sigma_grid(self.solver_steps, self.flow_shift)
        return insert_sigmas(visited, grid)

    def guidance(self, expert: Expert) -> float:
        """The teacher's guidance scale while `expert` denoises."""
        return self.guidance_scale if expert == "high" else self.guidance_scale_2

    def guided_evaluations(self, expert: Expert) -> int:
        """Transformer evaluations of one guided step of the teacher."""
        return 1 if self.guidance(expert) == 1 else 2

    def evaluations(self, sigmas: Sequence[float], guided: bool) -> int:
        """Transformer evaluations of one sample along `sigmas`, by the experts that own them."""
        experts: tuple[Expert, ...] = ("high", "low")
        owned = {e: len(expert_sigmas(sigmas, e, self.boundary_ratio)) for e in experts}
        each = {e: self.guided_evaluations(e) if guided else 1 for e in experts}
        return sum(each[e] * max(0, owned[e] - 1) for e in experts)

    def score_guidance(self, expert: Expert) -> float:
        """Guidance of the teacher's score in distribution matching. By default the teacher's; where
        half of it pulls towards the teacher's own samples, twice as far from the unguided.
        """
        scales = {"high": self.real_score_guidance_scale, "low": self.real_score_guidance_scale_2}
        if (scale := scales[expert]) is not None:
            return scale
        own = self.guidance(expert)
        return 2 * own - 1 if self.real_score == "paired" else own

    # ---------------------------------------------------------------------------- as plain values

    @property
    def weights_key(self) -> dict[str, Any]:
        """The settings that decide which numbers the teacher computes with, besides its files: part
        of the keys by which stored samples are found.
        """
        key: dict[str, Any] = {"dtype": self.mixed_precision}
        if self.base_precision != "bf16":
            key["base"] = self.base_precision
        return key

    def to_json(self) -> dict[str, Any]:
        """Plain values of every setting but the secret one, for run.json and for comparing runs."""
        values = dataclasses.asdict(self)
        del values["hub_token"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
