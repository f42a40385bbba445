"""Roles, routing and the sampler, against stock diffusers and against closed forms."""

from __future__ import annotations

import pytest
import torch
from conftest import TEXT_DIM, random_transformer
from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline

from wan_distill.maths import flow
from wan_distill.maths.flow import euler, sample, sigma_batch
from wan_distill.maths.sigmas import expert_of, handover, insert_sigmas, sigma_grid, steps_of
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.config import LORA_TARGETS

BOUNDARY = 0.875


def two_role_denoiser(checkpointing: bool) -> Denoiser:
    """One expert with student and fake-score adapters whose effect is not zero."""
    transformer = random_transformer(0, layers=2)
    for seed, role in enumerate(("student", "fake_score")):
        add_adapter(transformer, role, rank=4, alpha=4, layers=LORA_TARGETS, seed=seed)
        for p in adapter_parameters(transformer, role).values():
            p.data.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return Denoiser({"high": transformer}, BOUNDARY)


def inputs(batch: int = 2, sigma: float = 0.9):
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 16, 2, 4, 4, generator=rng)
    return x, sigma_batch(sigma, x), torch.randn(batch, 8, TEXT_DIM, generator=rng)


def gradients_after_scores(denoiser: Denoiser, role: str) -> dict[str, torch.Tensor | None]:
    """Gradients after `role` ran with gradient, the other roles without, and only then backward:
    DMD's order.
    """
    x, sigma, prompt = inputs()
    with denoiser.training(role):
        velocity = denoiser.velocity(x, sigma, prompt, role=role)
        with torch.no_grad():
            for other in ("teacher", "student", "fake_score"):
                denoiser.velocity(x, sigma, prompt, role=other)
        velocity.square().mean().backward()
    return {name: p.grad for name, p in denoiser.experts["high"].named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_the_trained_role_and_no_other_gets_gradients(role, checkpointing):
    denoiser = two_role_denoiser(checkpointing)
    gradients = gradients_after_scores(denoiser, role)
    trained = set(adapter_parameters(denoiser.experts["high"], role))
    assert (
        len(trained) == 2 * len(LORA_TARGETS) * 2 + 2 * 4 * 2
    )  # two layers; attention targets occur twice
    for name, gradient in gradients.items():
        if name in trained:
            assert gradient is not None and gradient.abs().max() > 0, name
        else:
            assert gradient is None, name


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_gradient_checkpointing_changes_no_gradient(role):
    plain = gradients_after_scores(two_role_denoiser(False), role)
    recomputed = gradients_after_scores(two_role_denoiser(True), role)
    for name, gradient in plain.items():
        assert (gradient is None) == (recomputed[name] is None)
        if gradient is not None:
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-9)


def test_teacher_is_the_base_and_roles_differ():
    denoiser = two_role_denoiser(False)
    x, sigma, prompt = inputs()
    with torch.no_grad():
        roles = ("teacher", "student", "fake_score")
        teacher, student, fake = (denoiser.velocity(x, sigma, prompt, role=role) for role in roles)
        base = random_transformer(0, layers=2)(x, 1000 * sigma.float(), prompt).sample
    torch.testing.assert_close(teacher, base, rtol=0, atol=0)
    assert not any(
        p.requires_grad for p in denoiser.experts["high"].parameters()
    )  # nothing is in training
    assert (student - teacher).abs().max() > 1e-3 and (student - fake).abs().max() > 1e-3


def test_a_role_switch_is_undone_after_an_error():
    denoiser = two_role_denoiser(False)
    x, sigma, prompt = inputs()
    before = denoiser.velocity(x, sigma, prompt, role="teacher")
    with pytest.raises(RuntimeError), denoiser.training("student"):
        denoiser.velocity(x[:, :3], sigma, prompt, role="student")
    assert not any(p.requires_grad for p in denoiser.experts["high"].parameters())
    torch.testing.assert_close(
        denoiser.velocity(x, sigma, prompt, role="teacher"), before, rtol=0, atol=0
    )


def test_gradients_of_a_role_out_of_training_are_refused():
    denoiser = two_role_denoiser(False)
    x, sigma, prompt = inputs()
    with denoiser.training("student"), pytest.raises(RuntimeError, match="no_grad"):
        denoiser.velocity(x, sigma, prompt, role="fake_score")


def test_guidance_is_the_pipelines():
    denoiser = two_role_denoiser(False)
    x, sigma, prompt = inputs()
    negative = torch.zeros(1, 8, TEXT_DIM)
    with torch.no_grad():
        cond = denoiser.velocity(x, sigma, prompt, role="teacher")
        uncond = denoiser.velocity(x, sigma, negative.expand_as(prompt), role="teacher")
        guided = denoiser.guided_velocity(x, sigma, prompt, negative, 4.0)
    torch.testing.assert_close(guided, uncond + 4.0 * (cond - uncond), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ experts


def test_sigmas_on_both_sides_of_the_boundary_are_refused():
    denoiser = two_role_denoiser(False)
    x, _, prompt = inputs()
    with pytest.raises(ValueError, match="both sides"):
        denoiser.velocity(x, torch.tensor([0.9, 0.5]), prompt, role="teacher")
    with pytest.raises(ValueError, match="not loaded"):
        denoiser.velocity(x, torch.tensor([0.4, 0.5]), prompt, role="teacher")


@pytest.mark.parametrize("shift, steps", [(5, 2), (5, 3), (5, 4), (5, 8), (7, 4)])
def test_routing_is_the_pipelines_also_at_exactly_the_boundary(random_teacher, shift, steps):
    """Shift 7 with 4 steps puts a step at sigma 0.875 exactly; the pipeline gives it to
    `transformer`.
    """
    pipe = WanPipeline.from_pretrained(random_teacher)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    called = []
    pipe.transformer.register_forward_hook(lambda *_: called.append("high"))
    pipe.transformer_2.register_forward_hook(lambda *_: called.append("low"))
    pipe(
        prompt_embeds=torch.zeros(1, 4, TEXT_DIM),
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
    )
    sigmas = sigma_grid(steps, shift)
    assert called == [expert_of(s, BOUNDARY) for s in sigmas[:-1]]
    if shift == 7:
        assert sigmas[2] == BOUNDARY and called[2] == "high"


def test_the_default_grid_and_its_handover():
    sigmas = sigma_grid(4, 5.0)
    assert sigmas == pytest.approx((1, 0.9375, 5 / 6, 0.625, 0))
    assert steps_of("high", sigmas, BOUNDARY) == [0, 1] and steps_of("low", sigmas, BOUNDARY) == [
        2,
        3,
    ]
    for even in (2, 4, 6, 8):
        assert handover(sigma_grid(even, 5.0), BOUNDARY) == pytest.approx(5 / 6)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_the_exported_scheduler_gives_our_sigmas(steps):
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(steps)
    assert scheduler.sigmas.tolist() == pytest.approx(sigma_grid(steps, 5.0), abs=1e-15)


def test_student_sigmas_become_solver_points_at_no_extra_cost():
    teacher, student = sigma_grid(40, 12.0), sigma_grid(4, 5.0)
    merged = insert_sigmas(student, teacher)
    assert (
        len(merged) == len(teacher)
        and set(student) <= set(merged)
        and sorted(merged, reverse=True) == list(merged)
    )


# ------------------------------------------------------------------------ closed-form Gaussian data


MEAN, STD = 0.7, 0.3


def gaussian_velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[noise - x0 | x] for x0 ~ N(MEAN, STD^2)."""
    s = flow.per_sample(sigma, x)
    variance = (1 - s) ** 2 * STD**2 + s**2
    surprise = (x - (1 - s) * MEAN) / variance
    return s * surprise - (MEAN + (1 - s) * STD**2 * surprise)


def gaussian_path(noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """Where the probability-flow ODE carries `noise` from sigma 1: quantiles are kept."""
    return (1 - sigma) * MEAN + ((1 - sigma) ** 2 * STD**2 + sigma**2) ** 0.5 * noise


def test_euler_follows_the_closed_form_path():
    noise = torch.randn(
        4, 1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    errors = []
    for steps in (100, 200):
        solved = list(euler(gaussian_velocity, noise, sigma_grid(steps, 3.0)))
        errors.append(
            max(
                float((x - gaussian_path(noise, s)).abs().max())
                for x, s in zip(solved, sigma_grid(steps, 3.0)[1:], strict=True)
            )
        )
    assert errors[1] < 0.02 and errors[0] / errors[1] == pytest.approx(
        2, rel=0.1
    )  # a first-order solver


def test_one_student_step_with_the_trajectory_target_lands_on_the_path():
    noise = torch.randn(
        3, 1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    sigmas = sigma_grid(4, 5.0)

    def student(x, sigma):
        i = sigmas.index(float(sigma[0]))
        start, end = gaussian_path(noise, sigmas[i]), gaussian_path(noise, sigmas[i + 1])
        return flow.mean_velocity(start, end, sigma_batch(sigmas[i], x), sigma_batch(sigmas[i + 1], x))

    torch.testing.assert_close(sample(student, noise, sigmas), gaussian_path(noise, 0.0))


def test_velocity_and_x0_are_two_views_of_one_thing():
    x, sigma, _ = inputs(sigma=0.3)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    noisy = flow.add_noise(x, noise, sigma)
    torch.testing.assert_close(
        flow.x0_from_velocity(noisy, noise - x, sigma), x, rtol=1e-5, atol=1e-6
    )
