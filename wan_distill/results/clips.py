"""The clips on the page: the finished student's, those over training time, the worst."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy
from PIL import Image

from wan_distill.errors import UsageError, one_line
from wan_distill.layout import FEW_CLIP, STUDENT_CLIP, TEACHER_CLIP, RunFolder
from wan_distill.maths.sigmas import Expert
from wan_distill.results.progress import Segment
from wan_distill.results.recorded import SHOWN, worst_samples
from wan_distill.settings.reading import parse_json
from wan_distill.system.pictures import write_video

LARGE = 150_000  # bytes: a clip beyond that is made smaller for the page
SMALL_WIDTH = 416  # pixels, of such a clip: half of Wan's 832
STOPS = 6  # states of the student that are shown of one expert, at most


@dataclass
class PromptClips:
    """All previews of one prompt.

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


def prompt_texts(folder: RunFolder) -> list[str]:
    """The prompts of the previews; none where there are no previews. Raises UsageError where they
    are damaged.
    """
    file = folder.preview_prompts
    if not file.exists():
        return []
    try:
        texts: list[str] = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{file}: is damaged ({one_line(error)}); delete the folder {file.parent.name}, and "
            "clips are drawn from here on"
        ) from error
    return texts


# --------------------------------------------------------------------------------- the evaluation's


def finished_pairs(folder: RunFolder, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The first clips of the evaluation, by number: nobody chose them."""
    return _sides(folder, evaluation, range(min(SHOWN, len(evaluation["clips"]))))


def worst_pairs(folder: RunFolder, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The clips farthest from their teacher's."""
    return _sides(folder, evaluation, worst_samples(evaluation))


def _sides(
    folder: RunFolder, evaluation: dict[str, Any], samples: Sequence[int]
) -> list[dict[str, Any]]:
    """The clips of some samples that are there: prompt, distances, and a clip for each side."""
    found = []
    for sample in samples:
        files = {who: folder.clip(who, sample) for who in (TEACHER_CLIP, FEW_CLIP, STUDENT_CLIP)}
        if all(file.exists() for file in files.values()):
            clips = {who: embedded_clip(file) for who, file in files.items()}
            found.append(evaluation["clips"][sample] | dict(number=sample + 1, clips=clips))
    return found


# ------------------------------------------------------------------------------- over training time


def latest_pairs(segments: Sequence[Segment], blurred: bool) -> tuple[list[dict[str, Any]], str]:
    """The latest previews, and what they are of: what is exported, once that is known. They are the
    low expert's, which are finished clips; without any, the high expert's.

    Args:
        blurred: whether the high expert's clips are blurred: where a low one works after it.
    """
    latest = sorted(segments, key=lambda segment: segment.expert == "low")  # keeps their order
    for segment in reversed(latest):
        rows = preview_clips(segment.folder, segment.expert)
        if rows:
            break
    else:
        return [], ""
    texts = prompt_texts(segment.folder)
    pairs, shown = [], 0
    for row in rows:
        if row.prompt >= len(texts):  # an earlier version left those of prompts that are gone
            continue
        exported = segment.exported if segment.exported in row.student else None
        shown = max(row.student) if exported is None else exported
        clips = {STUDENT_CLIP: embedded_clip(row.student[shown])}
        if row.teacher:
            clips[TEACHER_CLIP] = embedded_clip(row.teacher)
        pairs.append(dict(prompt=texts[row.prompt], number=row.prompt + 1, clips=clips))
    words = f"{segment.title}, after {shown} updates"
    if blurred and segment.expert == "high":
        words += " (it only makes the first steps: blur is normal here)"
    return pairs, words


def over_time(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Per expert: the prompts, and the student's states in the order of training."""
    found = []
    for expert in ("low", "high"):
        own = [segment for segment in segments if segment.expert == expert]
        states = [(segment, updates) for segment in own for updates in _updates_shown(segment)]
        if states:
            rows, chosen = _rows(states), _chosen(states)
            found.append(dict(expert=expert, stops=_stops(states), chosen=chosen, rows=rows))
    return found


def _updates_shown(segment: Segment) -> list[int]:
    """The first, the last, the exported, and some between."""
    rows = preview_clips(segment.folder, segment.expert)
    updates = sorted({number for row in rows for number in row.student})
    kept = {updates[0], updates[-1]} if updates else set()
    if segment.exported in updates:
        kept.add(segment.exported)
    between = [number for number in updates if number not in kept]
    room = STOPS - len(kept)
    kept |= set(between[:: max(1, -(-len(between) // max(1, room)))][:room])
    return sorted(kept)


def _stops(states: Sequence[tuple[Segment, int]]) -> list[str]:
    return [
        f"{segment.title}: update {updates}" + (", exported" if updates == segment.exported else "")
        for segment, updates in states
    ]


def _chosen(states: Sequence[tuple[Segment, int]]) -> int:
    """The state that is shown first: what the last stage exports, or else the last one."""
    segment = states[-1][0]
    exported = [i for i, state in enumerate(states) if state == (segment, segment.exported)]
    return exported[0] if exported else len(states) - 1


def _rows(states: Sequence[tuple[Segment, int]]) -> list[dict[str, Any]]:
    """Per prompt: its text, the teacher's clip, and the student's at each state."""
    texts = prompt_texts(states[0][0].folder)
    rows = []
    for index, text in enumerate(texts):
        clips, teacher = [], None
        for segment, updates in states:
            file = segment.folder.preview(segment.expert, f"{updates:06d}", index)
            beside = segment.folder.preview(segment.expert, TEACHER_CLIP, index)
            clips.append(embedded_clip(file) if file.exists() else "")
            teacher = beside if beside.exists() else teacher
        if any(clips):
            shown = embedded_clip(teacher) if teacher else ""
            rows.append(dict(prompt=text, teacher=shown, clips=clips))
    return rows


# --------------------------------------------------------------------------------------- embedding


def embedded_clip(file: Path) -> str:
    """The clip as a data address; a large one is made smaller first, once."""
    if file.stat().st_size > LARGE:
        file = shrunk(file)
    return embedded(file.read_bytes(), "video/mp4")


def embedded(content: bytes, media_type: str) -> str:
    """A data address."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def shrunk(file: Path) -> Path:
    """The same clip, `SMALL_WIDTH` wide at most, in a folder `small` beside it; made where it is
    missing or older.
    """
    small = file.parent / "small" / file.name
    if small.exists() and small.stat().st_mtime >= file.stat().st_mtime:
        return small
    fps = round(imageio.immeta(file)["fps"])
    frames = [Image.fromarray(frame) for frame in imageio.imiter(file)]
    for frame in frames:
        frame.thumbnail((SMALL_WIDTH, SMALL_WIDTH))
    return write_video(small, numpy.stack([numpy.asarray(f) for f in frames]) / 255, fps)
