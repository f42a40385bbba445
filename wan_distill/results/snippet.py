"""The code that samples a student with diffusers, for the README of its folder."""

from __future__ import annotations

import json
from pathlib import Path

from wan_distill.layout import LORA_FILE, PICTURE
from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.lora_names import is_in_block
from wan_distill.settings.pipelines import IMAGE_TO_VIDEO, TEXT_TO_VIDEO
from wan_distill.settings.teacher_changes import TeacherLora

TO_THE_CPU_TOO = 'pipe.to("cuda" if torch.cuda.is_available() else "cpu")'
TO_A_GPU = 'pipe.to("cuda")  # too little memory: pipe.enable_model_cpu_offload() instead'
PRODUCT = {"down", "up", "alpha"}  # parts of a LoRA's layer that are matrices and their scale


def snippet(
    config: Config, info: TeacherInfo, experts: tuple[Expert, ...], where: str = "."
) -> str:
    """The inference code for this student.

    Args:
        experts: those that the student has of its own.
        where: its folder (the code then runs as it stands inside it) or its hub repository, for
            readers who have no file of this machine.
    """
    if unread := [lora for lora in info.changes.loras if not _diffusers_reads(lora)]:
        names = ", ".join(sorted({lora.header.path.name for lora in unread}))
        return (
            f"# diffusers does not read all of the teacher's LoRA {names}: sample with sample.py,\n"
            "# or load the merged pipeline (--save_merged), which has it in its weights.\n"
        )
    exact = config.mixed_precision == "no"
    dtype = "torch.float32" if exact else "torch.bfloat16"
    local = Path(info.source).is_dir()
    source = _here(Path(info.source), where) if local else info.source
    pipeline = IMAGE_TO_VIDEO if info.takes_picture else TEXT_TO_VIDEO
    imports = ["FlowMapEulerDiscreteScheduler", pipeline]
    load = "".join([*_merge_lines(info, where), *_load_lines(experts, json.dumps(where))])
    replaced = {} if config.whole_student else _replaced(info, json.dumps(source), dtype, where)
    imports += ["WanTransformer3DModel"] if replaced else []
    if config.whole_student:  # a complete pipeline, scheduler included
        imports, load = [pipeline], ""
        source = "student" if where == "." else where
    if not exact:  # bf16 shows as banding
        imports.append("AutoencoderKLWan")
        replaced["vae"] = (
            f"vae = AutoencoderKLWan.from_pretrained({json.dumps(source)}, "
            'subfolder="vae", dtype=torch.float32)\n'
        )
    tools, crop, picture = "export_to_video", "", ""
    if info.takes_picture:  # cropped: the pipeline would stretch it
        tools, crop = "export_to_video, load_image", "from PIL import ImageOps\n"
        size = f"{config.width}, {config.height}"
        picture = f'image=ImageOps.fit(load_image("{PICTURE}"), ({size})),\n    '
    given = [f"{part}={part}" for part in replaced]
    arguments = ", ".join([json.dumps(source), *given, f"dtype={dtype}"])
    return f"""import torch
from diffusers import {", ".join(sorted(imports))}
from diffusers.utils import {tools}
{crop}
{"".join(replaced.values())}pipe = {pipeline}.from_pretrained({arguments})
{load}{TO_THE_CPU_TOO if exact else TO_A_GPU}
video = pipe(
    {picture}prompt="a prompt of yours",
    height={config.height},
    width={config.width},
    num_frames={config.num_frames},
    num_inference_steps={config.grid_steps},
    guidance_scale=1.0,
    max_sequence_length={config.max_sequence_length},
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "video.mp4", fps={config.fps})
"""


def _diffusers_reads(lora: TeacherLora) -> bool:
    """Whether `load_lora_weights` takes all of a LoRA to the transformer that it is for: not from a
    file for both experts, of kohya's layout products in blocks alone, and no plain differences.
    """
    header = lora.header
    if header.transformer or any(parts.keys() - PRODUCT for parts in header.layers.values()):
        return False
    return header.layout != "kohya" or all(map(is_in_block, header.layers))


def _here(path: Path, where: str) -> str:
    """`path` as the code names it: as it is on this machine, or what others have to fill in."""
    return str(path.resolve()) if where == "." else f"path/to/{path.resolve().name}"


def _load_lines(experts: tuple[Expert, ...], where: str) -> list[str]:
    """The code that puts each expert's LoRA on its transformer, and the scheduler in place."""
    lines = []
    for expert in experts:
        second = ", load_into_transformer_2=True" if SUBFOLDER[expert] == "transformer_2" else ""
        lines.append(
            f'pipe.load_lora_weights({where}, weight_name="{LORA_FILE[expert]}", '
            f'adapter_name="{expert}"{second})\n'
        )
    lines.append(
        f"pipe.scheduler = FlowMapEulerDiscreteScheduler.from_pretrained({where}, "
        'subfolder="scheduler")\n'
    )
    return lines


def _replaced(info: TeacherInfo, source: str, dtype: str, where: str) -> dict[str, str]:
    """Folder name -> the code that loads an expert which replaces the pipeline's."""
    code = {}
    for expert, path in info.changes.experts.items():
        part, file = SUBFOLDER[expert], json.dumps(_here(path, where))
        call = f"from_pretrained({file}, dtype={dtype})"
        if path.is_file():
            call = f'from_single_file({file}, config={source}, subfolder="{part}", dtype={dtype})'
        code[part] = f"{part} = WanTransformer3DModel.{call}\n"
    return code


def _merge_lines(info: TeacherInfo, where: str) -> list[str]:
    """The code that merges the teacher's LoRAs into the experts."""
    lines = []
    for lora in info.changes.loras:
        path, part = lora.header.path.resolve(), SUBFOLDER[lora.expert]
        second = ", load_into_transformer_2=True" if part == "transformer_2" else ""
        lines.append(
            f"pipe.load_lora_weights({json.dumps(_here(path.parent, where))}, "
            f"weight_name={json.dumps(path.name)}{second})\n"
            f'pipe.fuse_lora(components=["{part}"], lora_scale={lora.strength})\n'
            "pipe.unload_lora_weights()\n"
        )
    return lines
