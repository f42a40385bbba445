"""How to use a student in other programs, for the README of its folder."""

from __future__ import annotations

from wan_distill.layout import LORA_FILE, RunFolder
from wan_distill.results.workflow_nodes import first_step_of_low
from wan_distill.results.workflows import COMFYUI_TOKENS, comfyui_can
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.schedulers import older_diffusers

# Of ComfyUI's template video_wan2_2_14B_t2v, where its 4-step LoRAs are on.
TEMPLATE = (4, 5.0, 2)  # steps, shift, first step of the low expert
TRAIN_STEPS = 1000


def elsewhere(config: Config, info: TeacherInfo, files: RunFolder) -> list[str]:
    """Paragraphs about older diffusers, ComfyUI and WanVideoWrapper; none of a whole student."""
    if config.whole_student:
        return []
    parts = [older_diffusers(config.flow_shift, config.grid_steps)]
    if config.max_sequence_length != COMFYUI_TOKENS:
        return [
            *parts,
            f"**Not for ComfyUI:** it pads every prompt to {COMFYUI_TOKENS} tokens, and this "
            f"student was trained with {config.max_sequence_length} "
            "(`--max_sequence_length`). Its clips would be wrong there, and in every other program "
            "that pads so.",
        ]
    parts.append(comfyui(config, info, files if comfyui_can(config, info) else None))
    if comfyui_can(config, info) and files.wrapper_workflow.exists():
        parts.append(
            f"ComfyUI-WanVideoWrapper: open `{files.wrapper_workflow.name}`. Its scheduler is "
            "`flowmatch_distill`; the one that is called `euler` there visits other sigmas and is "
            "wrong."
        )
    return parts


def comfyui(config: Config, info: TeacherInfo, files: RunFolder | None) -> str:
    """The settings of ComfyUI's nodes with which it samples as this student was trained.

    Args:
        files: the output folder, where it has a workflow.
    """
    steps, split = config.grid_steps, first_step_of_low(config)
    parts = []
    if files is not None and files.workflow.exists():
        names = " and ".join(f"`{files.lora(e).name}`" for e in LORA_FILE if files.has_student(e))
        parts.append(
            f"ComfyUI: copy {names} to `models/loras` and open `{files.workflow.name}`, which has "
            "every setting below."
        )
    if (steps, config.flow_shift, split) == TEMPLATE:
        kind = "Image" if info.takes_picture else "Text"
        parts.append(
            f"ComfyUI's template *Wan 2.2 14B {kind} to Video* has the same settings where its "
            "4-step LoRAs are on: put these files in their place."
        )
    parts.append(
        "By hand: load each file into the model of its expert with strength 1, and set the shift "
        f"of each model to {config.flow_shift:g} (node ModelSamplingSD3). Sample with {steps} "
        "steps, cfg 1, sampler `euler` and scheduler `simple`"
    )
    if split == steps:
        parts[-1] += " in one KSampler node."
    else:
        parts[-1] += " in two KSampler (Advanced) nodes:"
        parts.append(
            f"1. high-noise expert: steps 0 to {split}; add noise: enable; return with leftover "
            f"noise: enable\n2. low-noise expert: steps {split} to {steps}; add noise: disable; "
            "return with leftover noise: disable"
        )
    if info.takes_picture:
        parts.append(
            "The picture goes through the node WanImageToVideo (`start_image`), whose three "
            "outputs are what the samplers are given; no CLIP vision model is needed."
        )
    for fewer in config.sampling_steps:
        if fewer != steps:
            low = first_step_of_low(config, fewer)
            begins = f", the low-noise expert from step {low}" if low < fewer else ""
            parts.append(f"In {fewer} steps: the same with {fewer} instead of {steps}{begins}.")
    parts.append("Any other scheduler, shift, cfg or split gives other clips.")
    if TRAIN_STEPS % steps:
        parts[-1] += f" (`simple` itself rounds: at {steps} steps its sigmas are up to 0.0007 off.)"
    return "\n\n".join(parts)
