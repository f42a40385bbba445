"""The model card: the README of a student's repository on the hub."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from wan_distill.layout import STUDENT_CLIP, TEACHER_CLIP, RunFolder
from wan_distill.results.clips import preview_clips, prompt_texts
from wan_distill.results.progress import exported_updates
from wan_distill.results.readme import readme
from wan_distill.results.recorded import SHOWN, worst_samples
from wan_distill.results.summary import cost
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.spent import read_spent

TAGS = ["lora", "wan", "distillation", "few-step"]
Clips = list[tuple[str, list[tuple[str, Path]]]]
"""(prompt, [(who, file), ...]) for each prompt"""


def model_card(
    folder: Path,
    stages: Sequence[Config],
    info: TeacherInfo,
    evaluation: dict[str, Any] | None,
    name: str,
) -> str:
    """The text of the repository's README.md.

    It is the output folder's README with code that reads from the repository `name`, between the
    hub's front matter and schedule, cost, limits and clips.

    Args:
        stages: the settings of each stage of the job, in order.
    """
    config = stages[-1]
    local = Path(info.source).is_dir()  # a path on this machine names nothing on the hub
    kind = "image-to-video" if info.takes_picture else "text-to-video"
    relation = "finetune" if config.whole_student else "adapter"
    front = ModelCardData(
        library_name="diffusers",
        pipeline_tag=kind,
        tags=[*TAGS, kind],
        base_model=None if local else info.source,
        license="apache-2.0" if info.source.startswith("Wan-AI/") else None,
    )
    if not local:
        front["base_model_relation"] = relation
    files = RunFolder(folder)
    parts = [
        f"---\n{front.to_yaml()}\n---",
        readme(folder, config, info, evaluation, name).rstrip(),
        f"## Schedule\n\n```json\n{json.dumps(_schedule(config))}\n```",
        f"## Training\n\n{_training(files, stages)}",
        f"## Limits\n\n{_limits(config, evaluation)}",
    ]
    shown = evaluation_clips(files, evaluation, range(SHOWN)) or preview_pairs(files)
    if shown:
        parts.append(f"## Clips\n\n{_videos(shown, name, folder)}")
    if evaluation and (worst := evaluation_clips(files, evaluation, worst_samples(evaluation))):
        words = "The clips farthest from their teacher's, out of all that were measured."
        parts.append(f"## The worst clips\n\n{words}\n\n{_videos(worst, name, folder)}")
    return "\n\n".join(parts) + "\n"


def _schedule(config: Config) -> dict[str, Any]:
    return dict(
        sigmas=config.sigmas(),
        flow_shift=config.flow_shift,
        boundary_ratio=config.boundary_ratio,
        guidance_scale=1.0,
        max_sequence_length=config.max_sequence_length,
    )


def _training(files: RunFolder, stages: Sequence[Config]) -> str:
    """What made it, and what that cost."""
    words = [f"Method: {'; then '.join(map(_updates, stages))}."]
    if files.spent.exists():
        spent = cost(stages[-1], read_spent(files.spent))
        words.append(f"It took {spent.value}: {spent.words}")
    words.append("Every setting is in `run.json`; `report.html` shows the whole run.")
    return " ".join(words)


def _updates(config: Config) -> str:
    """The updates of one stage, and whose they are."""
    experts = " and of the ".join(f"{expert} expert" for expert in config.experts)
    each = " each" if len(config.experts) > 1 else ""
    return f"{config.method}, {config.max_train_steps} updates of the {experts}{each}"


def _limits(config: Config, evaluation: dict[str, Any] | None) -> str:
    clip = f"{config.num_frames} frames of {config.width} x {config.height} pixels"
    lines = [
        f"- It was trained on clips of {clip}. Other sizes and lengths were not measured.",
        "- It has learned the steps above and no others, without guidance: another number of "
        "steps, shift or guidance scale gives other clips. Negative prompts do nothing.",
    ]
    if evaluation:
        lines.append(
            f"- It was measured on {evaluation['samples']} clips of {evaluation['prompts']} "
            "prompts, by their distance to its teacher's clips. No people judged them."
        )
    else:
        lines.append("- It was not measured against its teacher.")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- clips


def evaluation_clips(
    files: RunFolder, evaluation: dict[str, Any] | None, samples: Sequence[int]
) -> Clips:
    """Those clips of the evaluation that are there as videos."""
    found: Clips = []
    for sample in samples if evaluation else ():
        pair = [(who, files.clip(who, sample)) for who in (TEACHER_CLIP, STUDENT_CLIP)]
        if evaluation and all(file.exists() for _, file in pair):
            found.append((evaluation["clips"][sample]["prompt"], pair))
    return found


def preview_pairs(files: RunFolder) -> Clips:
    """The previews of the exported student, or else the last ones, each after the teacher's.

    They are the low expert's, which are finished clips; without any, the high expert's.
    """
    texts = prompt_texts(files)
    found: Clips = []
    for expert in ("low", "high"):
        for row in preview_clips(files, expert):
            exported = exported_updates(files, expert)
            updates = exported if exported in row.student else max(row.student)
            pair = [(TEACHER_CLIP, row.teacher)] if row.teacher else []
            text = texts[row.prompt] if row.prompt < len(texts) else ""
            found.append((text, [*pair, (STUDENT_CLIP, row.student[updates])]))
        if found:
            break
    return found


def _videos(clips: Clips, name: str, folder: Path) -> str:
    """Markdown that shows clips from the repository `name`."""
    blocks = []
    for prompt, pair in clips:
        videos = [
            f'<video controls muted loop src="https://huggingface.co/{name}/resolve/main/'
            f'{file.relative_to(folder).as_posix()}"></video> {who}'
            for who, file in pair
        ]
        blocks.append("\n".join([f"{_plain(prompt)}:\n", *videos] if prompt else videos))
    return "\n\n".join(blocks)


def _plain(text: str) -> str:
    """Text that markdown and HTML leave as it is."""
    return html.escape(re.sub(r"([\\`*_\[\]#])", r"\\\1", text), quote=False)
