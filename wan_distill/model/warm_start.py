"""A student that begins as a LoRA which exists already: an earlier run's, or anybody's for Wan."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from wan_distill.errors import UsageError
from wan_distill.layout import LORA_FILE, RunFolder
from wan_distill.lora.files import LoraFile
from wan_distill.lora.layouts import named_for
from wan_distill.lora.ranks import cut
from wan_distill.maths.sigmas import Expert
from wan_distill.model.adapters import adapter_parameters
from wan_distill.model.student_files import student_metadata
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.job import LORA_TARGETS
from wan_distill.settings.lora_headers import LoraHeader
from wan_distill.settings.lora_names import is_in_block, is_trained, matrix_shape
from wan_distill.settings.lora_sources import find_loras
from wan_distill.settings.recipes import Role
from wan_distill.system.files import write_atomically, write_tensors

FLAG = "--init_student_from"
SHOWN = 3  # names in a message


def warm_start_files(config: Config, info: TeacherInfo) -> dict[Expert, LoraHeader]:
    """The LoRA of each expert that `--init_student_from` has one for. Raises UsageError where that
    is none of a trained expert.
    """
    source = config.init_student_from
    if source is None:
        return {}
    files = find_loras(source, FLAG, info.experts, config.cache_dir)
    for expert in config.experts:
        if expert not in files:
            raise UsageError(
                f"{FLAG} {source}: holds no {LORA_FILE[expert]}; give the output folder of a run "
                f"that trained the {expert} expert, or the files: HIGH,LOW"
            )
    return files


def check_warm_start(config: Config, info: TeacherInfo) -> str | None:
    """What the student begins with, in words.

    Raises UsageError where a file does not fit the teacher, or where layers of it have no adapter
    here.
    """
    files = warm_start_files(config, info)
    if not files:
        return None
    lines = []
    for expert in config.experts:
        file = files[expert]
        _check_layers(file, config, info)
        fits = "" if file.ranks == (config.rank,) else f" in --rank {config.rank}"
        lines.append(f"{expert} from {_describe(file)}{fits})")
    for expert, file in _carried(config, files).items():
        check_shapes(file, info)
        lines.append(f"{expert}, which is not trained here, carried over from {_describe(file)})")
    notes = [*_left_out(files, config), *_schedule(files, config)]
    return "; ".join(lines) + "".join(f"\n          {note}" for note in notes)


def _describe(file: LoraHeader) -> str:
    ranks = "/".join(map(str, file.ranks))
    return f"{file.path.name} ({file.layout} layout, rank {ranks}"


def _carried(config: Config, files: dict[Expert, LoraHeader]) -> dict[Expert, LoraHeader]:
    """Those of `files` that the output folder takes over as they are. What is there stays, unless
    it was taken over from a first stage, which may have learned more since.
    """
    out = RunFolder(Path(config.output_dir))
    found = [e for e in files if out.lora(e).exists()]
    kept = [e for e in found if out.expert(e).exists() or not config.is_second_stage]
    return {e: f for e, f in files.items() if e not in (*config.experts, *kept)}


def _trained(file: LoraHeader) -> list[str]:
    """The layers of `file` that this tool trains."""
    return [m for m, parts in file.layers.items() if "down" in parts and is_trained(m)]


def _check_layers(file: LoraHeader, config: Config, info: TeacherInfo) -> None:
    """Raises UsageError."""
    trained = _trained(file)
    if not trained:
        raise UsageError(
            f"{file.label}: holds no layer that this tool trains; give a LoRA of the blocks' "
            "linear layers"
        )
    used = [layer for layer in LORA_TARGETS if any(m.endswith(layer) for m in trained)]
    if not set(used) <= set(config.lora_layers):
        raise UsageError(
            f"{file.label}: its layers are {','.join(used)}; give them as --lora_layers, or their "
            "effect would be lost"
        )
    check_shapes(file, info)


def check_shapes(file: LoraHeader, info: TeacherInfo) -> None:
    """Raises UsageError where a trained layer of `file` is none of the teacher's, of another size,
    or holds what is no number.
    """
    blocks = info.transformer["num_layers"]
    LoraFile(file).check()
    for module in _trained(file):
        wanted = matrix_shape(module, info.transformer)
        found = (file.shape(module, "up")[0], file.shape(module, "down")[1])
        if is_in_block(module) and int(module.split(".")[1]) >= blocks:
            raise UsageError(
                f"{file.label}: has a layer {module}, {info.name} has {blocks} blocks; give a LoRA "
                "that was made for this teacher"
            )
        if found != wanted:
            raise UsageError(
                f"{file.label}: {module} is a matrix of {found[0]}x{found[1]}, {info.name}'s is "
                f"{wanted[0]}x{wanted[1]}; give a LoRA that was made for this teacher"
            )


def _left_out(files: dict[Expert, LoraHeader], config: Config) -> list[str]:
    """One line for what of the files' effect the student does not take over."""
    names = [
        name
        for file in (*map(files.__getitem__, config.experts), *_carried(config, files).values())
        for name in (*file.unknown, *_without_adapter(file))
    ]
    if not names:
        return []
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return [f"left out, since no adapter here has a place for them: {len(names)} tensors ({shown})"]


def _without_adapter(file: LoraHeader) -> list[str]:
    """The tensors of Wan's layers with an effect that no adapter here can have."""
    others = [p["down"] for m, p in file.layers.items() if "down" in p and not is_trained(m)]
    return [*(name for name, _ in LoraFile(file).extras()), *others]


def _schedule(files: dict[Expert, LoraHeader], config: Config) -> list[str]:
    """One line for a schedule that is not this run's, or not known."""
    now = [round(sigma, 4) for sigma in config.sigmas()[:-1]]
    ours = f"this run trains sigmas {now} (--flow_shift, --sampling_steps)"
    for expert in config.experts:
        schedule = files[expert].schedule
        if schedule is None:
            return [f"which sigmas it was trained for it does not say; {ours}"]
        then = [round(sigma, 4) for sigma in schedule.get("sigmas", [])[:-1]]
        if then != now:
            return [f"it was trained for sigmas {then}; {ours}"]
    return []


@torch.no_grad()
def begin_as(transformer: WanTransformer3DModel, role: Role, file: LoraHeader) -> str | None:
    """Gives the adapter of `role` the effect of `file`, whose alphas and ranks may be others.

    A smaller rank is filled up with what the adapter has: a random half and a zero half, which can
    learn. A larger one is cut to the nearest product of this rank; returned is what that has lost,
    in words. Layers that the file lacks stay as they are.
    """
    ours = adapter_parameters(transformer, role)
    settings = transformer.peft_config[role]
    tensors = LoraFile(file)
    lost = total = 0.0
    for name, down in ours.items():
        module, _, half = name.partition(".lora_")
        if not half.startswith("A") or not file.layers.get(module, {}).keys() & {"down"}:
            continue
        layer = tensors.read(module)
        assert layer.down is not None and layer.up is not None
        theirs_down, theirs_up = layer.down.float(), layer.up.float()
        if len(theirs_down) > settings.r:
            smaller = cut(theirs_down, theirs_up, settings.r)
            theirs_down, theirs_up = smaller.down, smaller.up
            lost, total = lost + smaller.lost, total + smaller.total
        rank = len(theirs_down)
        up = ours[name.replace(".lora_A.", ".lora_B.")]
        up.zero_()
        down[:rank].copy_(theirs_down)
        up[:, :rank].copy_(theirs_up * (layer.scale / (settings.lora_alpha / settings.r)))
    if not total:
        return None
    return (
        f"{file.path.name}: cut from rank {file.ranks[-1]} to {settings.r}; relative error of its "
        f"matrices {math.sqrt(lost / total):.2g}"
    )


def carry_over(config: Config, info: TeacherInfo) -> list[str]:
    """Writes the given LoRAs of experts that are not trained here, but not over others; says so."""
    done = []
    for expert, file in _carried(config, warm_start_files(config, info)).items():
        target = RunFolder(Path(config.output_dir)).lora(expert)
        is_ours = file.schedule is not None and file.layout == "comfyui"
        if is_ours and not _without_adapter(file):
            write_atomically(target, file.path.read_bytes())
        else:
            write_tensors(target, _in_our_layout(file), student_metadata(config, info, expert))
        done.append(f"{target.name}: not trained here; carried over from {file.path}")
    return done


def _in_our_layout(file: LoraHeader) -> dict[str, Tensor]:
    """What an adapter can hold of it, which is what every reader of our files reads."""
    lora, tensors = LoraFile(file), dict[str, Tensor]()
    for module in _trained(file):
        product = dataclasses.replace(lora.read(module), weight=None, bias=None)
        tensors |= named_for("comfyui", module, product)[0]
    return tensors
