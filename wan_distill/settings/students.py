"""The files of a student, and the schedule that they carry or that is declared; no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_distill.errors import FileError, UsageError
from wan_distill.layout import LORA_FILE, student_file
from wan_distill.settings.lora_headers import METADATA_KEY, LoraHeader, parse_schedule
from wan_distill.settings.lora_sources import local
from wan_distill.settings.reading import read_header

FLAG = "--student"
# What both experts of one student have in common.
SAME_SCHEDULE = (
    "teacher",
    "sampling_steps",
    "flow_shift",
    "boundary_ratio",
    "max_sequence_length",
    "student_layers",
)
# What a sampler reads of a student's metadata.
NEEDED = (*SAME_SCHEDULE, "expert", "subfolder", "height", "width", "num_frames")


def find_student(student: str, cache_dir: str | None) -> list[Path]:
    """The files that --student names: those in a folder, files separated by commas, or the same on
    the hub. Raises UsageError where there is none.
    """
    names = [student] if os.path.exists(student) else student.split(",")
    found = []
    for name in filter(None, map(str.strip, names)):
        path = local(name, FLAG, cache_dir)
        found += _in_folder(path) if path.is_dir() else [path]
    if not found:
        raise UsageError(f"{FLAG} {student!r}: names no file; give the folder of a run, or files")
    return found


def _in_folder(folder: Path) -> list[Path]:
    """A run's students or, where there are none, whatever LoRAs lie there."""
    files = [file for expert in LORA_FILE if (file := student_file(folder, expert)).exists()]
    if files:
        return files
    if (folder / "model_index.json").is_file():
        raise UsageError(
            f"{FLAG} {folder}: is a whole pipeline; load it with "
            "DiffusionPipeline.from_pretrained, or give the folder of the run around it"
        )
    others = [file for file in folder.glob("*.safetensors") if not file.name.startswith(".")]
    if not others:
        raise UsageError(
            f"{FLAG} {folder}: holds none of {', '.join(LORA_FILE.values())}; train first, or "
            "give the folder of the run"
        )
    return sorted(others)


def student_schedule(files: list[Path], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a student before it is sampled: what its files say, or what is declared.

    Args:
        given: the flags: `teacher_path`, `flow_shift` and `steps` say what files of other tools do
            not. A `flow_shift` must be the student's own where its files say that.

    Raises UsageError.
    """
    if not any(map(carries_schedule, files)):
        return _declared(files, given)
    student = read_schedule(files)
    shift = given["flow_shift"]
    if shift not in (None, student["flow_shift"]):
        raise UsageError(
            f"--flow_shift {shift:g}: this student was trained with {student['flow_shift']:g}; "
            "leave it out"
        )
    return student


def is_declared(student: Mapping[str, Any]) -> bool:
    """Whether the schedule is the user's word, since the files carry none."""
    return "expert" not in student


def carries_schedule(file: Path) -> bool:
    """Whether this tool wrote the file; of a damaged one its reader says what is wrong."""
    try:
        header, _ = read_header(file)
    except FileError:
        return True
    metadata = header.get("__metadata__")
    return isinstance(metadata, dict) and METADATA_KEY in metadata


def _declared(files: list[Path], given: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule of LoRAs of other tools. Raises UsageError where the flags do not give it."""
    for file in files:
        LoraHeader(file, FLAG)  # is it a LoRA at all?
    lacking = [f"--{k}" for k in ("teacher_path", "flow_shift", "steps") if given[k] is None]
    if lacking:
        raise UsageError(
            f"{FLAG} {files[0]}: carries no schedule, since another tool wrote it; give "
            f"{', '.join(lacking)} as it was made for (public 4-step LoRAs of Wan2.2: --flow_shift "
            "5 --steps 4), or begin a run with it (--init_student_from)"
        )
    return dict(
        teacher=given["teacher_path"],
        flow_shift=given["flow_shift"],
        sampling_steps=[given["steps"]],
    )


# ------------------------------------------------------------------------------ what files carry


def read_schedule(files: list[Path]) -> dict[str, Any]:
    """What the metadata of `files` say together: that of the first, with the teacher's files of
    all, and `experts`, which they are for.

    Raises UsageError where one is none of this tool's, or contradicts another.
    """
    schedules = [read_one(file) for file in files]
    first = schedules[0]
    made_from = dict(first.get("teacher_files") or {})
    experts = [first["expert"]]
    for file, other in zip(files[1:], schedules[1:], strict=True):
        differing = [
            f"{key} {other[key]} against {first[key]}"
            for key in SAME_SCHEDULE
            if other[key] != first[key]
        ]
        others = other.get("teacher_files") or {}
        if any(made_from[part] != others[part] for part in made_from.keys() & others):
            differing.append("made from other files of the teacher")
        if other["expert"] in experts:
            differing.append(f"both are for the {other['expert']} expert")
        if differing:
            raise UsageError(
                f"{FLAG} {file}: belongs to another student than {files[0]} "
                f"({'; '.join(differing)}); give the two files of one run"
            )
        experts.append(other["expert"])
        made_from |= others
    return first | {"teacher_files": made_from, "experts": experts}


def read_one(file: Path) -> dict[str, Any]:
    """The metadata of one file. Raises UsageError where a sampler could not work with it."""
    schedule = read_metadata(file)
    lacking = [name for name in NEEDED if name not in schedule]
    if lacking:
        raise UsageError(
            f"{FLAG} {file}: its schedule lacks {', '.join(lacking)}; it was written by another "
            "version of this tool, sample it with that"
        )
    return schedule


def read_metadata(file: Path) -> dict[str, Any]:
    """The schedule in a student's header. Raises UsageError for files that are not ours, and for
    damaged ones.
    """
    try:
        header, _ = read_header(file)
    except FileError as error:
        raise UsageError(f"{FLAG} {error}") from error
    metadata = header.get("__metadata__")
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if text is None:
        raise UsageError(
            f"{file}: carries no schedule, since another tool wrote it; give files of one student"
        )
    return parse_schedule(file, text)
