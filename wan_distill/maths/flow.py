"""Flow matching as Wan uses it, and the Euler sampler, for plain tensors.

Notation (rectified flow, arXiv 2209.03003): x0 are clean latents, noise ~ N(0, I),
x = (1 - sigma) * x0 + sigma * noise, and velocity = dx/dsigma = noise - x0. Latents are
[B, C, F, H, W]. `sigma` is one noise level per sample, [B], in [0, 1], unless it is a float.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, F, H, W], sigma [B]) -> velocity, of the shape of x."""


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """`values` [B] as [B, 1, 1, ...], on the device and in the dtype of `like` [B, ...]."""
    return values.to(like.device, like.dtype, non_blocking=True).view(-1, *[1] * (like.ndim - 1))


def sigma_batch(sigma: float, like: Tensor) -> Tensor:
    """`sigma` once for each sample of `like` [B, ...]: float64 [B] on the CPU.

    `Denoiser` chooses the expert by these values; on the CPU that never waits for a device.
    """
    return torch.full((like.shape[0],), sigma, dtype=torch.float64)


# ------------------------------------------------------------------------------------- conversions


def x0_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that `velocity` implies at `x`: x0 = x - sigma * velocity."""
    return x - per_sample(sigma, x) * velocity


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One explicit Euler step of dx/dsigma = velocity, from `sigma` to `next_sigma`."""
    return x + per_sample(next_sigma - sigma, x) * velocity


def mean_velocity(x: Tensor, next_x: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """The velocity with which one Euler step from `x` arrives at `next_x`.

    The inverse of `euler_step`; `sigma` and `next_sigma` must differ.
    """
    return (x - next_x) / per_sample(sigma - next_sigma, x)


# ---------------------------------------------------------------------------------------- guidance


def guide(cond: Tensor, uncond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) as `WanPipeline` computes it.

    Args:
        guidance_scale: 1 returns `cond`; a larger scale moves further away from `uncond`.
    """
    return uncond + guidance_scale * (cond - uncond)


# ------------------------------------------------------------------------------------ noise levels


def uniform(low: float, high: float, size: int, rng: torch.Generator) -> Tensor:
    """`size` float64 draws from [low, high), on the CPU as `sigma_batch` is."""
    return low + (high - low) * torch.rand(size, generator=rng, dtype=torch.float64)


def shift_sigmas(u: Tensor, shift: float) -> Tensor:
    """`sigmas.shift_sigma` for a tensor of levels `u` in [0, 1], of any shape."""
    return shift * u / (1 + (shift - 1) * u)


# ------------------------------------------------------------------------------------------ phases


def phase_coefficients(sigma: Tensor, start: float) -> tuple[Tensor, Tensor]:
    """alpha and beta of the diffusion that begins at latents x_start of noise level `start`.

    x_sigma = alpha * x_start + beta * noise, with alpha = (1 - sigma) / (1 - start) and
    beta^2 = sigma^2 - alpha^2 * start^2 (Phased DMD, arXiv 2510.27684). A `start` of 0 gives the
    ordinary diffusion: alpha = 1 - sigma, beta = sigma.

    Args:
        sigma: [B], in (start, 1].
        start: in [0, 1).
    """
    alpha = (1 - sigma) / (1 - start)
    beta = (sigma**2 - alpha**2 * start**2).sqrt()
    return alpha, beta


def phase_add_noise(x_start: Tensor, noise: Tensor, sigma: Tensor, start: float) -> Tensor:
    """Latents of noise level `start` diffused further to `sigma`: alpha * x_start + beta * noise.

    See `phase_coefficients`.
    """
    alpha, beta = phase_coefficients(sigma, start)
    return per_sample(alpha, x_start) * x_start + per_sample(beta, x_start) * noise


def phase_velocity(x_start: Tensor, noise: Tensor, sigma: Tensor, start: float) -> Tensor:
    """Regression target of the critic: its mean given x_sigma is the velocity of the diffusion.

    v* = (sigma + (1 - sigma) * start^2 / (1 - start)^2) / beta * noise - x_start / (1 - start)
    (Phased DMD, arXiv 2510.27684). For `start` = 0 it is `noise - x0`. For `start` > 0 the target
    `noise - x_start` is biased, and v* has label noise that grows without bound as sigma
    approaches `start`: keep a distance.
    """
    _, beta = phase_coefficients(sigma, start)
    weight = (sigma + (1 - sigma) * start**2 / (1 - start) ** 2) / beta
    return per_sample(weight, x_start) * noise - x_start / (1 - start)


# ----------------------------------------------------------------------------------------- sampler


def euler(velocity: Velocity, x: Tensor, sigmas: Iterable[float]) -> Iterator[Tensor]:
    """Yields the latents after each Euler step along `sigmas`, which descend.

    Args:
        x: latents [B, C, F, H, W] at the first of `sigmas`; not yielded.
    """
    for level, next_level in itertools.pairwise(sigmas):
        sigma = sigma_batch(level, x)
        x = euler_step(x, velocity(x, sigma), sigma, sigma_batch(next_level, x))
        yield x


def adams_bashforth(velocity: Velocity, x: Tensor, sigmas: Iterable[float]) -> Iterator[Tensor]:
    """Yields the latents after each step of the second-order Adams-Bashforth method along `sigmas`,
    which descend at any distances. The first step is Euler's.

    One evaluation a step, as Euler's method takes, and an error that falls with the square of the
    step: x += h (v + h / (2 h_before) (v - v_before)) (Hairer, Norsett and Wanner, Solving Ordinary
    Differential Equations I, section III.5). The velocity must be smooth: restart where the expert
    changes.

    Args:
        x: latents [B, C, F, H, W] at the first of `sigmas`; not yielded.
    """
    before: tuple[Tensor, float] | None = None
    for level, next_level in itertools.pairwise(sigmas):
        sigma, step = sigma_batch(level, x), next_level - level
        here = velocity(x, sigma)
        slope = here
        if before is not None:
            earlier, earlier_step = before
            slope = here + step / (2 * earlier_step) * (here - earlier)
        before = here, step
        x = euler_step(x, slope, sigma, sigma_batch(next_level, x))
        yield x


SOLVERS: dict[str, Callable[[Velocity, Tensor, Iterable[float]], Iterator[Tensor]]] = {
    "euler": euler,
    "ab2": adams_bashforth,
}


def sample(velocity: Velocity, x: Tensor, sigmas: Iterable[float]) -> Tensor:
    """The latents at the last of `sigmas`, from `x` at the first; `x` itself for a single sigma."""
    latents = x
    for latents_after_step in euler(velocity, x, sigmas):
        latents = latents_after_step
    return latents
