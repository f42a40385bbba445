"""The tensors of a LoRA file of any layout, read one layer at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from wan_distill.errors import UsageError
from wan_distill.settings.lora_headers import LoraHeader
from wan_distill.settings.lora_names import Part


@dataclass(frozen=True)
class Layer:
    """What a LoRA adds to one layer: `scale * up @ down + weight` to its matrix, and `bias`.

    Attributes:
        down, up: [rank, in] and [out, rank], of a convolution with its kernel; both or neither.
        scale: alpha / rank.
        weight, bias: as large as the layer's own.
    """

    down: Tensor | None
    up: Tensor | None
    scale: float
    weight: Tensor | None
    bias: Tensor | None

    def change(self, shape: torch.Size, device: torch.device | None = None) -> Tensor:
        """What is added to the weight of that shape, in float32 on `device` (default: the CPU)."""
        total = torch.zeros(shape, device=device)
        if self.down is not None and self.up is not None:
            up, down = self.up.to(device).float(), self.down.to(device).float()
            total += self.scale * (up.flatten(1) @ down.flatten(1)).view(shape)
        return total if self.weight is None else total + self.weight.to(device).float().view(shape)


class LoraFile:
    """The tensors of the LoRA that `header` describes."""

    def __init__(self, header: LoraHeader):
        self.header = header

    @cached_property
    def _tensors(self) -> Any:
        """The open file; it stays open as long as this object is in use."""
        return safe_open(self.header.path, framework="pt")

    def read(self, module: str) -> Layer:
        """One layer's tensors, in the file's dtype, on the CPU."""
        parts = self.header.layers[module]

        def get(part: Part) -> Tensor | None:
            return self._tensors.get_tensor(parts[part]) if part in parts else None

        scale = self.scale(module)
        bias, lora_bias = get("bias"), get("lora_bias")
        if lora_bias is not None:
            scaled = scale * lora_bias.float()
            bias = scaled if bias is None else bias.float() + scaled
        return Layer(get("down"), get("up"), scale, get("weight"), bias)

    def scale(self, module: str) -> float:
        """alpha / rank of a layer: by its alpha, otherwise by the metadata; without either, 1."""
        rank = self.header.rank(module)
        if not rank:
            return 1.0
        if "alpha" in self.header.layers[module]:
            return float(self._tensors.get_tensor(self.header.layers[module]["alpha"])) / rank
        config = self.header.peft
        alpha = config.get("lora_alpha", rank)
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", self.header.stems[module]):
                alpha = value
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def check(self) -> None:
        """Raises UsageError where a value that is used is no number."""
        for module, parts in self.header.layers.items():
            values = [self._tensors.get_tensor(name) for name in parts.values()]
            finite = all(bool(tensor.float().isfinite().all()) for tensor in values)
            if not (finite and math.isfinite(self.scale(module))):
                raise UsageError(
                    f"{self.header.label}: {module} holds values that are no numbers (nan or inf); "
                    "give another file"
                )

    def extras(self) -> Iterator[tuple[str, float]]:
        """(name, norm) of each tensor that is added as it is and is not zero everywhere: the part
        of this file's effect that no product of two matrices carries.
        """
        for parts in self.header.layers.values():
            for part in ("weight", "bias", "lora_bias"):
                if part in parts:
                    norm = float(self._tensors.get_tensor(parts[part]).float().norm())
                    if norm != 0:
                        yield parts[part], norm
