"""A frozen base that is small on the device: the matrices of its blocks are stored in fewer bits,
in host memory, or both, and each is restored for the moment of its use.

Weights only, in plain torch: it needs no other package, trains on any device, and gives the same
numbers everywhere; but where no gradient flows, a GPU that has fp8 arithmetic uses it. The base is
frozen, so backward needs a matrix only to pass the gradient on; it is restored again for that, and
never kept. Adapters stay float32 on the device (QLoRA, arXiv 2305.14314).

    bf16        the matrix as it is
    int8, fp8   one scale per row: |w| / 127, |w| / 448
    nf4         4-bit quantiles of a normal distribution, one scale per 64 weights (QLoRA, app. E)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional

from wan_distill.model.codes import NF4, dequantise, fp8_product, has_fp8_products, quantise
from wan_distill.model.offload import BlockFetcher, HostPool


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
    fetched: Tensor | None = None
    """a copy of `codes` on the device, while there is one"""

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

    def fill(self, weight: Tensor, pool: HostPool | None = None) -> None:
        """Stores `weight` [out, in], on its device or in `pool`."""
        codes, self.scale = quantise(weight, self.kind)
        if self.offload:
            codes = (pool or HostPool(codes.nbytes)).place(codes)
        self.codes = codes
        if self.kind == "nf4":
            self.levels = torch.tensor(NF4, device=weight.device)
        marker = torch.empty(0, dtype=self.dtype, device=weight.device)
        self.weight = nn.Parameter(marker, requires_grad=False)

    @property
    def size(self) -> int:
        """Bytes of its codes."""
        bits = {"bf16": 8 * self.dtype.itemsize, "nf4": 4}.get(self.kind, 8)
        return self.in_features * self.out_features * bits // 8

    @property
    def fits_fp8_product(self) -> bool:
        """Whether the kernel takes it: sizes of 16 values, bf16 beside fp8."""
        sizes_fit = self.in_features % 16 == 0 and self.out_features % 16 == 0
        return self.kind == "fp8" and self.dtype == torch.bfloat16 and sizes_fit

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        shape = (self.out_features, self.in_features)
        x = x.to(self.dtype)
        codes = self.codes if self.fetched is None else self.fetched
        if self.fits_fp8_product and not torch.is_grad_enabled() and has_fp8_products(x.device):
            return fp8_product(x, codes, self.scale, bias)
        product: Tensor = _Product.apply(x, codes, self.scale, bias, self.kind, shape, self.levels)
        return product


def load_streamed(
    folder: Path,
    weights: Mapping[str, Tensor],
    kind: str | None,
    dtype: torch.dtype,
    device: torch.device,
    offload: bool = False,
    fetch_ahead: bool = False,
) -> WanTransformer3DModel:
    """A frozen transformer whose tensors come one by one: there is never a whole copy beside it.

    Args:
        folder: that of its config.json.
        weights: diffusers' name -> tensor, of all its tensors.
        kind: how the blocks' matrices are stored: bf16, int8, fp8 or nf4; None: as plain layers.
        dtype: of the arithmetic, and of what is not quantised.
        offload: put the blocks' matrices into host memory.
        fetch_ahead: copy each block's to the device while the block before it works; its blocks
            must then be recomputed for a backward pass.
    """
    settings = WanTransformer3DModel.load_config(folder)
    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel.from_config(settings)
    stored = store_matrices(model, kind, dtype, offload) if kind else []
    pool = HostPool(sum(layer.size for layers in stored for layer in layers)) if offload else None
    in_float32 = set(model._keep_in_fp32_modules)
    for name, tensor in weights.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, StoredLinear) and leaf == "weight":
            module.fill(tensor.to(dtype) if kind == "bf16" else tensor, pool)
        else:
            exact = bool(in_float32 & set(name.split(".")))
            tensor = tensor.to(torch.float32 if exact else dtype)
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    # Buffers are in no file. `model.to` would also move the matrices that are in host memory.
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if offload and fetch_ahead:
        BlockFetcher(model.blocks, stored, device)
    return model.requires_grad_(False).eval()


def store_matrices(
    model: WanTransformer3DModel, kind: str, dtype: torch.dtype, offload: bool
) -> list[list[StoredLinear]]:
    """Puts a StoredLinear, still to be filled, in the place of each linear layer of the blocks;
    gives those of each block.
    """
    for path, module in list(model.blocks.named_modules()):
        if type(module) is nn.Linear:
            model.blocks.set_submodule(path, StoredLinear(module, kind, dtype, offload))
    return [[m for m in b.modules() if isinstance(m, StoredLinear)] for b in model.blocks]
