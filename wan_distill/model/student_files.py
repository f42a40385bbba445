"""A student's files: LoRAs that both diffusers and ComfyUI load, with the schedule in their
metadata, or all weights of a shallower student.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from wan_distill.errors import UsageError
from wan_distill.layout import RunFolder
from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.model.adapters import adapter_parameters, prune
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.job import LORA_TARGETS
from wan_distill.system.files import write_tensors

METADATA_KEY = "wan_distill"
# diffusers' module names -> the original Wan names, under which ComfyUI, LightX2V and diffusers all
# load LoRAs.
ORIGINAL_NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
DIFFUSERS_NAMES = {original: ours for ours, original in ORIGINAL_NAMES.items()}


# ------------------------------------------------------------------------------------------- names


def to_original_names(adapter: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """peft names -> `diffusion_model.blocks.N.self_attn.q.lora_down.weight`, with an `.alpha` for
    each module.
    """
    converted = {}
    for name, tensor in adapter.items():
        module, half = name.split(".lora_")
        _, block, layer = module.split(".", 2)
        stem = f"diffusion_model.blocks.{block}.{ORIGINAL_NAMES[layer]}"
        converted[f"{stem}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = tensor
        converted[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return converted


def module_name(stem: str) -> str:
    """`diffusion_model.blocks.0.self_attn.q` -> `blocks.0.attn1.to_q`, diffusers' name of it.

    Raises KeyError for layers that this tool does not train.
    """
    _, block, layer = stem.removeprefix("diffusion_model.").split(".", 2)
    return f"blocks.{block}.{DIFFUSERS_NAMES[layer]}"


def to_adapter_names(lora: dict[str, Tensor], role: str) -> dict[str, Tensor]:
    """The inverse of `to_original_names`, for the adapter called `role`; alphas are dropped."""
    adapter = {}
    for name, tensor in lora.items():
        if not name.endswith(".alpha"):
            stem, half = name.split(".lora_")
            letter = "A" if half.startswith("down") else "B"
            adapter[f"{module_name(stem)}.lora_{letter}.{role}.weight"] = tensor
    return adapter


# ----------------------------------------------------------------------------------------- writing


def schedule_metadata(config: Config, info: TeacherInfo, expert: Expert) -> dict[str, Any]:
    """What a sampler must know to run this student; written into the safetensors header."""
    return dict(
        expert=expert,
        subfolder=SUBFOLDER[expert],
        teacher=info.source,
        teacher_fingerprint=info.fingerprint(),
        method=config.method,
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
    )


def save_student(
    folder: Path, weights: dict[str, Tensor], config: Config, info: TeacherInfo, expert: Expert
) -> None:
    """Writes one expert's student into a run's folder: its LoRA or, with `--student_layers`, all of
    its weights.
    """
    if config.whole_student:
        write_tensors(RunFolder(folder).whole(expert), weights, _metadata(config, info, expert))
    else:
        save_lora(RunFolder(folder).lora(expert), weights, config, info, expert)


def save_lora(
    file: Path, adapter: dict[str, Tensor], config: Config, info: TeacherInfo, expert: Expert
) -> None:
    """Writes one expert's LoRA, with the schedule in the metadata."""
    lora = to_original_names(adapter, config.lora_alpha)
    write_tensors(file, lora, _metadata(config, info, expert))


def _metadata(config: Config, info: TeacherInfo, expert: Expert) -> dict[str, str]:
    # One key only: several would be written in any order, and the same student would not be the
    # same bytes.
    return {METADATA_KEY: json.dumps(schedule_metadata(config, info, expert))}


def scheduler_for(config: Config) -> FlowMapEulerDiscreteScheduler:
    """The stock scheduler whose `set_timesteps(N)` gives the trained sigmas exactly."""
    return FlowMapEulerDiscreteScheduler(shift=config.flow_shift)


# ----------------------------------------------------------------------------------------- reading


def read_metadata(file: Path) -> dict[str, Any]:
    """The schedule in a student's header. Raises UsageError for files that are not ours."""
    with safe_open(file, framework="pt") as student:
        metadata = student.metadata() or {}
    if METADATA_KEY not in metadata:
        raise UsageError(f"{file}: carries no schedule; it was not written by this tool")
    schedule: dict[str, Any] = json.loads(metadata[METADATA_KEY])
    return schedule


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


def check_init(config: Config) -> None:
    """Raises UsageError where `--init_student_from` has no student of this run's rank and layers
    for each expert.
    """
    source = config.init_student_from
    if source is None:
        return
    for expert in config.experts:
        file = RunFolder(Path(source)).lora(expert)
        if not file.exists():
            raise UsageError(
                f"--init_student_from {source}: holds no {file.name}; give the output folder of a "
                f"run that trained the {expert} expert"
            )
        rank, layers = _rank_and_layers(file)
        if rank != config.rank or set(layers) != set(config.lora_layers):
            raise UsageError(
                f"--init_student_from {file}: its rank is {rank} and its layers "
                f"{','.join(layers)}; give the same --rank and --lora_layers"
            )


def _rank_and_layers(file: Path) -> tuple[int, list[str]]:
    """Of a LoRA, by its header. Raises UsageError."""
    try:
        read_metadata(file)
        with safe_open(file, framework="pt") as lora:
            names = [name for name in list(lora.keys()) if ".lora_down." in name]
            rank: int = lora.get_slice(names[0]).get_shape()[0] if names else 0
    except SafetensorError as error:
        raise UsageError(
            f"--init_student_from {file}: damaged ({error}); give another run's folder"
        ) from error
    modules = [module_name(name.split(".lora_")[0]) for name in names]
    used = [layer for layer in LORA_TARGETS if any(m.endswith(layer) for m in modules)]
    return rank, used


@torch.no_grad()
def init_student(transformer: WanTransformer3DModel, file: Path) -> None:
    """Begins the student where another run's ended. alphas may differ, ranks and layers may not.

    Raises UsageError where they do.
    """
    lora = load_file(file)
    theirs = to_adapter_names(lora, "student")
    ours = adapter_parameters(transformer, "student")
    if {n: t.shape for n, t in theirs.items()} != {n: p.shape for n, p in ours.items()}:
        raise UsageError(
            f"{file}: its rank or layers differ from --rank and --lora_layers; use the same in "
            "both runs"
        )
    alpha = next(float(t) for name, t in lora.items() if name.endswith(".alpha"))
    scale = alpha / transformer.peft_config["student"].lora_alpha
    for name, parameter in ours.items():
        parameter.copy_(theirs[name] * (scale if ".lora_B." in name else 1.0))
