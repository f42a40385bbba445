"""An expert's tensors under diffusers' names, read one at a time: from diffusers' files or from a
single file of ComfyUI or the original Wan, with the teacher's LoRAs added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open
from torch import Tensor

from wan_distill.lora.files import LoraFile
from wan_distill.settings.teacher_changes import TeacherLora

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# What ComfyUI stores beside an fp8 matrix `X.weight`: its scale, and what is not needed here.
SCALES = (".scale_weight", ".weight_scale")
BESIDE = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class ExpertWeights(Mapping[str, Tensor]):
    """diffusers' name -> tensor, read when it is asked for.

    A matrix that a scale or a LoRA changes is exact, in float32; all others have the file's dtype.
    """

    def __init__(
        self,
        files: Sequence[Path],
        loras: Iterable[TeacherLora] = (),
        device: torch.device | None = None,
    ):
        self._loras = [(LoraFile(lora.header), lora.strength) for lora in loras]
        self._places: dict[str, tuple[safe_open, str]] = {}
        self._scales: dict[str, str] = {}
        # safetensors does not know the `cpu:0` of several processes on a CPU.
        place = "cpu" if device is None or device.type == "cpu" else str(device)
        opened = [safe_open(file, framework="pt", device=place) for file in files]
        shards = {name: tensors for tensors in opened for name in list(tensors.keys())}
        for stored, name in diffusers_names(shards).items():
            self._places[name] = (shards[stored], stored)
        for name in shards:
            if name.endswith(SCALES):
                self._scales[name.rpartition(".")[0] + ".weight"] = name

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, by its file's header."""
        tensors, stored = self._places[name]
        return tuple(tensors.get_slice(stored).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        tensors, stored = self._places[name]
        tensor = tensors.get_tensor(stored)
        if tensor.dtype in FP8:
            tensor = tensor.float()
            if stored in self._scales:
                tensor *= tensors.get_tensor(self._scales[stored]).float()
        return _with_loras(name, tensor, self._loras)


def diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """Stored name -> diffusers' name, of the tensors that are weights.

    Args:
        names: all of an expert, since a shard alone may not show whose names they are.
    """
    plain = {}
    for name in names:
        if not name.endswith((*SCALES, *BESIDE)):
            prefix = next((p for p in PREFIXES if name.startswith(p)), "")
            plain[name.removeprefix(prefix)] = name
    if not any(".self_attn." in name for name in plain):
        return {name: short for short, name in plain.items()}
    converted = convert_wan_transformer_to_diffusers({name: name for name in plain})
    return {plain[original]: name for name, original in converted.items()}


def _with_loras(name: str, tensor: Tensor, loras: Sequence[tuple[LoraFile, float]]) -> Tensor:
    module, _, leaf = name.rpartition(".")
    for lora, strength in loras:
        if module not in lora.header.layers:
            continue
        layer = lora.read(module)
        if leaf == "weight":
            tensor = tensor.float() + strength * layer.change(tensor.shape, tensor.device)
        elif leaf == "bias" and layer.bias is not None:
            tensor = tensor.float() + strength * layer.bias.to(tensor.device).float()
    return tensor
