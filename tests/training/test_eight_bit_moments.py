"""--use_8bit_adam: bitsandbytes' AdamW beside torch's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_distill.settings.config import Config
from wan_distill.system.runtime import Runtime
from wan_distill.training.learner import Learner

pytest.importorskip("bitsandbytes")


def test_moments_of_several_weights_go_into_one_file(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    """bitsandbytes has one table of levels for all of them."""
    config = small_config(use_8bit_adam=True, method="trajectory")
    weights = {f"{i}.weight": torch.nn.Parameter(torch.zeros(64, 128)) for i in range(2)}
    learner = Learner("student", weights, config, 10)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    learner.update(Runtime(config), torch.zeros(()))
    save_file(learner.tensors(), tmp_path / "moments.safetensors")
    assert load_file(tmp_path / "moments.safetensors").keys() == learner.tensors().keys()


def test_8_bit_moments_train_alike_and_are_resumed_exactly(
    small_config: Callable[..., Config],
) -> None:
    """bitsandbytes keeps tensors of fewer than 4096 values in 32 bits: these have more."""
    config = small_config(
        use_8bit_adam=True,
        learning_rate=1e-2,
        method="trajectory",
        lr_scheduler="constant",
        lr_warmup_steps=0,
    )

    def learner(**changes: Any) -> Learner:
        weight = torch.nn.Parameter(torch.zeros(64, 128))
        changed = dataclasses.replace(config, **changes)
        return Learner("student", {"block.weight": weight}, changed, 10)

    def train(learner: Learner, first: int, last: int) -> torch.Tensor:
        (weight,) = learner.parameters.values()
        for step in range(first, last):
            rng = torch.Generator().manual_seed(step)
            weight.grad = 1 + torch.randn(weight.shape, generator=rng)
            learner.update(Runtime(config), torch.zeros(()))
        return weight.detach().clone()

    in_8_bits = learner()
    coarse = train(in_8_bits, 0, 6)
    exact = train(learner(use_8bit_adam=False), 0, 6)
    assert torch.cosine_similarity(coarse.flatten(), exact.flatten(), dim=0) > 0.99
    assert not torch.equal(coarse, exact) and in_8_bits.update_norm() is None
    saved = {name: value.clone() for name, value in in_8_bits.tensors().items()}
    again = learner()
    again.restore(saved, in_8_bits.done)
    assert torch.equal(train(again, 6, 10), train(in_8_bits, 6, 10))
    with pytest.raises(KeyError, match="8bit"):
        learner(use_8bit_adam=False).restore(saved, 6)
