"""The ranges of single numbers, whatever the teacher."""

from __future__ import annotations

import dataclasses
import math

from wan_distill.errors import UsageError
from wan_distill.settings.config import Config

POSITIVE = (
    "gpu_hour_price",
    "budget",
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_trajectories",
    "teacher_steps",
    "solver_steps",
    "rank",
    "lora_alpha",
    "flow_shift",
    "teacher_shift",
    "max_sequence_length",
    "learning_rate",
    "refine_steps",
    "refine_learning_rate",
    "max_grad_norm",
    "adam_epsilon",
    "sample_batch_size",
    "checkpointing_steps",
    "logging_steps",
    "fps",
    "critic_updates",
    "fake_score_learning_rate",
    "fake_score_lora_alpha",
    "score_draws",
    "solver_points",
    "huber_c",
    "monitor_samples",
    "nonfinite_limit",
)


FRACTIONS = ("adam_beta1", "adam_beta2", "ema_decay")


NOT_NEGATIVE = (
    "critic_warmup_steps",
    "diversity_weight",
    "seed",
    "eval_seed",
    "lr_warmup_steps",
    "ema_start",
    "adam_weight_decay",
    "monitor_steps",
    "validation_steps",
)

LAST_PORT = 65535
LARGEST_FPS = 1000


def check_fps(value: int) -> None:
    """Raises UsageError where no video is written with so many frames per second."""
    if value > LARGEST_FPS:
        raise UsageError(f"--fps {value}: no player shows so many; give {LARGEST_FPS} at most")


def check_values(config: Config) -> None:
    """Ranges that hold for every teacher. Raises UsageError."""
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name} {value}: must be a finite number")
        if value is None or isinstance(value, (str, tuple)):
            continue
        if name in POSITIVE and not value > 0:
            raise UsageError(f"--{name} {value}: must be greater than 0")
        if name == "eval_samples" and value < 2:
            raise UsageError(f"--{name} {value}: diversity needs two samples of a prompt; give 2")
        if name == "fps":
            check_fps(value)
        if name == "serve" and not 0 <= value <= LAST_PORT:
            raise UsageError(f"--{name} {value}: is no port; give one from 1024 to {LAST_PORT}")
        if name in FRACTIONS and not 0 <= value < 1:
            raise UsageError(f"--{name} {value}: must be at least 0 and below 1")
        if name in NOT_NEGATIVE and value < 0:
            raise UsageError(f"--{name} {value}: must not be negative")
        if name.removeprefix("real_score_") in ("guidance_scale", "guidance_scale_2") and value < 1:
            raise UsageError(f"--{name} {value}: guidance starts at 1, which is off")
