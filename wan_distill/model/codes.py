"""A matrix in fewer bits and back, in plain torch; and the product of two matrices in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NF4_BLOCK = 64
ROW_LIMIT = {"int8": 127.0, "fp8": 448.0}


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(codes uint8, scales float32) of a matrix [out, in]; for bf16 itself and no scales."""
    if kind == "bf16":
        return weight, torch.ones(())
    weight = weight.float()
    if kind == "nf4":
        return _quantise_nf4(weight)
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / ROW_LIMIT[kind]
    scaled = weight / scale
    stored = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)
    return stored.view(torch.uint8), scale


def _quantise_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two codes per byte, the first in the upper half; the last block is filled up with zeros."""
    padded = functional.pad(weight.flatten(), (0, -weight.numel() % NF4_BLOCK))
    blocks = padded.view(-1, NF4_BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)
    levels = torch.tensor(NF4, device=weight.device)
    halfway = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scale, halfway).to(torch.uint8).flatten()
    return codes[::2] << 4 | codes[1::2], scale


def dequantise(
    codes: Tensor,
    scale: Tensor,
    kind: str,
    shape: tuple[int, int],
    like: Tensor,
    levels: Tensor | None = None,
) -> Tensor:
    """The matrix [out, in] that `codes` stand for, in the dtype and on the device of `like`.

    Args:
        shape: (out, in), which codes of nf4 do not show.
        levels: NF4, best on that device already: the host waits for a copy of it.
    """
    codes = codes.to(like.device, non_blocking=True)
    scale = scale.to(like.device, non_blocking=True)
    if kind == "bf16":
        return codes.to(like.dtype)
    if kind == "nf4":
        levels = torch.tensor(NF4) if levels is None else levels
        levels = levels.to(codes.device)
        places = torch.stack([codes >> 4, codes & 15], 1).flatten().int()
        values = (levels[places].view(-1, NF4_BLOCK) * scale).flatten()
        return values[: shape[0] * shape[1]].view(shape).to(like.dtype)
    stored = codes.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    return (stored.float() * scale).to(like.dtype)


def has_fp8_products(device: torch.device) -> bool:
    """Whether `device` multiplies bf16's matrices in fp8 with a scale per row: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def fp8_product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] @ matrix.T + bias in fp8 arithmetic, of a matrix that `quantise` stored as fp8.

    `x` is rounded to fp8 too, with one scale per row, so this is for where no gradient flows.
    """
    rows = x.flatten(0, -2)
    # The norm reads `x` once, where an absolute value would write a copy of it.
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True).float()
    inverse = (ROW_LIMIT["fp8"] / largest.clamp_min(1e-12)).to(x.dtype)
    scaled = (rows * inverse).clamp(-ROW_LIMIT["fp8"], ROW_LIMIT["fp8"])
    product = torch._scaled_mm(
        scaled.to(torch.float8_e4m3fn),
        codes.view(torch.float8_e4m3fn).t(),
        scale_a=inverse.float().reciprocal(),
        scale_b=scale.t(),
        bias=bias,
        out_dtype=x.dtype,
    )
    return product.unflatten(0, x.shape[:-1])
