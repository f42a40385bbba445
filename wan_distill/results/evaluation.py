"""How good is the student? Measured against fresh teacher samples, on other prompts and seeds.

Fréchet distance (arXiv 1706.08500) between sets of *latents*, on the leading principal components
of the teacher's samples: in the full latent space 512 samples would measure mostly bias and noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from wan_distill.data.first_frames import Prompt, text_of
from wan_distill.data.rollout import carry
from wan_distill.data.run import Run
from wan_distill.errors import UsageError
from wan_distill.layout import FEW_CLIP, STUDENT_CLIP, TEACHER_CLIP
from wan_distill.maths.randomness import keyed_noise
from wan_distill.maths.sigmas import Expert, expert_sigmas
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.student_files import load_student
from wan_distill.model.vae import decode
from wan_distill.results.comparison import compare_sets
from wan_distill.results.recorded import clear_clips, record, shown_samples
from wan_distill.results.samplers import Sampler, Samplers, samplers
from wan_distill.results.timing import Way, seconds_per_sample
from wan_distill.system.console import progress_bar
from wan_distill.system.files import DamagedFile, read_hashed, write_hashed
from wan_distill.system.pictures import contact_sheet, write_video

COMPARED = 4  # prompts in the contact sheet


def _counter(bar: tqdm, evaluations: int) -> Callable[[int], object]:
    """Moves `bar` on by `evaluations` per sample."""
    return lambda samples: bar.update(samples * evaluations)


class Evaluation:
    """Draws the samples of every row and compares them; the teacher's are stored for the next time.

    Args:
        prompts: those that were not trained on. Sample i follows prompt i modulo their number.
    """

    def __init__(self, run: Run, prompts: Sequence[Prompt]):
        self.run = run
        self.config = run.config
        count = run.config.eval_samples
        prompts = prompts[: count // 2]  # two samples of each, for the diversity
        self.prompts = [prompts[i % len(prompts)] for i in range(count)]
        self.texts = [text_of(prompt) for prompt in self.prompts]
        self.distinct = len(set(self.prompts))

    def measure(self) -> dict[str, Any] | None:
        """The whole table as JSON-ready values; also written to evaluation.json. Made by the main
        process alone; the others get nothing.
        """
        if not self.run.runtime.is_main:
            return None
        rows = samplers(self.config)
        drawn = {row: self.draw(row) for row in [rows.independent, *rows.table]}
        ways = {row.name: Way(row.role, row.sigmas, row.guided) for row in rows.table}
        seconds = seconds_per_sample(self.run, ways, self.prompts)
        result = compare_sets(self.run, rows, drawn, self.prompts, seconds)
        if record(self.run, result):
            self._show(rows, drawn, result)
        return result

    def _show(
        self, rows: Samplers, drawn: Mapping[Sampler, Tensor], result: dict[str, Any]
    ) -> None:
        """Writes the contact sheet and the clips of the page."""
        vae, count = self.run.teacher.load_vae(), min(COMPARED, self.distinct)
        sheet = [rows.paired, rows.few_unguided, *rows.students]
        clips = {row.name: decode(vae, drawn[row][:count]) for row in sheet}
        contact_sheet(self.run.folder.comparison, clips, self.texts[:count])
        clear_clips(self.run.folder)
        sides = {
            TEACHER_CLIP: rows.paired,
            FEW_CLIP: rows.few_guided,
            STUDENT_CLIP: rows.students[-1],
        }
        for sample in shown_samples(result):
            for who, row in sides.items():
                (frames,) = decode(vae, drawn[row][sample : sample + 1])
                file = self.run.folder.clip(who, sample)
                write_video(file, frames.numpy(), self.config.fps)

    # -------------------------------------------------------------------------------------- samples

    def draw(self, row: Sampler) -> Tensor:
        """The samples [N, C, F, H, W] of one row; teacher rows come from their cache."""
        file = self.cache_file(row)
        if row.role == "teacher" and file.exists():
            try:
                return read_hashed(file)["latents"]
            except DamagedFile as error:
                raise UsageError(f"{error}; delete it and run again") from error
        latents = self._sample(row)
        if row.role == "teacher":
            file.parent.mkdir(parents=True, exist_ok=True)
            write_hashed(file, {"latents": latents})
        return latents

    def key(self, row: Sampler) -> dict[str, Any]:
        """Everything that the samples of a teacher row depend on, in plain values."""
        return dict(
            prompts=self.prompts,
            row=dict(sigmas=row.sigmas, guided=row.guided, noise=row.noise),
            seed=self.config.eval_seed,
        ) | self.run.sampling_key(row.sigmas, row.guided)

    def cache_file(self, row: Sampler) -> Path:
        text = json.dumps(self.key(row), sort_keys=True)
        return self.run.caches.evaluation_cache(hashlib.sha256(text.encode()).hexdigest()[:16])

    def _sample(self, row: Sampler) -> Tensor:
        key = ("evaluation", self.config.eval_seed, row.noise)
        noise = [keyed_noise(self.run.latent_shape, *key, i) for i in range(len(self.prompts))]
        latents = torch.stack(noise)
        total = len(latents) * row.evaluations(self.config)
        with progress_bar(total, row.name, "eval", self.run.runtime.is_main) as bar:
            for expert in self.run.info.experts:
                sigmas = expert_sigmas(row.sigmas, expert, self.config.boundary_ratio)
                if not sigmas:
                    continue
                each = row.step_evaluations(self.config, expert)
                batches = carry(
                    self.run,
                    self._load(expert, row.role),
                    expert,
                    latents,
                    self.prompts,
                    sigmas,
                    role=row.role if self._has_own(expert) else "teacher",
                    guided=row.guided,
                    advance=_counter(bar, each),
                )
                for batch, reached in batches:
                    latents[batch] = reached[sigmas[-1]]
                    self.run.runtime.raise_if_stopped()
        return latents

    def _load(self, expert: Expert, role: Literal["teacher", "student"]) -> Denoiser:
        """One expert, alone in memory; a student's adapter is merged into it where that is exact
        enough, as users run it.
        """
        config = self.config
        transformer = self.run.teacher.load_expert(expert)
        if role == "student" and self._has_own(expert):
            file = self.run.folder.student(expert)
            if not file.exists():
                raise UsageError(
                    f"--output_dir {config.output_dir}: holds no {file.name} to evaluate; train "
                    "first"
                )
            load_student(transformer, file)
            plain = config.base_precision == "bf16" and not (config.offload or config.whole_student)
            if plain and config.mixed_precision == "no":
                # Not in bf16: merged weights are rounded, which the unmerged student is not.
                transformer.fuse_lora()
        return self.run.denoiser(expert, transformer)

    def _has_own(self, expert: Expert) -> bool:
        """Whether the student has this expert of its own: trained here, or carried over from a warm
        start.
        """
        return expert in self.config.experts or self.run.folder.has_student(expert)
