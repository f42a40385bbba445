"""A student in the stock pipeline: loads it, samples it and its teacher."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import torch
from diffusers import FlowMapEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline

from wan_distill.data.pictures import read_picture
from wan_distill.errors import FileError, Halted, NonFiniteError, UsageError, one_line
from wan_distill.lora.layouts import for_diffusers
from wan_distill.maths.sigmas import SUBFOLDER
from wan_distill.model.loading import hide_loading_bars, load_transformer, load_vae
from wan_distill.model.part_files import of_teacher
from wan_distill.model.student_files import load_student
from wan_distill.results.student import has_teacher_beneath
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.students import read_metadata
from wan_distill.system import pictures
from wan_distill.system.side_by_side import side_by_side
from wan_distill.umt5.text import load_text

TEACHER_STEPS = 40  # Wan2.2's own
TIMED = 3  # clips of the student, of which the median is said
ENOUGH = 30.0  # seconds, after which no further one is made
Pipeline: TypeAlias = "WanPipeline | WanImageToVideoPipeline"


def load_pipeline(info: TeacherInfo, config: Config, files: list[Path], offload: bool) -> Pipeline:
    """The teacher's pipeline with a verified text side and the student's weights, on its device.

    Each part is read from the files that a run reads. `model_index.json` and `scheduler/` are not
    used: a student brings its own schedule. Raises UsageError where the text side is broken, or the
    student does not fit.
    """
    if not sys.stderr.isatty():
        hide_loading_bars()
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and not info.embedded else torch.float32
    try:
        encoder, tokenizer, verdict = load_text(
            info.folder, dtype=dtype, variant=config.variant, allow_pickle=config.allow_pickle
        )
    except FileError as error:
        raise UsageError(of_teacher(info, error)) from error
    if verdict.verdict != "PASS":
        print(*verdict.explain(), sep="\n")
    experts = {
        SUBFOLDER[expert]: load_transformer(info, config, expert, dtype, torch.device("cpu"))
        for expert in info.experts
    }
    kind = WanImageToVideoPipeline if info.takes_picture else WanPipeline
    pipe = kind(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=load_vae(info, config),
        scheduler=FlowMapEulerDiscreteScheduler(),
        boundary_ratio=info.boundary_ratio,
        expand_timesteps=info.expand_timesteps,
        **experts,
    )
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    for file in files:
        add_student(pipe, file)
    if offload and cuda:
        pipe.enable_model_cpu_offload()
        return pipe
    try:
        pipe.to("cuda" if cuda else "cpu")
    except torch.OutOfMemoryError as error:
        raise Halted("the pipeline does not fit the GPU's memory; give --offload") from error
    return pipe


def add_student(pipe: Pipeline, file: Path) -> None:
    """Gives one expert its LoRA, or a shallower student's weights. Raises UsageError if unfit."""
    student = read_metadata(file)
    try:
        if not has_teacher_beneath(student):
            load_student(getattr(pipe, student["subfolder"]), file)
            return
        pipe.load_lora_weights(
            for_diffusers(file),
            adapter_name=student["expert"],
            load_into_transformer_2=student["expert"] == "low",
        )
    except (RuntimeError, ValueError, LookupError) as error:
        raise UsageError(
            f"--student {file}: does not fit this teacher ({one_line(error)[:200]}); give the "
            "teacher it was made for"
        ) from error


def given_picture(file: str | None, info: TeacherInfo, clip: Mapping[str, Any]) -> dict[str, Any]:
    """What clips begin with, as the pipeline's argument, cropped to their aspect; nothing where a
    teacher takes no picture. Raises UsageError where there is none, or one too many.
    """
    if file is None and not info.takes_picture:
        return {}
    if file is None:
        raise UsageError("--image: this student's clips begin with a picture; give the file of one")
    if not info.takes_picture:
        raise UsageError(f"--image {file}: this student makes videos from text alone; leave it out")
    size = clip["height"], clip["width"]
    return dict(image=read_picture(file, size=size).cropped(*size))


def sample_clip(
    pipe: Pipeline, prompt: str, seed: int, shift: float, call: dict[str, Any]
) -> tuple[numpy.ndarray, float]:
    """One clip: frames [F, H, W, 3] in [0, 1], and the seconds it took, decoding included.

    Args:
        shift: of the sigmas, which are those of `FlowMapEulerDiscreteScheduler`.
        call: further arguments of the pipeline.

    Raises NonFiniteError where it is none, and Halted where the memory does not suffice.
    """
    pipe.scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    noise = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    try:
        frames = pipe(prompt=prompt, generator=noise, output_type="np", **call).frames[0]
    except torch.OutOfMemoryError as error:
        raise Halted(
            "out of GPU memory; give --offload, or a smaller --height, --width or --num_frames"
        ) from error
    if not numpy.isfinite(frames).all():
        raise NonFiniteError("the clip is not finite; download the student and its teacher again")
    return frames, time.perf_counter() - started


def make_videos(
    videos: Sequence[tuple[str, int, Path]],
    fps: int,
    pipe: Pipeline,
    shift: float,
    call: dict[str, Any],
    info: TeacherInfo,
    teacher: Pipeline | None = None,
    place: Callable[[Path], Path] = Path,
) -> None:
    """Writes each video and says what it took.

    Args:
        videos: (prompt, seed, file) of each.
        shift, call: as of `sample_clip`.
        teacher: what it is sampled with, where each video shows it beside the student.
        place: which file is written, asked when it is: others may have made one meanwhile.

    Raises as `sample_clip`, and Halted where a video cannot be written.
    """
    work = f"{call['num_inference_steps']} evaluations"
    teachers_work, slow = f"{teacher_evaluations(info)} evaluations", 0.0
    for prompt, seed, file in videos:
        frames, seconds = sample_clip(pipe, prompt, seed, shift, call)
        if teacher is not None:
            reference, slow = sample_teacher(teacher, prompt, seed, info, call)
            sides = {f"teacher: {teachers_work}": reference, f"student: {work}": frames}
            frames = side_by_side(sides)
        took = f": {work}, {seconds:.2f} s" if teacher is None else ""
        print(f"wrote {_write(place(file), frames, fps)}{took}", flush=True)
    if teacher is not None:  # its last clip was warm
        fast = merged_seconds(pipe, prompt, seed, shift, call)
        print(
            f"teacher: {teachers_work}, {slow:.2f} s; student, adapters merged: {work}, "
            f"{fast:.2f} s; decoding included, {slow / fast:.1f} times as fast"
        )


def _write(file: Path, frames: numpy.ndarray, fps: int) -> Path:
    try:
        return pictures.write_video(file, frames, fps)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise Halted(f"--out {file}: cannot be written ({reason}); choose another") from error


def merged_seconds(
    pipe: Pipeline, prompt: str, seed: int, shift: float, call: dict[str, Any]
) -> float:
    """The seconds that one clip of the student takes with its adapters merged, as users run it. The
    pipeline keeps them merged. Arguments as of `sample_clip`, which has warmed the pipeline up.
    """
    for part in SUBFOLDER.values():
        expert = getattr(pipe, part, None)
        if expert is not None and getattr(expert, "peft_config", None):
            expert.fuse_lora()
            expert.unload_lora()
    seconds: list[float] = []
    while len(seconds) < TIMED and sum(seconds) < ENOUGH:
        seconds.append(sample_clip(pipe, prompt, seed, shift, call)[1])
    return statistics.median(seconds)


def teacher_evaluations(info: TeacherInfo) -> int:
    """Transformer evaluations of a clip of `sample_teacher`: with guidance a step takes two."""
    return TEACHER_STEPS * (2 if info.sampling_defaults["guidance_scale"] > 1 else 1)


def sample_teacher(
    pipe: Pipeline, prompt: str, seed: int, info: TeacherInfo, call: dict[str, Any]
) -> tuple[numpy.ndarray, float]:
    """One clip of the guided teacher, sampled as Wan does, returned as by `sample_clip`.

    The student's LoRAs are off meanwhile. Of the student's `call`, size, text length and picture
    are taken.
    """
    wan = info.sampling_defaults
    call = dict(call, num_inference_steps=TEACHER_STEPS)
    call["negative_prompt"] = wan["negative_prompt"]
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
