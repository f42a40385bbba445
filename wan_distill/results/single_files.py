"""The merged experts as single files for ComfyUI, written tensor by tensor and read back."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

from wan_distill.data.run import Run
from wan_distill.errors import ExportError
from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.model.expert_weights import ExpertWeights
from wan_distill.model.part_files import expert_files
from wan_distill.model.student_files import student_metadata
from wan_distill.settings.lora_headers import LoraHeader
from wan_distill.settings.lora_names import original_tensor
from wan_distill.settings.teacher_changes import TeacherLora
from wan_distill.system.tensor_stream import Layout, write_stream

KINDS = {"comfyui": "bf16", "comfyui-fp8": "fp8_scaled"}
FP8 = torch.float8_e4m3fn
FP8_LIMIT = 448.0  # its largest number
# By this tensor ComfyUI knows that matrices have scales; by its two elements, that the arithmetic
# is not to be fp8 too.
MARK, MARKS = "scaled_fp8", (2,)
# The largest difference of a tensor that passes, relative to its norm: bf16 keeps 3 digits, fp8 1.
TOLERANCE = {"bf16": 4e-3, "fp8_scaled": 4e-2}


def export_single_files(run: Run) -> None:
    """Writes what `--export` asks for. Raises ExportError where a file does not give the student
    back.
    """
    for export, kind in KINDS.items():
        if export in run.config.export:
            for expert in run.info.experts:
                _write(run, expert, kind)


def merged(run: Run, expert: Expert) -> ExpertWeights:
    """An expert with its student in it, tensor by tensor; changed ones are float32."""
    student = run.folder.student(expert)
    if student.exists() and run.config.whole_student:
        return ExpertWeights([student])
    loras = list(run.info.changes.of(expert))
    if student.exists():
        loras.append(TeacherLora(expert, LoraHeader(student, "--output_dir"), 1.0))
    if expert not in run.info.changes.experts:
        run.teacher.fetch(SUBFOLDER[expert])
    _, files = expert_files(run.info, run.config, expert)
    return ExpertWeights(files, loras)


def _write(run: Run, expert: Expert, kind: str) -> None:
    file = run.folder.single_file(expert, kind)
    file.parent.mkdir(exist_ok=True)
    tensors = merged(run, expert)
    layout: Layout = {MARK: (FP8, MARKS)} if kind != "bf16" else {}
    for name in tensors:
        layout |= announced(name, tensors.shape(name), kind)
    marks = [(MARK, torch.zeros(MARKS).to(FP8))] if MARK in layout else []
    each = (stored(name, tensor, kind).items() for name, tensor in tensors.items())
    metadata = student_metadata(run.config, run.info, expert)
    write_stream(
        file, layout, itertools.chain(marks, itertools.chain.from_iterable(each)), metadata
    )
    worst = difference_of(file, tensors)
    if not worst <= TOLERANCE[kind]:  # also refuses NaN
        raise ExportError(f"{file}: read back, a tensor differs by {worst:.2g}; do not use it")
    print(f"{file.parent.name}/{file.name}: read back; tensors differ by at most {worst:.1g}")


def in_fp8(name: str, dimensions: int, kind: str) -> bool:
    """Whether a tensor is a linear layer's matrix, and those are to be fp8."""
    return kind != "bf16" and dimensions == 2 and name.endswith(".weight")


def announced(name: str, shape: tuple[int, ...], kind: str) -> Layout:
    """What `stored` gives, by name, dtype and shape."""
    original = original_tensor(name)
    if not in_fp8(name, len(shape), kind):
        return {original: (torch.bfloat16, shape)}
    return {original: (FP8, shape), scale_name(original): (torch.float32, ())}


def stored(name: str, tensor: Tensor, kind: str) -> dict[str, Tensor]:
    """What ComfyUI's file holds of a tensor, under its original name: in bf16 or, of a linear
    layer's matrix, in fp8 with the scale by which it is to be multiplied.
    """
    original = original_tensor(name)
    if not in_fp8(name, tensor.dim(), kind):
        return {original: tensor.to(torch.bfloat16)}
    matrix = tensor.float()
    scale = matrix.abs().amax().clamp_min(1e-12) / FP8_LIMIT
    return {original: (matrix / scale).to(FP8), scale_name(original): scale}


def scale_name(original: str) -> str:
    return original.removesuffix(".weight") + ".scale_weight"


def difference_of(file: Path, tensors: ExpertWeights) -> float:
    """The largest difference of any tensor of `file` from `tensors`, relative to its norm.

    Raises ExportError where the file has others.
    """
    again = ExpertWeights([file])
    if again.keys() != tensors.keys():
        raise ExportError(f"{file}: does not hold the expert's tensors; do not use it")
    worst = 0.0
    for name, tensor in tensors.items():
        exact = tensor.float()
        difference = (again[name].float() - exact).norm() / exact.norm().clamp_min(1e-12)
        worst = max(worst, float(difference)) if difference == difference else math.nan
        if math.isnan(worst):
            break
    return worst
