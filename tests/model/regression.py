"""One velocity regression, whose gradient every way of storing and running the base must give."""

from __future__ import annotations

from functools import partial

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.checkpointing import enable_checkpointing
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser


def adapter_gradient(
    model: WanTransformer3DModel, checkpointing: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The student adapter's gradient, flat, on the CPU; the adapter is added here, and has an
    effect.
    """
    add_adapter(model, "student", rank=4, alpha=4, layers=("to_q", "to_v", "ffn.net.2"), seed=3)
    return gradient_of_student(model, checkpointing, dtype)


def gradient_of_student(
    model: WanTransformer3DModel,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    keep_attention: bool = False,
) -> Tensor:
    """The same of an adapter that is there already; its weights are set here."""
    parameters = adapter_parameters(model, "student")
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in parameters.values():
            p.copy_(0.1 * torch.randn(p.shape, generator=rng))
    if checkpointing:
        enable_checkpointing(model, keep_attention)
    autocast = partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
    denoiser = Denoiser({"high": model}, None, autocast=autocast)
    x, sigma, condition = inputs(rng)
    with denoiser.training("student"):
        velocity = denoiser.velocity(x, sigma, condition, role="student")
        (velocity - x).square().mean().backward()
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    assert len(gradients) == len(parameters)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    return torch.cat([gradient.flatten() for gradient in gradients])


def inputs(rng: torch.Generator) -> tuple[Tensor, Tensor, Condition]:
    """Latents of two clips, their sigmas and what they show."""
    x = torch.randn(2, 16, 2, 4, 4, generator=rng)
    prompt = torch.randn(2, 6, 16, generator=rng)
    return x, torch.tensor([0.9, 0.3], dtype=torch.float64), Condition(prompt)
