"""Noise levels without torch: which sigmas a sampler visits and which expert owns each of them.

`sigma` is in [0, 1], 1 = pure noise; `x = (1 - sigma) * x0 + sigma * noise`; `timestep = 1000 *
sigma`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Expert = Literal["high", "low"]
NUM_TRAIN_TIMESTEPS = 1000
SUBFOLDER: dict[str, str] = {"high": "transformer", "low": "transformer_2"}


def shift_sigma(u: float, shift: float) -> float:
    """Resolution shift of a uniform noise level (SD3, arXiv 2403.03206, eq. 23): s*u / (1 +
    (s-1)*u).

    Written so that 0 and 1 stay exactly what they are for any shift.

    Args:
        u: unshifted level in [0, 1].
        shift: positive; 1 = identity, larger spends more steps at high noise.
    """
    return u / (u + (1 - u) / shift)


def sigma_grid(steps: int, shift: float) -> tuple[float, ...]:
    """The `steps + 1` sigmas of an Euler sampler, from 1 down to and including 0.

    Equals `FlowMapEulerDiscreteScheduler(shift=shift).set_timesteps(steps)`. Grids are nested:
    every sigma of `steps` is also in the grid of `2 * steps`.
    """
    return tuple(shift_sigma(1 - i / steps, shift) for i in range(steps + 1))


def expert_of(sigma: float, boundary: float | None) -> Expert:
    """Who denoises at `sigma`, by the rule of `WanPipeline`: t >= boundary_ratio * 1000 is
    `transformer`.
    """
    if boundary is None or sigma * NUM_TRAIN_TIMESTEPS >= boundary * NUM_TRAIN_TIMESTEPS:
        return "high"
    return "low"


def steps_of(expert: Expert, sigmas: tuple[float, ...], boundary: float | None) -> list[int]:
    """Indices i of the steps sigmas[i] -> sigmas[i+1] that `expert` denoises; consecutive, possibly
    empty.
    """
    return [i for i, sigma in enumerate(sigmas[:-1]) if expert_of(sigma, boundary) == expert]


def handover(sigmas: tuple[float, ...], boundary: float | None) -> float:
    """The sigma at which the high expert hands its latents to the low one; 0 when there is no low
    step.
    """
    high = steps_of("high", sigmas, boundary)
    return sigmas[high[-1] + 1]


def insert_sigmas(sigmas: tuple[float, ...], grid: tuple[float, ...]) -> tuple[float, ...]:
    """`grid` with each of `sigmas` put in place of its nearest interior point (or added where none
    is left).

    Gives the teacher's solver the student's sigmas as exact solver points at no extra evaluation.
    """
    merged = list(grid)
    free = set(range(1, len(grid) - 1))
    for sigma in sigmas:
        if sigma in merged:
            free.discard(merged.index(sigma))
            continue
        nearest = min(free, key=lambda i: abs(grid[i] - sigma), default=None)
        if nearest is None:
            merged.append(sigma)
        else:
            merged[nearest] = sigma
            free.discard(nearest)
    return tuple(sorted(merged, reverse=True))


# Sigmas at which scores are compared: never outside the range its teacher expert was trained on.
SCORE_MARGIN = 0.02


def score_range(
    expert: Expert, boundary: float | None, end: float, most: float
) -> tuple[float, float]:
    """Sigmas at which this expert's scores are compared: its teacher's own range, clear of the
    phase's end.
    """
    low, high = SCORE_MARGIN, most
    if boundary is not None and expert == "high":
        low = boundary
    elif boundary is not None:
        high = min(most, boundary - 1e-6)  # the boundary itself belongs to the high expert
    return max(low, end + SCORE_MARGIN) if end > 0 else low, high


def unshift_sigma(sigma: float, shift: float) -> float:
    """The inverse of `schedule.shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def expert_sigmas(
    sigmas: Sequence[float], expert: Expert, boundary: float | None
) -> tuple[float, ...]:
    """The consecutive sigmas `expert` integrates over, its end point included; empty if it owns
    none.
    """
    owned = [i for i, s in enumerate(sigmas[:-1]) if expert_of(s, boundary) == expert]
    return tuple(sigmas[owned[0] : owned[-1] + 2]) if owned else ()
