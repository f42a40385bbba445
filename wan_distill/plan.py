"""The resolved plan of a run, in words, before anything heavy is loaded."""

from __future__ import annotations

from wan_distill.config import REASONS, Config
from wan_distill.schedule import SUBFOLDER, expert_of, steps_of


def describe_plan(config: Config, info, prompts: list[str], held_out: list[str]) -> str:
    """What will happen: teacher, clip, student sigmas and their experts, updates, roles, where things go."""
    kind = "the embedded tiny teacher" if info.embedded else f"{len(info.experts)} expert(s)"
    split = "one transformer" if config.boundary is None else f"high expert at sigma >= {config.boundary:g}, low below"
    lines = [
        f"Teacher   {info.source} ({kind}; {split})",
        f"          guided ODE: {config.teacher_steps} Euler steps, shift {config.teacher_shift:g}, guidance "
        f"{config.guidance_scale:g} (high), {config.guidance_scale_2:g} (low)",
        f"Clip      {config.num_frames} frames of {config.height}x{config.width}, latents "
        f"{'x'.join(map(str, info.latent_shape(config)))}, text of {config.max_sequence_length} tokens",
        f"Student   {' or '.join(map(str, config.sampling_steps))} steps, no guidance, shift {config.flow_shift:g}; "
        f"LoRA rank {config.rank} on a frozen {config.mixed_precision.replace('no', 'fp32')} base",
    ]
    for steps in config.sampling_steps:
        sigmas = config.sigmas(steps)
        owners = [f"{s:.4f} {expert_of(s, config.boundary)}" for s in sigmas[:-1]]
        lines.append(f"  sigmas  {' | '.join(owners)} | {sigmas[-1]:.0f}")
    roles = "student, critic (fake_score)" if config.method == "dmd" else "student"
    lines.append(f"Method    {config.method}; roles on one frozen base: teacher, {roles}")
    if config.method == "dmd":
        lines += [f"  --{name} {getattr(config, name)}: {reason}" for name, reason in REASONS.items()]
    for expert in config.experts:
        owned = [i + 1 for i in steps_of(expert, config.sigmas(), config.boundary)]
        lines.append(f"  {expert:<7} {config.max_train_steps} updates of {config.train_batch_size} x "
                     f"{config.gradient_accumulation_steps} samples, steps {owned} ({SUBFOLDER[expert]})")
    lines += [
        f"Prompts   {len(prompts)} to train on, {len(held_out)} held out for the evaluation",
        f"Output    {config.output_dir} (checkpoints every {config.checkpointing_steps} updates)",
    ]
    return "\n".join(lines)
