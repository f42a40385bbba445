"""A workflow of ComfyUI-WanVideoWrapper with everything filled in."""

from __future__ import annotations

from typing import Any

from wan_distill.layout import LORA_FILE, PICTURE
from wan_distill.maths.sigmas import Expert
from wan_distill.results.workflow_nodes import PROMPT, VAE, Nodes, Workflow, base_file, phases
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo

WRAPPER_STEPS = 4  # the only number that its scheduler flowmatch_distill knows


def wrapper_workflow(config: Config, info: TeacherInfo, experts: tuple[Expert, ...]) -> Workflow:
    """The same for ComfyUI-WanVideoWrapper's nodes. Its scheduler `flowmatch_distill` visits these
    sigmas to 2e-4; the one that it calls `euler` does not.
    """
    nodes, steps = Nodes(), config.grid_steps
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
    vae = nodes.add("WanVideoVAELoader", model_name=VAE, precision="bf16")
    begun = _begin(nodes, config, info, vae)
    samples: dict[str, Any] = {}
    for expert, first, last in phases(config, info):
        loras = [(one.header.path.name, one.strength) for one in info.changes.of(expert)]
        loras += [(LORA_FILE[expert], 1.0)] if expert in experts else []
        before: dict[str, Any] = {}
        lora = before
        for name, strength in loras:
            number = nodes.add(
                "WanVideoLoraSelect",
                f"For the {expert}-noise expert",
                lora=name,
                strength=strength,
                low_mem_load=False,
                merge_loras=True,
                **before,
            )
            before, lora = dict(prev_lora=[number, 0]), dict(lora=[number, 0])
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
            image_embeds=[begun, 0],
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
    tiles = dict(tile_x=272, tile_y=272, tile_stride_x=144, tile_stride_y=128)
    decoding = dict(vae=[vae, 0], enable_vae_tiling=False, **tiles, **samples)
    frames = nodes.add("WanVideoDecode", **decoding)
    nodes.add_video(frames, config.fps)
    return nodes.all


def _begin(nodes: Nodes, config: Config, info: TeacherInfo, vae: str) -> str:
    """Adds the node that the samplers begin with: of an image-to-video student the picture's, which
    would stretch it, so it is cropped to the clip's aspect before.
    """
    size: dict[str, Any] = dict(width=config.width, height=config.height)
    if not info.takes_picture:
        return nodes.add("WanVideoEmptyEmbeds", **size, num_frames=config.num_frames)
    picture = nodes.add("LoadImage", "First frame", image=PICTURE)
    cropped = nodes.add(
        "ImageScale", image=[picture, 0], upscale_method="lanczos", crop="center", **size
    )
    return nodes.add(
        "WanVideoImageToVideoEncode",
        start_image=[cropped, 0],
        vae=[vae, 0],
        **size,
        num_frames=config.num_frames,
        noise_aug_strength=0.0,
        start_latent_strength=1.0,
        end_latent_strength=1.0,
        force_offload=True,
        fun_or_fl2v_model=False,
    )
