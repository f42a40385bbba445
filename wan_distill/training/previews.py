"""Clips to judge by eye while an expert trains: the same prompts and noise, teacher beside student.

The high expert is shown by the x0 that its last step heads for (blurred by nature), the low one by
the finished clip, which begins with the distilled high expert's latents.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import torch

from wan_distill.data.first_frames import PicturedPrompt, Prompt, text_of
from wan_distill.data.run import Run
from wan_distill.data.samples import SampleRequest
from wan_distill.layout import TEACHER_CLIP, strip_of
from wan_distill.maths.sigmas import Expert
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.vae import decode
from wan_distill.settings.config import Config
from wan_distill.system.files import write_atomically
from wan_distill.system.pictures import write_video
from wan_distill.training.learner import Learner
from wan_distill.training.monitor import Exported
from wan_distill.training.phase_clips import PhaseClips

# Of the time since training began; previews that would take more are left out.
MAX_SHARE = 0.05
SHOWN = 3  # prompts, where none is given


def validation_prompts(config: Config, held_out: Sequence[Prompt]) -> list[Prompt]:
    """`--validation_prompt`, several separated by |; otherwise a few that are not trained on, whose
    pictures, where they have some, those of the setting get too.
    """
    if not config.validation_prompt:
        return list(held_out[:SHOWN])
    given = [part.strip() for part in config.validation_prompt.split("|") if part.strip()]
    pictures = [prompt.picture for prompt in held_out if isinstance(prompt, PicturedPrompt)]
    if not pictures:
        return list(given)
    return [PicturedPrompt(text, pictures[i % len(pictures)]) for i, text in enumerate(given)]


class Previews:
    """Writes `previews/<expert>-<student updates>-<prompt>.mp4`, and the teacher's side once.

    Solves nothing: see `requests`.
    """

    def __init__(self, run: Run, expert: Expert, prompts: Sequence[Prompt]):
        self.run = run
        self.expert: Expert = expert
        self.clips = PhaseClips(run, expert, prompts, len(prompts))
        self.began = time.perf_counter()
        self.spent = 0.0
        self.left_out = False
        self.teacher_shown = False
        self.shown: set[int] = set()
        """numbers of updates of which there are clips"""

    @property
    def on(self) -> bool:
        return self.run.config.validation_steps > 0 and bool(self.clips)

    def requests(self) -> list[SampleRequest]:
        """The stored samples that the clips read."""
        return self.clips.requests() if self.on else []

    def lack(self, updates: int) -> bool:
        """Whether the clips of the student after so many updates have yet to be made."""
        first = self.run.folder.preview(self.expert, f"{updates:06d}", 0)
        there = first.exists() or strip_of(first).exists()
        return self.on and (not there or self._are_of_other_prompts())

    def due(self, updates: int, last: bool = False) -> bool:
        """At 0, at every `--validation_steps` student updates while that costs little, and last."""
        config, runtime = self.run.config, self.run.runtime
        if not self.on or not runtime.samples_student():
            return False
        if updates == 0 or last:
            return True
        if updates % config.validation_steps:
            return False
        share = self.spent / (time.perf_counter() - self.began)
        if (runtime.max_over_ranks(share) if runtime.joint else share) <= MAX_SHARE:
            return True
        if not self.left_out:
            runtime.say(
                f"\nA preview was left out: they have taken {self.spent:.0f} s, more than "
                f"{MAX_SHARE:.0%} of the run. Raise --validation_steps to space them evenly."
            )
            self.left_out = True
        return False

    @torch.no_grad()
    def write(self, denoiser: Denoiser, learner: Learner) -> None:
        """Samples the student as it would be exported now, and writes its clips."""
        started = time.perf_counter()
        if not self.teacher_shown:
            self._save_teacher()
        with learner.shipped():
            self._save(f"{learner.done:06d}", self.clips.student_x0(denoiser))
        self.shown.add(learner.done)
        self.spent += time.perf_counter() - started

    @torch.no_grad()
    def write_exported(self, denoiser: Denoiser, learner: Learner, exported: Exported) -> None:
        """Writes the clips of the student that is exported, where there are none of that update."""
        if not self.on or not self.run.runtime.samples_student():
            return
        if exported.updates in self.shown:
            return
        if not self.teacher_shown:
            self._save_teacher()
        with learner.holding(exported.weights):
            self._save(f"{exported.updates:06d}", self.clips.student_x0(denoiser))

    def resume(self, updates: int) -> None:
        """Takes up the clips of an interrupted run; those of updates that are made anew go, and all
        that are of other prompts.
        """
        if self.on and self._are_of_other_prompts():
            if self.run.runtime.is_main:
                for expert in self.run.info.experts:
                    for file in self.run.folder.previews.glob(f"{expert}-*"):
                        file.unlink()
                self.run.folder.preview_prompts.unlink(missing_ok=True)  # last: others look for it
            return
        for file in self.run.folder.previews.glob(f"{self.expert}-*"):
            number = file.name.split("-")[1]
            if number.isdecimal() and int(number) <= updates:
                self.shown.add(int(number))
            elif number.isdecimal() and self.run.runtime.is_main:
                file.unlink()

    def _prompts(self) -> bytes:
        """What they are of, as it is written down."""
        texts = [text_of(prompt) for prompt in self.clips.prompts]
        return json.dumps(texts, ensure_ascii=False).encode()

    def _are_of_other_prompts(self) -> bool:
        """Whether the clips that are there show other prompts than those that are to come."""
        written = self.run.folder.preview_prompts
        return written.exists() and written.read_bytes() != self._prompts()

    def _save_teacher(self) -> None:
        if self.run.runtime.is_main:
            self.run.folder.previews.mkdir(parents=True, exist_ok=True)
            write_atomically(self.run.folder.preview_prompts, self._prompts())
        self._save(TEACHER_CLIP, self.clips.teacher_x0())
        self.teacher_shown = True

    def _save(self, who: str, x0: torch.Tensor) -> None:
        if not self.run.runtime.is_main:
            return
        config = self.run.config
        frames = decode(self.run.teacher.load_vae(), x0, config.sample_batch_size)
        for prompt, clip in enumerate(frames):
            file = self.run.folder.preview(self.expert, who, prompt)
            write_video(file, clip.numpy(), config.fps)
