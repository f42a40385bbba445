"""report.html: the whole run on one page that needs no other file.

`page.html` holds the markup, and jinja2 escapes every value in it; here those values are computed
from what lies in the output folder. Charts are SVG, videos and pictures are embedded, so the page
opens offline and can be sent as one file.
"""

from __future__ import annotations

import base64
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from wan_distill.layout import TEACHER_CLIP, RunFolder
from wan_distill.maths.sigmas import Expert
from wan_distill.results.charts import charts
from wan_distill.results.clips import PromptClips, preview_clips
from wan_distill.results.readme import package_versions
from wan_distill.results.snippet import snippet
from wan_distill.results.table import cells
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.recipes import STAGES
from wan_distill.system.files import write_atomically
from wan_distill.training.metrics import read_lines
from wan_distill.training.monitor import warnings

# The low expert makes the finished clips: they come first.
CLIP_TITLES: dict[Expert, str] = {
    "low": "low-noise expert: finished clips",
    "high": "high-noise expert: what its steps head for, blurred by nature",
}


def write_page(folder: Path, config: Config, info: TeacherInfo) -> None:
    """Writes `report.html` into `folder`, the output folder of a run that may still be going on.

    Sections of which nothing exists yet are left out.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    values = page_values(RunFolder(folder), config, info)
    page = environment.get_template("page.html").render(values)
    write_atomically(RunFolder(folder).page, page.encode())


def page_values(folder: RunFolder, config: Config, info: TeacherInfo) -> dict[str, Any]:
    """Every value that `page.html` names."""
    lines = lines_of_job(folder)
    evaluation = json.loads(_text(folder.evaluation) or "null")
    return dict(
        name=info.name,
        source=info.source,
        steps=" or ".join(map(str, config.sampling_steps)),
        teacher_steps=config.teacher_steps,
        method=config.method_title,
        updates={line["expert"]: line["step"] for line in lines},
        quality=quality(evaluation, config.grid_steps) if evaluation else None,
        sentence=(evaluation or {}).get("sentence"),
        health=health(lines),
        clips=clips(folder),
        comparison=_embedded(folder.comparison, "image/png"),
        table=table(evaluation) if evaluation else None,
        charts=charts(lines),
        code=snippet(config, info, tuple(e for e in info.experts if folder.has_student(e))),
        plan=_text(folder.plan),
        versions=versions(),
    )


def lines_of_job(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of all stages. A later stage's updates are counted on from those
    of the one before.
    """
    lines: list[dict[str, Any]] = []
    for methods in STAGES.values():
        for method in methods[:-1]:
            lines += read_lines(folder.stage(method).metrics)
    before: dict[str, tuple[int, int]] = {}
    for line in lines:
        before[line["expert"]] = (line["step"], line.get("student_updates", 0))
    for line in read_lines(folder.metrics):
        step, updates = before.get(line["expert"], (0, 0))
        later = dict(step=step + line["step"])
        if "student_updates" in line:
            later |= dict(student_updates=updates + line["student_updates"])
        lines.append(line | later)
    return lines


def versions() -> str:
    """Python, the packages and the operating system."""
    packages = [f"{name} {number}" for name, number in package_versions().items()]
    python = f"Python {platform.python_version()}"
    return f"{', '.join([python, *packages])}; {platform.platform()}"


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _embedded(file: Path, media_type: str) -> str:
    """The file as a data address; empty where there is none."""
    if not file.exists():
        return ""
    return f"data:{media_type};base64,{base64.b64encode(file.read_bytes()).decode()}"


# ---------------------------------------------------------------------------------- how good it is


@dataclass(frozen=True)
class Health:
    """`mark` is "good", "bad" or "unknown"."""

    mark: str
    words: str


def health(lines: list[dict[str, Any]]) -> Health:
    """What the last check of the student showed."""
    checks = [line for line in lines if "monitor_luminance" in line]
    if not checks:
        return Health("unknown", "the student has not been checked yet.")
    names = [name for name in checks[-1] if name.startswith("monitor_")]
    problems = warnings({name.removeprefix("monitor_"): checks[-1][name] for name in names})
    if problems:
        return Health("bad", " ".join(problems))
    return Health(
        "good", "at the last check motion, exposure and diversity were close to the teacher's."
    )


def quality(evaluation: dict[str, Any], steps: int) -> dict[str, str] | None:
    """The student that samples in `steps` steps beside its teacher: quality and speed, where sets
    of samples were compared.
    """
    if "gap_closed" not in evaluation:
        return None
    rows = {row["sampler"]: row["seconds_per_sample"] for row in evaluation["rows"]}
    teacher = evaluation["rows"][0]["seconds_per_sample"]
    student = rows[f"student {steps}"]
    return dict(
        gap_closed=f"{evaluation['gap_closed']:.0%}",
        speedup=f"{teacher / student:.1f}",
        teacher_seconds=f"{teacher:.3g}",
        student_seconds=f"{student:.3g}",
    )


def table(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The evaluation's rows as text."""
    return dict(
        titles=cells(evaluation)[0],
        rows=cells(evaluation)[1:],
        samples=evaluation["samples"],
    )


# ------------------------------------------------------------------------------------------- clips


def clips(folder: RunFolder) -> list[dict[str, Any]]:
    """Per expert and prompt: the teacher, the student at first and the student now."""
    prompts = json.loads(_text(folder.preview_prompts) or "[]")
    blocks: list[dict[str, Any]] = []
    for expert, title in CLIP_TITLES.items():
        rows = [
            dict(
                prompt=prompts[row.prompt] if row.prompt < len(prompts) else "", clips=figures(row)
            )
            for row in preview_clips(folder, expert)
        ]
        if rows:
            blocks.append(dict(title=title, rows=rows))
    return blocks


def figures(row: PromptClips) -> list[dict[str, str]]:
    """The clips of one prompt that are shown, each with its label."""
    updates = list(row.student)
    shown = {f"student after {n} updates": row.student[n] for n in (updates[0], updates[-1])}
    if row.teacher:
        shown = {TEACHER_CLIP: row.teacher} | shown
    return [dict(label=label, data=_embedded(file, "video/mp4")) for label, file in shown.items()]
