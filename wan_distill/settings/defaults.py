"""The defaults, one setting a line, with their reasons: rules for every teacher, the embedded one
among them.

Rates follow from the teacher's width and the optimizer, batches from the tokens of a clip
(settings/scale.py). Only sizes and counts differ between teachers that a CPU can run and larger
ones. How well the rules carry over was measured on a family of teachers (docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wan_distill.settings.scale import Scale


@dataclass(frozen=True)
class Default:
    """One setting's default: a value, or a function of the teacher's scale."""

    rule: Any
    reason: str

    def value(self, scale: Scale) -> Any:
        return self.rule(scale) if callable(self.rule) else self.rule


def sized(small: Any, large: Any, picture: Any = None) -> Callable[[Scale], Any]:
    """A size or count: `small` where a CPU can run the teacher, otherwise `large`.

    Args:
        picture: in place of `small` where clips begin with a picture; None: the same.
    """
    with_picture = small if picture is None else picture
    return lambda scale: large if scale.is_large else with_picture if scale.takes_picture else small


def by_captions(small: int, large: int, picture: int | None = None) -> Callable[[Scale], int]:
    """The same, a count that is `small` for each 120 captions that a tiny teacher comes with."""
    usual = sized(small, large, picture)
    return lambda scale: usual(scale) * (1 if scale.is_large else scale.caption_sets)


def by_width(value: float, power: float = 1.0) -> Callable[[Scale], float]:
    """A rate that is `value` at width 128 and falls as 1 / width ** power: 0.5 for Muon."""
    return lambda scale: scale.by_width(value, power)


EVERY_METHOD: dict[str, Default] = {
    "mixed_precision": Default(
        lambda scale: "no" if scale.fits_float32 else "bf16",
        "14 billion float32 weights do not fit one card",
    ),
    "gradient_checkpointing": Default(
        lambda scale: scale.is_large, "activations of 81 frames do not fit otherwise"
    ),
    "save_merged": Default(sized(True, False), "another 57 GB on the disk"),
    "evaluate": Default(True, "a student whose quality nobody knows is of no use"),
    "evaluation": Default(
        sized("sets", "pairs"), "hundreds of guided samples of A14B take days; sets show more"
    ),
    "eval_samples": Default(sized(512, 16), "sets need hundreds; pairs show the same with a few"),
    "sample_batch_size": Default(
        lambda scale: scale.at_once(32, tokens=8192), "more outgrow a CPU's caches"
    ),
    "num_trajectories": Default(
        by_captions(1024, 256, picture=512), "fewer are learned by heart; more cost updates"
    ),
    "checkpointing_steps": Default(sized(100, 20), "about half an hour of work at most is lost"),
    "validation_steps": Default(sized(100, 50), "previews take at most 5 % of the run"),
    "logging_steps": Default(sized(10, 2), "means of ten updates are smooth enough to read"),
    "monitor_steps": Default(sized(100, 50), "the best of these checks is exported"),
    "monitor_samples": Default(sized(32, 8), "two seeds per prompt; each costs a sampled clip"),
    "lora_alpha": Default(64.0, "alpha / rank = 1"),
    "lr_warmup_steps": Default(10, "the first gradients tell little"),
    "optimizer": Default("adamw", "a matching loss was measured with no other"),
    # What other methods ignore has a value too, so that every run.json is complete.
    "critic_warmup_steps": Default(100, "the critic must know the student before it judges it"),
    "critic_updates": Default(2, "5 to 1 in DMD2; 2 suffice on the tiny teachers"),
    "fake_score_learning_rate": Default(by_width(1e-3), "the critic must keep up with the student"),
    "fake_score_lora_alpha": Default(64.0, "alpha / rank = 1"),
    "score_draws": Default(
        2, "the high phase's target is 100 times noisier than plain flow matching's"
    ),
    "real_score": Default(
        "samples",
        "guided scores belong to no distribution, so students slowly drift; those of samples need "
        "solved samples and a third adapter",
    ),
    "score_sigma_max": Default(
        0.98,
        "DMD2's, t = 980; raise it if clips grow light or dark: only near 1 can the score see a "
        "clip's brightness",
    ),
    "diversity_weight": Default(
        lambda scale: 0.0 if scale.takes_picture else 1.0,
        "matching alone lets samples of one prompt grow alike (DP-DMD); with a picture it does "
        "harm",
    ),
    "solver_points": Default(24, "about as many as the teacher's own steps"),
}

TRAJECTORY = EVERY_METHOD | {
    "max_train_steps": Default(
        by_captions(200, 130, picture=300),
        "each sample is seen 3 to 9 times, and not learned by heart",
    ),
    "optimizer": Default("muon", "learns more where updates are few (docs/methods_measured.md)"),
    "learning_rate": Default(by_width(2.8e-3, power=0.5), "half and twice of it are no better"),
    "adam_beta1": Default(0.9, "a regression: the gradient's direction lasts"),
    "lr_scheduler": Default("cosine", "ends where the last updates average out"),
    "ema_decay": Default(0.0, "the cosine schedule already averages"),
    "ema_start": Default(0, "the first updates are far from the end"),
}
# Muon takes matrices only, and bitsandbytes has no 8-bit form of it.
ADAMW_TRAJECTORY: Mapping[str, Default] = {
    "optimizer": Default("adamw", "all weights, or 8-bit moments"),
    "learning_rate": Default(by_width(4e-3), "the largest that stays smooth"),
}
SHORT_TRAJECTORY: Mapping[str, Default] = {
    "max_train_steps": Default(
        by_captions(600, 200, picture=300), "long steps are harder to regress"
    ),
    "num_trajectories": Default(
        by_captions(2048, 256, picture=1024), "with fewer, small shapes are lost"
    ),
}

DMD = EVERY_METHOD | {
    "max_train_steps": Default(sized(120, 60), "matching converges in hundreds of updates"),
    "learning_rate": Default(by_width(7e-4), "no larger than the critic can follow"),
    "adam_beta1": Default(0.9, "large rates need momentum; 0 in DMD2"),
    "lr_scheduler": Default("cosine", "ends where the last updates average out"),
    "ema_decay": Default(0.95, "single updates of a matching loss are noisy"),
    "ema_start": Default(20, "the first updates are far from the end"),
    "checkpointing_steps": Default(sized(50, 10), "a student update takes 3 to 6 of all roles"),
    "validation_steps": Default(sized(40, 20), "the same"),
    "logging_steps": Default(2, "the same"),
    "monitor_steps": Default(sized(20, 10), "the best of these checks is exported"),
    "monitor_samples": Default(
        sized(256, 8), "a matching loss says nothing about quality: look closely"
    ),
}
# What changes where a student is refined (--init_student_from): at full rate, or judged by a critic
# that does not know that student yet, the first updates undo what it began with.
DMD_WARM_START: dict[str, Default] = {
    "max_train_steps": Default(sized(30, 16), "a refinement: most of the way is done"),
    # The exported average follows the last third: over more of so few it would lag behind them.
    "ema_start": Default(sized(20, 10), "the first updates are far from the end"),
    "lr_warmup_steps": Default(sized(10, 5), "a third of the updates"),
    "learning_rate": Default(
        by_width(2e-5), "a student that is near its teacher soon goes beyond it"
    ),
    "critic_warmup_steps": Default(sized(100, 30), "it must know the student it begins with"),
    "critic_updates": Default(1, "more were not better (benchmarks/frontier.py)"),
    "monitor_steps": Default(sized(5, 4), "the best of these checks is exported, soon passed by"),
}
# And where that student is the first stage's, which begins each clip as the teacher's from the same
# noise. One of another tool does not.
DMD_SECOND_STAGE: Mapping[str, Default] = DMD_WARM_START | {
    "real_score": Default("paired", "steadier on such a student, and without a third adapter"),
}
# Printed in the plan; None: the reason of the default.
DMD_REASONS: Mapping[str, str | None] = {
    "learning_rate": None,
    "real_score": None,
    "fake_score_learning_rate": None,
    "real_score_guidance_scale": "of guided scores; None = the teacher's own, S, and of paired "
    "2 S - 1: captions are obeyed better; lower it if colours saturate",
    "real_score_guidance_scale_2": "the same for the low expert",
    "negative_prompt": "what the teacher's score is guided away from, as in its own sampling",
    "critic_warmup_steps": None,
    "critic_updates": None,
    "score_sigma_max": None,
    "score_draws": None,
    "diversity_weight": None,
    "ema_decay": None,
    "adam_beta1": None,
    "max_grad_norm": "one bad rollout must not undo a hundred good ones",
}

CONSISTENCY = EVERY_METHOD | {
    "max_train_steps": Default(sized(500, 250), "each update sees a small part of a step"),
    "learning_rate": Default(by_width(2e-3), "the largest that stays smooth"),
    "adam_beta1": Default(0.9, "a regression: the gradient's direction lasts"),
    "lr_scheduler": Default("cosine", "ends where the last updates average out"),
    "ema_decay": Default(0.95, "the moving target makes single updates noisy"),
    "ema_start": Default(50, "the first updates are far from the end"),
}

# What --student_layers changes: all weights are trained, not an adapter.
WHOLE_STUDENT: Mapping[str, Default] = {
    "learning_rate": Default(by_width(1e-3), "whole weights move further than an adapter"),
    "save_merged": Default(True, "a shallower student is a pipeline of its own"),
}
