"""What the header of a LoRA file says, in any layout: layers, ranks, metadata; no torch."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from wan_distill.errors import FileError, UsageError
from wan_distill.settings.lora_names import Layout, Part, read_name
from wan_distill.settings.reading import read_header

OTHER_KINDS = re.compile(r"\.(lokr_|hada_|oft_|dora_scale|lora_mid|lora_magnitude)")
PEFT_METADATA = "lora_adapter_metadata"  # of diffusers
PEFT_CONFIG = "adapter_config.json"  # of peft, beside the file


class LoraHeader:
    """One LoRA file, in whichever layout, by its header alone.

    Args:
        path: a safetensors file.
        flag: the flag that named it, for messages.
        transformer: of a file that holds LoRAs of both experts (diffusers writes such), whose to
            read: `transformer` or `transformer_2`.

    Attributes:
        layers: diffusers' name of each layer -> its parts -> the tensors' names.
        stems: diffusers' name of each layer -> its name in the file.
        unknown: tensors that belong to no layer of Wan.
        transformers: which ones the file names.

    Raises UsageError where the file is damaged, and where it is no LoRA for Wan.
    """

    def __init__(self, path: Path, flag: str, transformer: str | None = None):
        self.path = path
        self.flag = flag
        self.transformer = transformer
        self.label = f"{flag} {path}"
        try:
            header, _ = read_header(path)
        except FileError as error:
            raise UsageError(f"{flag} {error}") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._tensors: dict[str, Any] = header
        self.layers: dict[str, dict[Part, str]] = {}
        self.stems: dict[str, str] = {}
        self.unknown: list[str] = []
        self.transformers: set[str] = set()
        self.layout: Layout = "comfyui"
        for name in header:
            self._sort_in(name, transformer)
        self._check(list(header))

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

    def shape(self, module: str, part: Part) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self._tensors[self.layers[module][part]]["shape"])

    def rank(self, module: str) -> int:
        """Of a layer's product; 0 where it has none."""
        return self.shape(module, "down")[0] if "down" in self.layers[module] else 0

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks in this file, ascending."""
        return tuple(sorted({self.rank(m) for m, p in self.layers.items() if "down" in p}))

    @cached_property
    def peft(self) -> dict[str, Any]:
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
