"""A student's files: LoRAs that both diffusers and ComfyUI load, with the schedule in their
metadata, or all weights of a shallower student.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from wan_distill.layout import RunFolder
from wan_distill.lora.files import Layer
from wan_distill.lora.layouts import named_for
from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.model.adapters import adapter_parameters, prune
from wan_distill.settings.assets import short_name
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.lora_headers import METADATA_KEY
from wan_distill.settings.students import read_metadata
from wan_distill.system.files import rename_aside, write_tensors

# ------------------------------------------------------------------------------------------- names


def to_original_names(adapter: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """peft names -> `diffusion_model.blocks.N.self_attn.q.lora_down.weight`, with an `.alpha` for
    each module of a block: the layout `comfyui`.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.items():
        module, half = name.split(".lora_")
        modules.setdefault(module, {})[half[0]] = tensor
    converted: dict[str, Tensor] = {}
    for module, halves in modules.items():
        down, up = halves["A"], halves["B"]
        product = Layer(down, up, alpha / len(down), None, None)
        converted |= named_for("comfyui", module, product)[0]
    return converted


# ----------------------------------------------------------------------------------------- writing


def schedule_metadata(
    config: Config, info: TeacherInfo, expert: Expert, updates: int | None = None
) -> dict[str, Any]:
    """What a sampler must know to run this student; written into the safetensors header."""
    return dict(
        expert=expert,
        subfolder=SUBFOLDER[expert],
        teacher=short_name(info.folder) or info.source,
        teacher_embedded=info.embedded,
        teacher_commit=None if info.is_local else info.commit,
        teacher_variant=info.variant,
        teacher_files=info.part_fingerprints(),
        teacher_changes=info.changes.fingerprints(),
        teacher_lora=list(config.teacher_lora),
        teacher_transformer=config.teacher_transformer,
        teacher_transformer_2=config.teacher_transformer_2,
        method=config.method_title,
        sampling_steps=list(config.sampling_steps),
        sigmas=list(config.sigmas()),
        flow_shift=config.flow_shift,
        boundary_ratio=config.boundary_ratio,
        guidance_scale=1.0,
        max_sequence_length=config.max_sequence_length,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        scheduler="FlowMapEulerDiscreteScheduler",
        student_layers=config.student_layers,
        updates=updates,
    )


def save_student(
    folder: Path,
    weights: dict[str, Tensor],
    config: Config,
    info: TeacherInfo,
    expert: Expert,
    updates: int | None = None,
) -> None:
    """Writes one expert's student into a run's folder: its LoRA or, with `--student_layers`, all of
    its weights. An earlier one of the other kind is set aside.

    Args:
        updates: how many made it in this run, to be noted in the file.
    """
    lora, whole = RunFolder(folder).lora(expert), RunFolder(folder).whole(expert)
    if config.whole_student:
        write_tensors(whole, weights, student_metadata(config, info, expert, updates))
    else:
        save_lora(lora, weights, config, info, expert, updates)
    other = lora if config.whole_student else whole
    if other.exists():
        print(f"{rename_aside(other).name}: an earlier student, set aside.")


def save_lora(
    file: Path,
    adapter: dict[str, Tensor],
    config: Config,
    info: TeacherInfo,
    expert: Expert,
    updates: int | None = None,
) -> None:
    """Writes one expert's LoRA in `--lora_dtype`, with the schedule in the metadata."""
    dtype = torch.bfloat16 if config.lora_dtype == "bf16" else torch.float32
    rounded = {name: tensor.to(dtype) for name, tensor in adapter.items()}
    lora = to_original_names(rounded, config.lora_alpha)
    write_tensors(file, lora, student_metadata(config, info, expert, updates))


def student_metadata(
    config: Config, info: TeacherInfo, expert: Expert, updates: int | None = None
) -> dict[str, str]:
    """The header of a student's file."""
    # One key only: several would be written in any order, and the same student would not be the
    # same bytes.
    return {METADATA_KEY: json.dumps(schedule_metadata(config, info, expert, updates))}


def scheduler_for(config: Config) -> FlowMapEulerDiscreteScheduler:
    """The stock scheduler whose `set_timesteps(N)` gives the trained sigmas exactly."""
    return FlowMapEulerDiscreteScheduler(shift=config.flow_shift)


# ----------------------------------------------------------------------------------------- reading


def load_student(transformer: WanTransformer3DModel, file: Path) -> None:
    """Makes a freshly loaded expert its student: adds the LoRA in `file` as the adapter `student`,
    in float32, or takes all weights from `file`.
    """
    if layers := read_metadata(file).get("student_layers"):
        prune(transformer, layers)
        transformer.load_state_dict(load_file(file))
        return
    lora = WanPipeline.lora_state_dict(str(file.parent), weight_name=file.name)
    transformer.load_lora_adapter(lora, adapter_name="student", low_cpu_mem_usage=True)
    for name, parameter in adapter_parameters(transformer, "student").items():
        # diffusers has rounded it to the base's dtype.
        exact = lora["transformer." + name.replace(".student.", ".")]
        parameter.data = exact.to(parameter.device, torch.float32)
