"""A frozen base that is small on the device: the blocks' matrices are kept in fewer bits, in host
memory, or both, and spread out one at a time for use.

Weight-only, in plain torch, so that it needs no extra package, trains on any device and is the same
everywhere. The base is frozen: backward needs a matrix only to pass the gradient on, so it is
fetched and spread out again there and never kept. Adapters stay float32 on the device (QLoRA, arXiv
2305.14314).

    bf16        as it is int8, fp8   one scale a row: |w| / 127, |w| / 448 nf4         4-bit
    quantiles of a normal distribution, one scale per 64 weights (QLoRA, appendix E)
"""

from __future__ import annotations

from pathlib import Path

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
    """(codes uint8, scales float32) of a matrix [out, in]; bf16: (itself, no scales)."""
    if kind == "bf16":
        return weight, torch.ones(())
    weight = weight.float()
    if kind == "nf4":
        blocks = functional.pad(weight.flatten(), (0, -weight.numel() % NF4_BLOCK)).view(
            -1, NF4_BLOCK
        )
        scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)
        levels = torch.tensor(NF4, device=weight.device)
        codes = (
            torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
            .to(torch.uint8)
            .flatten()
        )
        return codes[::2] << 4 | codes[1::2], scale
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / ROW_LIMIT[kind]
    scaled = weight / scale
    stored = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)
    return stored.view(torch.uint8), scale


def dequantise(
    codes: Tensor, scale: Tensor, kind: str, shape: tuple[int, int], like: Tensor
) -> Tensor:
    """The matrix [out, in] that `codes` stand for, in the dtype and on the device of `like`."""
    dtype = like.dtype
    codes, scale = (t.to(like.device, non_blocking=True) for t in (codes, scale))
    if kind == "bf16":
        return codes.to(dtype)
    if kind == "nf4":
        levels = torch.tensor(NF4, device=codes.device)
        values = (
            levels[torch.stack([codes >> 4, codes & 15], 1).flatten().int()].view(-1, NF4_BLOCK)
            * scale
        )
        return values.flatten()[: shape[0] * shape[1]].view(shape).to(dtype)
    stored = codes.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    return (stored.float() * scale).to(dtype)


class _Product(torch.autograd.Function):
    """x @ weight.T + bias with a weight that is fetched and spread out for each use, forward and
    backward.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, kind: str, shape
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.kind, ctx.shape = kind, shape
        return functional.linear(x, dequantise(codes, scale, kind, shape, x), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        codes, scale = ctx.saved_tensors
        return (
            gradient @ dequantise(codes, scale, ctx.kind, ctx.shape, gradient),
            None,
            None,
            None,
            None,
            None,
        )


class StoredLinear(nn.Linear):
    """A frozen linear layer whose matrix is kept quantised, in host memory, or both: in `codes`.

    `weight` is empty; it tells others (adapters above all) where, and in which dtype, the layer
    works.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        kind: str,
        dtype: torch.dtype,
        offload: bool,
    ):
        super().__init__(in_features, out_features, bias=bias, device="meta")
        self.kind, self.dtype, self.offload = kind, dtype, offload
        self.register_buffer("scale", None)

    def fill(self, weight: Tensor) -> None:
        """Stores `weight` [out, in], on its device or in (pinned) host memory."""
        codes, self.scale = quantise(weight, self.kind)
        if self.offload:
            codes = codes.cpu()
            codes = codes.pin_memory() if torch.cuda.is_available() else codes
        self.codes = codes
        self.weight = nn.Parameter(
            torch.empty(0, dtype=self.dtype, device=weight.device), requires_grad=False
        )

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return _Product.apply(
            x.to(self.dtype),
            self.codes,
            self.scale,
            bias,
            self.kind,
            (self.out_features, self.in_features),
        )


def load_stored(
    folder: Path,
    files: list[Path],
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    offload: bool = False,
) -> WanTransformer3DModel:
    """A frozen transformer whose blocks' matrices are quantised, or put into host memory
    (`offload`), as they stream
    in: there is no whole copy on the device, ever."""
    settings = WanTransformer3DModel.load_config(folder)
    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel.from_config(settings)
    for path, module in list(model.blocks.named_modules()):
        if type(module) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(
                model.blocks.get_submodule(parent),
                name,
                StoredLinear(
                    module.in_features,
                    module.out_features,
                    module.bias is not None,
                    kind,
                    dtype,
                    offload,
                ),
            )
    exact = set(model._keep_in_fp32_modules)
    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safe_open is no mapping)
                path, _, leaf = name.rpartition(".")
                module, tensor = model.get_submodule(path), tensors.get_tensor(name)
                if isinstance(module, StoredLinear) and leaf == "weight":
                    module.fill(tensor.to(dtype) if kind == "bf16" else tensor)
                else:
                    kept = torch.float32 if exact & set(name.split(".")) else dtype
                    setattr(module, leaf, nn.Parameter(tensor.to(kept), requires_grad=False))
    for (
        module
    ) in model.modules():  # buffers, which are in no file; `model.to` would fetch what is offloaded
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.requires_grad_(False).eval()
