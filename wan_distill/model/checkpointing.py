"""Activations that are computed again in the backward pass, with or without those of attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from wan_distill.settings.config import Config


def recompute_blocks(transformer: WanTransformer3DModel, config: Config) -> None:
    """Makes a backward pass compute the blocks again, as `--gradient_checkpointing` asks."""
    if config.gradient_checkpointing:
        enable_checkpointing(transformer, config.keep_attention)


def enable_checkpointing(transformer: WanTransformer3DModel, keep_attention: bool) -> None:
    """diffusers' own checkpointing, one block at a time.

    Args:
        keep_attention: store the output of each self-attention, which is half of a block's work on
            long clips, instead of computing it again.
    """
    if keep_attention:
        transformer.enable_gradient_checkpointing(gradient_checkpointing_func=_keeping_attention)
    else:
        transformer.enable_gradient_checkpointing()


def _keeping_attention(block: nn.Module, *inputs: Any) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, _is_kept)
    return checkpoint(block.__call__, *inputs, use_reentrant=False, context_fn=contexts)


def _is_kept(context: Any, operator: Any, *inputs: Any, **named: Any) -> CheckpointPolicy:
    name = operator._overloadpacket.__name__
    if name.startswith("_scaled_dot_product") and not name.endswith("_backward"):
        query: Tensor = inputs[0]
        key: Tensor = inputs[1]
        if query.shape[-2] == key.shape[-2]:  # attention to the text's few tokens costs little
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
