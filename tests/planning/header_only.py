"""Wan2.2-T2V-A14B, or I2V-A14B, as a folder of true configurations and weight files that have
headers alone.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel
from wan_shapes import A14B, A14B_I2V

from wan_distill.settings.assets import EMBEDDED_TEACHER

ENCODER = dict(
    vocab_size=256384,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    architectures=["UMT5EncoderModel"],
)
VAE = dict(base_dim=96, z_dim=16, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)


def write_a14b(folder: Path, data: bool = True, picture: bool = False) -> Path:
    """A folder laid out like the hosted one.

    Args:
        data: give each weight file its true size, as a hole that takes no room on the disk;
            otherwise it ends with its header.
        picture: I2V-A14B instead.
    """
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(EMBEDDED_TEACHER / part, folder / part)
    index = json.loads((EMBEDDED_TEACHER / "model_index.json").read_text())
    if picture:
        index |= dict(_class_name="WanImageToVideoPipeline", boundary_ratio=0.9)
        index |= dict(image_encoder=[None, None], image_processor=[None, None])
    (folder / "model_index.json").write_text(json.dumps(index))
    with torch.device("meta"):
        models: dict[str, nn.Module] = {
            "transformer": WanTransformer3DModel(**(A14B_I2V if picture else A14B)),
            "vae": AutoencoderKLWan(**VAE),
            "text_encoder": UMT5EncoderModel(UMT5Config(**ENCODER)),
        }
    models["transformer_2"] = models["transformer"]
    for part, model in models.items():
        (folder / part).mkdir()
        tensors = dict(model.state_dict())
        name = "diffusion_pytorch_model.safetensors"
        if part == "text_encoder":
            del tensors["encoder.embed_tokens.weight"]  # `shared.weight` is the same table
            name = "model.safetensors"
            settings: dict[str, Any] = model.config.to_dict()
        else:
            settings = dict(model.config) | {"_class_name": type(model).__name__}
        (folder / part / "config.json").write_text(json.dumps(settings, default=list))
        write_header(folder / part / name, tensors.items(), data)
    return folder


def write_header(file: Path, tensors: Iterable[tuple[str, torch.Tensor]], data: bool) -> None:
    """A safetensors file of float32 tensors, without their values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + 4 * math.prod(tensor.shape)
        header[name] = dict(dtype="F32", shape=list(tensor.shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        if data:
            out.truncate(8 + len(text) + end)
