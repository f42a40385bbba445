"""The teacher of the student that sample.py is given, and whether the two fit."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wan_distill.data.prompts import counting_tokens
from wan_distill.errors import UsageError
from wan_distill.maths.sigmas import Expert, expert_of, sigma_grid
from wan_distill.model.hub_files import patterns_of
from wan_distill.model.part_files import parts_of
from wan_distill.model.warm_start import check_shapes
from wan_distill.planning.changed_files import check_changes
from wan_distill.planning.teacher_files import check_text, describe_files
from wan_distill.settings.assets import EMBEDDED, download
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, read_teacher
from wan_distill.settings.lora_headers import LoraHeader
from wan_distill.settings.lora_sources import find_loras
from wan_distill.settings.series import note_of
from wan_distill.settings.students import FLAG, is_declared, read_metadata
from wan_distill.settings.teacher_changes import TeacherChanges, TeacherLora
from wan_distill.system.files import make_output_folder, write_atomically


def check_folders(folders: Iterable[Path]) -> None:
    """Makes the folders of videos. Raises UsageError where one cannot be written."""
    for folder in sorted(folders):
        make_output_folder(folder, "--out")


def note_series(folder: Path, settings: dict[str, Any]) -> None:
    """Writes down what the videos in `folder` are sampled with, for `check_series`."""
    write_atomically(note_of(folder), json.dumps(settings, sort_keys=True).encode())


def has_teacher_beneath(student: dict[str, Any]) -> bool:
    """Whether a student is an adapter on its teacher, by its metadata; otherwise it is a
    transformer of fewer blocks, or a LoRA of another tool that is merged in.
    """
    return not student.get("student_layers") and not is_declared(student)


# ------------------------------------------------------------------------------------ its teacher


def teacher_config(
    student: dict[str, Any], chosen: dict[str, Any], allow_other: bool = False
) -> Config:
    """The settings with which the teacher of a student is found as its run found it.

    Args:
        student: the student's metadata.
        chosen: settings that the user gives instead, by name; None: as the run had it.
        allow_other: whether the teacher may be another one; what changed the student's own, LoRAs
            and replaced experts, is then not looked for.
    """
    # Earlier versions had one embedded teacher, and wrote where it was on their machine.
    is_earlier = student.get("teacher_embedded") and student["teacher"] not in EMBEDDED
    made: dict[str, Any] = {}
    given = chosen["teacher_path"]
    known = given is None or os.path.realpath(given) == os.path.realpath(student["teacher"])
    if known:
        made = dict(
            teacher_path=None if is_earlier else student["teacher"],
            revision=student.get("teacher_commit"),
            variant=student.get("teacher_variant"),
        )
    if known or not allow_other:
        made |= dict(
            teacher_lora=tuple(student.get("teacher_lora", ())),
            teacher_transformer=student.get("teacher_transformer"),
            teacher_transformer_2=student.get("teacher_transformer_2"),
        )
    return Config(**made | {name: value for name, value in chosen.items() if value is not None})


def find_teacher(
    student: dict[str, Any], chosen: dict[str, Any], allow_other: bool = False
) -> tuple[TeacherInfo, Config]:
    """The teacher that a student was made from, with its files checked and on this machine.

    The arguments are those of `teacher_config`. Raises UsageError.
    """
    config = teacher_config(student, chosen, allow_other)
    try:
        info = read_teacher(config)
    except UsageError as error:
        flag = str(error).partition(" ")[0]
        if chosen.get(flag.removeprefix("--"), "given") is None:
            raise UsageError(f"{error}; or say where it is now: {flag}") from error
        raise
    if not info.is_local:
        patterns = [p for part in parts_of(info) for p in patterns_of(info, config, part)]
        download(info.source, info.commit, config.cache_dir, patterns)
    describe_files(info, config)
    return info, config


def check_prompts(info: TeacherInfo, length: int, prompts: list[str]) -> None:
    """Says which prompts have more than `length` tokens. Raises UsageError where the teacher's
    tokenizer does not know what they say.
    """
    check_text(info, prompts)
    too_long = counting_tokens(Config(max_sequence_length=length), info)
    for prompt in dict.fromkeys(prompts):
        if remark := too_long(prompt):
            print(f"--prompt {prompt[:40]!r}...: {remark}", file=sys.stderr)


def check_teacher(
    info: TeacherInfo,
    student: dict[str, Any],
    allow_other: bool,
    flag: str = "--allow_other_teacher",
) -> None:
    """Raises UsageError where the LoRAs were made for another teacher than the one at hand, or it
    is not known to be the same.

    Args:
        flag: the one that sets `allow_other`.
    """
    if allow_other:
        return
    _check_boundary(info, student, flag)
    commit = student.get("teacher_commit")
    made_from = f"{student['teacher']}{f' at commit {commit}' if commit else ''}"
    is_same = not info.is_local and info.commit == commit
    is_same &= info.changes.fingerprints() == student.get("teacher_changes", {})
    if is_same and info.variant == student.get("teacher_variant"):
        return
    written = student["teacher_files"]
    here = info.part_fingerprints()
    others = [part for part in sorted(written) if here.get(part) != written[part]]
    if written and not others:
        return
    why = f"other: {', '.join(others)}" if others else "it was written by an earlier version"
    variant = student.get("teacher_variant")
    hint = f" with --variant {variant}" if variant and variant != info.variant else ""
    raise UsageError(
        f"--teacher_path {info.source}: this student was made from {made_from}, and these files "
        f"are not known to be the same ({why}); give that one{hint}, or {flag} to try it anyway"
    )


def _check_boundary(info: TeacherInfo, student: dict[str, Any], flag: str) -> None:
    """Raises UsageError where the teacher gives a step of the student to another expert than the
    one that learned it.
    """
    boundary = student["boundary_ratio"]
    for steps in student["sampling_steps"]:
        for sigma in sigma_grid(steps, student["flow_shift"])[:-1]:
            if expert_of(sigma, boundary) != expert_of(sigma, info.boundary_ratio):
                raise UsageError(
                    f"--teacher_path {info.source}: the boundary_ratio in its model_index.json is "
                    f"{info.boundary_ratio}, where this student was made with {boundary}, so that "
                    f"the other expert would do the step at sigma {sigma:.4f}; write {boundary} "
                    f"there, or {flag} to try it anyway"
                )


def check_fits(info: TeacherInfo, files: list[Path]) -> None:
    """Raises UsageError where the teacher has no expert that a file is for, or one of another
    size.
    """
    for file in files:
        student = read_metadata(file)
        if student["expert"] not in info.experts:
            raise UsageError(
                f"--student {file}: is for the {student['expert']} expert, and {info.name} has a "
                "single transformer; give the teacher it was made for"
            )
        if has_teacher_beneath(student):
            check_shapes(LoraHeader(file, "--student"), info)


def merged_into(
    info: TeacherInfo, student: str, config: Config
) -> tuple[TeacherInfo, list[Expert]]:
    """(the teacher with LoRAs of another tool merged into it while it loads, which any layout
    allows and every layer; the experts that they are for). Says what is merged.

    Args:
        student: the value of --student.

    Raises UsageError where a file does not fit, or does not say which expert it is for.
    """
    found = find_loras(student, FLAG, info.experts, config.cache_dir)
    loras = tuple(TeacherLora(expert, header, 1.0) for expert, header in found.items())
    alone = dataclasses.replace(info, changes=TeacherChanges(loras=loras))
    print(f"student: merged into the teacher: {check_changes(alone, config)}")
    changes = dataclasses.replace(info.changes, loras=(*loras, *info.changes.loras))
    merged = dataclasses.replace(info, changes=changes)
    describe_files(merged, config)  # which refuses what nothing can be merged into
    return merged, list(found)
