"""Tiny pipelines with random weights, made offline in a second: what a test needs of a teacher, and
no more.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from PIL import Image
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from wan_distill.settings.assets import EMBEDDED_TEACHER

TEXT_DIM = 16
# In the words of the embedded teacher's tokenizer.
CAPTIONS = ("a red circle", "a blue square", "a small red circle moving left")


def random_transformer(
    seed: int, channels: int = 16, layers: int = 1, picture: bool = False
) -> WanTransformer3DModel:
    """
    Args:
        picture: it takes a first frame's mask and latents too, as Wan2.2-I2V-A14B's do.
    """
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=2 * channels + 4 if picture else channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=64,
    )
    return model.eval()


def write_pictures(folder: Path, count: int = 3) -> Path:
    """A folder for `--images`: random pictures, each with a caption beside it."""
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = torch.randint(256, (40, 48, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i % len(CAPTIONS)])
    return folder


def write_pipeline(
    folder: Path,
    *,
    two_experts: bool = True,
    expand_timesteps: bool = False,
    channels: int = 16,
    layers: int = 1,
    picture: bool = False,
) -> Path:
    """A `WanPipeline` folder laid out like the hosted ones, with random weights; with `picture` a
    `WanImageToVideoPipeline`.
    """
    tokenizer = EMBEDDED_TEACHER / "tokenizer"
    shutil.copytree(tokenizer, folder / "tokenizer")
    torch.manual_seed(0)
    vocabulary = json.loads((EMBEDDED_TEACHER / "text_encoder" / "config.json").read_text())[
        "vocab_size"
    ]
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    weights = {
        k: v.clone() for k, v in encoder.state_dict().items() if k != "encoder.embed_tokens.weight"
    }
    (folder / "text_encoder").mkdir()
    save_file(weights, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    config = encoder.config.to_dict() | {
        "tie_word_embeddings": False,
        "architectures": ["UMT5EncoderModel"],
    }
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    random_transformer(1, channels, layers, picture).save_pretrained(folder / "transformer")
    if two_experts:
        random_transformer(2, channels, layers, picture).save_pretrained(folder / "transformer_2")
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    vae.save_pretrained(folder / "vae")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanImageToVideoPipeline" if picture else "WanPipeline",
        "_diffusers_version": "0.42.1",
        "expand_timesteps": expand_timesteps,
        "boundary_ratio": (0.9 if picture else 0.875) if two_experts else None,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if two_experts else [None, None],
    }
    if picture:
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
