"""Refuses what cannot work: ranges, settings against each other and against the teacher."""

from __future__ import annotations

import dataclasses
import math

from wan_distill.errors import UsageError
from wan_distill.maths.sigmas import expert_of, steps_of
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.job import LORA_TARGETS
from wan_distill.settings.recipes import recipe_of

POSITIVE = (
    "gpu_hour_price",
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_trajectories",
    "teacher_steps",
    "rank",
    "lora_alpha",
    "flow_shift",
    "teacher_shift",
    "max_sequence_length",
    "learning_rate",
    "max_grad_norm",
    "adam_epsilon",
    "sample_batch_size",
    "checkpointing_steps",
    "logging_steps",
    "eval_samples",
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


def check_all(config: Config, teacher: TeacherInfo) -> None:
    """Raises UsageError where a resolved `config` cannot work with `teacher`."""
    check_values(config)
    check_sides(config, teacher.side_multiple)
    check_student_layers(config, teacher)
    check_schedule(config, teacher)


def check_values(config: Config) -> None:
    """Ranges that hold for every teacher. Raises UsageError."""
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name} {value}: must be a finite number")
        if value is None or isinstance(value, (str, tuple)):
            continue
        if name in POSITIVE and not value > 0:
            raise UsageError(f"--{name} {value}: must be greater than 0")
        if name in FRACTIONS and not 0 <= value < 1:
            raise UsageError(f"--{name} {value}: must be at least 0 and below 1")
        if name in NOT_NEGATIVE and value < 0:
            raise UsageError(f"--{name} {value}: must not be negative")
        if name.removeprefix("real_score_") in ("guidance_scale", "guidance_scale_2") and value < 1:
            raise UsageError(f"--{name} {value}: guidance starts at 1, which is off")
    for name in ("gpu", "plan_json"):
        if getattr(config, name) is not None and not config.dry_run:
            raise UsageError(
                f"--{name} {getattr(config, name)}: is for the plan; give --dry_run too, or leave "
                "it out"
            )
    if config.mixed_precision == "fp16":
        raise UsageError(
            "--mixed_precision fp16: a quarter of the first gradients would be exactly 0, since "
            "fp16 has no room for numbers below 6e-8; use bf16, or no for float32"
        )
    if config.checkpoints_total_limit is not None and config.checkpoints_total_limit < 1:
        raise UsageError(
            f"--checkpoints_total_limit {config.checkpoints_total_limit}: keep at least 1 to "
            "resume from"
        )
    if foreign := [name for name in config.lora_layers if name not in LORA_TARGETS]:
        raise UsageError(
            f"--lora_layers {','.join(config.lora_layers)}: Wan's blocks have no "
            f"{foreign[0] or 'such'} "
            f"layer; choose from {','.join(LORA_TARGETS)}"
        )
    if config.score_sigma_max is not None and not 0.9 <= config.score_sigma_max < 1:
        raise UsageError(
            f"--score_sigma_max {config.score_sigma_max}: must be at least 0.9 and below 1 (DMD2: "
            "0.98)"
        )
    if config.num_frames < 1 or config.num_frames % 4 != 1:
        near = max(1, (config.num_frames - 1) // 4 * 4 + 1)
        raise UsageError(
            f"--num_frames {config.num_frames}: Wan needs 4k+1 frames; use {near} or {near + 4}"
        )
    if config.max_sequence_length < 2:
        raise UsageError(
            f"--max_sequence_length {config.max_sequence_length}: need room for one word and its "
            "end mark"
        )


def check_sides(config: Config, multiple: int) -> None:
    """Height and width are whole patches. Raises UsageError."""
    for name in ("height", "width"):
        side = getattr(config, name)
        if side < multiple or side % multiple:
            near = max(multiple, side // multiple * multiple)
            raise UsageError(
                f"--{name} {side}: Wan's patches need a multiple of {multiple}; use {near} or "
                f"{near + multiple}"
            )


def check_student_layers(config: Config, teacher: TeacherInfo) -> None:
    """Raises UsageError where a shallower student cannot be made, or not in this way."""
    layers, total = config.student_layers, teacher.transformer["num_layers"]
    if layers is None:
        return
    if not 1 <= layers <= total:
        raise UsageError(
            f"--student_layers {layers}: {teacher.name} has {total} blocks; give 1 to {total}"
        )
    if recipe_of(config).needs_teacher:
        raise UsageError(
            f"--student_layers {layers}: --method {config.method} needs the teacher beneath the "
            "student; "
            "use --method trajectory"
        )
    clashing = [
        flag
        for flag, given in (
            ("--init_student_from", config.init_student_from),
            ("--offload", config.offload),
            ("--shard", config.shard),
            (f"--base_precision {config.base_precision}", config.base_precision != "bf16"),
            ("--no-save_merged", not config.save_merged),
        )
        if given
    ]
    if clashing:
        raise UsageError(
            f"--student_layers {layers}: all weights are trained and a pipeline is written; leave "
            f"{clashing[0]} out"
        )


def check_schedule(config: Config, teacher: TeacherInfo) -> None:
    """Grids are nested; each expert that is trained owns a step, and owns it at inference too.
    Raises UsageError.
    """
    for steps in config.sampling_steps:
        if config.grid_steps % steps:
            listing = ",".join(map(str, config.sampling_steps))
            raise UsageError(
                f"--sampling_steps {listing}: the sigmas of {steps} steps "
                f"are not among those of {config.grid_steps}; use divisors of the largest, such as "
                "2,4,8"
            )
    boundary = config.boundary_ratio
    if boundary is None:
        if config.expert == "low":
            raise UsageError(
                f"--expert low: {teacher.name} has a single transformer; leave --expert out"
            )
        return
    if teacher.boundary_ratio is None:
        raise UsageError(
            f"--boundary_ratio {boundary}: {teacher.name} has a single transformer; leave it out"
        )
    if not 0 < boundary < 1:
        raise UsageError(
            f"--boundary_ratio {boundary}: must lie between 0 and 1 (Wan2.2 T2V: 0.875)"
        )
    if config.score_sigma_max <= boundary:
        raise UsageError(
            f"--score_sigma_max {config.score_sigma_max}: leaves the high expert, which works "
            "above "
            f"{boundary:g}, no score; raise it"
        )
    for steps in config.sampling_steps:
        sigmas = config.sigmas(steps)
        for sigma in sigmas[:-1]:
            if abs(sigma - boundary) < 1e-4:
                raise UsageError(
                    f"--flow_shift {config.flow_shift:g} with {steps} steps: sigma {sigma:.4f} "
                    "sits on the boundary "
                    f"{boundary:g}, where rounding picks the expert; choose another --flow_shift, "
                    "such as 5"
                )
            if expert_of(sigma, boundary) != expert_of(sigma, teacher.boundary_ratio):
                raise UsageError(
                    f"--boundary_ratio {boundary:g}: the step at sigma {sigma:.4f} would be run by "
                    "the other expert at "
                    "inference, where the teacher's pipeline splits at "
                    f"{teacher.boundary_ratio:g}; "
                    "leave --boundary_ratio out"
                )
    for expert in config.experts:
        if not any(
            steps_of(expert, config.sigmas(steps), boundary) for steps in config.sampling_steps
        ):
            listing = ", ".join(f"{sigma:.4f}" for sigma in config.sigmas()[:-1])
            other = "high" if expert == "low" else "low"
            raise UsageError(
                f"--expert {config.expert}: the {expert} expert owns none of the steps (sigmas "
                f"{listing}; "
                f"boundary {boundary:g}); use --expert {other}, more --sampling_steps or another "
                "--flow_shift"
            )
