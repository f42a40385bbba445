"""What is trained on an expert, and with which weights it begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from random_teachers import random_transformer
from regression import gradient_of_student

from wan_distill.model.adapters import (
    adapter_layers,
    adapter_parameters,
    add_adapter,
    make_roles,
    prune,
    spaced_blocks,
)
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.config import Config
from wan_distill.settings.recipes import Role

ROLES: tuple[Role, ...] = ("student", "fake_score", "real_score")


def base(dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    return random_transformer(7, layers=2).requires_grad_(False).to(dtype)


def with_student(dtype: torch.dtype) -> WanTransformer3DModel:
    model = base(dtype)
    add_adapter(model, "student", rank=4, alpha=4, layers=("to_q", "to_v", "ffn.net.2"), seed=3)
    return model


# ----------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_are_not_cast_change_no_gradient(
    dtype: torch.dtype, checkpointing: bool
) -> None:
    """peft would copy each input to float32 first; under autocast the results are the same bits."""
    kept, cast = with_student(dtype), with_student(dtype)
    assert not any(layer.cast_input_dtype_enabled for layer in adapter_layers(kept))
    for layer in adapter_layers(cast):
        layer.cast_input_dtype_enabled = True
    first, second = (gradient_of_student(m, checkpointing, dtype) for m in (kept, cast))
    assert first.abs().max() > 0 and torch.equal(first, second)


def test_a_bf16_base_gets_no_float32_copies_of_its_activations() -> None:
    model = with_student(torch.bfloat16)
    dtypes: set[torch.dtype] = set()
    for layer in adapter_layers(model):
        layer.lora_A["student"].register_forward_pre_hook(
            lambda _, given: dtypes.add(given[0].dtype)
        )
    gradient_of_student(model, dtype=torch.bfloat16)
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_float32_without_effect_and_drawn_from_its_seed(dtype: torch.dtype) -> None:
    state = torch.random.get_rng_state()
    models = {seed: base(dtype) for seed in (0, 1)}
    torch.random.set_rng_state(state)
    for seed, model in models.items():
        add_adapter(model, "student", rank=4, alpha=4, layers=("to_q",), seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = base(dtype)
    add_adapter(again, "student", rank=4, alpha=4, layers=("to_q",), seed=0)
    for name, p in adapter_parameters(models[0], "student").items():
        assert p.dtype == torch.float32
        assert torch.equal(p, adapter_parameters(again, "student")[name])
        if ".lora_B." in name:
            assert not p.any()
        else:
            assert not torch.equal(p, adapter_parameters(models[1], "student")[name])


def test_each_role_has_its_own_tensors_and_scale(small_config: Callable[..., Config]) -> None:
    config = small_config(
        method="dmd",
        real_score="samples",
        rank=4,
        lora_alpha=2.0,
        fake_score_lora_alpha=12.0,
        lora_layers=("to_q",),
    )
    model = base()
    parameters = make_roles(model, ROLES, config, "low")
    assert tuple(parameters) == ROLES
    names = [name for role in ROLES for name in parameters[role]]
    assert len(names) == len(set(names)) == 3 * 2 * 2 * 2  # roles, blocks, attentions, halves
    for layer in adapter_layers(model):
        assert layer.scaling == {"student": 0.5, "fake_score": 3.0, "real_score": 3.0}


def test_both_scores_begin_alike_and_all_else_differs(small_config: Callable[..., Config]) -> None:
    """They are compared with each other; what they begin with must not decide."""

    def beginnings(expert: Any, **changes: Any) -> dict[str, torch.Tensor]:
        config = small_config(method="dmd", real_score="samples", rank=4, **changes)
        parameters = make_roles(base(), ROLES, config, expert)
        return {
            role: torch.cat([p.detach().flatten() for p in parameters[role].values()])
            for role in ROLES
        }

    high, low, other = beginnings("high"), beginnings("low"), beginnings("high", seed=1)
    assert torch.equal(high["fake_score"], high["real_score"])
    assert not torch.equal(high["fake_score"], high["student"])
    for role in ROLES:
        assert not torch.equal(high[role], low[role])
        assert not torch.equal(high[role], other[role])


# ----------------------------------------------------------------------------- shallower students


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (40, 4, [0, 13, 26, 39]),
        (30, 8, [0, 4, 8, 12, 17, 21, 25, 29]),
        (40, 39, [*range(19), *range(20, 40)]),
        (5, 5, [0, 1, 2, 3, 4]),
        (6, 2, [0, 5]),
        (6, 1, [0]),
    ],
)
def test_blocks_are_spaced_evenly_with_the_first_and_the_last(
    total: int, count: int, expected: list[int]
) -> None:
    assert spaced_blocks(total, count) == expected


def test_pruning_keeps_those_blocks_and_says_so() -> None:
    model = random_transformer(7, layers=7)
    blocks = list(model.blocks)
    prune(model, 3)
    assert [blocks.index(block) for block in model.blocks] == [0, 3, 6]
    assert model.config.num_layers == 3
    again = WanTransformer3DModel.from_config(model.config)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_shallower_student_trains_all_its_weights_in_float32(
    small_config: Callable[..., Config],
) -> None:
    model = base(torch.bfloat16)
    config = small_config(method="trajectory", student_layers=1, save_merged=True)
    ((role, parameters),) = make_roles(model, ("student",), config, "high").items()
    assert role == "student" and parameters.keys() == dict(model.named_parameters()).keys()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters.values())
    assert len(model.blocks) == 1
    assert Denoiser({"high": model}, None).dtype == torch.float32
