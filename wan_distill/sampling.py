"""The few-step sampler that rollouts, teacher solves, previews, evaluation and tests all share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from wan_distill import flow

Velocity = Callable[[Tensor, Tensor], Tensor]


def at(sigma: float, like: Tensor) -> Tensor:
    """`sigma` for every sample of `like` [B, ...], as the float64 CPU tensor the denoiser routes by."""
    return torch.full((like.shape[0],), sigma, dtype=torch.float64)


def euler(velocity: Velocity, x: Tensor, sigmas: Iterable[float]) -> Iterator[Tensor]:
    """Yields the latents after each Euler step along `sigmas` (descending), beginning from `x` at the first.

    Args:
        velocity: (x [B, C, F, H, W], sigma [B]) -> velocity, same shape as x.
        x: latents at sigmas[0].
    """
    sigmas = list(sigmas)
    for sigma, next_sigma in itertools.pairwise(sigmas):
        x = flow.euler_step(x, velocity(x, at(sigma, x)), at(sigma, x), at(next_sigma, x))
        yield x


def sample(velocity: Velocity, x: Tensor, sigmas: Iterable[float]) -> Tensor:
    """The latents at the last of `sigmas`; `x` itself where there is no step to take."""
    *_, x = x, *euler(velocity, x, sigmas)
    return x
