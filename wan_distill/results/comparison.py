"""How near a student comes to its teacher: the gap closed, how sure that is, and what clips show
without a learned judge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wan_distill.maths.distances import frechet_distance
from wan_distill.maths.tiny_judge import Judge
from wan_distill.maths.tiny_world import World, is_caption

GROUPS = 16  # of the jackknife
NORMAL_95 = 1.96  # standard errors on either side of a 95 % interval


def gap_closed(distance: float, floor: float, worst: float) -> float:
    """1 for a Fréchet distance of `floor`, 0 for one of `worst`."""
    return 1 - (distance - floor) / (worst - floor)


def standard_error(sets: Sequence[Tensor], reference: Tensor) -> float:
    """Of the gap closed, over samples: a jackknife that leaves out one of `GROUPS` groups at a time
    (Efron and Stein, The jackknife estimate of variance, 1981).

    Args:
        sets: vectors [N, D] of the student, of the teacher from the same noise, and of what closes
            nothing of the gap.
        reference: [N, D] of the teacher from other noise.
    """
    groups = min(GROUPS, len(reference))
    values = []
    for group in range(groups):
        kept = torch.arange(len(reference)) % groups != group
        distances = [frechet_distance(vectors[kept], reference[kept]) for vectors in sets]
        values.append(gap_closed(*distances))
    mean = sum(values) / groups
    return math.sqrt((groups - 1) / groups * sum((value - mean) ** 2 for value in values))


def interval_95(value: float, error: float) -> list[float]:
    """Both ends of the 95 % interval of a value with this standard error."""
    return [value - NORMAL_95 * error, value + NORMAL_95 * error]


def world_measures(
    world: dict[str, Any] | None, clips: Tensor, prompts: Sequence[str]
) -> dict[str, float]:
    """What needs no learned judge, where the teacher is a tiny one: the share of clips that show
    what their captions say, and how steady the moving shape is.

    Args:
        world: the values of its `World`; nothing is measured where it has none.
        clips: [N, F, H, W, 3] of RGB in [0, 1].
        prompts: at least N; those that are no captions of that world are left out.
    """
    if world is None:
        return {}
    judge = Judge(World(**world))
    shown = [(clip, prompt) for clip, prompt in zip(clips, prompts, strict=False)]
    known = [(2 * clip.permute(3, 0, 1, 2) - 1, p) for clip, p in shown if is_caption(p)]
    if not known:
        return {}
    return dict(
        obeys=sum(judge.obeys(*each) for each in known) / len(known),
        steadiness=sum(judge.steadiness(*each) for each in known) / len(known),
    )
