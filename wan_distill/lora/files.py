"""A LoRA file of any layout, opened: its layers are known by its header, their tensors are read one
layer at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_distill.errors import UsageError
from wan_distill.lora.names import Layout, Part, read_name

OTHER_KINDS = re.compile(r"\.(lokr_|hada_|oft_|dora_scale|lora_mid|lora_magnitude)")
PEFT_METADATA = "lora_adapter_metadata"  # of diffusers
PEFT_CONFIG = "adapter_config.json"  # of peft, beside the file


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

    def change(self, shape: torch.Size) -> Tensor:
        """What is added to the weight of that shape, in float32."""
        total = torch.zeros(shape)
        if self.down is not None and self.up is not None:
            product = self.up.float().flatten(1) @ self.down.float().flatten(1)
            total = total + (self.scale * product).view(shape)
        return total if self.weight is None else total + self.weight.float().view(shape)


class LoraFile:
    """One LoRA file, in whichever layout.

    Args:
        path: a safetensors file.
        flag: the flag that named it, for messages.
        transformer: of a file that holds LoRAs of both experts (diffusers writes such), whose to
            read: `transformer` or `transformer_2`.

    Raises UsageError where the file is damaged, and where it is no LoRA for Wan.
    """

    def __init__(self, path: Path, flag: str, transformer: str | None = None):
        self.path = path
        self.label = f"{flag} {path}"
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                self.metadata: dict[str, str] = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{self.label}: damaged ({error}); download it again") from error
        self.layers: dict[str, dict[Part, str]] = {}
        self.stems: dict[str, str] = {}
        self.unknown: list[str] = []
        self.transformers: set[str] = set()
        self.layout: Layout = "comfyui"
        for name in names:
            self._sort_in(name, transformer)
        self._check(names)

    def _sort_in(self, name: str, transformer: str | None) -> None:
        if kind := OTHER_KINDS.search(name):
            raise UsageError(
                f"{self.label}: holds {kind[1].strip('_')} tensors, which is another kind of "
                "adapter; give a LoRA (lora_down and lora_up, or lora_A and lora_B)"
            )
        read = read_name(name)
        if read is None:
            self.unknown.append(name)
            return
        if read.transformer:
            self.transformers.add(read.transformer)
        if transformer and read.transformer not in (None, transformer):
            return
        self.layers.setdefault(read.module, {})[read.part] = name
        self.stems[read.module] = read.stem
        if read.part in ("down", "up"):
            self.layout = read.layout

    def _check(self, names: list[str]) -> None:
        if not self.layers:
            shown = f", only names such as {names[0]}" if names else ""
            raise UsageError(
                f"{self.label}: holds no LoRA layer of Wan{shown}; give a LoRA for Wan2.2"
            )
        for module, parts in self.layers.items():
            if ("down" in parts) != ("up" in parts):
                there, gone = ("down", "up") if "down" in parts else ("up", "down")
                raise UsageError(
                    f"{self.label}: {module} has its {there} matrix without the {gone} one; "
                    "download it again"
                )

    @cached_property
    def _tensors(self) -> Any:
        """The open file; it stays open as long as this object is in use."""
        return safe_open(self.path, framework="pt")

    def shape(self, module: str, part: Part) -> tuple[int, ...]:
        """Of one tensor, by the header."""
        return tuple(self._tensors.get_slice(self.layers[module][part]).get_shape())

    def rank(self, module: str) -> int:
        """Of a layer's product; 0 where it has none."""
        return self.shape(module, "down")[0] if "down" in self.layers[module] else 0

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks in this file, ascending."""
        return tuple(sorted({self.rank(m) for m, p in self.layers.items() if "down" in p}))

    def read(self, module: str) -> Layer:
        """One layer's tensors, in the file's dtype, on the CPU."""
        parts = self.layers[module]

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
        rank = self.rank(module)
        if not rank:
            return 1.0
        if "alpha" in self.layers[module]:
            return float(self._tensors.get_tensor(self.layers[module]["alpha"])) / rank
        config = self._peft
        alpha = config.get("lora_alpha", rank)
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", self.stems[module]):
                alpha = value
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    @cached_property
    def _peft(self) -> dict[str, Any]:
        """The settings of peft's adapter, where the file or a file beside it gives them."""
        beside = self.path.with_name(PEFT_CONFIG)
        try:
            if text := self.metadata.get(PEFT_METADATA):
                flat: dict[str, Any] = json.loads(text)
                return {key.partition(".")[2] or key: value for key, value in flat.items()}
            if beside.is_file():
                config: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
                return config
        except (ValueError, AttributeError) as error:
            raise UsageError(
                f"{self.label}: its adapter settings cannot be read ({error}); download it again"
            ) from error
        return {}

    def extras(self) -> Iterator[tuple[str, float]]:
        """(name, norm) of each tensor that is added as it is and is not zero everywhere: the part
        of this file's effect that no product of two matrices carries.
        """
        for parts in self.layers.values():
            for part in ("weight", "bias", "lora_bias"):
                if part in parts:
                    norm = float(self._tensors.get_tensor(parts[part]).float().norm())
                    if norm != 0:
                        yield parts[part], norm
