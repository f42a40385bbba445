"""Refuses what cannot work: ranges, settings against each other and against the teacher."""

from __future__ import annotations

from wan_distill.errors import UsageError
from wan_distill.maths.sigmas import Expert, expert_of, sigma_grid, steps_of
from wan_distill.settings.clip_sizes import check_clip, check_positions
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.job import LORA_TARGETS
from wan_distill.settings.operation import EXPORTS
from wan_distill.settings.ranges import check_values
from wan_distill.settings.recipes import recipe_of


def check_all(config: Config, teacher: TeacherInfo) -> None:
    """Raises UsageError where a resolved `config` cannot work with `teacher`."""
    check_values(config)
    check_single(config)
    check_pictures(config, teacher)
    check_clip(config, teacher.side_multiple)
    check_positions(config, teacher)
    check_student_layers(config, teacher)
    check_grids(config)
    check_boundary(config, teacher)


def check_single(config: Config) -> None:
    """Settings that only some values of make sense. Raises UsageError."""
    for name in ("gpu", "plan_json"):
        if getattr(config, name) is not None and not config.dry_run:
            raise UsageError(
                f"--{name} {getattr(config, name)}: is for the plan; give --dry_run too, or leave "
                "it out"
            )
    if unknown := [name for name in config.export if name not in EXPORTS]:
        raise UsageError(
            f"--export {','.join(config.export)}: there is no {unknown[0] or 'empty'} format; "
            f"choose from {','.join(EXPORTS)}"
        )
    if "diffusers" in config.export and not config.save_merged:
        raise UsageError("--export diffusers: contradicts --no-save_merged; leave one out")
    if config.critic_from_student and config.init_student_from is None:
        raise UsageError(
            "--critic_from_student: there is no LoRA to begin with; give --init_student_from"
        )
    if config.optimizer == "muon" != recipe_of(config).defaults["optimizer"].rule:
        raise UsageError(
            f"--optimizer muon: --method {config.method} has learning rates for adamw only; leave "
            "it out, or use --method trajectory"
        )
    if config.optimizer == "muon" and config.use_8bit_adam:
        raise UsageError("--use_8bit_adam: there is none for --optimizer muon; leave one out")
    if config.optimizer == "muon" and config.whole_student:
        raise UsageError(
            f"--optimizer muon: takes matrices only, and --student_layers {config.student_layers} "
            "trains all weights; leave --optimizer out"
        )
    if config.keep_attention and not config.gradient_checkpointing:
        raise UsageError(
            "--keep_attention: without --gradient_checkpointing everything is kept; give both, or "
            "leave it out"
        )
    if config.keep_attention and config.compile:
        raise UsageError(
            "--keep_attention: does not see into the blocks that --compile makes; leave one out"
        )
    for name in ("negative_prompt", "validation_prompt"):
        given = getattr(config, name) or ""
        if any("\ud800" <= character <= "\udfff" for character in given):
            raise UsageError(
                f"--{name} {given!a}: is no text of the terminal's encoding; retype it"
            )
    if config.validation_prompt and not config.validation_prompt.replace("|", "").strip():
        raise UsageError(
            f"--validation_prompt {config.validation_prompt!r}: holds no prompt; give one, or "
            "several separated by |"
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
            f"--lora_layers {','.join(config.lora_layers)}: no adapter goes to a "
            f"{foreign[0] or 'nameless'} layer; choose from {','.join(LORA_TARGETS)}"
        )
    if config.score_sigma_max is not None and not 0.9 <= config.score_sigma_max < 1:
        raise UsageError(
            f"--score_sigma_max {config.score_sigma_max}: must be at least 0.9 and below 1 (DMD2: "
            "0.98)"
        )


def check_pictures(config: Config, teacher: TeacherInfo) -> None:
    """Raises UsageError where a teacher is given what it does not learn from."""
    if config.images is not None and not teacher.takes_picture:
        raise UsageError(
            f"--images {config.images}: {teacher.name} is a text-to-video teacher, which takes no "
            "pictures; leave it out"
        )
    source = config.image_source
    if source is not None and not teacher.takes_picture:
        raise UsageError(
            f"--image_source {source}: {teacher.name} is a text-to-video teacher, which takes no "
            "pictures; leave it out"
        )
    if source is not None and config.images is not None:
        raise UsageError(
            f"--image_source {source}: makes pictures, and --images gives some; leave one out"
        )
    if config.prompts is not None and teacher.takes_picture and source is None:
        raise UsageError(
            f"--prompts {config.prompts}: {teacher.name} begins its clips with pictures, whose "
            "captions lie beside them; give --images instead, or --image_source too"
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
            "student; use --method trajectory"
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


def check_grids(config: Config) -> None:
    """The coarser sampling grids are nested in the finest. Raises UsageError."""
    for steps in config.sampling_steps:
        if config.grid_steps % steps:
            listing = ",".join(map(str, config.sampling_steps))
            raise UsageError(
                f"--sampling_steps {listing}: the sigmas of {steps} steps are not among those of "
                f"{config.grid_steps}; use divisors of the largest, such as 2,4,8"
            )


def check_boundary(config: Config, teacher: TeacherInfo) -> None:
    """Each expert that is trained owns a step, and owns it at inference too. Raises UsageError."""
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
            f"above {boundary:g}, no score; raise it"
        )
    for steps in config.sampling_steps:
        _check_owners(config, teacher, steps, boundary)
    for expert in config.experts:
        _check_owns_a_step(config, expert, boundary)


def _shift_beside(config: Config, steps: int, boundary: float) -> float:
    """A shift near the given one, with which no step sits on the boundary: 5 if it can be."""
    near = [5.0, *(config.flow_shift + sign * i / 10 for i in range(1, 30) for sign in (1, -1))]
    grids = {s: sigma_grid(steps, s)[:-1] for s in near if s > 0}
    return next(s for s, grid in grids.items() if min(abs(g - boundary) for g in grid) > 1e-3)


def _check_owners(config: Config, teacher: TeacherInfo, steps: int, boundary: float) -> None:
    """Raises UsageError where rounding, or another boundary, decides whose step it is."""
    for sigma in config.sigmas(steps)[:-1]:
        if abs(sigma - boundary) < 1e-4:
            raise UsageError(
                f"--flow_shift {config.flow_shift:g} with {steps} steps: sigma {sigma:.4f} "
                f"sits on the boundary {boundary:g}, where rounding picks the expert; choose "
                f"another --flow_shift, such as {_shift_beside(config, steps, boundary):g}"
            )
        if expert_of(sigma, boundary) != expert_of(sigma, teacher.boundary_ratio):
            raise UsageError(
                f"--boundary_ratio {boundary:g}: the step at sigma {sigma:.4f} would be run by "
                "the other expert at inference, where the teacher's pipeline splits at "
                f"{teacher.boundary_ratio:g}; leave --boundary_ratio out"
            )


def _check_owns_a_step(config: Config, expert: Expert, boundary: float) -> None:
    """Raises UsageError where `expert` has nothing to learn."""
    if any(steps_of(expert, config.sigmas(n), boundary) for n in config.sampling_steps):
        return
    listing = ", ".join(f"{sigma:.4f}" for sigma in config.sigmas()[:-1])
    other = "high" if expert == "low" else "low"
    raise UsageError(
        f"--expert {config.expert}: the {expert} expert owns none of the steps (sigmas {listing}; "
        f"boundary {boundary:g}); use --expert {other}, more --sampling_steps or another "
        "--flow_shift"
    )
