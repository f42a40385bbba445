"""A student's files: LoRAs that both diffusers and ComfyUI load, with the schedule in their
metadata.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from wan_distill.errors import ExportError, UsageError
from wan_distill.layout import LORA_FILE, WHOLE_FILE
from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.model.adapters import prune
from wan_distill.settings.config import LORA_TARGETS, Config
from wan_distill.settings.description import TeacherInfo
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


def schedule_metadata(config: Config, info: TeacherInfo, expert: Expert) -> dict:
    """What a sampler must know to run this student, as it is written into the LoRA's safetensors
    header.
    """
    return dict(
        expert=expert,
        subfolder=SUBFOLDER[expert],
        teacher=info.source,
        teacher_fingerprint=info.fingerprint(),
        method=config.method,
        sampling_steps=list(config.sampling_steps),
        sigmas=list(config.sigmas()),
        flow_shift=config.flow_shift,
        boundary_ratio=config.boundary,
        guidance_scale=1.0,
        max_sequence_length=config.max_sequence_length,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        scheduler="FlowMapEulerDiscreteScheduler",
        student_layers=config.student_layers,
    )


def to_original_names(adapter: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """peft names -> `diffusion_model.blocks.N.self_attn.q.lora_down.weight`, with an `.alpha` for
    each module.
    """
    converted = {}
    for name, tensor in adapter.items():
        module, half = name.split(".lora_")
        block, layer = module.split(".", 2)[1:]
        stem = f"diffusion_model.blocks.{block}.{ORIGINAL_NAMES[layer]}"
        converted[f"{stem}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = tensor
        converted[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return converted


def to_adapter_names(lora: dict[str, Tensor], role: str) -> dict[str, Tensor]:
    """The inverse of `to_original_names`, for the adapter called `role`; alphas are dropped."""
    adapter = {}
    for name, tensor in lora.items():
        if name.endswith(".alpha"):
            continue
        stem, half = name.removeprefix("diffusion_model.").split(".lora_")
        _, block, layer = stem.split(".", 2)
        letter = "A" if half.startswith("down") else "B"
        adapter[f"blocks.{block}.{DIFFUSERS_NAMES[layer]}.lora_{letter}.{role}.weight"] = tensor
    return adapter


def save_lora(
    file: Path, adapter: dict[str, Tensor], config: Config, info: TeacherInfo, expert: Expert
) -> None:
    """Writes one expert's LoRA, with the schedule in the metadata."""
    # One key only: several would be written in any order, and the same student would not be the
    # same bytes.
    metadata = {METADATA_KEY: json.dumps(schedule_metadata(config, info, expert))}
    write_tensors(file, to_original_names(adapter, config.lora_alpha), metadata)


def save_student(
    folder: Path, weights: dict[str, Tensor], config: Config, info: TeacherInfo, expert: Expert
) -> None:
    """Writes what `student_file` finds: one expert's LoRA or, with `--student_layers`, all of its
    weights.
    """
    if config.student_layers is None:
        save_lora(folder / LORA_FILE[expert], weights, config, info, expert)
    else:
        metadata = {METADATA_KEY: json.dumps(schedule_metadata(config, info, expert))}
        write_tensors(folder / WHOLE_FILE[expert], weights, metadata)


def read_metadata(file: Path) -> dict:
    """The schedule in a LoRA's header. Raises UsageError for files that are not ours."""
    with safe_open(file, framework="pt") as lora:
        metadata = lora.metadata() or {}
    if METADATA_KEY not in metadata:
        raise UsageError(f"{file}: carries no schedule; it was not written by this tool")
    return json.loads(metadata[METADATA_KEY])


def load_student(transformer: WanTransformer3DModel, file: Path) -> None:
    """Makes the student of a freshly loaded expert: puts its LoRA on, or takes all of its weights
    from `file`.
    """
    from peft import LoraConfig

    if layers := read_metadata(file).get("student_layers"):
        prune(transformer, layers)
        transformer.load_state_dict(load_file(file))
        return
    lora = load_file(file)
    alpha, rank = _scale(lora)
    targets = sorted({name.split(".lora_")[0] for name in to_adapter_names(lora, "student")})
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), adapter_name="student"
    )
    _fill(transformer, to_adapter_names(lora, "student"), 1.0, file)


def check_init(config: Config) -> None:
    """Whether `--init_student_from` has a student for each expert, of this run's rank and layers.
    Raises UsageError.
    """
    for expert in config.experts:
        file = Path(config.init_student_from) / LORA_FILE[expert]
        if not file.exists():
            raise UsageError(
                f"--init_student_from {config.init_student_from}: holds no {file.name}; give the "
                "output "
                f"folder of a run that trained the {expert} expert"
            )
        try:
            read_metadata(file)
            with safe_open(file, framework="pt") as lora:
                names = [name for name in list(lora.keys()) if ".lora_down." in name]
                ranks = {name: lora.get_slice(name).get_shape()[0] for name in names}
        except SafetensorError as error:
            raise UsageError(
                f"--init_student_from {file}: damaged ({error}); give another run's folder"
            ) from error
        modules = [DIFFUSERS_NAMES[name.split(".", 3)[3].split(".lora_")[0]] for name in ranks]
        layers = [
            layer for layer in LORA_TARGETS if any(module.endswith(layer) for module in modules)
        ]
        rank = next(iter(ranks.values()))
        if rank != config.rank or set(layers) != set(config.lora_layers):
            raise UsageError(
                f"--init_student_from {file}: its rank is {rank} and its layers "
                f"{','.join(layers)}; "
                "give the same --rank and --lora_layers"
            )


def init_student(transformer: WanTransformer3DModel, file: Path) -> None:
    """Begins the student where another run's ended; alphas may differ, ranks and layers may not
    (`check_init`).
    """
    lora = load_file(file)
    alpha, rank = _scale(lora)
    ours = transformer.peft_config["student"]
    _fill(
        transformer,
        to_adapter_names(lora, "student"),
        (alpha / rank) / (ours.lora_alpha / ours.r),
        file,
    )


def _scale(lora: dict[str, Tensor]) -> tuple[float, int]:
    """alpha and rank of a LoRA file."""
    return (
        next(float(t) for name, t in lora.items() if name.endswith(".alpha")),
        next(t.shape[0] for name, t in lora.items() if name.endswith(".lora_down.weight")),
    )


@torch.no_grad()
def _fill(
    transformer: WanTransformer3DModel, adapter: dict[str, Tensor], scale: float, file: Path
) -> None:
    wanted = {
        name: p
        for name, p in transformer.named_parameters()
        if ".lora_" in name and ".student." in name
    }
    if {n: t.shape for n, t in adapter.items()} != {n: p.shape for n, p in wanted.items()}:
        raise UsageError(
            f"{file}: its rank or layers differ from --rank and --lora_layers; use the same in "
            "both runs"
        )
    for name, p in wanted.items():
        p.copy_(adapter[name] * (scale if ".lora_B." in name else 1.0))


def scheduler_for(config: Config) -> FlowMapEulerDiscreteScheduler:
    """The stock scheduler whose `set_timesteps(N)` gives the trained sigmas exactly."""
    return FlowMapEulerDiscreteScheduler(shift=config.flow_shift)


@torch.no_grad()
def verify_lora(transformer: WanTransformer3DModel, file: Path, atol: float = 1e-3) -> float:
    """Loads `file` as diffusers does and as ComfyUI does, and compares what each makes of
    `transformer`'s weights.

    ComfyUI adds alpha / rank * up @ down to the matrix of the original name. Returns the largest
    relative difference; raises ExportError above `atol`. Works on copies of single matrices:
    nothing large is held twice.
    """
    lora = load_file(file)
    transformer.load_lora_adapter(
        WanPipeline.lora_state_dict(str(file.parent), weight_name=file.name),
        adapter_name="check",
        prefix="transformer",
    )
    worst, checked = 0.0, 0
    for name, module in transformer.named_modules():
        if (
            not name.startswith("blocks.")
            or not isinstance(module, LoraLayer)
            or "check" not in module.lora_A
        ):
            continue
        _, block, layer = name.split(".", 2)
        stem = f"diffusion_model.blocks.{block}.{ORIGINAL_NAMES[layer]}"
        down, up = lora[f"{stem}.lora_down.weight"].float(), lora[f"{stem}.lora_up.weight"].float()
        comfy = up @ down * (float(lora[f"{stem}.alpha"]) / down.shape[0])
        ours = module.get_delta_weight("check").float().cpu()
        worst = max(worst, float((ours - comfy).norm() / comfy.norm().clamp_min(1e-12)))
        checked += 1
    transformer.unload_lora()
    stored = sum(name.endswith(".alpha") for name in lora)
    if checked != stored or worst > atol:
        raise ExportError(
            f"{file}: loaded back, {checked} of {stored} layers agree to {worst:.2g}; do not use it"
        )
    return worst
