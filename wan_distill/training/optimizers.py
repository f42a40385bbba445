"""The optimizers of adapters and weights. Their states have names of their own, so that a
checkpoint of one is never taken for another's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from wan_distill.settings.config import Config

MOMENTUM = 0.95  # of Muon, with Nesterov's look ahead


def make_optimizer(
    config: Config, parameters: Iterable[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over `parameters`; learning rates of both kinds change a
    weight by about as much.

    `muon` moves each matrix along the nearest orthogonal one to its momentum, so that all
    directions learn alike (Jordan et al. 2024, kellerjordan.github.io/posts/muon), at Adam's size:
    0.2 sqrt(max(rows, columns)) (arXiv 2502.16982, equation 4). It takes matrices only.
    `adamw` is torch's, or bitsandbytes' with 8-bit moments (arXiv 2110.02861).
    """
    decay = config.adam_weight_decay
    if config.optimizer == "muon":
        return torch.optim.Muon(
            parameters,
            lr=learning_rate,
            momentum=MOMENTUM,
            weight_decay=decay,
            adjust_lr_fn="match_rms_adamw",
        )
    settings: dict[str, Any] = dict(
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=decay,
        eps=config.adam_epsilon,
    )
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, **settings, fused=True)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def first_moment(config: Config) -> str:
    """The name of the first moment in the state of a weight."""
    if config.optimizer == "muon":
        return "momentum_buffer"
    return "state1" if config.use_8bit_adam else "exp_avg"


def has_adam_moments(config: Config) -> bool:
    """Whether the state of a weight holds AdamW's two moments as they are."""
    return first_moment(config) == "exp_avg"
