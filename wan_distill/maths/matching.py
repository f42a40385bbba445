"""The two errors of distribution matching, in plain tensors: the critic's and the student's."""

from __future__ import annotations

from torch import Tensor

from wan_distill.maths import flow

NORMALISER_FLOOR = 1e-4


def critic_error(velocity: Tensor, target: Tensor, sigma: Tensor, end: float) -> Tensor:
    """Mean of clamp(1 / beta^2, 0, 10) * |beta * (velocity - target)|^2 (Phased DMD's stable form).

    Plain squared error wherever beta^2 > 0.1; nearer to the end of a phase above 0 the target's
    noise would rule.
    """
    error = (velocity - target).square()
    if end == 0:
        return error.mean()
    _, beta = flow.phase_coefficients(sigma, end)
    return (flow.per_sample((10 * beta**2).clamp_max(1), error) * error).mean()


def matching_gradient(x0: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """(x0_fake - x0_real) / mean|x0 - x0_real|: each sample's own normaliser, so every sigma counts
    alike.
    """
    scale = (x0 - x0_real).abs().flatten(1).mean(1).clamp_min(NORMALISER_FLOOR)
    return (x0_fake - x0_real) / flow.per_sample(scale, x0)
