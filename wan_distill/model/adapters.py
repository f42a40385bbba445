"""What is trained on an expert: one LoRA adapter per role or, with `--student_layers`, all weights
of some of its blocks.
"""

from __future__ import annotations

import warnings

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from wan_distill.maths.randomness import keyed_seed
from wan_distill.maths.sigmas import Expert
from wan_distill.settings.config import Config
from wan_distill.settings.recipes import Role


def make_roles(
    transformer: WanTransformer3DModel, roles: tuple[Role, ...], config: Config, expert: Expert
) -> dict[Role, dict[str, nn.Parameter]]:
    """Role -> (name -> trainable tensor), in float32.

    Each of `roles` gets an adapter on the frozen base. With `--student_layers` there is one role,
    the student, and it trains all weights of the blocks that are left.
    """
    if config.student_layers:
        prune(transformer, config.student_layers)
        return {"student": train_all_weights(transformer)}
    for role in roles:
        # The two scores are compared with each other, so both begin with the same weights.
        begins_as = "fake_score" if role == "real_score" else role
        add_adapter(
            transformer,
            role,
            rank=config.rank,
            alpha=adapter_alpha(config, role),
            layers=config.lora_layers,
            seed=keyed_seed(config.seed, expert, begins_as),
        )
    return {role: adapter_parameters(transformer, role) for role in roles}


def adapter_alpha(config: Config, role: Role) -> float:
    """alpha of a role's adapter, whose effect is scaled by alpha / rank."""
    return config.lora_alpha if role == "student" else config.fake_score_lora_alpha


def add_adapter(
    transformer: WanTransformer3DModel,
    role: Role,
    *,
    rank: int,
    alpha: float,
    layers: tuple[str, ...],
    seed: int,
) -> None:
    """Adds the LoRA adapter of `role` to a transformer: in float32, without effect at first, its
    random half drawn from `seed`.

    Where the base is not float32, forward passes through the adapter must run under autocast.

    Args:
        layers: endings of module names, such as `to_q`; all linear layers with one of them get an
            adapter.
    """
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers))
    # peft draws from the global generator, and warns about a second adapter.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        torch.manual_seed(seed)
        transformer.add_adapter(lora, adapter_name=role)
    for parameter in adapter_parameters(transformer, role).values():
        # peft chose the base's dtype. Small updates would be lost in bf16.
        parameter.data = parameter.data.float()
    for layer in adapter_layers(transformer):
        # peft casts each input to the adapter's float32. Autocast casts it back, so that copy would
        # only cost memory and time.
        layer.cast_input_dtype_enabled = False


def adapter_layers(transformer: WanTransformer3DModel) -> list[LoraLayer]:
    """The layers of `transformer` that have adapters."""
    return [module for module in transformer.modules() if isinstance(module, LoraLayer)]


def adapter_parameters(transformer: WanTransformer3DModel, role: Role) -> dict[str, nn.Parameter]:
    """Name -> trainable tensor of one role's adapter, in a fixed order."""
    return {
        name: parameter
        for name, parameter in transformer.named_parameters()
        if ".lora_" in name and f".{role}." in name
    }


def spaced_blocks(total: int, count: int) -> list[int]:
    """Indices of `count` blocks at even distances among `total`, with the first and the last.

    Neighbouring blocks of a deep transformer do nearly the same (arXiv 2403.03853), so a shallower
    student begins with these.
    """
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def prune(transformer: WanTransformer3DModel, layers: int) -> None:
    """Removes blocks in place until `layers` are left, and writes that number into the config."""
    chosen = spaced_blocks(len(transformer.blocks), layers)
    transformer.blocks = nn.ModuleList(transformer.blocks[i] for i in chosen)
    transformer.register_to_config(num_layers=layers)


def train_all_weights(transformer: WanTransformer3DModel) -> dict[str, nn.Parameter]:
    """Name -> every weight, made trainable and float32: small updates would be lost in bf16."""
    for parameter in transformer.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return dict(transformer.named_parameters())
