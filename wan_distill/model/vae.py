"""The VAE at work: clips from latents, and latents of a first frame."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

TILED_BELOW = 40e9  # bytes of a device's memory


def decodes_in_tiles(device: torch.device) -> bool:
    """Whether a card is so small that the VAE decodes a clip piece by piece (8 GB for one of
    81x480x832 at once): below 40 GB. Clips of up to 256 pixels are one piece.
    """
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).total_memory < TILED_BELOW


def put_channels_last(module: nn.Module) -> None:
    """Lays the weights of convolutions out with the channels last; their outputs follow.

    On a CPU the Wan VAE decodes in less than half of the time, since its norms are over the
    channels of each place (benchmarks/RESULTS.md). Values differ by rounding only.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            part.weight.data = part.weight.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode_first_frame(vae: AutoencoderKLWan, picture: Tensor, frames: int) -> Tensor:
    """Normalised latents [C, f, h, w] of a clip of `frames` frames of which the first is given and
    the others are zero: to the bit those of `WanImageToVideoPipeline.prepare_latents`.

    Args:
        picture: [3, H, W] in [-1, 1].
    """
    vae.disable_tiling()  # pieces of a picture have other latents than the whole
    clip = torch.zeros(1, 3, frames, *picture.shape[1:], device=vae.device)
    clip[0, :, 0] = picture
    latents: Tensor = vae.encode(clip).latent_dist.mode()
    mean = torch.tensor(vae.config["latents_mean"], device=vae.device).view(1, -1, 1, 1, 1)
    inverse = 1 / torch.tensor(vae.config["latents_std"], device=vae.device).view(1, -1, 1, 1, 1)
    return ((latents - mean) * inverse)[0]


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: Tensor, batch_size: int = 16) -> Tensor:
    """Frames [B, F, H, W, 3] in [0, 1], float32 on the CPU, of normalised latents [B, C, f, h, w].

    Args:
        batch_size: clips to decode at the same time.
    """
    device = latents.device
    mean = torch.tensor(vae.config["latents_mean"], device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config["latents_std"], device=device).view(1, -1, 1, 1, 1)
    clips = []
    for part in latents.split(batch_size):
        frames = vae.decode((part.float() * std + mean).to(vae.device)).sample
        frames = frames.float().clamp(-1, 1) / 2 + 0.5
        clips.append(frames.permute(0, 2, 3, 4, 1).cpu())
    return torch.cat(clips)
