"""A shallower student (--student_layers): some of the teacher's blocks, all of their weights trained.

Fewer blocks make each of its few steps cheaper too. Blocks are kept at even distances, the first and the last among
them, since neighbours in a deep transformer do nearly the same (arXiv 2403.03853).
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import nn


def kept_blocks(total: int, kept: int) -> list[int]:
    """Which of `total` blocks a student of `kept` begins with."""
    return [round(i * (total - 1) / max(1, kept - 1)) for i in range(kept)]


def prune(transformer: WanTransformer3DModel, layers: int) -> None:
    """Leaves `layers` of the blocks, in place; its configuration says so."""
    transformer.blocks = nn.ModuleList(transformer.blocks[i] for i in kept_blocks(len(transformer.blocks), layers))
    transformer.register_to_config(num_layers=layers)


def trainable(transformer: WanTransformer3DModel) -> dict[str, nn.Parameter]:
    """Name -> every weight, in float32 and to be trained: small updates are lost in bf16."""
    transformer.to(torch.float32).requires_grad_(True)
    return dict(transformer.named_parameters())
