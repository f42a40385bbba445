"""How good is the student of a large teacher? A few clips, each beside its teacher's from the same
noise.

Sets of hundreds of clips, as `evaluation.py` compares them, would take a 14B teacher days. Each
clip is stored when it is solved, so that an interruption loses one batch at most; statistics are
taken clip by clip, so that one decoded clip is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from wan_distill.data.first_frames import Prompt, text_of
from wan_distill.data.run import Run
from wan_distill.data.samples import SampleRequest, SampleStore
from wan_distill.data.solving import solve_missing
from wan_distill.layout import FEW_CLIP, STUDENT_CLIP, TEACHER_CLIP
from wan_distill.maths.distances import diversity, picture_statistics, sharpness
from wan_distill.maths.sigmas import sigma_grid
from wan_distill.model.vae import decode
from wan_distill.results.comparison import clip_list, interval_95, ratio_error
from wan_distill.results.optical_flow import flow_magnitude, is_available
from wan_distill.results.recorded import clear_clips, record, will_be_shown
from wan_distill.results.table import sentence
from wan_distill.results.timing import Way, seconds_per_sample
from wan_distill.settings.config import BASELINE_STEPS, Config
from wan_distill.settings.sample_specs import SampleSpec
from wan_distill.system.pictures import contact_sheet, write_video
from wan_distill.system.side_by_side import side_by_side

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

    @property
    def guided(self) -> bool:
        return self.spec.sampler == "teacher"


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
        seconds: dict[str, float] = {}
        if self.run.runtime.samples_student():
            ways = {
                row.name: Way(row.spec.sampler, row.spec.sigmas, row.guided) for row in compared
            }
            seconds = seconds_per_sample(self.run, ways, self.prompts)
        if not self.run.runtime.is_main:
            return None
        latents = {name: self._latents(store) for name, store in stores.items()}
        result = self._compare(compared, latents, seconds)
        record(self.run, result)
        return result

    def _compare(
        self,
        compared: Sequence[Row],
        latents: dict[str, list[Tensor]],
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        """The table as JSON-ready values; the videos are written on the way."""
        pictures = self._pictures(latents)
        reference = compared[0].name
        table = [
            self._line(row, reference, latents, pictures)
            | dict(seconds_per_sample=seconds[row.name])
            for row in compared
        ]
        few, best = compared[1].name, f"student {self.run.config.grid_steps}"
        own, others = (distances(latents[name], latents[reference]) for name in (best, few))
        nearer = 1 - own.mean() / others.mean()
        return dict(
            kind="pairs",
            rows=table,
            sentence=sentence(table, self.run.config.grid_steps),
            nearer=float(nearer),
            nearer_interval=interval_95(float(nearer), ratio_error(own, others)),
            samples=len(self.indices),
            prompts=len(self.prompts),
            eval_seed=self.run.config.eval_seed,
            clips=clip_list(self._texts(), own, others),
        )

    def _texts(self) -> list[str]:
        """The prompt of each clip."""
        return [text_of(self.prompts[i % len(self.prompts)]) for i in self.indices]

    def _latents(self, store: SampleStore) -> list[Tensor]:
        """x0 [C, F, H, W] of each sample, on the CPU."""
        return [store.at([i], store.spec.stored)[0].cpu() for i in self.indices]

    def _pictures(self, latents: dict[str, list[Tensor]]) -> dict[str, list[dict[str, float]]]:
        """Statistics of each decoded clip; writes the videos and the contact sheet."""
        vae = self.run.teacher.load_vae()
        statistics: dict[str, list[dict[str, float]]] = {name: [] for name in latents}
        sheet: dict[str, list[Tensor]] = {name: [] for name in latents}
        shown = will_be_shown(self.run.folder, len(self.indices))
        for i in self.indices:
            clips: dict[str, Tensor] = {}
            prompt = self.prompts[i % len(self.prompts)]
            for name, of_row in latents.items():
                frames = decode(vae, of_row[i][None], 1)
                given = self.run.first_frame_statistics([prompt], frames)
                statistics[name].append(_statistics(frames) | given)
                if i < COMPARED:
                    chosen = torch.linspace(0, frames.shape[1] - 1, FRAMES).round().long()
                    sheet[name].append(frames[0, chosen])
                clips[name] = frames[0]
            if shown:
                self._write_videos(i, clips)
        if shown:
            stacked = {name: torch.stack(clips) for name, clips in sheet.items()}
            contact_sheet(self.run.folder.comparison, stacked, self._texts()[:COMPARED])
        return statistics

    def _write_videos(self, sample: int, clips: dict[str, Tensor]) -> None:
        """The clips [F, H, W, 3] of one sample by row: teacher and student as one video, and each
        side as its own.
        """
        if sample == 0:
            clear_clips(self.run.folder)
        reference, few, *_ = clips
        student = f"student {self.run.config.grid_steps}"
        fps = self.run.config.fps
        pair = side_by_side({name: clips[name].numpy() for name in (reference, student)})
        write_video(self.run.folder.pairs / f"{sample:02d}.mp4", pair, fps)
        sides = {reference: TEACHER_CLIP, few: FEW_CLIP, student: STUDENT_CLIP}
        for name, who in sides.items():
            write_video(self.run.folder.clip(who, sample), clips[name].numpy(), fps)

    def _line(
        self,
        row: Row,
        reference: str,
        latents: dict[str, list[Tensor]],
        pictures: dict[str, list[dict[str, float]]],
    ) -> dict[str, Any]:
        """What the table says of one row, in relation to the row called `reference`."""
        own, base = pictures[row.name], pictures[reference]
        count = len(self.prompts)
        spread = diversity(torch.stack(latents[reference]), count)
        return dict(
            sampler=row.name,
            steps=row.steps,
            evaluations=self.run.config.evaluations(row.spec.sigmas, row.guided),
            paired_distance=float(distances(latents[row.name], latents[reference]).mean()),
            **{name: _mean(own, name) / _mean(base, name) for name in RATIOS if name in base[0]},
            luminance_drift=_mean(own, "luminance") - _mean(base, "luminance"),
            diversity=diversity(torch.stack(latents[row.name]), count) / spread,
        )


def _statistics(frames: Tensor) -> dict[str, float]:
    """Of one decoded clip [1, F, H, W, 3]."""
    values = picture_statistics(frames) | dict(sharpness=sharpness(frames))
    return values | dict(optical_flow=flow_magnitude(frames[0])) if is_available() else values


def distances(clips: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The root mean square [N] of the difference of each pair of latents."""
    pairs = zip(clips, others, strict=True)
    return torch.stack([(a - b).square().mean().sqrt() for a, b in pairs])


def _mean(clips: list[dict[str, float]], name: str) -> float:
    return sum(clip[name] for clip in clips) / len(clips)
