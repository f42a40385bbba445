"""The first lines of a run: what, from what, where, how long, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wan_distill.layout import RunFolder
from wan_distill.planning.hardware import Hardware
from wan_distill.planning.parts import parts
from wan_distill.planning.plan import greatest_need
from wan_distill.planning.wording import duration, if_busy, size
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo


def headline(
    stages: Sequence[Config], info: TeacherInfo, prompts: int, held_out: int, hardware: Hardware
) -> list[str]:
    """Of a job on `prompts` prompts, `held_out` further ones of which measure the student."""
    config = stages[-1]
    steps = " or ".join(map(str, config.sampling_steps))
    trained = f"LoRA of rank {config.rank}"
    if config.whole_student:
        trained = f"{config.student_layers} blocks, all weights"
    seconds = sum(part.seconds(hardware) for part in parts(stages, info, prompts + held_out))
    hours = hardware.count * seconds / 3600
    cost = "no GPU to pay for"
    if hardware.is_gpu:
        price = config.gpu_hour_price
        cost = f"about ${hours * price:,.0f} at ${price:g} per GPU-hour (--gpu_hour_price)"
    plan = RunFolder(Path(config.output_dir)).plan
    peak = greatest_need(stages, info)[1].peak
    clip = f"{config.num_frames} frames of {config.height}x{config.width}"
    names = stages[0].experts  # a later stage may refine some of them only
    experts = " and ".join(names) + (" experts" if len(names) > 1 else " expert")
    return [
        f"Student   {steps} steps without guidance, {clip}; {trained}; {config.method_title}",
        f"Teacher   {info.title} ({experts}); {prompts} prompts, {held_out} more to measure with",
        f"On        {hardware.count} x {hardware.title}; predicted peak {size(peak)} of memory",
        f"Time      about {duration(seconds)} in all, predicted"
        f"{if_busy(seconds, hardware.busy)}; {cost}",
        f"Output    {config.output_dir} (the whole plan: {plan.name}, or --dry_run)",
    ]
