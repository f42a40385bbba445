"""The sampling loop outside training."""

from __future__ import annotations

from torch import Tensor

from wan_distill.maths.flow import Velocity
from wan_distill.maths.sigmas import Expert
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.config import Config


def guided(
    denoiser: Denoiser, config: Config, expert: Expert, prompt: Tensor, negative: Tensor
) -> Velocity:
    """The velocity field of the guided teacher inside `expert`'s range."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser.guided_velocity(x, sigma, prompt, negative, config.guidance(expert))

    return velocity
