"""The sampling loop outside training, against steps written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import PROMPTS

from wan_distill.data.rollout import carry, velocity_of
from wan_distill.maths.flow import euler_step, sigma_batch
from wan_distill.model.adapters import make_roles
from wan_distill.model.condition import Condition

SIGMAS = (1.0, 0.97, 0.9375, 5 / 6)


@pytest.fixture
def setup(make_run):
    """(run, denoiser of the high expert, latents of three samples)."""
    run = make_run(method="trajectory", sample_batch_size=2)
    denoiser = run.denoiser("high", run.teacher.load_expert("high"))
    rng = torch.Generator().manual_seed(0)
    return run, denoiser, torch.randn(3, *run.latent_shape, generator=rng)


@pytest.mark.parametrize("guided", [True, False])
def test_latents_are_those_of_euler_steps_in_batches(setup, guided):
    run, denoiser, latents = setup
    advanced = []
    batches = list(
        carry(
            run,
            denoiser,
            "high",
            latents,
            PROMPTS,
            SIGMAS,
            role="teacher",
            guided=guided,
            store=(1.0, 0.9375),
            advance=advanced.append,
        )
    )
    assert [batch for batch, _ in batches] == [slice(0, 2), slice(2, 4)]
    assert advanced == [2, 2, 2, 1, 1, 1]
    for row in range(3):
        batch, reached = batches[row // 2]
        assert set(reached) == {1.0, 0.9375, 5 / 6}  # the last one always
        x, condition = latents[row : row + 1], run.condition([PROMPTS[row]])
        for sigma, after in itertools.pairwise(SIGMAS):
            if sigma in reached:
                torch.testing.assert_close(reached[sigma][row - batch.start], x[0])
            now = sigma_batch(sigma, x)
            with torch.no_grad():
                velocity = denoiser.velocity(x, now, condition, role="teacher")
                if guided:
                    without = denoiser.velocity(x, now, Condition(run.negative), role="teacher")
                    velocity = without + 4 * (velocity - without)
            x = euler_step(x, velocity, now, sigma_batch(after, x))
        torch.testing.assert_close(reached[5 / 6][row - batch.start], x[0], rtol=1e-4, atol=1e-5)


def test_the_guidance_is_that_of_the_expert(setup):
    run, denoiser, latents = setup
    condition = run.condition(PROMPTS)
    low = run.denoiser("low", run.teacher.load_expert("low"))
    for expert, model, sigma, scale in (("high", denoiser, 0.9, 4.0), ("low", low, 0.5, 3.0)):
        field = velocity_of(run, model, expert, condition, role="teacher", guided=True)
        now = sigma_batch(sigma, latents)
        with torch.no_grad():
            expected = model.guided_velocity(latents, now, condition, run.negative, scale)
            assert torch.equal(field(latents, now), expected)


def test_nothing_is_traced_for_a_gradient(setup):
    run, denoiser, latents = setup
    for p in denoiser.experts["high"].parameters():
        p.requires_grad_(True)
    for _, reached in carry(run, denoiser, "high", latents, PROMPTS, SIGMAS, role="teacher"):
        assert not any(x.requires_grad for x in reached.values())


def test_arithmetic_is_in_the_bases_dtype(make_run):
    """Also that of the adapter, whose weights are float32."""
    run = make_run(method="trajectory", mixed_precision="bf16")
    transformer = run.teacher.load_expert("high")
    make_roles(transformer, ("student",), run.config, "high")
    dtypes = set()
    transformer.blocks[0].attn1.to_q.lora_B["student"].register_forward_hook(
        lambda module, inputs, output: dtypes.add((module.weight.dtype, output.dtype))
    )
    denoiser = run.denoiser("high", transformer)
    latents = torch.zeros(1, *run.latent_shape)
    batches = carry(run, denoiser, "high", latents, PROMPTS[:1], SIGMAS, role="student")
    assert [x.dtype for _, reached in batches for x in reached.values()] == [torch.float32]
    assert dtypes == {(torch.float32, torch.bfloat16)}
