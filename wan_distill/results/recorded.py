"""evaluation.json: which student it measured, and when a new one takes its place."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from wan_distill.data.run import Run
from wan_distill.errors import FileError
from wan_distill.layout import FEW_CLIP, STUDENT_CLIP, TEACHER_CLIP, RunFolder
from wan_distill.maths.sigmas import SUBFOLDER, expert_of
from wan_distill.settings.fingerprints import fingerprint_file
from wan_distill.system.records import read_record, write_record

SHOWN = 4  # clips, by number: chosen before anybody saw them
WORST = 4  # clips: those farthest from their teacher's
OURS = re.compile(rf"(({TEACHER_CLIP}|{FEW_CLIP}|{STUDENT_CLIP})-)?\d+\.(mp4|frames\.png)")


def student_hashes(folder: RunFolder) -> dict[str, str]:
    """Expert -> what identifies its student's weights, for those that have a whole file."""
    files = {expert: folder.student(expert) for expert in SUBFOLDER if folder.has_student(expert)}
    found = {expert: _hash(file, file.stat().st_mtime_ns) for expert, file in files.items()}
    return {expert: digest for expert, digest in found.items() if digest is not None}


@functools.lru_cache(maxsize=8)
def _hash(file: Path, changed: int) -> str | None:
    """What identifies the weights in a file that was last changed at `changed`: a live page asks
    again and again. None of a damaged one, which nobody has measured.
    """
    try:
        return fingerprint_file(file)
    except FileError:
        return None


def will_be_shown(folder: RunFolder, samples: int) -> bool:
    """Whether an evaluation with so many samples becomes `evaluation.json`: unless that holds one
    of the same student with more.
    """
    earlier = read_evaluation(folder)
    return earlier is None or bool(earlier["samples"] <= samples)


def record(run: Run, result: dict[str, Any]) -> bool:
    """Writes an evaluation, with the student that it measured noted in it, and says so where it
    does not become `evaluation.json`. Returns whether it did.
    """
    folder, samples = run.folder, result["samples"]
    result["student"] = student_hashes(folder)
    owners = {expert_of(sigma, run.config.boundary_ratio) for sigma in run.config.sigmas()[:-1]}
    result["lacking"] = [expert for expert in SUBFOLDER if expert in owners - {*result["student"]}]
    shown = will_be_shown(folder, samples)
    file = folder.evaluation if shown else folder.lesser_evaluation(result["kind"], samples)
    write_record(file, result)
    if not shown:
        run.runtime.say(
            f"\n{folder.evaluation.name} keeps an evaluation of this student with more samples; "
            f"this one, with {samples}, is in {file.name}."
        )
    return shown


def read_evaluation(folder: RunFolder) -> dict[str, Any] | None:
    """The evaluation of the student that lies in `folder`; None where there is none, or where it
    measured other weights. Raises UsageError where it is damaged.
    """
    result = read_record(folder.evaluation, "delete it, and run again with --evaluate_only")
    return result if result and result.get("student") == student_hashes(folder) else None


def worst_samples(result: dict[str, Any]) -> list[int]:
    """The clips farthest from their teacher's, the farthest first."""
    clips = result["clips"]
    return sorted(range(len(clips)), key=lambda i: -clips[i]["paired_distance"])[:WORST]


def shown_samples(result: dict[str, Any]) -> list[int]:
    """The clips that are written as videos: the first, and the worst."""
    first = range(min(SHOWN, len(result["clips"])))
    return sorted({*first, *worst_samples(result)})


def clear_clips(folder: RunFolder) -> None:
    """Deletes the videos of an earlier evaluation."""
    for place in (folder.clips, folder.pairs):
        for file in place.glob("*") if place.exists() else ():
            if OURS.fullmatch(file.name):
                file.unlink()
