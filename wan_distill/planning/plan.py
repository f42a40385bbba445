"""The resolved plan of a run, in words, before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from wan_distill.data.first_frames import Prompt
from wan_distill.maths.sigmas import SUBFOLDER, expert_of, steps_of
from wan_distill.planning.disk import disk_needs
from wan_distill.planning.hardware import Hardware, hardware_of
from wan_distill.planning.levers import what_fits
from wan_distill.planning.memory import Estimate, estimate, host_needs, shape_of
from wan_distill.planning.parts import parts
from wan_distill.planning.picture_work import source_words
from wan_distill.planning.wording import count, duration, if_busy, operations, size
from wan_distill.planning.work import sample_work, solve_flops, update_work
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.recipes import recipe_of
from wan_distill.settings.scale import processes

SHOWN = 24  # characters of a setting's value


def describe_plan(
    stages: Sequence[Config],
    info: TeacherInfo,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    budget: Sequence[str] = (),
) -> str:
    """What will happen: teacher, clip, student sigmas and their experts, updates, roles, where
    things go.
    """
    config = stages[-1]
    lines = [*_teacher(config, info), *_student(config, info)]
    for number, stage in enumerate(stages, start=1):
        lines += _method(stage, f"{number}. " if len(stages) > 1 else "")
        lines += _updates(stage)
    each = ", each with its picture" if info.takes_picture else ""
    lines += [
        *budget,
        f"Prompts   {len(prompts)} to train on, {len(held_out)} held out for the evaluation{each}",
        *source_words(config, info),
        f"Output    {config.output_dir} (checkpoints every {config.checkpointing_steps} student "
        "updates)",
    ]
    return "\n".join(lines)


def _updates(config: Config) -> list[str]:
    at_once = config.train_batch_size * (1 if config.context_parallel else processes(config))
    total = at_once * config.gradient_accumulation_steps
    micro = f" ({at_once} at a time)" if total > config.train_batch_size else ""
    owned = {e: steps_of(e, config.sigmas(), config.boundary_ratio) for e in config.experts}
    return [
        f"  {expert:<7} {config.max_train_steps} updates of {total} samples{micro}; makes steps "
        f"{' and '.join(str(i + 1) for i in steps)} ({SUBFOLDER[expert]})"
        for expert, steps in owned.items()
    ]


def _teacher(config: Config, info: TeacherInfo) -> list[str]:
    kind = "two experts" if len(info.experts) == 2 else "one expert"
    split = "one transformer"
    if config.boundary_ratio is not None:
        split = f"high expert at sigma >= {config.boundary_ratio:g}, low below"
    latents = "x".join(map(str, info.latent_shape(config)))
    return [
        f"Teacher   {info.title} ({kind}; {split})",
        *(f"          changed: {words}" for words in info.changes.words()),
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


def _method(config: Config, number: str) -> list[str]:
    recipe = recipe_of(config)
    roles = ", ".join(recipe.roles(config)).replace("fake_score", "critic (fake_score)")
    lines = [f"Method    {number}{config.method}; roles on one frozen base: teacher, {roles}"]
    lines += [f"  note    {note}" for note in recipe.notes(config)]
    return lines + [
        f"  --{config.flag(name)} {_shown(getattr(config, name))}: {reason}"
        for name, reason in recipe.reasons(config).items()
    ]


def _shown(value: Any) -> str:
    """A setting's value, at most about as long as a word or two."""
    text = "(default)" if value is None else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


# ------------------------------------------------------------------------------- memory and time


def describe_needs(stages: Sequence[Config], info: TeacherInfo, prompts: int = 0) -> str:
    """Whether it fits, hours, dollars; then memory by kind, disk, work, and what fits which GPU.
    Loads no weights.

    Args:
        prompts: how many are encoded.
    """
    config, need = greatest_need(stages, info)
    hardware = hardware_of(config, info)
    lines = [*_decisive(stages, info, need, hardware, prompts), *_memory(config, info, need)]
    host = host_needs(config, info, need.trace)
    lines += [f"Host      {size(number)} of memory {what}" for what, number in host.items()]
    disk = disk_needs(stages, info, need.trace, prompts)
    lines += [f"Disk      {size(number)} {what}" for what, number in disk.items()]
    lines += _work(stages, info)
    if not info.embedded:
        lines.append("Cards     the largest clip that fits, with the exact base")
        lines += [
            f"  {card:<13}{fits or 'nothing tried fits; use several cards with --shard'}"
            for card, fits in what_fits(config, info).items()
        ]
    return "\n".join(lines)


def greatest_need(stages: Sequence[Config], info: TeacherInfo) -> tuple[Config, Estimate]:
    """The stage whose predicted peak of memory is the largest, and its estimate."""
    needs = [(stage, estimate(stage, info)) for stage in stages]
    return max(needs, key=lambda each: each[1].peak)


def _decisive(
    stages: Sequence[Config], info: TeacherInfo, need: Estimate, hardware: Hardware, prompts: int
) -> list[str]:
    """Does it fit, how long does it take, what does it cost?"""
    found = parts(stages, info, prompts)
    seconds = sum(part.seconds(hardware) for part in found)
    fits = "yes" if need.peak <= hardware.usable else "NO: choose from the lines under Cards"
    listing = ", ".join(f"{part.name} {duration(part.seconds(hardware))}" for part in found)
    lines = [
        f"On        {hardware.count} x {hardware.title}",
        f"Fits      {fits}; predicted peak {size(need.peak)} of {size(hardware.usable)} usable",
        f"Time      about {duration(seconds)}{if_busy(seconds, hardware.busy)}",
        f"          {listing}",
        f"          at {hardware.rate / 1e12:.3g} TFLOP/s per device ({hardware.reason})",
    ]
    if hardware.named:
        hours, price = hardware.count * seconds / 3600, stages[-1].gpu_hour_price
        lines.append(
            f"Cost      about ${hours * price:,.0f}: {hours:.1f} GPU-hours at ${price:g} "
            "(--gpu_hour_price)"
        )
    return lines


def _memory(config: Config, info: TeacherInfo, need: Estimate) -> list[str]:
    cost = need.trace
    tokens = shape_of(config, info).tokens
    return [
        f"Model     {len(info.experts)} x {count(cost.parameters)} parameters, one in memory at "
        f"a time; {tokens} tokens per sample; {count(cost.adapter)} trained per role",
        f"Memory    predicted peak {size(need.peak)} while an expert trains",
        *(f"  {name:<12}{size(value):>9}" for name, value in need.by_kind().items()),
    ]


def _work(stages: Sequence[Config], info: TeacherInfo) -> list[str]:
    costs = [estimate(stage, info).trace for stage in stages]
    solve = solve_flops(stages, info, costs[0])
    samples = sum(work.rows for work in sample_work(stages, info))
    lines = [f"Work      {operations(solve)} to solve {samples} samples, once"]
    for config, cost in zip(stages, costs, strict=True):
        batch = config.train_batch_size * config.gradient_accumulation_steps
        lines += [
            f"  {work.expert:<4} {work.role:<11} {operations(work.flops)} per update ({batch} "
            f"samples), {work.updates} updates"
            for work in update_work(config, cost)
        ]
    return lines


def plan_numbers(
    stages: Sequence[Config], info: TeacherInfo, prompts: int, cards: bool = True
) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, dollars.

    Args:
        prompts: how many are encoded.
        cards: whether to say what fits other cards too, which takes a while for a large teacher.
    """
    config, need = greatest_need(stages, info)
    hardware = hardware_of(config, info)
    found = parts(stages, info, prompts)
    seconds = sum(part.seconds(hardware) for part in found)
    hours = hardware.count * seconds / 3600
    return dict(
        config=stages[-1].to_json(),
        stages=[stage.to_json() for stage in stages],
        hardware=dataclasses.asdict(hardware),
        fits=need.peak <= hardware.usable,
        peak_bytes=need.peak,
        bytes_by_kind=need.by_kind(),
        host_bytes=host_needs(config, info, need.trace),
        disk_bytes=disk_needs(stages, info, need.trace, prompts),
        seconds=seconds,
        seconds_by_stage={part.name: part.seconds(hardware) for part in found},
        gpu_hours=hours,
        dollars=hours * config.gpu_hour_price if hardware.named else None,
        samples_to_solve=sum(work.rows for work in sample_work(stages, info)),
        cards=what_fits(config, info) if cards else {},
    )
