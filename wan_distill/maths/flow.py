"""Flow-matching maths of Wan, and the Euler sampler that everything shares, in plain tensors.

Notation: x0 clean latents, noise ~ N(0, I), x = (1 - sigma) * x0 + sigma * noise, velocity = noise
- x0 (rectified flow, arXiv 2209.03003). Latents are [B, C, F, H, W]; sigmas are [B].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Views `values` [B] as [B, 1, 1, ...] on the device and in the dtype of `like` [B, ...]."""
    return values.to(like.device, like.dtype, non_blocking=True).view(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x = (1 - sigma) * x0 + sigma * noise, at sigma [B] in [0, 1]."""
    sigma = per_sample(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def x0_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that `velocity` implies at `x`: x0 = x - sigma * velocity."""
    return x - per_sample(sigma, x) * velocity


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One explicit Euler step of dx/dsigma = velocity, from `sigma` [B] to `next_sigma` [B]."""
    return x + per_sample(next_sigma - sigma, x) * velocity


def mean_velocity(x: Tensor, next_x: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """The constant velocity that carries `x` at `sigma` [B] exactly to `next_x` at `next_sigma`
    [B].
    """
    return (x - next_x) / per_sample(sigma - next_sigma, x)


def guide(cond: Tensor, uncond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) as `WanPipeline` writes it; scale 1 = off."""
    return uncond + guidance_scale * (cond - uncond)


def shift_sigmas(u: Tensor, shift: float) -> Tensor:
    """Resolution shift of uniform levels `u` in [0, 1]; see `schedule.shift_sigma`."""
    return shift * u / (1 + (shift - 1) * u)


def phase_coefficients(sigma: Tensor, start: float) -> tuple[Tensor, Tensor]:
    """alpha and beta of the diffusion that begins at latents of noise level `start` instead of at
    x0.

    x_sigma = alpha * x_start + beta * noise, with alpha = (1 - sigma) / (1 - start) and
    beta^2 = sigma^2 - alpha^2 start^2 (Phased DMD, arXiv 2510.27684); sigma [B] in (start, 1].
    `start` = 0 gives back the ordinary diffusion alpha = 1 - sigma, beta = sigma.
    """
    alpha = (1 - sigma) / (1 - start)
    beta = (sigma**2 - alpha**2 * start**2).sqrt()
    return alpha, beta


def phase_velocity(x_start: Tensor, noise: Tensor, sigma: Tensor, start: float) -> Tensor:
    """Regression target whose conditional mean is the marginal velocity of p(x_start) diffused to
    sigma.

    v* = -x_start / (1 - start) + [(sigma + (1 - sigma) start^2 / (1 - start)^2) / beta] * noise
    (Phased DMD, arXiv 2510.27684). The naive `noise - x_start` is biased for start > 0. For start =
    0 it is `noise - x0`. The label noise grows as sigma -> start: keep a margin.
    """
    _, beta = phase_coefficients(sigma, start)
    weight = (sigma + (1 - sigma) * start**2 / (1 - start) ** 2) / beta
    return per_sample(weight, x_start) * noise - x_start / (1 - start)


def uniform(low: float, high: float, size: int, rng: torch.Generator) -> Tensor:
    """`size` float64 draws, uniform in [low, high), on the CPU so that routing by sigma never syncs
    a device.
    """
    return low + (high - low) * torch.rand(size, generator=rng, dtype=torch.float64)


def phase_add_noise(x_start: Tensor, noise: Tensor, sigma: Tensor, start: float) -> Tensor:
    """alpha * x_start + beta * noise: latents of level `start` diffused on to sigma [B]; see
    `phase_coefficients`.
    """
    alpha, beta = phase_coefficients(sigma, start)
    return per_sample(alpha, x_start) * x_start + per_sample(beta, x_start) * noise


Velocity = Callable[[Tensor, Tensor], Tensor]


def sigma_batch(sigma: float, like: Tensor) -> Tensor:
    """`sigma` for every sample of `like` [B, ...], as the float64 CPU tensor the denoiser routes
    by.
    """
    return torch.full((like.shape[0],), sigma, dtype=torch.float64)


def euler(velocity: Velocity, x: Tensor, sigmas: Iterable[float]) -> Iterator[Tensor]:
    """Yields the latents after each Euler step along `sigmas` (descending), beginning from `x` at
    the first.

    Args:
        velocity: (x [B, C, F, H, W], sigma [B]) -> velocity, same shape as x.
        x: latents at sigmas[0].
    """
    sigmas = list(sigmas)
    for sigma, next_sigma in itertools.pairwise(sigmas):
        x = euler_step(x, velocity(x, sigma_batch(sigma, x)), sigma_batch(sigma, x), sigma_batch(next_sigma, x))
        yield x


def sample(velocity: Velocity, x: Tensor, sigmas: Iterable[float]) -> Tensor:
    """The latents at the last of `sigmas`; `x` itself where there is no step to take."""
    *_, x = x, *euler(velocity, x, sigmas)
    return x
