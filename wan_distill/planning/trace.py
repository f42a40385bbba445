"""How much memory and arithmetic an update takes: traced on fake tensors, from configuration files
alone.

An update of a model with two and with three blocks is run on tensors that have shapes but no data
(`FakeTensorMode`), while a ledger counts every storage and every matrix product. All blocks of a
Wan transformer are alike, so memory and arithmetic are affine in their number and the true depth
follows exactly.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.checkpointing import enable_checkpointing
from wan_distill.settings.recipes import Role

ROLE: Role = "student"


class Ledger(TorchDispatchMode):
    """Counts, while active, bytes of tensor storage alive (`live`, `peak`) and floating-point
    operations (`flops`).

    Works on any device and on fake tensors. `held` exist already and are not counted.
    """

    def __init__(self, held: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._seen = weakref.WeakSet(t.untyped_storage() for t in held)
        self._kept = [t.untyped_storage() for t in held]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and (storage := tensor.untyped_storage()) not in self._seen
            ):
                self._seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, storage.nbytes())
        self.flops += _operations(func, args, kwargs or {}, result)
        return result

    def _release(self, size: int) -> None:
        self.live -= size


def _operations(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Floating-point operations of one call; only matrix products and attention count."""
    name = func._overloadpacket.__name__
    if name.startswith("_scaled_dot_product"):
        backward = name.endswith("_backward")
        query, key = args[1:3] if backward else args[:2]
        forward = (
            4 * math.prod(query.shape) * key.shape[-2]
        )  # Q K^T and P V, 2 operations a multiply-add
        return (
            forward * 5 // 2 if backward else forward
        )  # five products instead of two (FlashAttention-2, sec. 3)
    formula = flop_registry.get(func._overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


@dataclass(frozen=True)
class Shape:
    """Everything that the cost of an update depends on: sizes of the transformer, the clip and the
    adapters.
    """

    transformer: tuple
    latents: tuple[int, int, int, int]
    batch: int
    text: int
    dtype: torch.dtype
    rank: int
    layers: tuple[str, ...]
    checkpointing: bool
    expand_timesteps: bool
    keep_attention: bool = False
    whole: bool = False
    """all weights are trained, instead of adapters on a frozen base (--student_layers)"""

    @property
    def latent_values(self) -> int:
        """Numbers in the latents of one sample."""
        return math.prod(self.latents)

    @property
    def given_channels(self) -> int:
        """Of the picture and its mask, beside the noisy latents; 0 for text to video."""
        channels: int = dict(self.transformer)["in_channels"]
        return channels - self.latents[0]

    @property
    def tokens(self) -> int:
        """Patches of one sample."""
        patch = dict(self.transformer)["patch_size"]
        return math.prod(size // p for size, p in zip(self.latents[1:], patch, strict=True))


@dataclass(frozen=True)
class Trace:
    """Cost of one update of `Shape`: bytes beyond what is always resident, and operations."""

    parameters: int
    matrices: int
    """of `parameters`, those in the blocks' linear layers: what quantisation shrinks"""
    base_bytes: int
    adapter: int
    """trainable parameters of one role"""
    activations: int
    """peak over forward and backward, gradients included"""
    graph: int
    """held between forward and backward"""
    evaluation: int
    """peak of a forward without gradient"""
    forward_flops: int
    update_flops: int

    def extended(self, other: Trace, more: int) -> Trace:
        """With `other` one block deeper than this: the trace of a model `more` blocks deeper."""
        return Trace(
            *(
                a + more * (b - a)
                for a, b in zip(vars(self).values(), vars(other).values(), strict=True)
            )
        )


@functools.lru_cache(maxsize=64)
def trace(shape: Shape) -> Trace:
    """The cost of one forward and backward of the full-depth model, in about a second whatever its
    size.
    """
    depth = dict(shape.transformer)["num_layers"]
    if depth <= 3:
        return _trace(shape, depth)
    return _trace(shape, 2).extended(_trace(shape, 3), depth - 2)


def _trace(shape: Shape, depth: int) -> Trace:
    settings = dict(shape.transformer) | {"num_layers": depth}
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(settings).requires_grad_(False)
    matrices = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, nn.Linear))
    if shape.whole:
        model.requires_grad_(True)
    else:
        # One role works at a time; the adapters of others cost what `Estimate.adapters` counts.
        add_adapter(model, ROLE, rank=shape.rank, alpha=shape.rank, layers=shape.layers, seed=0)
    if shape.checkpointing:
        enable_checkpointing(model, shape.keep_attention)
    with FakeTensorMode():
        _give_storage(model, torch.float32 if shape.whole else shape.dtype)
        base = [p for name, p in model.named_parameters() if ".lora_" not in name]
        learned = base if shape.whole else list(adapter_parameters(model, ROLE).values())
        held = [*model.parameters(), *model.buffers()]
        x = torch.zeros(shape.batch, *shape.latents)
        time_shape = (shape.batch, shape.tokens) if shape.expand_timesteps else (shape.batch,)
        prompt = torch.zeros(shape.batch, shape.text, settings["text_dim"], dtype=shape.dtype)
        given = torch.zeros(shape.batch, shape.given_channels, *shape.latents[1:])
        inputs = (torch.cat([x, given], 1).to(model.dtype), torch.zeros(time_shape), prompt)
        autocast = functools.partial(
            torch.autocast, "cpu", shape.dtype, enabled=shape.dtype != torch.float32
        )
        with Ledger(held) as evaluation, torch.no_grad(), autocast():
            model(*inputs, return_dict=False)
        with Ledger(held) as update, autocast():
            velocity = model(*inputs, return_dict=False)[0].float()
            graph = update.live
            (velocity - x).square().mean().backward()
    return Trace(
        parameters=sum(p.numel() for p in base),
        matrices=matrices,
        base_bytes=sum(p.numel() * p.element_size() for p in base),
        adapter=sum(p.numel() for p in learned),
        activations=update.peak,
        graph=graph,
        evaluation=evaluation.peak,
        forward_flops=evaluation.flops,
        update_flops=update.flops,
    )


def _give_storage(model: WanTransformer3DModel, dtype: torch.dtype) -> None:
    """Moves a meta-device model to (fake) memory, in the dtypes that `from_pretrained` would give
    it.
    """
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                parts = f"{path}.{name}".split(".")
                exact = bool({"lora_A", "lora_B", *model._keep_in_fp32_modules} & set(parts))
                module._parameters[name] = nn.Parameter(
                    torch.zeros(p.shape, dtype=torch.float32 if exact else dtype),
                    requires_grad=p.requires_grad,
                )
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
