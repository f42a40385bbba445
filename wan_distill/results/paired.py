"""How good is the student of a large teacher? A few clips, each beside its teacher's from the same
noise.

Sets of hundreds of clips, as `evaluation.py` compares them, would take a 14B teacher days. Each
clip is stored when it is solved, so that an interruption loses one batch at most; statistics are
taken clip by clip, so that one decoded clip is in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from wan_distill.data.first_frames import Prompt, text_of
from wan_distill.data.run import Run
from wan_distill.data.samples import SampleRequest, SampleStore
from wan_distill.data.solving import solve_missing
from wan_distill.maths.distances import diversity, picture_statistics, sharpness
from wan_distill.maths.sigmas import sigma_grid
from wan_distill.model.loading import decode
from wan_distill.planning.work import evaluations
from wan_distill.results.optical_flow import flow_magnitude, is_available
from wan_distill.settings.config import BASELINE_STEPS, Config
from wan_distill.settings.sample_specs import SampleSpec
from wan_distill.system.files import write_atomically
from wan_distill.system.pictures import contact_sheet, write_video

SEEDS = 2  # per prompt: the fewest that show whether samples differ
COMPARED = 4  # clips in the contact sheet
FRAMES = 6  # of each of those clips
RATIOS = ("motion", "optical_flow", "first_frame", "departure", "saturation", "sharpness")
"""those that were measured"""


@dataclass(frozen=True)
class Row:
    """One way to make samples."""

    name: str
    spec: SampleSpec

    @property
    def steps(self) -> int:
        return len(self.spec.sigmas) - 1


def rows(config: Config) -> list[Row]:
    """The guided teacher, which the others are compared with; its own few steps; the students."""
    long = config.teacher_sigmas()
    short = sigma_grid(BASELINE_STEPS, config.flow_shift)
    few = Row(f"teacher {BASELINE_STEPS} guided", _spec(config, "teacher", short))
    if len(long) == len(short):  # --teacher_steps 4: same steps, other sigmas
        few = Row(f"{few.name}, shift {config.flow_shift:g}", few.spec)
    students = [
        Row(f"student {n}", _spec(config, "student", config.sigmas(n)))
        for n in config.sampling_steps
    ]
    reference = Row(f"teacher {len(long) - 1} guided", _spec(config, "teacher", long))
    return [reference, few, *students]


def _spec(
    config: Config, sampler: Literal["teacher", "student"], sigmas: tuple[float, ...]
) -> SampleSpec:
    count = config.eval_samples
    return SampleSpec("evaluation", sampler, sigmas, sigmas[-1:], count, noise="evaluation")


class PairedEvaluation:
    """Solves the clips of every row and compares them one by one with the teacher's.

    Args:
        prompts: those that were not trained on. Sample i follows prompt i modulo their number, so
            each prompt has at least two seeds where there are enough samples.
    """

    def __init__(self, run: Run, prompts: Sequence[Prompt]):
        self.run = run
        count = run.config.eval_samples
        self.prompts = tuple(prompts[: max(1, count // SEEDS)])
        self.indices = range(count)

    def measure(self) -> dict[str, Any] | None:
        """The table as JSON-ready values; also written to evaluation.json, with videos beside it.

        All processes call it and share the solving; only the main one gets the table.
        """
        compared = rows(self.run.config)
        stores = {row.name: SampleStore(self.run, row.spec, self.prompts) for row in compared}
        wanted = frozenset(self.indices)
        solve_missing(self.run, [SampleRequest(store, wanted) for store in stores.values()])
        if not self.run.runtime.is_main:
            return None
        latents = {name: self._latents(store) for name, store in stores.items()}
        pictures = self._pictures(latents)
        reference = compared[0].name
        table = [self._line(row, reference, latents, pictures) for row in compared]
        result = dict(
            kind="paired",
            rows=table,
            sentence=sentence(table, self.run.config.grid_steps),
            samples=len(self.indices),
            prompts=len(self.prompts),
            eval_seed=self.run.config.eval_seed,
        )
        write_atomically(self.run.folder.evaluation, json.dumps(result, indent=1).encode())
        return result

    def _latents(self, store: SampleStore) -> list[Tensor]:
        """x0 [C, F, H, W] of each sample, on the CPU."""
        return [store.at([i], store.spec.stored)[0].cpu() for i in self.indices]

    def _pictures(self, latents: dict[str, list[Tensor]]) -> dict[str, list[dict[str, float]]]:
        """Statistics of each decoded clip; writes the pairs' videos and the contact sheet."""
        vae = self.run.teacher.load_vae()
        statistics: dict[str, list[dict[str, float]]] = {name: [] for name in latents}
        shown: dict[str, list[Tensor]] = {name: [] for name in latents}
        reference, student = next(iter(latents)), f"student {self.run.config.grid_steps}"
        for i in self.indices:
            beside: dict[str, Tensor] = {}
            for name, clips in latents.items():
                frames = decode(vae, clips[i][None], 1)
                prompt = self.prompts[i % len(self.prompts)]
                given = self.run.first_frame_statistics([prompt], frames)
                statistics[name].append(_statistics(frames) | given)
                if i < COMPARED:
                    chosen = torch.linspace(0, frames.shape[1] - 1, FRAMES).round().long()
                    shown[name].append(frames[0, chosen])
                if name in (reference, student):
                    beside[name] = frames[0]
            pair = torch.cat([beside[reference], beside[student]], dim=2)
            file = self.run.folder.pairs / f"{i:02d}.mp4"
            write_video(file, pair.numpy(), self.run.config.fps)
        prompts = [
            text_of(self.prompts[i % len(self.prompts)]) for i in range(len(shown[reference]))
        ]
        sheets = {name: torch.stack(clips) for name, clips in shown.items()}
        contact_sheet(self.run.folder.comparison, sheets, prompts)
        return statistics

    def _line(
        self,
        row: Row,
        reference: str,
        latents: dict[str, list[Tensor]],
        pictures: dict[str, list[dict[str, float]]],
    ) -> dict[str, Any]:
        """What the table says of one row, in relation to the row called `reference`."""
        own, base = pictures[row.name], pictures[reference]
        distances = [
            float((a - b).square().mean().sqrt())
            for a, b in zip(latents[row.name], latents[reference], strict=True)
        ]
        count = len(self.prompts)
        spread = diversity(torch.stack(latents[reference]), count)
        return dict(
            sampler=row.name,
            steps=row.steps,
            evaluations=evaluations(self.run.config, self.run.info, row.spec),
            paired_distance=sum(distances) / len(distances),
            **{name: _mean(own, name) / _mean(base, name) for name in RATIOS if name in base[0]},
            luminance_drift=_mean(own, "luminance") - _mean(base, "luminance"),
            diversity=diversity(torch.stack(latents[row.name]), count) / spread,
        )


def _statistics(frames: Tensor) -> dict[str, float]:
    """Of one decoded clip [1, F, H, W, 3]."""
    values = picture_statistics(frames) | dict(sharpness=sharpness(frames))
    return values | dict(optical_flow=flow_magnitude(frames[0])) if is_available() else values


def _mean(clips: list[dict[str, float]], name: str) -> float:
    return sum(clip[name] for clip in clips) / len(clips)


def sentence(table: list[dict[str, Any]], steps: int) -> str:
    """The comparison in words."""
    by_name = {line["sampler"]: line for line in table}
    student, few = by_name[f"student {steps}"], table[1]
    nearer = "nearer to" if student["paired_distance"] < few["paired_distance"] else "farther from"
    moves = "" if math.isnan(student["motion"]) else f"move {student['motion']:.2f} times as much, "
    return (
        f"In {steps} steps without guidance the student's clips {moves}are "
        f"{student['sharpness']:.2f} times as sharp and {student['diversity']:.2f} times as "
        f"diverse as its teacher's, and are {nearer} them (distance "
        f"{student['paired_distance']:.3f}) than the teacher's own {few['steps']} guided steps are "
        f"({few['paired_distance']:.3f})."
    )
