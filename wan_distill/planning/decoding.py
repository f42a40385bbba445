"""What the VAE takes to decode: traced on fake tensors."""

from __future__ import annotations

import functools
import json

import torch
from diffusers import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode

from wan_distill.planning.trace import Ledger
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo

TRACED = (3, 4)
"""Latent frames. Wan's VAE decodes them one by one, all but the first alike; what is kept between
them is the clip so far."""


def decoding_bytes(config: Config, info: TeacherInfo) -> float:
    """Peak of decoding one batch of clips in float32, the VAE's weights included; 0 for a teacher
    whose VAE is not described.
    """
    if not info.vae:
        return 0.0
    settings = json.dumps({k: v for k, v in info.vae.items() if not k.startswith("_")})
    channels, frames, height, width = info.latent_shape(config)
    batch = config.sample_batch_size
    fewer = min(frames, TRACED[0])
    weights, peak = _traced(settings, (batch, channels, fewer, height, width))
    if frames > fewer:
        _, more = _traced(settings, (batch, channels, TRACED[1], height, width))
        peak += (frames - fewer) * (more - peak)
    return float(weights + peak)


@functools.lru_cache(maxsize=64)
def _traced(settings: str, latents: tuple[int, ...]) -> tuple[int, int]:
    """(bytes of the weights, peak beyond them) of decoding `latents` [B, C, F, H, W]."""
    with FakeTensorMode():
        vae = AutoencoderKLWan.from_config(json.loads(settings)).requires_grad_(False).eval()
        held = [*vae.parameters(), *vae.buffers()]
        with Ledger(held) as ledger, torch.no_grad():
            vae.decode(torch.zeros(latents))
    return sum(t.untyped_storage().nbytes() for t in held), ledger.peak
