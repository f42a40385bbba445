"""Is the student healthy? Its samples against the teacher's, on fixed prompts and seeds, while it
trains.

Losses of distribution matching say nothing about quality, and its known failures (frozen,
over-exposed or identical clips) come late in a run. So the weights that would be exported are
sampled at intervals, and problems are reported in plain words. Of the weights whose score is the
best, or cannot be told from the best on so few clips, the latest are stored beside the last
checkpoint: those are exported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from wan_distill.data.first_frames import Prompt
from wan_distill.data.run import Run
from wan_distill.data.samples import SampleRequest
from wan_distill.errors import UsageError, one_line
from wan_distill.maths.distances import (
    diversity,
    jackknife_error,
    picture_statistics,
    relative,
    scores_without_each,
)
from wan_distill.maths.sigmas import Expert
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.vae import decode
from wan_distill.settings.config import Config
from wan_distill.system.files import hash_tensors, write_tensors
from wan_distill.training.health import warnings
from wan_distill.training.learner import Learner
from wan_distill.training.phase_clips import PhaseClips

SEEDS = 2  # per prompt: the fewest that show whether samples differ
DECODED = 16  # clips per check that become pictures; score and diversity are of all latents
SEEN = "seen"  # metadata of the stored weights, as JSON


def monitored(config: Config, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """Those of the `prompts` to train on that the checks look at, spread over all."""
    count = max(1, min(config.monitor_samples // SEEDS, len(prompts)))
    return prompts[:: len(prompts) // count][:count]


class Exported(NamedTuple):
    """One expert's student as it is exported: its tensors, and the updates that made them."""

    weights: dict[str, Tensor]
    updates: int


class Monitor:
    """Checks one expert's student against the teacher. Solves nothing: see `requests`."""

    def __init__(self, run: Run, expert: Expert):
        self.run = run
        self.expert: Expert = expert
        self.file = run.folder.best(expert)
        self.best: list[float] = []
        """the best score, then those without each prompt"""
        prompts = monitored(run.config, run.prompts)
        self.clips = PhaseClips(run, expert, prompts, SEEDS * len(prompts))
        self.teacher_x0: Tensor | None = None
        self.teacher_statistics: dict[str, float] = {}

    @property
    def on(self) -> bool:
        return self.run.config.monitor_steps > 0 and bool(self.clips)

    def requests(self) -> list[SampleRequest]:
        """The stored samples that the checks read."""
        return self.clips.requests() if self.on else []

    # -------------------------------------------------------------------------------- checking

    def due(self, learner: Learner, last: bool = False) -> bool:
        """Whether the student is to be checked now, by this process."""
        interval = self.run.config.monitor_steps
        if not self.on or not self.run.runtime.samples_student():
            return False
        return last or learner.done % interval == 0

    @torch.no_grad()
    def check(self, denoiser: Denoiser, learner: Learner) -> dict[str, float]:
        """Scalars for metrics.jsonl; stores the weights if they are to be exported by what is known
        so far, and warns in plain words.
        """
        if self.teacher_x0 is None:
            self.teacher_x0 = self.clips.teacher_x0()
            self.teacher_statistics = self._statistics(self.teacher_x0)
        with learner.shipped():
            x0 = self.clips.student_x0(denoiser)
        values = relative(self._statistics(x0), self.teacher_statistics)
        scores = scores_without_each(x0, self.teacher_x0, self._left_out())
        values["score"] = scores[0]
        weights = (p.detach().double().square().sum() for p in learner.parameters.values())
        values["parameter_norm"] = math.sqrt(sum(float(total) for total in weights))
        if (change := learner.update_norm()) is not None:
            values["update_norm"] = change
        # Before training it is the bare base in few steps: nothing to warn of.
        problems = warnings(values, self.run.config) if learner.done else []
        self._keep(scores, bool(problems), learner)
        for problem in problems:
            self.run.runtime.say(
                f"\nWarning, {self.expert} expert after {learner.done} updates: {problem}"
            )
        values["updates"] = learner.done
        return {f"monitor_{name}": value for name, value in values.items()}

    def _left_out(self) -> int:
        """Prompts that can be left out in turn, with two samples left."""
        return len(self.clips.prompts) if len(self.clips.prompts) > 1 else 0

    def _keep(self, scores: list[float], ill: bool, learner: Learner) -> None:
        """Stores the weights where their score is the best; also where they are healthy and it is
        within one standard error of the best: they have learned for longer.
        """
        if len(self.best) != len(scores):
            self.best = []  # of other clips (--monitor_samples was changed): not to be compared
        better = not self.best or scores[0] < self.best[0]
        if not better:
            without = zip(scores[1:], self.best[1:], strict=True)
            noise = jackknife_error([mine - best for mine, best in without])
            if ill or scores[0] - self.best[0] > noise:
                return
        self.best = scores if better else self.best
        if self.run.runtime.is_main:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            weights = learner.exported()
            about = dict(
                score=scores[0], updates=learner.done, best=self.best, hash=hash_tensors(weights)
            )
            # One key of metadata only: several would be written in any order.
            write_tensors(self.file, weights, {SEEN: json.dumps(about)})

    def _statistics(self, x0: Tensor) -> dict[str, float]:
        vae = self.run.teacher.load_vae()
        frames = decode(vae, x0[:DECODED], self.run.config.sample_batch_size)
        prompts = self.clips.start.prompts_of(self.clips.rows)
        spread = dict(diversity=diversity(x0, len(self.clips.prompts)))
        return (
            picture_statistics(frames) | spread | self.run.first_frame_statistics(prompts, frames)
        )

    # ------------------------------------------------------------------------- the best weights

    def resume(self, step: int) -> None:
        """Takes up what an interrupted run found; a run from the start forgets an older one's."""
        if not self.run.runtime.samples_student() or not self.file.exists():
            return
        if step > 0:
            self.best = self._stored()[1]["best"]
        elif self.run.runtime.is_main:
            self.file.unlink()

    def exported(self, learner: Learner) -> Exported:
        """What to export: the weights that the checks chose, or the last without any check."""
        if not self.on or not self.file.exists():
            return Exported(learner.exported(), learner.done)
        weights, about = self._stored()
        score, best, updates = about["score"], about["best"][0], about["updates"]
        self.run.runtime.say(
            f"The {self.expert} expert's weights after {updates} of {learner.done} updates are "
            f"exported: their score is {score:.4f}"
            + (", the best." if score == best else f"; the best, {best:.4f}, is within its error.")
        )
        if not updates and self.run.config.is_second_stage:
            self.run.runtime.say(
                "These are the first stage's: the second brought them no nearer to the teacher."
            )
        elif not updates:
            self.run.runtime.say(
                f"Warning, {self.expert} expert: training brought it no nearer to the teacher than "
                "it began. Try a lower --learning_rate, or another --method."
            )
        return Exported(weights, updates)

    def chosen(self) -> int:
        """The updates of the student that a trained expert exports."""
        stored = updates_of(self.file) if self.on and self.file.exists() else None
        return self.run.config.max_train_steps if stored is None else stored

    def _stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The stored weights, and what `_keep` wrote about them. Raises UsageError where the file
        is damaged.
        """
        try:
            weights = load_file(self.file)
            about = _about(self.file)
            if about["hash"] != hash_tensors(weights):
                raise ValueError("its bytes changed since it was written")
        except (SafetensorError, KeyError, ValueError) as error:
            raise UsageError(
                f"{self.file}: the best weights so far are damaged ({one_line(error)}); delete the "
                "file and run again, and the best from there on are exported"
            ) from error
        return weights, about


def updates_of(file: Path) -> int:
    """The student's updates that made the weights which a check stored; 0 where the file is
    damaged, which is said where they are read.
    """
    try:
        updates: int = _about(file)["updates"]
    except (SafetensorError, KeyError, ValueError):
        return 0
    return updates


def _about(file: Path) -> dict[str, Any]:
    """What `Monitor._keep` wrote about the weights."""
    with safe_open(file, framework="pt") as opened:
        about: dict[str, Any] = json.loads((opened.metadata() or {})[SEEN])
    return about
