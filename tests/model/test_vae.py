"""The VAE's clips: those of the stock pipeline, whatever the layout of its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline
from random_teachers import TEXT_DIM
from torch import Tensor

from wan_distill.data import Run
from wan_distill.model.loading import load_vae
from wan_distill.model.vae import decode, decodes_in_tiles

MakeRun = Callable[..., Run]


def test_clips_are_decoded_as_the_stock_pipeline_does(random_teacher: Path) -> None:
    """Latents with a mean and a spread of their own; frames, height and width all differ."""
    pipe = WanPipeline.from_pretrained(random_teacher)
    pipe.set_progress_bar_config(disable=True)
    channels = pipe.vae.config.z_dim
    pipe.vae.register_to_config(
        latents_mean=[0.1 * i - 0.5 for i in range(channels)],
        latents_std=[0.5 + 0.2 * i for i in range(channels)],
    )

    def sampled(output_type: str) -> Tensor:
        frames = pipe(
            prompt_embeds=torch.zeros(3, 4, TEXT_DIM),
            latents=torch.randn(3, channels, 3, 4, 6, generator=torch.Generator().manual_seed(0)),
            height=32,
            width=48,
            num_frames=9,
            num_inference_steps=1,
            guidance_scale=1.0,
            output_type=output_type,
        ).frames
        return torch.as_tensor(frames)

    expected = sampled("np")
    frames = decode(pipe.vae, sampled("latent"), batch_size=2)
    assert frames.shape == expected.shape == (3, 9, 32, 48, 3)
    assert frames.dtype == torch.float32 and expected.std() > 0.05
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-4)


def test_the_vae_is_float32_in_a_bf16_run(make_run: MakeRun) -> None:
    vae = make_run(mixed_precision="bf16").teacher.load_vae()
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in vae.parameters())
    latents = torch.zeros(1, vae.config.z_dim, 1, 2, 2, dtype=torch.bfloat16)
    assert decode(vae, latents).dtype == torch.float32


def test_a_cpu_decodes_with_the_channels_last(make_run: MakeRun) -> None:
    """The layout spares half of the time; encoding keeps to the pipeline's bits."""
    run = make_run()
    vae, plain = run.teacher.load_vae(), load_vae(run.info, run.config)
    kernels = [m.weight for m in vae.decoder.modules() if isinstance(m, torch.nn.Conv3d)]
    last = torch.channels_last_3d
    assert kernels and all(kernel.is_contiguous(memory_format=last) for kernel in kernels)
    assert vae.encoder.conv_in.weight.is_contiguous()
    noise = torch.Generator().manual_seed(0)
    latents = torch.randn(2, vae.config.z_dim, 3, 4, 6, generator=noise)
    clips = decode(vae, latents)
    torch.testing.assert_close(clips, decode(plain, latents), rtol=0, atol=1e-5)
    assert clips.std() > 0.05


@pytest.mark.parametrize(("memory", "tiled"), [(25.7e9, True), (85e9, False)])
def test_a_small_card_decodes_clips_in_tiles(monkeypatch, memory: float, tiled: bool) -> None:
    card = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert decodes_in_tiles(torch.device("cuda")) is tiled
    assert not decodes_in_tiles(torch.device("cpu"))
