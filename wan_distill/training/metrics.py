"""metrics.jsonl, and the trackers people already have."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch import Tensor

from wan_distill.errors import UsageError, one_line
from wan_distill.layout import RunFolder
from wan_distill.maths.sigmas import Expert
from wan_distill.methods import make_method
from wan_distill.settings.config import Config
from wan_distill.system.files import write_atomically
from wan_distill.system.runtime import Runtime
from wan_distill.training.videos import log_videos


class Tracker:
    """The tracker that `--report_to` names, through accelerate; metrics of all stages and experts
    on one axis.
    """

    def __init__(self, stages: Sequence[Config], runtime: Runtime):
        config = stages[-1]
        self.tracker = None
        self.staged = len(stages) > 1
        self.before: dict[tuple[str, str], int] = {}
        """Updates of all roles that come before those of a method and expert."""
        total = 0
        for stage in stages:
            for expert in stage.experts:
                self.before[stage.method, expert] = total
                total += make_method(stage, expert).updates(stage.max_train_steps)
        self.total = total
        """Updates of all roles in the whole job."""
        if config.report_to == "none" or not runtime.is_main:
            return
        kind = LOGGER_TYPE_TO_CLASS[config.report_to]
        place = (
            dict(logging_dir=str(RunFolder(Path(config.output_dir)).tracker))
            if kind.requires_logging_directory
            else {}
        )
        self.tracker = kind(config.tracker_project_name, **place)
        self.tracker.start()
        settings = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v)
            for k, v in config.to_json().items()
        }
        self.tracker.store_init_configuration(settings)

    def log(self, line: dict, stage: Config) -> None:
        """One line of metrics.jsonl of one stage."""
        if self.tracker:
            expert = line["expert"]
            prefix = f"{stage.method}/{expert}" if self.staged else expert
            values = {f"{prefix}/{k}": v for k, v in line.items() if k not in ("expert", "step")}
            self.tracker.log(values, step=self.before[stage.method, expert] + line["step"])

    def log_clips(self, stage: Config, expert: Expert, step: int, updates: int) -> None:
        """The clips of the student after `updates` of its updates, `step` of all roles, where this
        tracker shows moving pictures.
        """
        if not self.tracker:
            return
        place = RunFolder(Path(stage.output_dir)).previews
        files = sorted(place.glob(f"{expert}-{updates:06d}-*.mp4"))
        prefix = f"{stage.method}/{expert}" if self.staged else expert
        clips = {f"{prefix}/clip {file.stem.split('-')[-1]}": file for file in files}
        log_videos(self.tracker, clips, self.before[stage.method, expert] + step)

    def log_evaluation(self, evaluation: dict[str, Any] | None) -> None:
        """The evaluation's table, at the end of all updates."""
        if not self.tracker or evaluation is None:
            return
        values = {
            f"evaluation/{row['sampler']}/{name}": value
            for row in evaluation["rows"]
            for name, value in row.items()
            if isinstance(value, (int, float))
        }
        if "gap_closed" in evaluation:
            values["evaluation/gap_closed"] = evaluation["gap_closed"]
        self.tracker.log(values, step=self.total)

    def finish(self) -> None:
        if self.tracker:
            self.tracker.finish()


class Metrics:
    """Appends one JSON line per logging interval to metrics.jsonl: means over its micro-batches, of
    all ranks.
    """

    def __init__(self, file: Path, runtime: Runtime):
        self.file = file
        self.runtime = runtime
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.seen: dict[str, float] = {}
        self.started = time.perf_counter()

    def add(self, **values: Tensor | float) -> None:
        """Records scalars, the same names on all ranks, without waiting for the device."""
        for name, value in values.items():
            value = (
                value.detach().double()
                if isinstance(value, Tensor)
                else torch.tensor(value, dtype=torch.float64)
            )
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def note(self, **values: float) -> None:
        """Values for the next line that only the main process has, as they are."""
        self.seen |= values

    def write(self, **context: Any) -> dict[str, Any]:
        """Writes the means since the last line, with `context` first, and returns the line."""
        now = time.perf_counter()
        line = context | self._means() | self.seen | dict(seconds=round(now - self.started, 4))
        self.sums, self.counts, self.seen, self.started = {}, {}, {}, now
        if self.runtime.is_main:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
        return line

    def _means(self) -> dict[str, float]:
        if not self.sums:
            return {}
        return {name: total / self.counts[name] for name, total in self._totals().items()}

    def _totals(self) -> dict[str, float]:
        """The sums, averaged over ranks; all of them must ask."""
        names = sorted(self.sums)
        totals = torch.stack([self.sums[n].to(self.runtime.device) for n in names])
        if self.runtime.sample_groups > 1:
            dist.all_reduce(totals)
            totals /= self.runtime.sample_groups
        return dict(zip(names, totals.tolist(), strict=True))

    def state(self) -> dict:
        """What has not been written yet, for a checkpoint; all ranks must ask."""
        return dict(
            sums=self._totals() if self.sums else {}, counts=dict(self.counts), seen=dict(self.seen)
        )

    def resume(self, state: dict, expert: str, step: int) -> None:
        """Goes on after `step` of `expert`: puts back `state`, drops lines that tell of later
        updates or are torn.
        """
        self.sums = {
            name: torch.tensor(total, dtype=torch.float64)
            for name, total in state.get("sums", {}).items()
        }
        self.counts, self.seen = dict(state.get("counts", {})), dict(state.get("seen", {}))
        if not self.runtime.is_main or not self.file.exists():
            return
        kept = [
            line
            for line in read_lines(self.file)
            if line["expert"] != expert or line["step"] <= step
        ]
        write_atomically(self.file, "".join(json.dumps(line) + "\n" for line in kept).encode())


def read_lines(file: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl; a last one that a kill tore is left out.

    Raises UsageError where a line is not one that `write` wrote.
    """
    text = file.read_bytes().decode("utf-8", "replace") if file.exists() else ""
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            values = json.loads(line)
            values["expert"], values["step"] + 0  # what a run that goes on looks for
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{file}:{number}: is no line of this tool ({one_line(error)}); move the file away "
                "and run again"
            ) from error
        lines.append(values)
    return lines
