"""Noise levels as plain floats: which sigmas a sampler visits, and which expert denoises each.

`sigma` lies in [0, 1]; 1 is pure noise and 0 is a clean sample:
`x = (1 - sigma) * x0 + sigma * noise`. Wan's `timestep` is `1000 * sigma`. A sampler's sigmas
descend; step i goes from sigmas[i] to sigmas[i + 1]. `boundary` is the teacher's `boundary_ratio`,
the lowest sigma of the high-noise expert, or None for a teacher with one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Expert = Literal["high", "low"]
NUM_TRAIN_TIMESTEPS = 1000
# Folder of each expert's weights inside a diffusers pipeline.
SUBFOLDER: dict[Expert, str] = {"high": "transformer", "low": "transformer_2"}
# Scores are compared at least this far above sigma 0 and above the end of their phase: close to
# the end of a phase the label noise of `flow.phase_velocity` grows without bound.
SCORE_MARGIN = 0.02


# -------------------------------------------------------------------------------------------- grids


def shift_sigma(u: float, shift: float) -> float:
    """Resolution shift of one noise level (SD3, arXiv 2403.03206, eq. 23): s*u / (1 + (s-1)*u).

    This form returns exactly 0 for 0 and exactly 1 for 1, whatever the shift is.
    `flow.shift_sigmas` is the same formula for tensors.

    Args:
        u: level before the shift, in [0, 1].
        shift: positive; 1 changes nothing, a larger shift moves levels towards 1.
    """
    return u / (u + (1 - u) / shift)


def unshift_sigma(sigma: float, shift: float) -> float:
    """The level `u` in [0, 1] for which `shift_sigma(u, shift)` is `sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def sigma_grid(steps: int, shift: float) -> tuple[float, ...]:
    """The `steps + 1` sigmas of an Euler sampler, from 1 down to and including 0.

    Equal to the sigmas of `FlowMapEulerDiscreteScheduler(shift=shift).set_timesteps(steps)`. Grids
    are nested: each sigma of `steps` is also in the grid of `2 * steps`.
    """
    return tuple(shift_sigma(1 - i / steps, shift) for i in range(steps + 1))


def insert_sigmas(sigmas: tuple[float, ...], grid: tuple[float, ...]) -> tuple[float, ...]:
    """`grid` in which each of `sigmas` replaces the nearest interior point not yet replaced.

    The teacher's solver then visits the student's sigmas exactly, with no extra evaluation. A sigma
    is added where no interior point is left.

    Returns:
        Descending sigmas that contain all of `sigmas` and both ends of `grid`.
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


# ------------------------------------------------------------------------------------------ experts


def expert_of(sigma: float, boundary: float | None) -> Expert:
    """The expert that denoises at `sigma`.

    `WanPipeline` compares timesteps: it takes `transformer` (high) where t >= boundary_ratio *
    1000. Products, not ratios, are compared here as well, so that rounding agrees with it.
    """
    if boundary is None or sigma * NUM_TRAIN_TIMESTEPS >= boundary * NUM_TRAIN_TIMESTEPS:
        return "high"
    return "low"


def steps_of(expert: Expert, sigmas: Sequence[float], boundary: float | None) -> list[int]:
    """Indices i of the steps sigmas[i] -> sigmas[i + 1] of `expert`: consecutive, may be empty."""
    return [i for i, sigma in enumerate(sigmas[:-1]) if expert_of(sigma, boundary) == expert]


def expert_sigmas(
    sigmas: Sequence[float], expert: Expert, boundary: float | None
) -> tuple[float, ...]:
    """The part of `sigmas` that `expert` integrates over, with the end of its last step.

    Empty where the expert has no step.
    """
    steps = steps_of(expert, sigmas, boundary)
    return tuple(sigmas[steps[0] : steps[-1] + 2]) if steps else ()


def handover(sigmas: Sequence[float], boundary: float | None) -> float:
    """The sigma at which the high expert passes its latents to the low one.

    0, the end of sampling, where the low expert has no step.
    """
    return expert_sigmas(sigmas, "high", boundary)[-1]


def score_range(
    expert: Expert, boundary: float | None, end: float, highest: float
) -> tuple[float, float]:
    """Lowest and highest sigma at which the scores of `expert` are compared.

    The teacher's expert gives a score only at sigmas on which it was trained.

    Args:
        end: sigma at which the expert's phase ends; 0 for the last phase.
        highest: upper limit, in (0, 1].
    """
    low, high = SCORE_MARGIN, highest
    if boundary is not None and expert == "high":
        low = boundary
    elif boundary is not None:
        high = min(highest, boundary - 1e-6)  # the boundary itself belongs to the high expert
    if end > 0:
        low = max(low, end + SCORE_MARGIN)
    return low, high
