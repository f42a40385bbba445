"""What each method needs, in plain values: defaults with their reasons, roles, stored samples, and
the number of transformer evaluations that an update takes.

To add a method, write its recipe here, name it in `RECIPES`, and write its class in `methods/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.settings import flags
from wan_distill.settings.config import Config
from wan_distill.settings.defaults import (
    ADAMW_TRAJECTORY,
    CONSISTENCY,
    DMD,
    DMD_REASONS,
    DMD_SECOND_STAGE,
    DMD_WARM_START,
    SHORT_TRAJECTORY,
    TRAJECTORY,
    Default,
)
from wan_distill.settings.sample_specs import SampleSpec, anchors, inputs, trajectories
from wan_distill.settings.scale import Scale

Role = Literal["teacher", "student", "fake_score", "real_score"]


@dataclass(frozen=True)
class UpdateCost:
    """What one update of one role evaluates, per sample of its batch."""

    with_gradient: float
    """transformer evaluations that are followed by a backward pass, one graph at a time"""
    without_gradient: float
    """transformer evaluations without"""
    batched: int
    """evaluations in the largest single forward while a graph is held; 0 where none is asked"""
    updates: int
    """number of such updates per expert"""


class Recipe:
    """One method in plain values. The defaults below suit a method with a single role."""

    defaults: Mapping[str, Default]
    """setting -> its default, and the reason"""
    levers: tuple[dict[str, Any], ...] = ()
    """changes of this method's settings that lower its memory"""
    needs_teacher = True
    """whether its losses ask the teacher, so that a student cannot take the teacher's place"""
    group: str | None = None
    """of the flags that this method alone reads"""
    explained: Mapping[str, str | None] = {}
    """settings that the plan explains -> the reason; None: that of the default"""

    def adjusted(self, config: Config) -> Mapping[str, Default]:
        """Defaults that depend on what else was asked for; they replace those of `defaults`."""
        return {}

    def reasons(self, config: Config) -> dict[str, str]:
        """Setting -> reason, for the settings that the plan explains to users of this method."""
        rules = {**self.defaults, **self.adjusted(config)}
        return {name: given or rules[name].reason for name, given in self.explained.items()}

    def batch(self, config: Config, scale: Scale) -> int:
        """Samples of one update, over all devices."""
        return 16 if scale.is_large else 32

    def notes(self, config: Config) -> list[str]:
        """What users of these settings should know, for the plan."""
        if 1 in config.sampling_steps and config.boundary_ratio is not None:
            return [
                "a single step is the high expert's, whose range ends far above all detail: for it "
                "--method trajectory is better by far (docs/methods_measured.md)"
            ]
        return []

    def roles(self, config: Config) -> tuple[Role, ...]:
        """Who is trained: each gets an adapter and an optimizer."""
        return ("student",)

    def samples(self, config: Config, expert: Expert, distilled: bool) -> dict[str, SampleSpec]:
        """Purpose -> the stored samples that training this expert reads.

        Args:
            distilled: whether there is a distilled high expert, whose hand-overs the low one then
                begins with.
        """
        raise NotImplementedError

    def costs(self, config: Config, expert: Expert) -> dict[Role, UpdateCost]:
        """Role -> what one of its updates evaluates."""
        raise NotImplementedError


class TrajectoryRecipe(Recipe):
    """Regress the teacher's mean velocity between neighbouring student sigmas."""

    defaults = TRAJECTORY
    needs_teacher = False

    def notes(self, config: Config) -> list[str]:
        return []

    def adjusted(self, config: Config) -> Mapping[str, Default]:
        short = SHORT_TRAJECTORY if max(config.sampling_steps) <= 2 else {}
        by_adamw = config.use_8bit_adam or config.whole_student or config.optimizer == "adamw"
        return {**short, **(ADAMW_TRAJECTORY if by_adamw else {})}

    def batch(self, config: Config, scale: Scale) -> int:
        """So many that the steps of their longer phase are the usual number."""
        phases = [config.phases(expert) for expert in SUBFOLDER]
        steps = max(len(sigmas) - 1 for phase in phases for sigmas in phase.values())
        return max(1, super().batch(config, scale) // steps)

    def samples(self, config: Config, expert: Expert, distilled: bool) -> dict[str, SampleSpec]:
        """`trajectories`: the teacher's; `inputs <n>`: where the low expert's first of n sampling
        steps begins.
        """
        return {"trajectories": trajectories(config)} | inputs(config, expert, distilled, True)

    def costs(self, config: Config, expert: Expert) -> dict[Role, UpdateCost]:
        lengths = [len(sigmas) - 1 for sigmas in config.phases(expert).values()]
        steps = sum(lengths) / max(1, len(lengths))  # every step of a phase learns
        return {"student": UpdateCost(steps, 0, 0, config.max_train_steps)}


class ConsistencyRecipe(Recipe):
    """Consistency inside each student step, along the teacher's stored path."""

    defaults = CONSISTENCY
    group = flags.CONSISTENCY

    def samples(self, config: Config, expert: Expert, distilled: bool) -> dict[str, SampleSpec]:
        return {"trajectories": trajectories(config)}

    def costs(self, config: Config, expert: Expert) -> dict[Role, UpdateCost]:
        # The guided teacher's step and the student's own end point come before the graph.
        before = config.guided_evaluations(expert) + 1
        return {"student": UpdateCost(1, before, 0, config.max_train_steps)}


class DMDRecipe(Recipe):
    """Phased distribution matching with a critic."""

    defaults = DMD
    group = flags.DMD
    levers = ({"real_score": "guided"},)
    explained = DMD_REASONS

    def adjusted(self, config: Config) -> Mapping[str, Default]:
        if config.is_second_stage:
            return DMD_SECOND_STAGE
        return DMD_WARM_START if config.init_student_from else {}

    def batch(self, config: Config, scale: Scale) -> int:
        return 16  # rollouts and scores take more memory than a regression

    def roles(self, config: Config) -> tuple[Role, ...]:
        if config.real_score == "samples":
            return ("student", "fake_score", "real_score")
        return ("student", "fake_score")

    def samples(self, config: Config, expert: Expert, distilled: bool) -> dict[str, SampleSpec]:
        """`inputs <n>`: where the low phase of n sampling steps begins; `samples`: which the
        student is matched with; `anchors`: for the diversity loss.
        """
        solved = config.real_score != "guided"
        specs = inputs(config, expert, distilled, solved)
        if solved:
            specs["samples"] = trajectories(config)
        if config.diversity_weight > 0 and expert == "high":
            specs["anchors"] = specs.get("samples", anchors(config))
        return specs

    def costs(self, config: Config, expert: Expert) -> dict[Role, UpdateCost]:
        learned = config.real_score == "samples"
        diverse = config.diversity_weight > 0 and expert == "high"
        exits: list[float] = []  # for each sampling grid, evaluations before the exit step
        draws: list[int] = []
        for sigmas in config.phases(expert).values():
            count = len(sigmas) - 1
            first = 1 if diverse and count > 1 else 0
            exits.append((first + count - 1) / 2)
            draws.append(config.score_draws if sigmas[-1] > 0 else 1)
        before = sum(exits) / len(exits)
        drawn = sum(draws) / len(draws)
        judge = 1 if learned or config.score_guidance(expert) == 1 else 2
        critic_updates = config.critic_warmup_steps + config.critic_updates * config.max_train_steps
        judged = judge * (2 if config.real_score == "paired" else 1)
        student = UpdateCost(1 + diverse, before + judged + 1, judge, config.max_train_steps)
        costs: dict[Role, UpdateCost] = {"student": student}
        costs["fake_score"] = UpdateCost(drawn, before + 1, 0, critic_updates)
        if learned:
            costs["real_score"] = UpdateCost(drawn, 0, 0, critic_updates)
        return costs


RECIPES: dict[str, Recipe] = {
    "dmd": DMDRecipe(),
    "trajectory": TrajectoryRecipe(),
    "consistency": ConsistencyRecipe(),
}


def recipe_of(config: Config) -> Recipe:
    """The recipe that `--method` names."""
    return RECIPES[config.method]


def reads_all_prompts(config: Config) -> bool:
    """Whether an expert begins with fresh noise, whose prompts are drawn from all, and not with
    stored samples.
    """
    recipe = recipe_of(config)
    return any(not recipe.samples(config, expert, distilled=True) for expert in config.experts)
