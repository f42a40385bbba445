"""What image-to-video transformers are given, against stock diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, WanImageToVideoPipeline
from PIL import Image
from random_teachers import TEXT_DIM

from wan_distill.maths.flow import sample
from wan_distill.maths.sigmas import SUBFOLDER, expert_of, sigma_grid
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.vae import encode_first_frame
from wan_distill.settings.job import LORA_TARGETS

BOUNDARY = 0.9
SIZE = dict(height=32, width=48, num_frames=9)


@pytest.fixture(scope="module")
def pipe(random_picture_teacher) -> WanImageToVideoPipeline:
    pipe = WanImageToVideoPipeline.from_pretrained(random_picture_teacher)
    pipe.set_progress_bar_config(disable=True)
    channels = range(pipe.vae.config.z_dim)
    pipe.vae.register_to_config(
        latents_mean=[0.1 * channel for channel in channels],
        latents_std=[1 + 0.1 * channel for channel in channels],
    )
    return pipe


def picture(seed: int = 0) -> Image.Image:
    pixels = torch.randint(256, (32, 48, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def condition_of(pipe: WanImageToVideoPipeline, prompt: torch.Tensor) -> Condition:
    """By our own encoding of the picture."""
    pixels = pipe.video_processor.preprocess(picture(), height=32, width=48)[0]
    latents = encode_first_frame(pipe.vae, pixels, SIZE["num_frames"])
    mask = torch.zeros(4, *latents.shape[1:])
    mask[:, 0] = 1
    return Condition(prompt, torch.cat([mask, latents])[None])


def test_mask_and_latents_are_the_pipelines_to_the_bit(pipe):
    pixels = pipe.video_processor.preprocess(picture(), height=32, width=48)
    with torch.no_grad():
        _, expected = pipe.prepare_latents(pixels, 1, 16, **SIZE, dtype=torch.float32)
    ours = condition_of(pipe, torch.zeros(1, 8, TEXT_DIM))
    assert torch.equal(ours.image, expected)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_both_experts_sample_as_the_stock_pipeline_does(pipe, role):
    """The guided teacher, and a student without guidance; both experts, routed at 0.9."""
    rng = torch.Generator().manual_seed(3)
    prompt, negative = (torch.randn(1, 8, TEXT_DIM, generator=rng) for _ in range(2))
    noise = torch.randn(1, 16, 3, 4, 6, generator=rng)
    experts = {expert: getattr(pipe, SUBFOLDER[expert]) for expert in ("high", "low")}
    if role == "student":
        for seed, expert in enumerate(experts.values()):
            add_adapter(expert, role, rank=4, alpha=4, layers=LORA_TARGETS, seed=seed)
            for p in adapter_parameters(expert, role).values():
                p.data.add_(0.02)
    denoiser, condition = Denoiser(experts, BOUNDARY), condition_of(pipe, prompt)
    scale = 3.5 if role == "teacher" else 1.0

    def velocity(x, sigma):
        if role == "teacher":
            return denoiser.guided_velocity(x, sigma, condition, negative, scale)
        return denoiser.velocity(x, sigma, condition, role=role)

    with torch.no_grad():
        ours = sample(velocity, noise, sigma_grid(4, 5.0))
    pipe.scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    with denoiser.acting_as(role):
        stock = pipe(
            picture(),
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            latents=noise,
            num_inference_steps=4,
            guidance_scale=scale,
            output_type="latent",
            **SIZE,
        ).frames
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shift", "steps"), [(5, 4), (5, 40), (8.8, 2), (9.2, 2)])
def test_routing_is_the_pipelines(pipe, shift, steps):
    """Shifts 8.8 and 9.2 put the second of two steps below and above sigma 0.9."""
    pipe.scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    called = []
    hooks = [
        getattr(pipe, SUBFOLDER[expert]).register_forward_hook(
            lambda *_, expert=expert: called.append(expert)
        )
        for expert in ("high", "low")
    ]
    pipe(
        picture(),
        prompt_embeds=torch.zeros(1, 4, TEXT_DIM),
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
        **SIZE,
    )
    for hook in hooks:
        hook.remove()
    sigmas = sigma_grid(steps, shift)
    assert called == [expert_of(s, BOUNDARY) for s in sigmas[:-1]]
    assert ("low" in called) == (shift != 9.2)


def test_the_negative_prompt_comes_with_the_same_picture():
    rng = torch.Generator().manual_seed(0)
    condition = Condition(torch.randn(2, 8, 4, generator=rng), torch.randn(2, 20, 1, 2, 2))
    negative = torch.randn(1, 8, 4, generator=rng)
    both = condition.and_negative(negative)
    assert torch.equal(both.prompt, torch.cat([condition.prompt, negative, negative]))
    assert torch.equal(both.image, torch.cat([condition.image, condition.image]))
    assert Condition(condition.prompt).and_negative(negative).image is None


def test_text_alone_leaves_latents_as_they_are():
    x = torch.zeros(1, 16, 1, 2, 2)
    assert Condition(torch.zeros(1, 8, 4)).beside(x) is x
