"""What a backward pass computes again, and what it does not."""

from __future__ import annotations

from collections import Counter

import torch
from diffusers import WanTransformer3DModel
from random_teachers import random_transformer
from regression import gradient_of_student
from torch.utils._python_dispatch import TorchDispatchMode

from wan_distill.model.adapters import add_adapter


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def student() -> WanTransformer3DModel:
    model = random_transformer(7, layers=2).requires_grad_(False)
    add_adapter(model, "student", rank=4, alpha=4, layers=("to_q", "to_v", "ffn.net.2"), seed=3)
    return model


def test_kept_attention_gives_the_very_same_gradient():
    plain = gradient_of_student(student(), checkpointing=True)
    kept = gradient_of_student(student(), checkpointing=True, keep_attention=True)
    assert torch.equal(kept, plain)


def test_self_attention_alone_is_not_computed_again():
    """Attention to the text is, and so are matrix products."""
    forward = "_scaled_dot_product_flash_attention_for_cpu"
    counts = {}
    for kept in (False, True):
        with Calls() as calls:
            gradient_of_student(student(), checkpointing=True, keep_attention=kept)
        counts[kept] = calls.of
    blocks = 2
    assert counts[False][forward] == 4 * blocks  # self and cross, each twice
    assert counts[True][forward] == 3 * blocks
    assert counts[False]["addmm"] == counts[True]["addmm"] > 0
