"""Options that save memory or time must leave the gradient alone: each is compared with the plain path."""

from __future__ import annotations

import pytest
import torch
from conftest import random_transformer

from wan_distill import memory
from wan_distill.config import EMBEDDED_TEACHER
from wan_distill.denoiser import Denoiser, adapter_parameters, add_adapter
from wan_distill.quantise import dequantise, load_quantised, quantise
from wan_distill.umt5 import weight_files

# Cosine of the adapter's gradient with the plain one's: what a rounding of the base of this size leaves.
AGREEMENT = {"int8": 0.999, "fp8": 0.99, "nf4": 0.95}


def gradient(model, checkpointing: bool = False, dtype=torch.float32) -> torch.Tensor:
    """The adapter's gradient of a velocity regression, flat; the adapter has an effect."""
    add_adapter(model, "student", rank=4, alpha=4, layers=("to_q", "to_v", "ffn.net.2"), seed=3)
    parameters = adapter_parameters(model, "student")
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in parameters.values():
            p.copy_(0.1 * torch.randn(p.shape, generator=rng))
    if checkpointing:
        model.enable_gradient_checkpointing()
    denoiser = Denoiser({"high": model}, None)
    x, prompt = torch.randn(2, 16, 2, 4, 4, generator=rng), torch.randn(2, 6, 16, generator=rng)
    with denoiser.training("student"), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        velocity = denoiser.velocity(x, torch.tensor([0.9, 0.3], dtype=torch.float64), prompt, role="student")
        (velocity - x).square().mean().backward()
    assert all(p.dtype == torch.float32 for p in parameters.values())
    return torch.cat([p.grad.flatten() for p in parameters.values()])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expert")
    random_transformer(7, layers=2).save_pretrained(folder)
    return folder


def loaded(folder, kind: str, dtype=torch.float32):
    return load_quantised(folder, weight_files(folder), kind, dtype, torch.device("cpu"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", list(AGREEMENT))
def test_gradients_through_a_quantised_base_agree_with_the_plain_ones(kind, checkpointing, stored):
    plain = gradient(random_transformer(7, layers=2).requires_grad_(False))
    coarse = gradient(loaded(stored, kind), checkpointing)
    assert torch.cosine_similarity(plain, coarse, dim=0) > AGREEMENT[kind]


@pytest.mark.parametrize("kind", list(AGREEMENT))
def test_a_quantised_layer_is_exactly_the_layer_with_its_rounded_weights(kind, stored):
    """Arithmetic and backward are exact: all error is the rounding's."""
    model = random_transformer(7, layers=2).requires_grad_(False)
    for module in model.blocks.modules():
        if type(module) is torch.nn.Linear:
            codes, scale = quantise(module.weight, kind)
            module.weight.copy_(dequantise(codes, scale, kind, tuple(module.weight.shape), torch.float32))
    torch.testing.assert_close(gradient(loaded(stored, kind)), gradient(model), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("fp8", 0.04), ("nf4", 0.12)])
def test_rounding_error_and_size_are_as_documented(kind, error):
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    codes, scale = quantise(weight, kind)
    again = dequantise(codes, scale, kind, (96, 160), torch.float32)
    assert (again - weight).norm() / weight.norm() < error
    size = codes.numel() + 4 * scale.numel()
    assert size == pytest.approx(weight.numel() * memory.BASE_BYTES[kind], rel=0.05)


def test_bf16_adapters_stay_float32_and_agree(stored):
    from diffusers import WanTransformer3DModel

    half = WanTransformer3DModel.from_pretrained(stored, torch_dtype=torch.bfloat16).requires_grad_(False)
    plain = gradient(random_transformer(7, layers=2).requires_grad_(False))
    assert torch.cosine_similarity(plain, gradient(half, dtype=torch.bfloat16), dim=0) > 0.99
    assert torch.cosine_similarity(plain, gradient(loaded(stored, "int8", torch.bfloat16), dtype=torch.bfloat16),
                                   dim=0) > 0.98


def test_a_run_with_a_quantised_base_trains_and_exports(small_config):
    import json
    from pathlib import Path

    import train_distillation

    config = small_config(base_precision="nf4", save_merged=True, evaluate=False, method="trajectory",
                          expert="high", prompts=str(EMBEDDED_TEACHER / "prompts.txt"))
    assert train_distillation.run(config) == 0
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["student_gradient_norm"] > 0
    assert (Path(config.output_dir) / "student" / "transformer_2").is_dir()
