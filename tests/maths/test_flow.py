"""Conversions, phases and the sampler against closed forms, on Gaussian data whose velocity and
path are known.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wan_distill.maths import flow
from wan_distill.maths.flow import euler, sample, sigma_batch
from wan_distill.maths.sigmas import shift_sigma, sigma_grid

MEAN, STD = 0.7, 0.3


def gaussian_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[noise - x0 | x] for x0 ~ N(MEAN, STD^2)."""
    s = flow.per_sample(sigma, x)
    variance = (1 - s) ** 2 * STD**2 + s**2
    surprise = (x - (1 - s) * MEAN) / variance
    return s * surprise - (MEAN + (1 - s) * STD**2 * surprise)


def gaussian_path(noise: Tensor, sigma: float) -> Tensor:
    """Where the probability-flow ODE carries `noise` from sigma 1: quantiles are kept."""
    return (1 - sigma) * MEAN + ((1 - sigma) ** 2 * STD**2 + sigma**2) ** 0.5 * noise


def normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


# ------------------------------------------------------------------------- conversions and guidance


def test_velocity_and_x0_are_two_views_of_one_thing():
    x0, noise = normal(2, 16, 2, 4, 4), normal(2, 16, 2, 4, 4, seed=1)
    sigma = torch.tensor([0.3, 0.8], dtype=torch.float64)
    noisy = flow.phase_add_noise(x0, noise, sigma, 0.0)
    torch.testing.assert_close(flow.x0_from_velocity(noisy, noise - x0, sigma), x0)
    torch.testing.assert_close(noisy[1], 0.2 * x0[1] + 0.8 * noise[1])  # each sample's own sigma


def test_the_mean_velocity_undoes_an_euler_step():
    x, velocity = normal(2, 1, 1, 2, 2), normal(2, 1, 1, 2, 2, seed=1)
    sigma = torch.tensor([1.0, 0.8], dtype=torch.float64)
    next_sigma = torch.tensor([0.5, 0.7], dtype=torch.float64)
    next_x = flow.euler_step(x, velocity, sigma, next_sigma)
    torch.testing.assert_close(next_x[0], x[0] - 0.5 * velocity[0])
    torch.testing.assert_close(flow.mean_velocity(x, next_x, sigma, next_sigma), velocity)


def test_levels_of_noise_stay_on_the_cpu_in_double_precision():
    levels = sigma_batch(0.3, torch.zeros(3, 2))
    assert levels.dtype == torch.float64 and levels.tolist() == [0.3] * 3
    drawn = flow.uniform(0.2, 0.4, 1000, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float64 and drawn.min() >= 0.2 and drawn.max() < 0.4
    assert float(drawn.mean()) == pytest.approx(0.3, abs=0.01)  # 5 standard errors


def test_guidance_composes_as_in_the_pipeline():
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert flow.guide(cond, uncond, 1.0) == 3
    assert flow.guide(cond, uncond, 4.0) == 9  # cond + 4 * (cond - uncond) is 11


# ------------------------------------------------------------------------------------------- phases


def regressed(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope of y on x, and its value at x's mean: all of E[y | x] where both are Gaussian."""
    centred = x - x.mean()
    return float((centred * y).mean() / centred.square().mean()), float(y.mean())


@pytest.mark.parametrize("start", [0.0, 5 / 6])
def test_the_critics_target_has_the_exact_conditional_mean(start):
    """E[target | x_sigma] must be the velocity E[noise - x0 | x_sigma] of the ordinary diffusion of
    x0.
    """
    rng = torch.Generator().manual_seed(0)
    size, sigma = 2_000_000, 0.93
    x0 = MEAN + STD * torch.randn(size, generator=rng, dtype=torch.float64)
    x_start = (1 - start) * x0 + start * torch.randn(size, generator=rng, dtype=torch.float64)
    noise = torch.randn(size, generator=rng, dtype=torch.float64)
    level = torch.tensor([sigma], dtype=torch.float64)
    x = flow.phase_add_noise(x_start[None], noise[None], level, start)[0]

    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    assert float(x.var()) == pytest.approx(
        variance, rel=5e-3
    )  # diffused on, it is the ordinary x_sigma
    slope, at_mean = (sigma - (1 - sigma) * STD**2) / variance, -MEAN
    found = regressed(x, flow.phase_velocity(x_start[None], noise[None], level, start)[0])
    # Label noise has a standard deviation of 6 at start 5/6: 4 sigma of the slope is 4 * 6 /
    # sqrt(size) = 0.017.
    assert found == pytest.approx((slope, at_mean), abs=0.02)

    naive = regressed(x, noise - x_start)
    if start == 0:
        assert naive == pytest.approx((slope, at_mean), abs=0.02)
    else:
        assert abs(naive[0] - slope) > 0.4  # the bias that phases make: not a subtlety


def test_a_phase_from_clean_latents_is_the_ordinary_diffusion():
    x0, noise = normal(2, 1, 1, 2, 2), normal(2, 1, 1, 2, 2, seed=1)
    sigma = torch.tensor([0.3, 0.8], dtype=torch.float64)
    for coefficient, expected in zip(
        flow.phase_coefficients(sigma, 0.0), (1 - sigma, sigma), strict=True
    ):
        torch.testing.assert_close(coefficient, expected)
    level = sigma[:, None, None, None, None]
    torch.testing.assert_close(
        flow.phase_add_noise(x0, noise, sigma, 0.0), (1 - level) * x0 + level * noise
    )
    torch.testing.assert_close(flow.phase_velocity(x0, noise, sigma, 0.0), noise - x0)


# ------------------------------------------------------------------------------------------ sampler


def test_euler_follows_the_closed_form_path():
    noise = normal(4, 1, 1, 2, 2)
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
    noise = normal(3, 1, 1, 2, 2)
    sigmas = sigma_grid(4, 5.0)

    def student(x, sigma):
        i = sigmas.index(float(sigma[0]))
        start, end = gaussian_path(noise, sigmas[i]), gaussian_path(noise, sigmas[i + 1])
        return flow.mean_velocity(
            start, end, sigma_batch(sigmas[i], x), sigma_batch(sigmas[i + 1], x)
        )

    torch.testing.assert_close(sample(student, noise, sigmas), gaussian_path(noise, 0.0))


def test_a_single_sigma_is_no_step():
    noise = normal(1, 1, 1, 2, 2)
    assert sample(gaussian_velocity, noise, [1.0]) is noise
    assert list(euler(gaussian_velocity, noise, [1.0])) == []


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_tensors_of_levels_are_shifted_as_single_ones(shift):
    levels = torch.linspace(0, 1, 21, dtype=torch.float64)
    expected = [shift_sigma(float(u), shift) for u in levels]
    torch.testing.assert_close(
        flow.shift_sigmas(levels, shift), torch.tensor(expected, dtype=torch.float64)
    )
