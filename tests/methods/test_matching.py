"""Distribution matching against algebra, on Gaussian data whose every score is known."""

from __future__ import annotations

import torch

from wan_distill.maths import flow
from wan_distill.maths.matching import critic_error, matching_gradient

MEAN, STD = 0.7, 0.3


def gaussian_x0(
    x: torch.Tensor, sigma: float, mean: float = MEAN, std: float = STD
) -> torch.Tensor:
    """E[x0 | x at sigma] for x0 ~ N(mean, std^2)."""
    gain = (1 - sigma) * std**2 / ((1 - sigma) ** 2 * std**2 + sigma**2)
    return mean + gain * (x - (1 - sigma) * mean)


def test_the_generators_gradient_is_algebra():
    """Student N(m, s^2) against teacher N(M, S^2) at known sigma: both posteriors, their gap, one
    normaliser each.
    """
    rng = torch.Generator().manual_seed(1)
    x0 = (
        0.1 + 0.5 * torch.randn(3, 2, 1, 4, 4, generator=rng, dtype=torch.float64)
    ).requires_grad_()
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    x = flow.phase_add_noise(x0.detach(), noise, sigma, 0.0)
    real = torch.stack([gaussian_x0(x[i], float(sigma[i])) for i in range(3)])
    fake = torch.stack([gaussian_x0(x[i], float(sigma[i]), 0.1, 0.5) for i in range(3)])

    gradient = matching_gradient(x0.detach(), real, fake)
    (0.5 * (x0 - (x0.detach() - gradient)).square().sum()).backward()
    for i, s in enumerate(sigma.tolist()):
        gains = [(1 - s) * v**2 / ((1 - s) ** 2 * v**2 + s**2) for v in (STD, 0.5)]
        teacher = MEAN + gains[0] * (x[i] - (1 - s) * MEAN)
        student = 0.1 + gains[1] * (x[i] - (1 - s) * 0.1)
        expected = (student - teacher) / (x0[i] - teacher).abs().mean()
        torch.testing.assert_close(x0.grad[i], expected.detach(), rtol=1e-10, atol=1e-12)
    assert torch.equal(matching_gradient(real, real, real), torch.zeros_like(real))


def test_the_critics_error_is_plain_unless_it_is_near_the_end_of_its_phase():
    velocity, target = (
        torch.ones(2, 1, 1, 2, 2, dtype=torch.float64),
        torch.zeros(2, 1, 1, 2, 2, dtype=torch.float64),
    )
    assert critic_error(velocity, target, torch.tensor([0.1, 0.9], dtype=torch.float64), 0.0) == 1
    assert (
        critic_error(velocity, target, torch.tensor([0.9, 0.95], dtype=torch.float64), 5 / 6) == 1
    )
    near = torch.tensor([0.84, 0.84], dtype=torch.float64)
    beta = flow.phase_coefficients(near, 5 / 6)[1]
    torch.testing.assert_close(critic_error(velocity, target, near, 5 / 6), 10 * beta[0] ** 2)


def test_where_student_and_teacher_agree_the_gradient_stays_small():
    """The normaliser has a floor: noise in the scores is not blown up."""
    x0 = torch.zeros(2, 1, 1, 2, 2)
    gradient = matching_gradient(x0, x0, x0 + 1e-5)
    torch.testing.assert_close(gradient, torch.full_like(x0, 0.1))
