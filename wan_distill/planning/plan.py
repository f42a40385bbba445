"""The resolved plan of a run, in words, before anything heavy is loaded: what, how big, how long,
and does it fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wan_distill.maths.sigmas import SUBFOLDER, expert_of, steps_of
from wan_distill.planning.levers import what_fits
from wan_distill.planning.memory import USABLE, Estimate, estimate, shape_of
from wan_distill.planning.trace import matrix_rate
from wan_distill.planning.wording import count, duration, operations, size
from wan_distill.planning.work import disk_needs, sample_work, solve_flops, update_work
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.recipes import recipe_of
from wan_distill.system.runtime import process_state

SHARE = 0.5  # of the measured matrix rate that training is assumed to reach


def describe_plan(
    config: Config, info: TeacherInfo, prompts: Sequence[str], held_out: Sequence[str]
) -> str:
    """What will happen: teacher, clip, student sigmas and their experts, updates, roles, where
    things go.
    """
    lines = [*_teacher(config, info), *_student(config, info), *_method(config)]
    for expert in config.experts:
        owned = [i + 1 for i in steps_of(expert, config.sigmas(), config.boundary_ratio)]
        lines.append(
            f"  {expert:<7} {config.max_train_steps} updates of {config.train_batch_size} x "
            f"{config.gradient_accumulation_steps} samples, steps {owned} ({SUBFOLDER[expert]})"
        )
    lines += [
        f"Prompts   {len(prompts)} to train on, {len(held_out)} held out for the evaluation",
        f"Output    {config.output_dir} (checkpoints every {config.checkpointing_steps} student "
        "updates)",
    ]
    return "\n".join(lines)


def _teacher(config: Config, info: TeacherInfo) -> list[str]:
    kind = "the embedded tiny teacher" if info.embedded else f"{len(info.experts)} expert(s)"
    split = "one transformer"
    if config.boundary_ratio is not None:
        split = f"high expert at sigma >= {config.boundary_ratio:g}, low below"
    latents = "x".join(map(str, info.latent_shape(config)))
    return [
        f"Teacher   {info.source} ({kind}; {split})",
        f"          guided ODE: {config.teacher_steps} Euler steps, shift "
        f"{config.teacher_shift:g}, guidance {config.guidance_scale:g} (high), "
        f"{config.guidance_scale_2:g} (low)",
        f"Clip      {config.num_frames} frames of {config.height}x{config.width}, latents "
        f"{latents}, text of {config.max_sequence_length} tokens",
    ]


def _student(config: Config, info: TeacherInfo) -> list[str]:
    base = config.mixed_precision.replace("no", "fp32")
    trained = f"LoRA rank {config.rank} on a frozen {base} base"
    if config.whole_student:
        blocks = info.transformer["num_layers"]
        trained = f"{config.student_layers} of the teacher's {blocks} blocks, all weights trained"
    steps = " or ".join(map(str, config.sampling_steps))
    lines = [
        f"Student   {steps} step{'s' * (config.grid_steps > 1)}, no guidance, shift "
        f"{config.flow_shift:g}; {trained}"
    ]
    for number in config.sampling_steps:
        sigmas = config.sigmas(number)
        owners = [f"{s:.4f} {expert_of(s, config.boundary_ratio)}" for s in sigmas[:-1]]
        lines.append(f"  sigmas  {' | '.join(owners)} | {sigmas[-1]:.0f}")
    return lines


def _method(config: Config) -> list[str]:
    recipe = recipe_of(config)
    roles = ", ".join(recipe.roles(config)).replace("fake_score", "critic (fake_score)")
    lines = [f"Method    {config.method}; roles on one frozen base: teacher, {roles}"]
    lines += [f"  note    {note}" for note in recipe.notes(config)]
    return lines + [
        f"  --{name} {getattr(config, name)}: {reason}" for name, reason in recipe.reasons.items()
    ]


# ------------------------------------------------------------------------------- memory and time


def describe_needs(config: Config, info: TeacherInfo) -> str:
    """Parameters, tokens, memory by kind, disk, arithmetic, time here, and what fits which card;
    loads no weights.
    """
    need = estimate(config, info)
    lines = [*_memory(config, info, need)]
    lines += [
        f"Disk      {size(b)} {what}" for what, b in disk_needs(config, info, need.trace).items()
    ]
    lines += _work(config, info, need)
    if not info.embedded:
        lines.append("Cards     the largest clip that fits, with the most exact base")
        lines += [
            f"  {card:>3} GB   {fits or 'nothing tried fits; use several cards with --shard'}"
            for card, fits in what_fits(config, info).items()
        ]
    return "\n".join(lines)


def _memory(config: Config, info: TeacherInfo, need: Estimate) -> list[str]:
    cost, device = need.trace, process_state().device
    tokens = shape_of(config, info).tokens
    lines = [
        f"Model     {len(info.experts)} x {count(cost.parameters)} parameters, one expert resident "
        f"at a time; {tokens} tokens per sample; {count(cost.adapter)} trained per role",
        f"Memory    predicted peak {size(need.peak)} while an expert trains ({device.type} here)",
        *(f"  {name:<12}{size(value):>9}" for name, value in need.by_kind().items()),
    ]
    if device.type == "cuda":
        usable = USABLE * torch.cuda.mem_get_info(device)[1]
        if need.peak > usable:
            lines.append(
                f"  warning  does not fit this card ({size(usable)} usable); choose from the lines "
                "below"
            )
    return lines


def _work(config: Config, info: TeacherInfo, need: Estimate) -> list[str]:
    """Operations and hours. Processes share the samples to solve; each makes every update."""
    state = process_state()
    solve = solve_flops(config, info, need.trace)
    samples = sum(work.rows for work in sample_work(config, info))
    batch = config.train_batch_size * config.gradient_accumulation_steps
    lines = [f"Work      {operations(solve)} to solve {samples} samples, once"]
    train = 0.0
    for work in update_work(config, need.trace):
        train += work.flops * work.updates
        lines.append(
            f"  {work.expert:<4} {work.role:<11} {operations(work.flops)} per update ({batch} "
            f"samples), {work.updates} updates"
        )
    rate = matrix_rate(state.device, shape_of(config, info).dtype)
    together = state.num_processes if config.context_parallel else 1
    seconds = (solve / state.num_processes + train / together) / (SHARE * rate)
    lines.append(
        f"Time      about {duration(seconds)} on {state.num_processes} x {state.device.type}: "
        f"{operations(solve + train)} at {SHARE:.0%} of the matrix rate measured here "
        f"({rate / 1e12:.3g} TFLOP/s)"
    )
    return lines
