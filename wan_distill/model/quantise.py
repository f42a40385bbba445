"""A frozen base that is small on the device: the matrices of its blocks are stored in fewer bits,
in host memory, or both, and each is restored for the moment of its use.

Weights only, in plain torch: it needs no other package, trains on any device, and gives the same
numbers everywhere. The base is frozen, so backward needs a matrix only to pass the gradient on; it
is restored again for that, and never kept. Adapters stay float32 on the device (QLoRA, arXiv
2305.14314).

    bf16        the matrix as it is
    int8, fp8   one scale per row: |w| / 127, |w| / 448
    nf4         4-bit quantiles of a normal distribution, one scale per 64 weights (QLoRA, app. E)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from torch import Tensor, nn
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


class _Product(torch.autograd.Function):
    """x @ matrix.T + bias, with a matrix that is restored for each use, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        kind: str,
        shape: tuple[int, int],
        levels: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(codes, scale, levels)
        ctx.kind = kind
        ctx.shape = shape
        return functional.linear(x, dequantise(codes, scale, kind, shape, x, levels), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, levels = ctx.saved_tensors
        matrix = dequantise(codes, scale, ctx.kind, ctx.shape, gradient, levels)
        return gradient @ matrix, None, None, None, None, None, None


class StoredLinear(nn.Linear):
    """A frozen linear layer whose matrix is quantised, in host memory, or both: in `codes`.

    `weight` is empty; it only shows others (adapters above all) on which device, and in which
    dtype, the layer works.
    """

    codes: Tensor
    scale: Tensor
    levels: Tensor | None

    def __init__(self, replaced: nn.Linear, kind: str, dtype: torch.dtype, offload: bool):
        """Takes the place of `replaced`, whose weights are not read; `fill` brings them."""
        super().__init__(
            replaced.in_features,
            replaced.out_features,
            bias=replaced.bias is not None,
            device="meta",
        )
        self.kind = kind
        self.dtype = dtype
        self.offload = offload
        self.register_buffer("scale", None)
        self.register_buffer("levels", None)

    def fill(self, weight: Tensor) -> None:
        """Stores `weight` [out, in], on its device or in (pinned) host memory."""
        codes, self.scale = quantise(weight, self.kind)
        if self.offload:
            codes = codes.cpu()
            codes = codes.pin_memory() if torch.cuda.is_available() else codes
        self.codes = codes
        if self.kind == "nf4":
            self.levels = torch.tensor(NF4, device=weight.device)
        marker = torch.empty(0, dtype=self.dtype, device=weight.device)
        self.weight = nn.Parameter(marker, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        shape = (self.out_features, self.in_features)
        product: Tensor = _Product.apply(
            x.to(self.dtype), self.codes, self.scale, bias, self.kind, shape, self.levels
        )
        return product


def load_stored(
    folder: Path,
    files: list[Path],
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    offload: bool = False,
) -> WanTransformer3DModel:
    """A frozen transformer whose blocks' matrices are quantised, in host memory, or both.

    Each tensor is stored as it is read: there is never a whole copy on the device.

    Args:
        folder: that of its config.json.
        files: its weights, as safetensors.
        kind: bf16, int8, fp8 or nf4.
        dtype: of the arithmetic, and of what is not quantised.
        offload: put the matrices into host memory.
    """
    settings = WanTransformer3DModel.load_config(folder)
    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel.from_config(settings)
    for path, module in list(model.blocks.named_modules()):
        if type(module) is nn.Linear:
            model.blocks.set_submodule(path, StoredLinear(module, kind, dtype, offload))
    for file in files:
        _read_weights(model, file, kind, dtype, device)
    # Buffers are in no file. `model.to` would also move the matrices that are in host memory.
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.requires_grad_(False).eval()


def _read_weights(
    model: WanTransformer3DModel, file: Path, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Puts the tensors of one file into their modules."""
    in_float32 = set(model._keep_in_fp32_modules)
    with safe_open(file, framework="pt", device=str(device)) as tensors:
        for name in tensors.keys():  # noqa: SIM118  (a safe_open is no mapping)
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            tensor = tensors.get_tensor(name)
            if isinstance(module, StoredLinear) and leaf == "weight":
                module.fill(tensor.to(dtype) if kind == "bf16" else tensor)
            else:
                exact = bool(in_float32 & set(name.split(".")))
                tensor = tensor.to(torch.float32 if exact else dtype)
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
