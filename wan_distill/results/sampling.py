"""A student in the stock pipeline: checks and loads its files, samples it and its teacher."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline

from wan_distill.errors import FileError, UsageError
from wan_distill.layout import LORA_FILE, student_file
from wan_distill.model.student_files import load_student, read_metadata
from wan_distill.settings.assets import download
from wan_distill.settings.config import WAN_NEGATIVE_PROMPT, Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.umt5.repair import load_text_encoder

TEACHER_STEPS = 40  # Wan2.2's own
# What both experts of one student have in common.
SAME_SCHEDULE = ("teacher", "sampling_steps", "flow_shift", "boundary_ratio", "max_sequence_length")


def find_student(student: str) -> list[Path]:
    """The files of the experts that --student names. Raises UsageError where there is none."""
    if Path(student).is_dir():
        files = [file for expert in LORA_FILE if (file := student_file(student, expert)).exists()]
        if not files:
            raise UsageError(
                f"--student {student}: holds none of {', '.join(LORA_FILE.values())}; train first"
            )
        return files
    files = [Path(name) for name in student.split(",")]
    for file in files:
        if not file.is_file():
            raise UsageError(f"--student {file}: there is no such file or folder")
    return files


def read_schedule(files: list[Path]) -> dict[str, Any]:
    """The metadata in the first of `files`. Raises UsageError where another's contradict them."""
    first = read_metadata(files[0])
    for file in files[1:]:
        other = read_metadata(file)
        differing = [
            f"{key} {other[key]} against {first[key]}"
            for key in SAME_SCHEDULE
            if other[key] != first[key]
        ]
        made_from, others = first.get("teacher_files") or {}, other.get("teacher_files") or {}
        if any(made_from[part] != others[part] for part in made_from.keys() & others):
            differing.append("made from other files of the teacher")
        if other["expert"] == first["expert"]:
            differing.append(f"both are for the {other['expert']} expert")
        if differing:
            raise UsageError(
                f"--student {file}: belongs to another student than {files[0]} "
                f"({'; '.join(differing)}); give the two files of one run"
            )
    return first


def check_teacher(info: TeacherInfo, student: dict[str, Any], allow_other: bool) -> None:
    """Raises UsageError where the LoRAs were made for another teacher than the one at hand, or it
    is not known to be the same.
    """
    commit = student.get("teacher_commit")
    same_commit = not info.is_local and info.commit == commit
    if allow_other or (same_commit and info.variant == student.get("teacher_variant")):
        return
    here, written = info.part_fingerprints(), student.get("teacher_files") or {}
    others = [part for part in sorted(written.keys() | here) if here.get(part) != written.get(part)]
    if written and not others:
        return
    made_from = f"{student['teacher']}{f' at commit {commit}' if commit else ''}"
    raise UsageError(
        f"--teacher_path {info.source}: this student was made from {made_from}, and these files "
        f"are not known to be the same ({', '.join(others)}); give that one, or "
        "--allow_other_teacher to try it anyway"
    )


def teacher_config(student: dict[str, Any], chosen: dict[str, Any]) -> Config:
    """The settings with which the teacher of a student is found as its run found it.

    Args:
        student: the student's metadata.
        chosen: settings that the user gives instead, by name; None: as the run had it.
    """
    made: dict[str, Any] = {}
    if chosen["teacher_path"] in (None, student["teacher"]):
        made = dict(
            teacher_path=None if student.get("teacher_embedded") else student["teacher"],
            revision=student.get("teacher_commit"),
            variant=student.get("teacher_variant"),
        )
    return Config(**made | {name: value for name, value in chosen.items() if value is not None})


def load_pipeline(
    info: TeacherInfo, config: Config, files: list[Path], offload: bool
) -> WanPipeline:
    """The teacher's pipeline with a verified text encoder and the student's weights, on its device.

    Raises UsageError where the text encoder is broken.
    """
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and not info.embedded else torch.float32
    folder = info.folder
    if not Path(info.source).is_dir():
        parts = ["text_encoder/*", "vae/*", "transformer*/*"]
        folder = download(info.source, info.commit, config.cache_dir, parts)
    variant = config.variant
    try:
        encoder, _ = load_text_encoder(folder, dtype=dtype, variant=variant)
    except FileError as error:
        raise UsageError(f"--teacher_path {info.source}: {error}") from error
    pipe: WanPipeline = WanPipeline.from_pretrained(
        folder, text_encoder=encoder, dtype=dtype, variant=variant
    )
    pipe.vae.to(torch.float32)  # as in training: bf16 shows as banding
    for file in files:
        add_student(pipe, file)
    if offload and cuda:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to("cuda" if cuda else "cpu")
    return pipe


def add_student(pipe: WanPipeline, file: Path) -> None:
    """Gives one expert of the pipeline its LoRA, or the weights of a shallower student."""
    student = read_metadata(file)
    if not has_teacher_beneath(student):
        load_student(getattr(pipe, student["subfolder"]), file)
        return
    pipe.load_lora_weights(
        str(file.parent),
        weight_name=file.name,
        adapter_name=student["expert"],
        load_into_transformer_2=student["expert"] == "low",
    )


def has_teacher_beneath(student: dict[str, Any]) -> bool:
    """Whether a student is an adapter on its teacher, by its metadata; otherwise it is a
    transformer of fewer blocks.
    """
    return not student.get("student_layers")


def sample_clip(
    pipe: WanPipeline, prompt: str, seed: int, shift: float, call: dict[str, Any]
) -> tuple[numpy.ndarray, float]:
    """One clip: frames [F, H, W, 3] in [0, 1], and the seconds it took, decoding included.

    Args:
        shift: of the sigmas, which are those of `FlowMapEulerDiscreteScheduler`.
        call: further arguments of the pipeline.
    """
    pipe.scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    noise = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    frames = pipe(prompt, generator=noise, output_type="np", **call).frames[0]
    return frames, time.perf_counter() - started


def sample_teacher(
    pipe: WanPipeline, prompt: str, seed: int, info: TeacherInfo, clip: dict[str, int]
) -> tuple[numpy.ndarray, float]:
    """One clip of the guided teacher, sampled as Wan does, returned as by `sample_clip`.

    The student's LoRAs are off meanwhile. `clip` gives size and text length.
    """
    wan = info.sampling_defaults
    call: dict[str, Any] = dict(clip, num_inference_steps=TEACHER_STEPS)
    call["negative_prompt"] = "" if info.embedded else WAN_NEGATIVE_PROMPT
    call["guidance_scale"] = wan["guidance_scale"]
    if len(info.experts) == 2:
        call["guidance_scale_2"] = wan["guidance_scale_2"]
    adapters = any(pipe.get_list_adapters().values())
    if adapters:
        pipe.disable_lora()
    frames, seconds = sample_clip(pipe, prompt, seed, wan["teacher_shift"], call)
    if adapters:
        pipe.enable_lora()
    return frames, seconds
