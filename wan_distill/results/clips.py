"""The preview clips of a run, by expert, prompt and number of student updates."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from wan_distill.layout import TEACHER_CLIP, RunFolder
from wan_distill.maths.sigmas import Expert


@dataclass
class PromptClips:
    """All clips of one prompt.

    Attributes:
        prompt: its index in `previews/prompts.json`.
        teacher: the teacher's clip, None where it is missing.
        student: number of updates -> the student's clip, fewest updates first.
    """

    prompt: int
    teacher: Path | None = None
    student: dict[int, Path] = field(default_factory=dict)


def preview_clips(folder: RunFolder, expert: Expert) -> list[PromptClips]:
    """The prompts of which the student has at least one clip, in order of their index."""
    prompts: dict[int, PromptClips] = {}
    for file in sorted(folder.previews.glob(f"{expert}-*.mp4")):
        parts = re.fullmatch(rf"{expert}-(\d+)-(\d+)", file.stem)
        if parts is None:  # the teacher's, or another program's
            continue
        updates, prompt = int(parts[1]), int(parts[2])
        clips = prompts.setdefault(prompt, PromptClips(prompt))
        clips.student[updates] = file
        teacher = folder.preview(expert, TEACHER_CLIP, prompt)
        clips.teacher = teacher if teacher.exists() else None
    return [prompts[index] for index in sorted(prompts)]
