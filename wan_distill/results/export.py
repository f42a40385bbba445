"""The scheduler, the merged pipeline and the inference snippet; every file is loaded back and
compared.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from wan_distill.data.run import Run
from wan_distill.errors import ExportError
from wan_distill.layout import LORA_FILE
from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.model.student_files import load_student, scheduler_for
from wan_distill.model.verification import verify_lora
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.files import open_to_umask

# A merged weight is rounded to the base's dtype: bf16 keeps 3 digits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


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


def save_merged(run: Run) -> None:
    """A complete pipeline folder: adapters merged into the experts, everything else byte for byte
    the teacher's.

    The text encoder is copied, never saved anew: saving it under transformers 5.0-5.2 is how files
    get broken.
    """
    folder, info = run.folder.merged, run.info
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part in ("text_encoder", "vae"):  # of a hub teacher, they may not be here yet
        run.teacher.fetch(part)
    left_out = shutil.ignore_patterns(*SUBFOLDER.values(), "scheduler", "*.txt")
    shutil.copytree(info.folder, partial, ignore=left_out)
    for expert in info.experts:
        _save_merged_expert(run, expert, partial / SUBFOLDER[expert])
    scheduler_for(run.config).save_pretrained(partial / "scheduler")
    index_file = partial / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", "FlowMapEulerDiscreteScheduler"]
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _save_merged_expert(run: Run, expert: Expert, folder: Path) -> None:
    """One expert of the merged pipeline, loaded back and compared; a single copy is in memory at
    any time.
    """
    transformer = run.teacher.load_expert(expert, exact=True)
    student = run.folder.student(expert)
    if not student.exists():
        transformer.save_pretrained(folder)
        open_to_umask(folder)
        return
    load_student(transformer, student)
    trained = probe(transformer)
    dtype, device = transformer.dtype, transformer.device
    if not run.config.whole_student:
        transformer.fuse_lora()
        transformer.unload_lora()
    transformer.save_pretrained(folder)
    open_to_umask(folder)
    del transformer
    saved = WanTransformer3DModel.from_pretrained(folder, dtype=dtype).to(device)
    difference = float((probe(saved) - trained).norm() / trained.norm())
    if not difference < TOLERANCE[dtype]:
        raise ExportError(
            f"student/{folder.name}: the merged expert, loaded back, differs from {student.name} "
            f"by {difference:.2g}; do not use it"
        )
    print(f"student/{folder.name}: loaded back; differs from {student.name} by {difference:.1g}")


@torch.no_grad()
def probe(transformer: WanTransformer3DModel) -> Tensor:
    """What the transformer makes of one small fixed input, one patch large: [1, C, f, h, w],
    float32 on the CPU.
    """
    config, rng = transformer.config, torch.Generator().manual_seed(0)
    device, dtype = transformer.device, transformer.dtype
    x = torch.randn(1, config.in_channels, *config.patch_size, generator=rng)
    text = torch.randn(1, 8, config.text_dim, generator=rng)
    timestep = torch.tensor([900.0], device=device)
    output: Tensor = transformer(
        x.to(device, dtype), timestep, text.to(device, dtype), return_dict=False
    )[0]
    return output.float().cpu()


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
