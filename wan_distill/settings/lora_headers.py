"""What the header of a LoRA file says, in any layout: layers, ranks, metadata; no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from wan_distill.errors import FileError, UsageError
from wan_distill.settings.lora_names import Layout, Part, read_name
from wan_distill.settings.reading import parse_json, read_header, read_json
from wan_distill.settings.weight_names import FLOATS

OTHER_KINDS = re.compile(r"\.(lokr_|hada_|oft_|dora_scale|lora_mid|lora_magnitude)")
METADATA_KEY = "wan_distill"  # under which this tool's files carry their schedule
PEFT_METADATA = "lora_adapter_metadata"  # of diffusers
PEFT_CONFIG = "adapter_config.json"  # of peft, beside the file
SHOWN = 40  # characters of a wrong value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < float("inf")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


# What a schedule must say, if anything, under the names that are read.
RIGHT: dict[str, Callable[[Any], bool]] = {
    "expert": lambda value: value in ("high", "low"),
    "teacher": lambda value: isinstance(value, str),
    "teacher_files": lambda value: isinstance(value, dict),
    "sampling_steps": lambda v: isinstance(v, list) and bool(v) and all(map(_is_count, v)),
    "sigmas": lambda value: isinstance(value, list) and all(isinstance(v, float) for v in value),
    "flow_shift": _is_number,
    "height": _is_count,
    "width": _is_count,
    "num_frames": _is_count,
    "max_sequence_length": _is_count,
}


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
        metadata = header.pop("__metadata__", None)
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}
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
            if wrong := self._wrong(module):
                raise UsageError(f"{self.label}: {module} {wrong}; give another file of this LoRA")

    def _wrong(self, module: str) -> str | None:
        """What keeps a layer's tensors from being a product, or a difference."""
        parts = self.layers[module]
        kinds = {self._tensors[name]["dtype"] for name in parts.values()}
        if others := sorted(kinds - FLOATS):
            return f"is stored as {others[0]}, which is no float"
        if "alpha" in parts and math.prod(self.shape(module, "alpha")) != 1:
            return f"has an alpha of {list(self.shape(module, 'alpha'))} numbers"
        if "down" in parts:
            down, up = self.shape(module, "down"), self.shape(module, "up")
            if min(len(down), len(up)) < 2 or not 0 < down[0] == up[1]:
                return f"has matrices of {list(up)} and {list(down)}, which have no product"
        return None

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
    def schedule(self) -> dict[str, Any] | None:
        """What this tool wrote about the student; None in files of others."""
        if METADATA_KEY not in self.metadata:
            return None
        return parse_schedule(self.path, self.metadata[METADATA_KEY])

    @cached_property
    def peft(self) -> dict[str, Any]:
        """The settings of peft's adapter, where the file or a file beside it gives them."""
        beside = self.path.with_name(PEFT_CONFIG)
        try:
            config: dict[str, Any] = {}
            if text := self.metadata.get(PEFT_METADATA):
                flat: dict[str, Any] = parse_json(text)
                config = {key.partition(".")[2] or key: value for key, value in flat.items()}
            elif beside.is_file():
                config = read_json(beside)
            own = config.get("alpha_pattern") or {}
            for alpha in (config.get("lora_alpha", 1), *own.values()):
                float(alpha)
            for pattern in own:
                re.compile(pattern)
        except (ValueError, AttributeError, TypeError, re.error) as error:
            raise UsageError(
                f"{self.label}: its adapter settings cannot be read ({error}); download it again"
            ) from error
        return config


def parse_schedule(file: Path, text: Any) -> dict[str, Any]:
    """The schedule that this tool wrote into a header. Raises UsageError where it is none."""
    try:
        schedule = parse_json(text)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file}: its schedule cannot be read ({error}); train again") from error
    if not isinstance(schedule, dict):
        raise UsageError(f"{file}: its schedule is none; train again")
    for name, is_right in RIGHT.items():
        if name in schedule and not is_right(schedule[name]):
            shown = str(schedule[name])[:SHOWN]
            raise UsageError(f"{file}: its schedule says {name} {shown}; train again")
    return schedule
