"""Do the files that change a teacher fit it? By their headers alone."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel

from wan_distill.errors import FileError, UsageError
from wan_distill.lora.files import LoraFile
from wan_distill.maths.sigmas import Expert
from wan_distill.model.expert_weights import diffusers_names
from wan_distill.model.part_files import expert_files
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.reading import read_header
from wan_distill.settings.teacher_changes import EXPERT_FLAG, TeacherLora
from wan_distill.settings.weight_names import explain_codes

Shapes = dict[str, list[int]]


def check_changes(info: TeacherInfo, config: Config) -> str | None:
    """What is changed of the teacher, in words. Raises UsageError where a file does not fit."""
    if not info.changes:
        return None
    wanted = transformer_shapes(info)
    for expert in info.changes.experts:
        _check_expert(info, config, expert, wanted)
    unused = [name for lora in info.changes.loras for name in _check_lora(lora, wanted)]
    words = "; ".join(info.changes.words())
    if unused:
        words += f"; left out, since Wan has no such layers: {len(unused)} tensors ({unused[0]})"
    return words


def transformer_shapes(info: TeacherInfo) -> Shapes:
    """Name -> shape of the tensors of this teacher's transformer."""
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(info.transformer)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_expert(info: TeacherInfo, config: Config, expert: Expert, wanted: Shapes) -> None:
    path, flag = info.changes.experts[expert], EXPERT_FLAG[expert]
    _, files = expert_files(info, config, expert)
    header: dict[str, Any] = {}
    try:
        for file in files:
            header |= read_header(file)[0]
    except FileError as error:
        raise UsageError(f"{flag} {error}") from error
    header.pop("__metadata__", None)
    names = diffusers_names(header)
    if shown := explain_codes({}, {name: header[name] for name in names}):
        raise UsageError(f"{flag} {path}: {shown[0]}; {shown[1]}")
    found = {names[name]: header[name]["shape"] for name in names}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UsageError(
                f"{flag} {path}: {name} is {found.get(name, 'missing')}, this teacher's is "
                f"{wanted.get(name, 'no such tensor')}; give a transformer of the same model, as a "
                "folder of diffusers or the original Wan, or as bf16 or scaled fp8 .safetensors "
                "of ComfyUI"
            )


def _check_lora(lora: TeacherLora, wanted: Shapes) -> list[str]:
    """The tensors of a LoRA that belong to no layer. Raises UsageError where one does not fit."""
    header = lora.header
    LoraFile(header).check()
    for module, parts in header.layers.items():
        shape = wanted.get(f"{module}.weight")
        found = shape
        if "down" in parts:
            found = [header.shape(module, "up")[0], header.shape(module, "down")[1]]
        elif "weight" in parts:
            found = list(header.shape(module, "weight"))
        if shape is None or found is None or found[:2] != shape[:2]:
            raise UsageError(
                f"{header.label}: {module} is {found or 'there'}, this teacher's is "
                f"{shape or 'missing'}; give a LoRA that was made for this model"
            )
    return header.unknown
