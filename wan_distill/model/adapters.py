"""What is trained on an expert: a LoRA adapter per role or, with `--student_layers`, some of its
blocks.

Blocks of a shallower student are kept at even distances, the first and the last among them, since
neighbours in a deep transformer do nearly the same (arXiv 2403.03853).
"""

from __future__ import annotations

import warnings

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import nn

from wan_distill.maths.randomness import keyed_seed
from wan_distill.maths.sigmas import Expert
from wan_distill.methods.base import Method
from wan_distill.settings.config import Config
from wan_distill.settings.recipes import Role


def add_adapter(
    transformer: WanTransformer3DModel,
    role: Role,
    *,
    rank: int,
    alpha: float,
    layers: tuple[str, ...],
    seed: int,
) -> None:
    """Adds the LoRA adapter of `role`: float32, zero effect at first, its random half drawn from
    `seed`.
    """
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers))
    # peft draws from the global generator, and finds it worth a warning that there are several
    # adapters, which is meant
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        torch.manual_seed(seed)
        transformer.add_adapter(lora, adapter_name=role)
    for parameter in adapter_parameters(transformer, role).values():
        parameter.data = (
            parameter.data.float()
        )  # peft gives it the base's dtype; bf16 would lose small updates


def adapter_parameters(
    transformer: WanTransformer3DModel, role: Role
) -> dict[str, torch.nn.Parameter]:
    """Name -> trainable tensor of one role's adapter, in a fixed order."""
    marker = f".{role}."
    return {
        name: p for name, p in transformer.named_parameters() if ".lora_" in name and marker in name
    }


def kept_blocks(total: int, kept: int) -> list[int]:
    """Which of `total` blocks a student of `kept` begins with."""
    return [round(i * (total - 1) / max(1, kept - 1)) for i in range(kept)]


def prune(transformer: WanTransformer3DModel, layers: int) -> None:
    """Leaves `layers` of the blocks, in place; its configuration says so."""
    transformer.blocks = nn.ModuleList(
        transformer.blocks[i] for i in kept_blocks(len(transformer.blocks), layers)
    )
    transformer.register_to_config(num_layers=layers)


def trainable(transformer: WanTransformer3DModel) -> dict[str, nn.Parameter]:
    """Name -> every weight, in float32 and to be trained: small updates are lost in bf16."""
    transformer.to(torch.float32).requires_grad_(True)
    return dict(transformer.named_parameters())


def make_roles(
    transformer: WanTransformer3DModel, method: Method, config: Config, expert: Expert
) -> dict[Role, dict[str, torch.nn.Parameter]]:
    """Role -> what it trains: an adapter each on the frozen base or, with `--student_layers`, all
    that is left.
    """
    if config.student_layers:
        prune(transformer, config.student_layers)
        return {"student": trainable(transformer)}
    for role in method.roles:
        begins_as = (
            "fake_score" if role == "real_score" else role
        )  # the two scores are compared: from one beginning
        add_adapter(
            transformer,
            role,
            rank=config.rank,
            alpha=config.adapter_alpha(role),
            layers=config.lora_layers,
            seed=keyed_seed(config.seed, expert, begins_as),
        )
    return {role: adapter_parameters(transformer, role) for role in method.roles}
