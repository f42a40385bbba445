"""A frozen transformer that is spread over all processes; whole blocks exist only while they work.

Adapters that are added afterwards are not FSDP's: each process has them whole, and the run averages
their gradients as it always does. Checkpoints are therefore the same files as without sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def load_sharded(
    folder: Path, weights: Mapping[str, Tensor] | None, dtype: torch.dtype, device: torch.device
) -> WanTransformer3DModel:
    """A frozen transformer of which each process holds its part. The first process reads one tensor
    after the other and hands out its parts: no machine's memory ever holds the whole.

    Args:
        folder: that of its config.json.
        weights: diffusers' name -> tensor, on the first process; None on the others.
        dtype: of what diffusers does not keep in float32.
    """
    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
    in_float32 = set(model._keep_in_fp32_modules)
    for path, module in model.named_modules():
        for leaf, p in module._parameters.items():
            if p is not None:
                exact = bool(in_float32 & {*path.split("."), leaf})
                empty = torch.empty_like(p, dtype=torch.float32 if exact else dtype)
                module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
    shard_base(model, device)
    parts = {}
    for name, p in model.named_parameters():
        if weights is None:
            whole = torch.empty(p.shape, dtype=p.dtype, device=device)
        else:
            whole = weights[name].to(device, p.dtype)
        parts[name] = nn.Parameter(_hand_out(whole, p), requires_grad=False)
    model.load_state_dict(parts, assign=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()


def _hand_out(whole: Tensor, p: Tensor) -> Tensor:
    """This process' part of the first one's `whole`, divided as `p` is."""
    if isinstance(p, DTensor):
        return distribute_tensor(whole, p.device_mesh, p.placements)
    dist.broadcast(whole, src=0)
    return whole


def shard_base(transformer: WanTransformer3DModel, device: torch.device) -> None:
    """Spreads a frozen transformer over all processes by FSDP2."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    main = next(transformer.get_submodule("blocks.0.attn1.to_q").parameters()).dtype
    # Wan keeps norms and tables in float32 within bf16 blocks. FSDP gathers one dtype per group,
    # and these are small, so each process keeps them whole.
    small = {p for p in transformer.parameters() if p.dtype != main}
    for p in small:
        if not p.is_meta:
            p.data = p.data.to(device)
    for block in transformer.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=small)
    fully_shard(transformer, mesh=mesh, reshard_after_forward=True, ignored_params=small)
