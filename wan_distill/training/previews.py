"""Clips to judge by eye while an expert trains: the same prompts and noise, teacher beside student.

The teacher's side is solved once, before the expert is loaded. The high expert is shown by the x0
that its last step heads for (blurred by nature), the low one by the finished clip, which begins
with the distilled high expert's latents.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import torch

from wan_distill.data.run import Sources
from wan_distill.maths.sigmas import Expert
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.loading import decode
from wan_distill.settings.config import Config
from wan_distill.system.files import write_atomically
from wan_distill.system.pictures import write_video
from wan_distill.training.learner import Learner
from wan_distill.training.monitor import SEEDS, Monitor

FOLDER, PROMPTS = "previews", "prompts.json"
MAX_SHARE = 0.05  # of the time since training began; previews that would take more are left out
SHOWN = 3  # prompts, where none is given


def validation_prompts(config: Config, held_out: list[str]) -> list[str]:
    """`--validation_prompt`, several separated by |; otherwise a few that are not trained on."""
    if config.validation_prompt:
        return [part.strip() for part in config.validation_prompt.split("|") if part.strip()]
    return held_out[:SHOWN]


class Previews:
    """Writes `previews/<expert>-<update>-<prompt>.mp4`, and the teacher's side once."""

    def __init__(self, expert: Expert, sources: Sources, prompts: list[str]):
        config = sources.config
        self.config, self.expert, self.teacher, self.runtime = (
            config,
            expert,
            sources.teacher,
            sources.runtime,
        )
        self.prompts = prompts
        self.folder = Path(config.output_dir) / FOLDER
        self.began, self.spent = time.perf_counter(), 0.0
        self.skipped = self.teacher_shown = False
        if config.validation_steps:
            watched = dataclasses.replace(
                config, monitor_steps=1, monitor_samples=SEEDS * len(prompts)
            )
            sources = dataclasses.replace(sources, config=watched, prompts=prompts)
            self.clips = Monitor(expert, sources, self.folder)  # its samples, not its judgement

    def due(self, step: int, last: int) -> bool:
        """At 0, at every `--validation_steps` while that costs little, and at the end."""
        every = self.config.validation_steps
        if (
            not every
            or not self.runtime.samples_student()
            or not self.clips.on
            or (step % every and step != last)
        ):
            return False
        share = self.spent / (time.perf_counter() - self.began)
        if (
            step in (0, last)
            or (self.runtime.max_over_ranks(share) if self.runtime.joint else share) <= MAX_SHARE
        ):
            return True
        if not self.skipped:
            self.runtime.say(
                f"\nA preview was left out: they have taken {self.spent:.0f} s, more than "
                f"{MAX_SHARE:.0%} "
                "of the run. Raise --validation_steps to space them evenly."
            )
            self.skipped = True
        return False

    @torch.no_grad()
    def write(self, denoiser: Denoiser, learner: Learner, step: int) -> None:
        """Samples the student as it would be exported now, and writes its clips."""
        started = time.perf_counter()
        if not self.teacher_shown:
            if self.runtime.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(
                    self.folder / PROMPTS, json.dumps(self.prompts, ensure_ascii=False).encode()
                )
            self._save("teacher", self.clips.teacher_x0())
            self.teacher_shown = True
        with learner.shipped():
            self._save(f"{step:06d}", self.clips.student_x0(denoiser))
        self.spent += time.perf_counter() - started

    def file(self, who: str, prompt: int) -> Path:
        return self.folder / f"{self.expert}-{who}-{prompt}.mp4"

    def _save(self, who: str, x0: torch.Tensor) -> None:
        if not self.runtime.is_main:
            return
        frames = decode(
            self.teacher.load_vae(), x0[: len(self.prompts)], self.config.sample_batch_size
        )
        for prompt, clip in enumerate(frames):
            write_video(self.file(who, prompt), clip.numpy(), self.config.fps)
