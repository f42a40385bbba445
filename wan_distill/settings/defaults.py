"""The defaults, one setting a line, with their reasons: for the embedded teacher and for real ones.

Sizes of the embedded teacher are those it was trained with; its rates and counts were measured on
it (docs/methods.md). Those of real teachers follow published recipes and A14B's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from wan_distill.settings.config import WAN_NEGATIVE_PROMPT


class Default(NamedTuple):
    """One setting's default."""

    embedded: Any
    real: Any
    reason: str


EVERY_METHOD: dict[str, Default] = {
    "method": Default("trajectory", "dmd", "measured on the tiny teacher; published for real ones"),
    "height": Default(64, 480, "the smaller size that Wan2.2 was trained at"),
    "width": Default(64, 832, "the same"),
    "num_frames": Default(17, 81, "five seconds at 16 frames per second"),
    "max_sequence_length": Default(16, 512, "tokens that the teacher was trained with"),
    "negative_prompt": Default("", WAN_NEGATIVE_PROMPT, "what the teacher is sampled with"),
    "mixed_precision": Default("no", "bf16", "14 billion float32 weights do not fit one card"),
    "gradient_checkpointing": Default(False, True, "activations of 81 frames do not fit otherwise"),
    "save_merged": Default(True, False, "another 57 GB on the disk"),
    "evaluate": Default(True, True, "a student whose quality nobody knows is of no use"),
    "evaluation": Default("sets", "pairs", "hundreds of guided samples of A14B take days"),
    "eval_samples": Default(512, 16, "sets need hundreds; pairs show the same with a few"),
    "train_batch_size": Default(32, 1, "one clip of 32,760 tokens fills the arithmetic of a GPU"),
    "sample_batch_size": Default(64, 1, "the same"),
    "checkpointing_steps": Default(250, 50, "about half an hour of work at most is lost"),
    "validation_steps": Default(200, 100, "previews take at most 5 % of the run"),
    "logging_steps": Default(10, 10, "means of ten updates are smooth enough to read"),
    "monitor_steps": Default(200, 50, "the best of these checks is exported"),
    "monitor_samples": Default(32, 8, "two seeds per prompt; each costs a sampled clip"),
    # What other methods ignore has a value too, so that every run.json is complete.
    "critic_warmup_steps": Default(
        100, 100, "the critic must know the student before it judges it"
    ),
    "critic_updates": Default(5, 5, "5 critic updates per student update, as in DMD2"),
    "fake_score_learning_rate": Default(
        2e-5, 2e-5, "half the student's rate keeps up, with 5 to 1"
    ),
    "fake_score_lora_alpha": Default(64.0, 64.0, "alpha / rank = 1"),
    "score_draws": Default(2, 2, "the high phase's target is noisy"),
    "real_score": Default("guided", "guided", "as published: nothing more to solve"),
    "score_sigma_max": Default(0.98, 0.98, "DMD2 compares scores at t from 20 to 980"),
    "diversity_weight": Default(0.05, 0.05, "DP-DMD's value"),
    "solver_points": Default(48, 48, "about as many as the teacher's own steps"),
}

TRAJECTORY = EVERY_METHOD | {
    "max_train_steps": Default(600, 2000, "each sample and step is seen 2 to 10 times"),
    "learning_rate": Default(2e-3, 1e-4, "the largest that stays smooth; LoRA's usual one"),
    "num_trajectories": Default(1024, 2000, "fewer are learned by heart"),
    "adam_beta1": Default(0.9, 0.9, "a regression: the gradient's direction lasts"),
    "lr_scheduler": Default("cosine", "cosine", "ends where the last updates average out"),
    "ema_decay": Default(0.0, 0.99, "cosine already averages on the tiny teacher"),
    "ema_start": Default(0, 200, "the first updates are far from the end"),
    "lora_alpha": Default(64.0, 64.0, "alpha / rank = 1"),
}
# Long steps are harder to regress: after 600 updates, samples are a tenth too alike.
SHORT_TRAJECTORY: Mapping[str, Any] = {"max_train_steps": 900}

DMD = EVERY_METHOD | {
    "max_train_steps": Default(120, 400, "matching converges in hundreds of student updates"),
    "learning_rate": Default(7e-4, 5e-5, "no larger than the critic can follow"),
    "num_trajectories": Default(1024, 2000, "as for the other methods: sets are shared"),
    "adam_beta1": Default(0.9, 0.0, "0 as published; the tiny teacher's large rates need momentum"),
    "lr_scheduler": Default("cosine", "constant_with_warmup", "as published for real ones"),
    "ema_decay": Default(0.95, 0.99, "single updates of a matching loss are noisy"),
    "ema_start": Default(20, 200, "the first updates are far from the end"),
    "lora_alpha": Default(64.0, 8.0, "a smaller effect per update at A14B's width"),
    "fake_score_learning_rate": Default(1e-3, 2e-5, "the critic must keep up with the student"),
    "critic_updates": Default(2, 5, "5 to 1 in DMD2; 2 suffice on the tiny teacher"),
    "real_score": Default("samples", "guided", "samples give the better student, and cost solving"),
    "diversity_weight": Default(1.0, 0.05, "matching alone lets samples of one prompt grow alike"),
    "train_batch_size": Default(16, 1, "rollouts and scores take more memory than a regression"),
    "checkpointing_steps": Default(50, 10, "a student update takes 3 to 6 updates of all roles"),
    "validation_steps": Default(40, 20, "the same"),
    "logging_steps": Default(2, 2, "the same"),
    "monitor_steps": Default(20, 50, "the best of these checks is exported"),
    "monitor_samples": Default(256, 8, "a matching loss says nothing about quality: look closely"),
}
# What changes where a student is refined (--init_student_from): at full rate, or judged by a critic
# that does not know that student yet, the first updates undo what it began with.
DMD_WARM_START: Mapping[bool, Mapping[str, Any]] = {
    True: {
        "max_train_steps": 45,
        "learning_rate": 1e-4,
        "critic_warmup_steps": 200,
        "critic_updates": 3,
        "monitor_steps": 15,
    },
    False: {"learning_rate": 5e-6, "real_score": "samples"},
}
DMD_REASONS: Mapping[str, str] = {  # printed in the plan
    "learning_rate": "no larger than the critic can follow; lower where a student is refined",
    "real_score": "a guided score belongs to no distribution, so students slowly drift; samples' "
    "scores need solved samples and a third adapter",
    "fake_score_learning_rate": "the critic must keep up with the student",
    "real_score_guidance_scale": "of guided scores; None = the teacher's own; lower it if colours "
    "saturate",
    "real_score_guidance_scale_2": "the same for the low expert",
    "negative_prompt": "what the teacher's score is guided away from, as in its own sampling",
    "critic_warmup_steps": "critic updates before the student's first: it must know the student",
    "critic_updates": "critic updates per student update, so that it follows: 5 in DMD2",
    "score_sigma_max": "only near 1 can the score see a clip's brightness: raise it if clips grow "
    "light or dark",
    "score_draws": "the high phase's target is 100 times noisier than plain flow matching's",
    "diversity_weight": "matching alone lets samples of one prompt grow alike (DP-DMD)",
    "ema_decay": "single updates of a matching loss are noisy",
    "adam_beta1": "0 as published: the critic's direction turns (DMD2)",
    "max_grad_norm": "one bad rollout must not undo a hundred good ones",
}

CONSISTENCY = EVERY_METHOD | {
    "max_train_steps": Default(500, 3000, "each update sees a small part of a step"),
    "learning_rate": Default(2e-3, 1e-5, "the target moves with the student"),
    "num_trajectories": Default(1024, 1000, "fewer are learned by heart"),
    "adam_beta1": Default(0.9, 0.9, "a regression: the gradient's direction lasts"),
    "lr_scheduler": Default("cosine", "constant_with_warmup", "as published for real ones"),
    "ema_decay": Default(0.95, 0.99, "the moving target makes single updates noisy"),
    "ema_start": Default(50, 200, "the first updates are far from the end"),
    "lora_alpha": Default(64.0, 64.0, "alpha / rank = 1"),
    "solver_points": Default(24, 48, "about as many as the teacher's own steps"),
}

# What --student_layers changes: all weights are trained, not an adapter.
WHOLE_STUDENT: Mapping[str, Default] = {
    "learning_rate": Default(1e-3, 2e-5, "whole weights move further than an adapter at one rate"),
    "save_merged": Default(True, True, "a shallower student is a pipeline of its own"),
}
