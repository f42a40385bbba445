"""Workflows of ComfyUI with everything filled in: its own nodes, and those of WanVideoWrapper.

They are written as ComfyUI's API takes them (`POST /prompt`); its editor opens such files too.
"""

from __future__ import annotations

import json
from typing import Any

from wan_distill.layout import LORA_FILE, RunFolder
from wan_distill.maths.sigmas import Expert, steps_of
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.files import write_atomically

Workflow = dict[str, dict[str, Any]]
"""Node number -> its class and inputs; [number, index] as an input is that output of a node."""

COMFYUI_TOKENS = 512  # ComfyUI pads every prompt to this many tokens
WRAPPER_STEPS = 4  # the only number that WanVideoWrapper's flowmatch_distill knows
PROMPT = "a red fox runs through snow"
# The names under which ComfyUI's own templates download the files of A14B.
TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
VAE = "wan_2.1_vae.safetensors"
A14B = "wan2.2_t2v_{expert}_noise_14B_fp8_scaled.safetensors"
A14B_SIZE = (40, 40, 2)  # blocks, heads, experts


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


def first_step_of_low(config: Config) -> int:
    """The number of steps that the high expert makes before the low one goes on."""
    return len(steps_of("high", config.sigmas(), config.boundary_ratio))


def phases(config: Config, info: TeacherInfo) -> list[tuple[Expert, int, int]]:
    """(expert, first step, the step after its last) of each expert that has any."""
    split, steps = first_step_of_low(config), config.grid_steps
    bounds: dict[Expert, tuple[int, int]] = {"high": (0, split), "low": (split, steps)}
    return [(e, *bounds[e]) for e in info.experts if bounds[e][0] < bounds[e][1]]


def base_file(info: TeacherInfo, expert: Expert) -> str:
    """The teacher's own file, as ComfyUI's templates call it; of other models a name to replace."""
    size = (info.transformer["num_layers"], info.transformer["num_attention_heads"])
    if (*size, len(info.experts)) == A14B_SIZE:
        return A14B.format(expert=expert)
    return f"{info.name}_{expert}_noise.safetensors"


class _Nodes:
    """Collects nodes; each call of `add` gives the number by which others refer to the node."""

    def __init__(self) -> None:
        self.all: Workflow = {}

    def add(self, kind: str, title: str = "", **inputs: Any) -> str:
        number = str(len(self.all) + 1)
        self.all[number] = dict(inputs=inputs, class_type=kind, _meta=dict(title=title or kind))
        return number

    def add_video(self, frames: str, fps: int) -> None:
        video = self.add("CreateVideo", images=[frames, 0], fps=float(fps))
        chosen = dict(filename_prefix="video/student", format="auto", codec="auto")
        self.add("SaveVideo", video=[video, 0], **chosen)


def comfyui_workflow(config: Config, info: TeacherInfo, experts: tuple[Expert, ...]) -> Workflow:
    """The two-expert workflow of ComfyUI's own nodes (or that of one expert).

    Args:
        experts: those with a LoRA.
    """
    nodes, steps = _Nodes(), config.grid_steps
    encoder = nodes.add("CLIPLoader", clip_name=TEXT_ENCODER, type="wan", device="default")
    vae = nodes.add("VAELoader", vae_name=VAE)
    positive = nodes.add("CLIPTextEncode", "Prompt", clip=[encoder, 0], text=PROMPT)
    # At cfg 1 it is not used, but the sampler has an input for it.
    negative = nodes.add(
        "CLIPTextEncode", "Negative prompt (unused at cfg 1)", clip=[encoder, 0], text=""
    )
    latents = nodes.add(
        "EmptyHunyuanLatentVideo",
        width=config.width,
        height=config.height,
        length=config.num_frames,
        batch_size=1,
    )
    for expert, first, last in phases(config, info):
        model = nodes.add(
            "UNETLoader",
            f"{expert}-noise expert",
            unet_name=base_file(info, expert),
            weight_dtype="default",
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
        latents = nodes.add(
            "KSamplerAdvanced",
            f"Steps {first} to {last}",
            model=[model, 0],
            add_noise="enable" if first == 0 else "disable",
            noise_seed=0,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=[positive, 0],
            negative=[negative, 0],
            latent_image=[latents, 0],
            start_at_step=first,
            end_at_step=last,
            return_with_leftover_noise="disable" if last == steps else "enable",
        )
    nodes.add_video(nodes.add("VAEDecode", samples=[latents, 0], vae=[vae, 0]), config.fps)
    return nodes.all


def wrapper_workflow(config: Config, info: TeacherInfo, experts: tuple[Expert, ...]) -> Workflow:
    """The same for ComfyUI-WanVideoWrapper's nodes. Its scheduler `flowmatch_distill` visits these
    sigmas to 2e-4; the one that it calls `euler` does not.
    """
    nodes, steps = _Nodes(), config.grid_steps
    encoder = nodes.add(
        "LoadWanVideoT5TextEncoder",
        model_name="umt5-xxl-enc-bf16.safetensors",
        precision="bf16",
        load_device="offload_device",
        quantization="disabled",
    )
    text = nodes.add(
        "WanVideoTextEncode",
        "Prompt",
        t5=[encoder, 0],
        positive_prompt=PROMPT,
        negative_prompt="",
        force_offload=True,
    )
    empty = nodes.add(
        "WanVideoEmptyEmbeds",
        width=config.width,
        height=config.height,
        num_frames=config.num_frames,
    )
    samples: dict[str, Any] = {}
    for expert, first, last in phases(config, info):
        lora: dict[str, Any] = {}
        if expert in experts:
            chosen = nodes.add(
                "WanVideoLoraSelect",
                f"Student of the {expert}-noise expert",
                lora=LORA_FILE[expert],
                strength=1.0,
                low_mem_load=False,
                merge_loras=True,
            )
            lora = dict(lora=[chosen, 0])
        model = nodes.add(
            "WanVideoModelLoader",
            f"{expert}-noise expert",
            model=base_file(info, expert),
            base_precision="bf16",
            quantization="disabled",
            load_device="offload_device",
            **lora,
        )
        number = nodes.add(
            "WanVideoSampler",
            f"Steps {first} to {last}",
            model=[model, 0],
            image_embeds=[empty, 0],
            text_embeds=[text, 0],
            steps=steps,
            cfg=1.0,
            shift=config.flow_shift,
            seed=0,
            force_offload=True,
            scheduler="flowmatch_distill",
            riflex_freq_index=0,
            start_step=first,
            end_step=-1 if last == steps else last,
            add_noise_to_samples=False,
            **samples,
        )
        samples = dict(samples=[number, 0])
    vae = nodes.add("WanVideoVAELoader", model_name=VAE, precision="bf16")
    tiles = dict(tile_x=272, tile_y=272, tile_stride_x=144, tile_stride_y=128)
    decoding = dict(vae=[vae, 0], enable_vae_tiling=False, **tiles, **samples)
    frames = nodes.add("WanVideoDecode", **decoding)
    nodes.add_video(frames, config.fps)
    return nodes.all
