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

from wan_distill.errors import ExportError
from wan_distill.layout import LORA_FILE, student_file
from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.model.loading import Teacher
from wan_distill.model.student_files import load_student, scheduler_for, verify_lora
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo


def export_student(config: Config, teacher: Teacher) -> None:
    """Writes the scheduler and, where asked for, the merged pipeline; the LoRA files were written
    by training.
    """
    output_dir = Path(config.output_dir)
    for expert in teacher.info.experts if config.init_student_from else ():
        if (
            expert not in config.experts
            and (kept := Path(config.init_student_from) / LORA_FILE[expert]).exists()
        ):
            shutil.copy2(kept, output_dir / kept.name)
            print(f"{kept.name}: not trained here; carried over from {config.init_student_from}")
    for expert in config.experts if config.student_layers is None else ():
        difference = verify_lora(
            teacher.load_expert(expert, exact=True), output_dir / LORA_FILE[expert]
        )
        print(
            f"{LORA_FILE[expert]}: loaded back as diffusers and as ComfyUI do; equal to "
            f"{difference:.1g}"
        )
    scheduler_for(config).save_pretrained(output_dir / "scheduler")
    if config.save_merged:
        save_merged(output_dir / "student", config, teacher, output_dir)


def save_merged(folder: Path, config: Config, teacher: Teacher, output_dir: Path) -> None:
    """A complete pipeline folder: adapters merged into the experts, everything else byte for byte
    the teacher's.

    The text encoder is copied, never re-saved: saving it under transformers 5.0-5.2 is how files
    get poisoned.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part in (
        "text_encoder",
        "vae",
    ):  # of a hub teacher, what this run did not need is not here yet
        teacher.fetch(part)
    experts = [SUBFOLDER[e] for e in ("high", "low")]
    shutil.copytree(
        teacher.info.folder, partial, ignore=shutil.ignore_patterns(*experts, "scheduler", "*.txt")
    )
    for expert in teacher.info.experts:
        _save_merged_expert(
            partial / SUBFOLDER[expert], config, teacher, expert, student_file(output_dir, expert)
        )
    scheduler_for(config).save_pretrained(partial / "scheduler")
    index = json.loads((partial / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", "FlowMapEulerDiscreteScheduler"]
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _save_merged_expert(
    folder: Path, config: Config, teacher: Teacher, expert: Expert, student: Path
) -> None:
    """One expert of the merged pipeline, loaded back and compared; a single copy is in memory at
    any time.
    """
    transformer = teacher.load_expert(expert, exact=True)
    if not student.exists():
        transformer.save_pretrained(folder)
        return
    load_student(transformer, student)
    trained, dtype, device = probe(transformer), transformer.dtype, transformer.device
    if config.student_layers is None:
        transformer.fuse_lora()
        transformer.unload_lora()
    transformer.save_pretrained(folder)
    del transformer
    saved = WanTransformer3DModel.from_pretrained(folder, dtype=dtype).to(device)
    difference = float((probe(saved) - trained).norm() / trained.norm())
    if not difference < (
        1e-4 if dtype == torch.float32 else 2e-2
    ):  # bf16 keeps 3 digits of a weight
        raise ExportError(
            f"student/{folder.name}: the merged expert, loaded back, differs from {student.name} "
            "by "
            f"{difference:.2g}; do not use it"
        )
    print(f"student/{folder.name}: loaded back; differs from {student.name} by {difference:.1g}")


@torch.no_grad()
def probe(transformer: WanTransformer3DModel) -> Tensor:
    """What the transformer makes of one small fixed input, one patch large: [1, C, f, h, w],
    float32 on the CPU.
    """
    config, rng = transformer.config, torch.Generator().manual_seed(0)
    x = torch.randn(1, config.in_channels, *config.patch_size, generator=rng)
    text = torch.randn(1, 8, config.text_dim, generator=rng)
    place = dict(device=transformer.device, dtype=transformer.dtype)
    return (
        transformer(
            x.to(**place),
            torch.tensor([900.0], device=transformer.device),
            text.to(**place),
            return_dict=False,
        )[0]
        .float()
        .cpu()
    )


def snippet(
    config: Config, info: TeacherInfo, experts: tuple[Expert, ...], where: str = "."
) -> str:
    """The inference code for this student; `where` is its folder (runs as it stands inside it) or
    hub repository.
    """
    dtype = "torch.float32" if config.mixed_precision == "no" else "torch.bfloat16"
    source = str(Path(info.source).resolve()) if Path(info.source).is_dir() else info.source
    here, imports, load = json.dumps(where), "FlowMapEulerDiscreteScheduler, WanPipeline", ""
    if config.student_layers is None:
        for expert in experts:
            second = (
                ", load_into_transformer_2=True" if SUBFOLDER[expert] == "transformer_2" else ""
            )
            load += (
                f'pipe.load_lora_weights({here}, weight_name="{LORA_FILE[expert]}", adapter_name="{expert}"'
                f"{second})\n"
            )
        load += f'pipe.scheduler = FlowMapEulerDiscreteScheduler.from_pretrained({here}, subfolder="scheduler")\n'
    else:  # a complete pipeline, scheduler included
        imports, source = "WanPipeline", "student" if where == "." else where
    return f"""import torch
from diffusers import {imports}
from diffusers.utils import export_to_video

pipe = WanPipeline.from_pretrained({json.dumps(source)}, dtype={dtype})
{load}pipe.to("cuda" if torch.cuda.is_available() else "cpu")
video = pipe(
    "a prompt of yours", height={config.height}, width={config.width}, num_frames={config.num_frames},
    num_inference_steps={config.grid_steps}, guidance_scale=1.0, max_sequence_length={config.max_sequence_length},
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "video.mp4", fps=16)
"""
