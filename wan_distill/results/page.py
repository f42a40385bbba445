"""report.html: the whole run on one page that needs no other file.

`page.html`, `page.css` and `page.js` hold the markup, and jinja2 escapes every value in it; here
those values are computed from what lies in the output folder. Charts are SVG and videos are
embedded, so the page opens offline and can be sent as one file.
"""

from __future__ import annotations

import hashlib
import json
import platform
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from wan_distill.layout import RunFolder
from wan_distill.results import summary
from wan_distill.results.charts import charts
from wan_distill.results.clips import (
    embedded,
    finished_pairs,
    latest_pairs,
    over_time,
    worst_pairs,
)
from wan_distill.results.facts import changed_settings, plan_basis, planned_and_spent, read_plan
from wan_distill.results.progress import Segment, segments
from wan_distill.results.readme import package_versions
from wan_distill.results.recorded import read_evaluation
from wan_distill.results.snippet import snippet
from wan_distill.results.table import marked_cells, remarks
from wan_distill.results.table import summary as in_words
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.files import write_atomically
from wan_distill.system.spent import read_spent


class Page:
    """The page of one job, which may still be going on. What does not exist yet is left out.

    Args:
        stages: the settings of its stages, in order.
    """

    def __init__(self, stages: Sequence[Config], info: TeacherInfo):
        self.stages = stages
        self.config = stages[-1]
        self.info = info
        self.folder = RunFolder(Path(self.config.output_dir))
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.template = environment.get_template("page.html")
        self.lock = threading.Lock()

    def write(self) -> None:
        """Writes `report.html` into the output folder."""
        write_atomically(self.folder.page, self.html().encode())

    def html(self) -> str:
        """The page as it is now. Threads wait for each other: it makes large clips smaller."""
        with self.lock:
            return self.template.render(self.values())

    def version(self) -> str:
        """Changes with the files that the page is made of."""
        places = [self.folder.spent, self.folder.evaluation, self.folder.readme]
        for stage in self.stages:
            folder = RunFolder(Path(stage.output_dir))
            places += [folder.metrics, folder.previews]
        times = [place.stat().st_mtime_ns for place in places if place.exists()]
        return hashlib.sha256(json.dumps(times).encode()).hexdigest()[:16]

    def values(self) -> dict[str, Any]:
        """Every value that `page.html` names."""
        config, info, folder = self.config, self.info, self.folder
        parts = segments(self.stages)
        evaluation, plan = read_evaluation(folder), read_plan(folder)
        spent = read_spent(folder.spent)
        blurred = len(info.experts) > 1
        hero, hero_words = _hero(folder, evaluation, parts, blurred)
        experts = tuple(e for e in info.experts if folder.has_student(e))
        where = config.hub_model_id or folder.path.resolve().name  # no path: others read it too
        return dict(
            version=self.version(),
            name=info.name,
            steps=" or ".join(map(str, config.sampling_steps)),
            size=dict(width=config.width, height=config.height),
            live=not spent.get("finished"),
            sentence=summary.sentence(config, parts, evaluation, spent),
            tiles=summary.tiles(config, parts, evaluation, spent),
            sides=_sides(config),
            hero=hero,
            hero_words=hero_words,
            over_time=over_time(parts),
            table=_table(evaluation),
            charts=charts(parts),
            warnings=_warnings(parts),
            worst=worst_pairs(folder, evaluation) if evaluation else [],
            settings=changed_settings(config, info, plan),
            code=snippet(config, info, experts, where) if folder.scheduler.exists() else "",
            workflows=_workflows(folder),
            needs=planned_and_spent(plan, spent),
            basis=plan_basis(plan),
            plan=_shared(_text(folder.plan)),
            facts=_facts(config, spent, evaluation),
            sections=_Sections(),
        )


class _Sections:
    """Tells the page which of its sections changed: a digest of each one's content."""

    def digest(self, content: str) -> str:
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _shared(plan: str) -> str:
    """The plan without what it says about this machine."""
    lines = plan.partition("\nOn this machine:")[0].splitlines()
    return "\n".join(line for line in lines if not line.startswith("Output"))


def _hero(
    folder: RunFolder, evaluation: dict[str, Any] | None, parts: Sequence[Segment], blurred: bool
) -> tuple[list[dict[str, Any]], str]:
    """The clips of the first screen: the finished student's, or else the latest previews."""
    pairs = finished_pairs(folder, evaluation) if evaluation else []
    if pairs:
        return pairs, "The finished student, on prompts and noise that it never saw in training"
    return latest_pairs(parts, blurred)


def _sides(config: Config) -> dict[str, str]:
    """What stands below the clips of each side."""
    rows = summary.samplers(config)
    sides = dict(teacher=rows.paired, few=rows.few_guided, student=rows.students[-1])
    names = dict(teacher="teacher", few="few steps", student="student")
    return {who: f"{names[who]} · {row.evaluations(config)} evals" for who, row in sides.items()}


def _table(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    """The evaluation's rows as text, each cell with how it compares with the yardstick."""
    if evaluation is None:
        return None
    words = " ".join([in_words(evaluation), *remarks(evaluation)])
    return dict(**marked_cells(evaluation), words=words)


def _warnings(parts: Sequence[Segment]) -> list[tuple[str, str]]:
    """(where, what) of every warning of the checks."""
    return [
        (part.at(line), " ".join(problems))
        for part in parts
        for line in part.lines
        if (problems := part.problems(line))
    ]


def _workflows(folder: RunFolder) -> list[tuple[str, str, str]]:
    """(name of the program, file name, data address) of each workflow that was written."""
    files = {"ComfyUI": folder.workflow, "ComfyUI-WanVideoWrapper": folder.wrapper_workflow}
    return [
        (program, file.name, embedded(file.read_bytes(), "application/json"))
        for program, file in files.items()
        if file.exists()
    ]


def _facts(
    config: Config, spent: dict[str, Any], evaluation: dict[str, Any] | None
) -> list[tuple[str, str]]:
    """Names and values of what else a reader asks for."""
    packages = ", ".join(f"{name} {number}" for name, number in package_versions().items())
    clip = f"{config.num_frames} frames of {config.width} × {config.height} pixels"
    found = [
        ("Method", config.method_title),
        ("Clips", f"{clip}, {config.fps} frames per second"),
        ("Seed", f"{config.seed}"),
        ("Began", _time(spent.get("began"))),
        ("Finished", _time(spent.get("finished"))),
        ("Device", f"{spent['processes']} × {spent['device']}" if spent else ""),
        ("Versions", f"Python {platform.python_version()}, {packages}; {platform.system()}"),
    ]
    if evaluation:
        found.insert(3, ("Seed of the evaluation", f"{evaluation['eval_seed']}"))
    return [(name, value) for name, value in found if value]


def _time(text: str | None) -> str:
    return (text or "").replace("T", " ").replace("Z", " UTC")
