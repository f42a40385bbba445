"""The scheduler and the inference snippet; each LoRA is loaded back and compared."""

from __future__ import annotations

import json
from pathlib import Path

from wan_distill.data.run import Run
from wan_distill.layout import LORA_FILE
from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.model.student_files import scheduler_for
from wan_distill.model.verification import verify_lora
from wan_distill.results.merged import save_merged
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo


def export_student(run: Run) -> None:
    """Writes the scheduler and, where asked for, the merged pipeline; the LoRA files were written
    by training.
    """
    config, folder = run.config, run.folder
    for expert in () if config.whole_student else config.experts:
        file = folder.lora(expert)
        difference = verify_lora(run.info.transformer, file)
        print(
            f"{file.name}: {config.lora_dtype}, loaded back as diffusers and as ComfyUI do; equal "
            f"to {difference:.1g}"
        )
    scheduler_for(config).save_pretrained(folder.scheduler)
    if config.save_merged:
        save_merged(run)


def snippet(
    config: Config, info: TeacherInfo, experts: tuple[Expert, ...], where: str = "."
) -> str:
    """The inference code for this student.

    Args:
        experts: those that the student has of its own.
        where: its folder (the code then runs as it stands inside it) or its hub repository.
    """
    dtype = "torch.float32" if config.mixed_precision == "no" else "torch.bfloat16"
    local = Path(info.source).is_dir()
    source = str(Path(info.source).resolve()) if local else info.source
    imports = "FlowMapEulerDiscreteScheduler, WanPipeline"
    load = "".join(_load_lines(experts, json.dumps(where)))
    if config.whole_student:  # a complete pipeline, scheduler included
        imports, load = "WanPipeline", ""
        source = "student" if where == "." else where
    return f"""import torch
from diffusers import {imports}
from diffusers.utils import export_to_video

pipe = WanPipeline.from_pretrained({json.dumps(source)}, dtype={dtype})
{load}pipe.to("cuda" if torch.cuda.is_available() else "cpu")
video = pipe(
    "a prompt of yours",
    height={config.height},
    width={config.width},
    num_frames={config.num_frames},
    num_inference_steps={config.grid_steps},
    guidance_scale=1.0,
    max_sequence_length={config.max_sequence_length},
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "video.mp4", fps=16)
"""


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
