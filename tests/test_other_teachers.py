"""Wan models besides the two-expert one go through the whole chain: single experts, per-token timesteps, one frame."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, write_pipeline
from diffusers import WanPipeline

import train_distillation
from wan_distill.config import EMBEDDED_TEACHER, Config, UsageError, resolve
from wan_distill.runtime import keyed_noise
from wan_distill.teacher import describe

SHAPES = {
    "wan2.1-t2v": dict(two_experts=False),
    "wan2.2-ti2v-5b": dict(two_experts=False, expand_timesteps=True, channels=48),
    "wan2.2-t2v-a14b": {},
}
CASES = [("wan2.1-t2v", "trajectory", 5), ("wan2.1-t2v", "dmd", 5), ("wan2.2-ti2v-5b", "trajectory", 5),
         ("wan2.2-ti2v-5b", "dmd", 1), ("wan2.2-t2v-a14b", "dmd", 1), ("wan2.1-t2v", "consistency", 1)]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("others")
    return {name: write_pipeline(root / name, **shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(("name", "method", "frames"), CASES)
def test_the_whole_chain_runs_and_the_stock_pipeline_samples_alike(name, method, frames, teachers, tmp_path):
    settings = SMALL | dict(
        teacher_path=str(teachers[name]), output_dir=str(tmp_path), method=method, num_frames=frames,
        prompts=str(EMBEDDED_TEACHER / "prompts.txt"), evaluate=True, save_merged=True, critic_warmup_steps=1,
        critic_updates=1, eval_samples=4, learning_rate=1e-2, lora_alpha=4.0, lr_scheduler="constant")
    config = Config(**settings)
    assert train_distillation.run(config) == 0
    info = describe(config)
    config = resolve(config, info)
    experts = {line["expert"] for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())}
    assert experts == set(info.experts)

    pipe = WanPipeline.from_pretrained(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    noise = keyed_noise(info.latent_shape(config), "other", 0)[None]
    stock = pipe("a small red circle moving left", height=32, width=32, num_frames=frames, num_inference_steps=4,
                 guidance_scale=1.0, latents=noise.clone(), max_sequence_length=config.max_sequence_length,
                 output_type="latent").frames
    prompt = pipe.encode_prompt("a small red circle moving left", do_classifier_free_guidance=False,
                                max_sequence_length=config.max_sequence_length)[0]
    torch.testing.assert_close(ours(config, info, tmp_path, noise, prompt), stock, rtol=1e-4, atol=1e-5)
    plain = ours(config, info, None, noise, prompt)
    assert not torch.allclose(plain, stock, rtol=1e-3, atol=1e-4), "the adapters have no effect"


def ours(config, info, lora_folder: Path | None, noise: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Our sampler's latents, of the student in `lora_folder` or of the bare teacher."""
    from diffusers import WanTransformer3DModel

    from wan_distill.denoiser import Denoiser
    from wan_distill.export import LORA_FILE, load_student
    from wan_distill.sampling import sample
    from wan_distill.schedule import SUBFOLDER

    experts = {}
    for expert in info.experts:
        experts[expert] = WanTransformer3DModel.from_pretrained(info.folder, subfolder=SUBFOLDER[expert]).eval()
        if lora_folder:
            load_student(experts[expert], lora_folder / LORA_FILE[expert])
    denoiser = Denoiser(experts, config.boundary, info.expand_timesteps)
    role = "student" if lora_folder else "teacher"
    with torch.no_grad():
        return sample(lambda x, sigma: denoiser.velocity(x, sigma, prompt, role=role), noise, config.sigmas())


def test_a_vae_of_16_pixels_a_latent_needs_sides_of_32(teachers, tmp_path):
    """Wan2.2 TI2V-5B: 16 pixels a latent times patches of 2."""
    folder = teachers["wan2.2-ti2v-5b"]
    vae = json.loads((folder / "vae" / "config.json").read_text())
    info = describe(Config(teacher_path=str(folder)))
    coarse = type(info)(**vars(info) | dict(vae=vae | dict(scale_factor_spatial=16)))
    settings = SMALL | dict(teacher_path=str(folder))
    resolve(Config(**settings | dict(height=64)), coarse)
    with pytest.raises(UsageError, match="multiple of 32; use 32 or 64"):
        resolve(Config(**settings | dict(height=48)), coarse)
