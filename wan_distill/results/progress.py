"""How far a job has come: its stages and experts, from the files in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan_distill.errors import FileError
from wan_distill.layout import RunFolder
from wan_distill.maths.sigmas import Expert
from wan_distill.settings.config import Config
from wan_distill.settings.lora_headers import METADATA_KEY
from wan_distill.settings.reading import read_header
from wan_distill.training.health import warnings
from wan_distill.training.metrics import read_lines


@dataclass
class Segment:
    """The training of one expert in one stage.

    Attributes:
        config: of the stage.
        title: for people: the expert, and the method where there are several.
        lines: of metrics.jsonl.
        start: updates of all roles in the whole job before it.
        exported: the student's updates that made the weights which are exported, once they are.
    """

    config: Config
    expert: Expert
    title: str
    folder: RunFolder
    lines: list[dict[str, Any]] = field(default_factory=list)
    start: int = 0
    exported: int | None = None

    @property
    def updates(self) -> int:
        """Of all roles, so far."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def student_updates(self) -> int:
        return max((line.get("student_updates", 0) for line in self.lines), default=0)

    def problems(self, line: dict[str, Any]) -> list[str]:
        """What the check in a line warns of; nothing before training."""
        if "monitor_luminance" not in line or line.get("monitor_updates") == 0:
            return []
        return warnings(values_of_check(line), self.config)

    def at(self, line: dict[str, Any]) -> str:
        """Where in the job a line was written."""
        updates = line.get("monitor_updates", line.get("student_updates", line["step"]))
        return f"{self.title}, student update {updates}"


def segments(stages: Sequence[Config]) -> list[Segment]:
    """Those of a job that have begun, in order."""
    found: list[Segment] = []
    start = 0
    for config in stages:
        folder = RunFolder(Path(config.output_dir))
        lines = read_lines(folder.metrics)
        for expert in config.experts:
            title = f"{expert} expert" + (f", {config.method}" if len(stages) > 1 else "")
            own = [line for line in lines if line["expert"] == expert]
            segment = Segment(config, expert, title, folder, own, start)
            segment.exported = exported_updates(folder, expert)
            start += segment.updates
            begun = own or any(folder.previews.glob(f"{expert}-*"))
            found += [segment] if begun else []
    return found


def exported_updates(folder: RunFolder, expert: Expert) -> int | None:
    """The updates that made the student's file; None where it does not say, or is not there yet."""
    if not folder.has_student(expert):
        return None
    try:
        header, _ = read_header(folder.student(expert))
    except FileError:  # whoever loads it says what is wrong
        return None
    about = json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))
    updates: int | None = about.get("updates")
    return updates


def values_of_check(line: dict[str, Any]) -> dict[str, float]:
    """What the check of the student in a line of metrics.jsonl found, by the names of the check."""
    return {k.removeprefix("monitor_"): v for k, v in line.items() if k.startswith("monitor_")}
