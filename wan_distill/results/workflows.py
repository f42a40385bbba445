"""Workflows of ComfyUI with everything filled in.

They are written as ComfyUI's API takes them (`POST /prompt`); its editor opens such files too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from wan_distill.layout import LORA_FILE, PICTURE, RunFolder
from wan_distill.maths.sigmas import Expert
from wan_distill.results.workflow_nodes import PROMPT, VAE, Nodes, Workflow, base_file, phases
from wan_distill.results.wrapper_workflow import WRAPPER_STEPS, wrapper_workflow
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.files import write_atomically

COMFYUI_TOKENS = 512  # ComfyUI pads every prompt to this many tokens
TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"


def comfyui_can(config: Config, info: TeacherInfo) -> bool:
    """Whether this student samples in ComfyUI as it was trained."""
    return (
        config.max_sequence_length == COMFYUI_TOKENS
        and not config.whole_student
        and not info.expand_timesteps
    )


def write_workflows(config: Config, info: TeacherInfo, folder: RunFolder) -> list[str]:
    """Writes those that this student can be sampled with. Returns their names."""
    experts = tuple(e for e in info.experts if folder.has_student(e))
    written = []
    for earlier in (folder.workflow, folder.wrapper_workflow):
        earlier.unlink(missing_ok=True)  # of a student that they do not fit any more
    if comfyui_can(config, info):
        write_atomically(folder.workflow, as_json(comfyui_workflow(config, info, experts)))
        written.append(folder.workflow.name)
        if config.grid_steps == WRAPPER_STEPS:
            workflow = wrapper_workflow(config, info, experts)
            write_atomically(folder.wrapper_workflow, as_json(workflow))
            written.append(folder.wrapper_workflow.name)
    return written


def as_json(workflow: Workflow) -> bytes:
    return (json.dumps(workflow, indent=2, ensure_ascii=False) + "\n").encode()


def comfyui_workflow(config: Config, info: TeacherInfo, experts: tuple[Expert, ...]) -> Workflow:
    """The two-expert workflow of ComfyUI's own nodes (or that of one expert).

    Args:
        experts: those with a LoRA.
    """
    nodes, steps = Nodes(), config.grid_steps
    encoder = nodes.add("CLIPLoader", clip_name=TEXT_ENCODER, type="wan", device="default")
    vae = nodes.add("VAELoader", vae_name=VAE)
    positive = nodes.add("CLIPTextEncode", "Prompt", clip=[encoder, 0], text=PROMPT)
    # At cfg 1 it is not used, but the sampler has an input for it.
    negative = nodes.add(
        "CLIPTextEncode", "Negative prompt (unused at cfg 1)", clip=[encoder, 0], text=""
    )
    begun = _begin(nodes, config, info, Begun([positive, 0], [negative, 0], [vae, 0]))
    latents = begun.latents
    for expert, first, last in phases(config, info):
        model = nodes.add(
            "UNETLoader",
            f"{expert}-noise expert",
            unet_name=base_file(info, expert),
            weight_dtype="default",
        )
        for lora in info.changes.of(expert):
            model = nodes.add(
                "LoraLoaderModelOnly",
                "Of the teacher",
                model=[model, 0],
                lora_name=lora.header.path.name,
                strength_model=lora.strength,
            )
        if expert in experts:
            model = nodes.add(
                "LoraLoaderModelOnly",
                f"Student of the {expert}-noise expert",
                model=[model, 0],
                lora_name=LORA_FILE[expert],
                strength_model=1.0,
            )
        model = nodes.add("ModelSamplingSD3", model=[model, 0], shift=config.flow_shift)
        sampled = nodes.add(
            "KSamplerAdvanced",
            f"Steps {first} to {last}",
            model=[model, 0],
            add_noise="enable" if first == 0 else "disable",
            noise_seed=0,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=begun.positive,
            negative=begun.negative,
            latent_image=latents,
            start_at_step=first,
            end_at_step=last,
            return_with_leftover_noise="disable" if last == steps else "enable",
        )
        latents = [sampled, 0]
    nodes.add_video(nodes.add("VAEDecode", samples=latents, vae=[vae, 0]), config.fps)
    return nodes.all


@dataclass(frozen=True)
class Begun:
    """What a workflow's first sampler is given: outputs of nodes."""

    positive: list[Any]
    negative: list[Any]
    vae: list[Any]
    latents: list[Any] = field(default_factory=list)


def _begin(nodes: Nodes, config: Config, info: TeacherInfo, begun: Begun) -> Begun:
    """Adds the node that makes empty latents and, of an image-to-video student, those of the
    picture, which ComfyUI crops to the clip as this tool does.
    """
    size: dict[str, Any] = dict(
        width=config.width, height=config.height, length=config.num_frames, batch_size=1
    )
    if not info.takes_picture:
        empty = nodes.add("EmptyHunyuanLatentVideo", **size)
        return replace(begun, latents=[empty, 0])
    picture = nodes.add("LoadImage", "First frame", image=PICTURE)
    both = nodes.add(
        "WanImageToVideo",
        start_image=[picture, 0],
        positive=begun.positive,
        negative=begun.negative,
        vae=begun.vae,
        **size,
    )
    return Begun([both, 0], [both, 1], begun.vae, [both, 2])
