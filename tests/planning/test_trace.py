"""Traced memory and arithmetic against autograd's own account, formulas, and real updates."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import WanTransformer3DModel
from wan_shapes import A14B, MIDDLE, MIDDLE_CLIP, config_of, teacher_of

from wan_distill.model.adapters import add_adapter
from wan_distill.planning import trace
from wan_distill.planning.memory import shape_of

# A14B's updates on fake tensors: as long as a whole run.
pytestmark = pytest.mark.journey


def test_the_graph_is_what_autograd_says_it_saves(tmp_path):
    """Independent of the ledger: autograd's own hooks get every tensor kept for backward."""
    info = teacher_of(MIDDLE, tmp_path)
    changes = dict(method="trajectory", gradient_checkpointing=False, train_batch_size=1)
    config = config_of(info, **MIDDLE_CLIP | changes)
    shape = shape_of(config, info)
    model = WanTransformer3DModel(**dict(shape.transformer)).requires_grad_(False)
    add_adapter(model, "student", rank=8, alpha=8, layers=config.lora_layers, seed=0)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(
            torch.randn(1, *shape.latents), torch.tensor([900.0]), torch.randn(1, 32, 64)
        )
    assert trace.trace(shape).graph == pytest.approx(sum(saved.values()), rel=0.1)
    del output


@pytest.mark.parametrize("checkpointing", [False, True])
def test_depth_follows_from_two_and_three_blocks(checkpointing, tmp_path):
    """All blocks are alike: what is extended to four equals what four give."""
    info = teacher_of(MIDDLE, tmp_path)
    config = config_of(info, method="dmd", gradient_checkpointing=checkpointing, **MIDDLE_CLIP)
    shape = shape_of(config, info)
    assert dict(shape.transformer)["num_layers"] == 4
    direct, extended = trace._trace(shape, 4), trace.trace(shape)
    for name, value in dataclasses.asdict(direct).items():
        assert getattr(extended, name) == pytest.approx(value, rel=1e-6), name


def test_a14b_is_described_without_weights(tmp_path):
    info = teacher_of(A14B, tmp_path)
    config = config_of(info)
    cost = trace.trace(shape_of(config, info))
    assert cost.parameters == 14_288_491_584  # as the hosted files' headers sum to
    assert shape_of(config, info).tokens == 21 * 30 * 52
    # Matrices act on every token (text keys and values: a few); attention adds two products of
    # tokens^2 * width.
    tokens, width, layers = 32760, 5120, 40
    linear = (
        2 * tokens * layers * (6 * width**2 + 2 * width * 13824) + 2 * 512 * layers * 2 * width**2
    )
    attention = 4 * layers * width * (tokens**2 + tokens * 512)
    adapters = 2 * tokens * cost.adapter
    assert cost.forward_flops == pytest.approx(linear + attention + adapters, rel=0.01)
