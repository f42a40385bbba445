"""What a run writes, in bytes."""

from __future__ import annotations

from collections.abc import Sequence

from wan_distill.planning.memory import FP32, moments_of, shape_of
from wan_distill.planning.picture_work import pictures_read, prompts_read
from wan_distill.planning.trace import Trace
from wan_distill.planning.work import sample_work
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.recipes import recipe_of

BF16 = 2  # bytes of a number
# Of the kinds of `disk_needs`, those that go to --samples_dir where it is given.
SHARED = (
    *("for solved samples", "for encoded prompts", "for encoded pictures"),
    "for pictures that are made",
)


def disk_needs(
    stages: Sequence[Config], info: TeacherInfo, cost: Trace, prompts: int = 0
) -> dict[str, float]:
    """Bytes that this run writes, by kind: below --output_dir, but for those of `SHARED`.

    Args:
        cost: of any stage.
        prompts: how many there are, each with its picture where the teacher takes some.
    """
    config = stages[-1]
    adapter = FP32 * cost.adapter
    latents = FP32 * shape_of(config, info).latent_values
    # Each stage's folder has both experts, refined or not.
    experts = len(stages[0].experts)
    exported = experts * sum(1 if c.lora_dtype == "float32" else 0.5 for c in stages)
    stored = sum(work.rows * len(work.spec.stored) for work in sample_work(stages, info))
    needs = {
        "for checkpoints": float(sum(map(_checkpoint_tensors, stages)) * adapter),
        "for the exported LoRA files": float(exported * adapter),
        "for solved samples": float(stored * latents),
    }
    text = config.max_sequence_length * info.transformer["text_dim"]
    number = FP32 if config.mixed_precision == "no" else BF16
    needs["for encoded prompts"] = float(prompts_read(stages, prompts) * text * number)
    if info.takes_picture:
        pixels = 3 * config.height * config.width
        pictures = pictures_read(stages, info, prompts)
        needs["for encoded pictures"] = float(pictures * (latents + FP32 * pixels))
        if info.picture_source is not None:  # of the same size: solved, then kept as pictures
            needs["for pictures that are made"] = float(pictures * (latents + pixels))
    if config.save_merged:
        needs["for the merged pipeline"] = len(info.experts) * cost.base_bytes
    for name, matrix in (("comfyui", BF16), ("comfyui-fp8", 1)):
        if name in config.export:
            size = matrix * cost.matrices + BF16 * (cost.parameters - cost.matrices)
            needs[f"for --export {name}"] = float(len(info.experts) * size)
    return needs


def _checkpoint_tensors(config: Config) -> float:
    """Sets of one role's tensors in all checkpoints of one stage."""
    limit = config.checkpoints_total_limit
    checkpoints = 1 + (limit or config.max_train_steps // config.checkpointing_steps)
    roles = len(recipe_of(config).roles(config))
    each = roles * (1 + moments_of(config)) + (config.ema_decay > 0)
    return checkpoints * len(config.experts) * each
