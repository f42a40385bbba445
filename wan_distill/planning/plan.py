"""The resolved plan of a run, in words, before anything heavy is loaded: what, how big, how long,
and does it fit.
"""

from __future__ import annotations

from wan_distill.maths.sigmas import SUBFOLDER, expert_of, steps_of
from wan_distill.planning import needs, trace
from wan_distill.planning.needs import _scaled, _size, disk_needs, what_fits
from wan_distill.settings.config import Config
from wan_distill.settings.recipes import REASONS


def describe_plan(config: Config, info, prompts: list[str], held_out: list[str]) -> str:
    """What will happen: teacher, clip, student sigmas and their experts, updates, roles, where
    things go.
    """
    kind = "the embedded tiny teacher" if info.embedded else f"{len(info.experts)} expert(s)"
    split = (
        "one transformer"
        if config.boundary is None
        else f"high expert at sigma >= {config.boundary:g}, low below"
    )
    lines = [
        f"Teacher   {info.source} ({kind}; {split})",
        f"          guided ODE: {config.teacher_steps} Euler steps, shift "
        f"{config.teacher_shift:g}, guidance "
        f"{config.guidance_scale:g} (high), {config.guidance_scale_2:g} (low)",
        f"Clip      {config.num_frames} frames of {config.height}x{config.width}, latents "
        f"{'x'.join(map(str, info.latent_shape(config)))}, text of {config.max_sequence_length} "
        "tokens",
        f"Student   {' or '.join(map(str, config.sampling_steps))} "
        f"step{'s' * (config.grid_steps > 1)}, "
        f"no guidance, shift {config.flow_shift:g}; "
        + (
            f"LoRA rank {config.rank} on a frozen {config.mixed_precision.replace('no', 'fp32')} "
            "base"
            if config.student_layers is None
            else f"{config.student_layers} of the teacher's {info.transformer['num_layers']} blocks, all weights trained"
        ),
    ]
    for steps in config.sampling_steps:
        sigmas = config.sigmas(steps)
        owners = [f"{s:.4f} {expert_of(s, config.boundary)}" for s in sigmas[:-1]]
        lines.append(f"  sigmas  {' | '.join(owners)} | {sigmas[-1]:.0f}")
    roles = ", ".join(config.roles).replace("fake_score", "critic (fake_score)")
    lines.append(f"Method    {config.method}; roles on one frozen base: teacher, {roles}")
    if 1 in config.sampling_steps and config.boundary is not None and config.method != "trajectory":
        lines.append(
            "  note    a single step is the high expert's, whose range ends far above all detail: "
            "for it "
            "--method trajectory is better by far (docs/methods.md)"
        )
    if config.method == "dmd":
        lines += [
            f"  --{name} {getattr(config, name)}: {reason}" for name, reason in REASONS.items()
        ]
    for expert in config.experts:
        owned = [i + 1 for i in steps_of(expert, config.sigmas(), config.boundary)]
        lines.append(
            f"  {expert:<7} {config.max_train_steps} updates of {config.train_batch_size} x "
            f"{config.gradient_accumulation_steps} samples, steps {owned} ({SUBFOLDER[expert]})"
        )
    lines += [
        f"Prompts   {len(prompts)} to train on, {len(held_out)} held out for the evaluation",
        f"Output    {config.output_dir} (checkpoints every {config.checkpointing_steps} updates)",
    ]
    return "\n".join(lines)


SHARE = 0.5  # of the measured matrix rate that training is assumed to reach


def describe_needs(config: Config, info) -> str:
    """Parameters, tokens, memory by kind, disk, arithmetic, time here, and what fits which card;
    loads no weights.
    """
    import torch

    from wan_distill.system.runtime import process_state

    need = needs.estimate(config, info, config.base_precision)
    cost, batch = need.trace, config.train_batch_size * config.gradient_accumulation_steps
    shape = needs.shape_of(config, info)
    device = process_state().device
    rate = trace.matrix_rate(device, shape.dtype)
    lines = [
        f"Model     {len(info.experts)} x {_count(cost.parameters)} parameters, one expert "
        "resident at a time; "
        f"{shape.tokens} tokens a sample; {_count(cost.adapter)} trained a role",
        f"Memory    predicted peak {_size(need.peak)} while an expert trains ({device.type} here)",
        *(f"  {name:<12}{_size(value):>9}" for name, value in need.by_kind().items()),
    ]
    lines += [
        f"Disk      {_size(size)} {what}" for what, size in disk_needs(config, info, cost).items()
    ]
    solve, updates = needs.arithmetic(config, info, cost)
    lines.append(f"Work      {_flops(solve)} to solve the samples that are stored, once")
    total = solve
    for role, (flops, count) in updates.items():
        total += flops * count * len(config.experts)
        lines.append(
            f"  {role:<11} {_flops(flops)} an update ({batch} samples), {count} updates an expert"
        )
    processes = process_state().num_processes
    lines.append(
        f"Time      about {_duration(total / (SHARE * rate * processes))} on {processes} x "
        f"{device.type}: "
        f"{_flops(total)} at {SHARE:.0%} of the matrix rate measured here ({rate / 1e12:.3g} "
        "TFLOP/s)"
    )
    if device.type == "cuda" and need.peak > (
        free := needs.USABLE * torch.cuda.mem_get_info(device)[1]
    ):
        lines.append(
            f"  warning  does not fit this card ({_size(free)} usable); choose from the lines below"
        )
    if not info.embedded:
        lines += ["Cards     the largest clip that fits, with the most exact base"]
        lines += [
            f"  {card:>3} GB   {fits or 'nothing tried fits; use several cards with --shard'}"
            for card, fits in what_fits(config, info).items()
        ]
    return "\n".join(lines)


def _count(number: float) -> str:
    return _scaled(number, {1e9: "B", 1e6: "M", 1e3: "K"})


def _flops(number: float) -> str:
    return _scaled(
        number, {1e18: " EFLOP", 1e15: " PFLOP", 1e12: " TFLOP", 1e9: " GFLOP", 1e6: " MFLOP"}
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.1f} minutes"
