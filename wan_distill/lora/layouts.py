"""Writes a LoRA in the layout of another program."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from wan_distill.lora.files import Layer, LoraFile
from wan_distill.settings.lora_headers import LoraHeader
from wan_distill.settings.lora_names import Layout, is_in_block, original_name
from wan_distill.settings.students import FLAG


def named_for(layout: Layout, module: str, layer: Layer) -> tuple[dict[str, Tensor], list[str]]:
    """(name -> tensor of one layer, what the layout has no place for).

    Args:
        layout: `comfyui`: the original Wan names, read by ComfyUI, WanVideoWrapper, LightX2V,
            DiffSynth and diffusers, which reads an alpha in blocks only: elsewhere it is multiplied
            into `lora_up`. `diffusers`: peft's names, alpha multiplied into `lora_B`, since its
            other readers look for none. `kohya`: musubi-tuner's.
        module: diffusers' name of the layer.
    """
    tensors: dict[str, Tensor] = {}
    left_out: list[str] = []
    if layout == "diffusers":
        stem = f"transformer.{module}"
        if layer.down is not None and layer.up is not None:
            tensors[f"{stem}.lora_A.weight"] = layer.down
            tensors[f"{stem}.lora_B.weight"] = (layer.up.float() * layer.scale).to(layer.up.dtype)
        extras = {"diff": layer.weight, "diff_b": layer.bias}
        if layer.bias is not None and tensors:
            tensors[f"{stem}.lora_B.bias"] = extras.pop("diff_b")  # type: ignore[assignment]
        left_out = [f"{stem}.{part}" for part, tensor in extras.items() if tensor is not None]
        return tensors, left_out
    stem = f"diffusion_model.{original_name(module)}"
    if layout == "kohya":
        stem = "lora_unet_" + original_name(module).replace(".", "_")
    if layer.down is not None and layer.up is not None:
        tensors[f"{stem}.lora_down.weight"] = layer.down
        tensors[f"{stem}.lora_up.weight"] = layer.up
        if layout == "kohya" or is_in_block(module):
            tensors[f"{stem}.alpha"] = torch.tensor(layer.scale * layer.down.shape[0])
        else:
            tensors[f"{stem}.lora_up.weight"] = (layer.up.float() * layer.scale).to(layer.up.dtype)
    for part, tensor in (("diff", layer.weight), ("diff_b", layer.bias)):
        if tensor is not None:
            tensors[f"{stem}.{part}"] = tensor
    return tensors, left_out


def for_diffusers(file: Path) -> str | dict[str, Tensor]:
    """A student's LoRA as `load_lora_weights` takes it: the file, or its tensors under peft's names
    where it is in kohya's layout, of which diffusers does not know the layers outside the blocks.
    """
    header = LoraHeader(file, FLAG)
    if header.layout != "kohya":
        return str(file)
    lora = LoraFile(header)
    tensors: dict[str, Tensor] = {}
    for module in header.layers:
        tensors |= named_for("diffusers", module, lora.read(module))[0]
    return tensors
