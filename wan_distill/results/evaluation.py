"""How good is the student? Measured against fresh teacher samples, on prompts and seeds never
trained on.

Fréchet distance (arXiv 1706.08500) between sets of *latents*, on the leading principal components
of the teacher's samples: in the full latent space 512 samples would measure mostly bias and noise.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from wan_distill.data.embeddings import PromptBank
from wan_distill.data.rollout import guided
from wan_distill.data.samples import teacher_sigmas
from wan_distill.errors import UsageError
from wan_distill.layout import student_file
from wan_distill.maths.distances import (
    diversity,
    frechet_distance,
    picture_statistics,
    principal_components,
)
from wan_distill.maths.flow import Velocity, sample
from wan_distill.maths.randomness import keyed_noise
from wan_distill.maths.sigmas import expert_sigmas, sigma_grid
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.loading import Teacher, decode
from wan_distill.model.student_files import load_student
from wan_distill.settings.config import Config
from wan_distill.system.console import progress_bar
from wan_distill.system.files import write_atomically, write_tensors
from wan_distill.system.pictures import contact_sheet
from wan_distill.system.runtime import Runtime

COMPONENTS = 64
PICTURES = (
    96  # clips a row that are decoded, for motion and luminance; the latents' measures use all
)
REFERENCE = "teacher, independent"
BASELINE_STEPS = 4


@dataclass(frozen=True)
class Sampler:
    """One way to make samples: who, along which sigmas, guided or not, from which noise."""

    name: str
    role: str
    sigmas: tuple[float, ...]
    guided: bool
    noise: str = "paired"

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def evaluations(self, config: Config) -> int:
        """Transformer evaluations per sample; guidance costs two a step."""
        count = 0
        for expert in ("high", "low"):
            taken = max(0, len(expert_sigmas(self.sigmas, expert, config.boundary)) - 1)
            count += taken * (2 if self.guided and config.guidance(expert) != 1 else 1)
        return count


def samplers(config: Config) -> list[Sampler]:
    """The rows of the table, the independent reference set first."""
    long, short = teacher_sigmas(config), sigma_grid(BASELINE_STEPS, config.flow_shift)
    return [
        Sampler(REFERENCE, "teacher", long, True, noise="independent"),
        Sampler(f"teacher {len(long) - 1} guided", "teacher", long, True),
        Sampler(f"teacher {BASELINE_STEPS} guided", "teacher", short, True),
        Sampler(f"teacher {BASELINE_STEPS} unguided", "teacher", short, False),
        *(
            Sampler(f"student {n}", "student", config.sigmas(n), False)
            for n in config.sampling_steps
        ),
    ]


class Evaluation:
    """Draws the samples of every row and compares them; the teacher's are kept for the next time."""

    def __init__(
        self,
        config: Config,
        teacher: Teacher,
        bank: PromptBank,
        prompts: list[str],
        runtime: Runtime,
    ):
        self.config = config
        self.teacher = teacher
        self.bank = bank
        # Sample i follows prompt i modulo their number: captions are balanced.
        self.prompts = [prompts[i % len(prompts)] for i in range(config.eval_samples)]
        self.distinct = len(set(self.prompts))
        self.runtime = runtime
        self.folder = Path(config.output_dir)

    def run(self, negative: Tensor) -> dict:
        """The whole table as JSON-ready values; also written to evaluation.json."""
        rows = samplers(self.config)
        drawn = {row.name: self._draw(row, negative) for row in rows}
        result = self._compare(rows, drawn)
        write_atomically(self.folder / "evaluation.json", json.dumps(result, indent=1).encode())
        shown = [rows[1], rows[3], *rows[4:]]
        vae, few = self.teacher.load_vae(), min(4, self.distinct)
        contact_sheet(
            self.folder / "comparison.png",
            {row.name: decode(vae, drawn[row.name][0][:few]) for row in shown},
            self.prompts[:few],
        )
        return result

    # -------------------------------------------------------------------------------------- samples

    def _draw(self, row: Sampler, negative: Tensor) -> tuple[Tensor, float]:
        """Latents [N, C, F, H, W] of one row and the seconds each took; teacher rows come from
        their cache.
        """
        file = self._cache_file(row)
        if row.role == "teacher" and file.exists():
            kept = load_file(file)
            return kept["latents"], float(kept["seconds"])
        started = time.perf_counter()
        latents = self._sample(row, negative)
        seconds = (time.perf_counter() - started) / len(latents)
        if row.role == "teacher":
            file.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(
                file, {"latents": latents, "seconds": torch.tensor(seconds, dtype=torch.float64)}
            )
        return latents, seconds

    def _cache_file(self, row: Sampler) -> Path:
        config = self.config
        key = dict(
            teacher=self.teacher.info.fingerprint(),
            text=self.bank.key,
            prompts=self.prompts,
            row=vars(row),
            seed=config.eval_seed,
            guidance=[config.guidance_scale, config.guidance_scale_2],
            negative=config.negative_prompt,
            shape=self.teacher.info.latent_shape(config),
            boundary=config.boundary,
            dtype=config.mixed_precision,
            **config.base_key,
        )
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / "evaluation" / f"{name}.safetensors"

    @torch.no_grad()
    def _sample(self, row: Sampler, negative: Tensor) -> Tensor:
        shape = self.teacher.info.latent_shape(self.config)
        latents = torch.stack(
            [
                keyed_noise(shape, "evaluation", self.config.eval_seed, row.noise, i)
                for i in range(len(self.prompts))
            ]
        )
        with progress_bar(
            len(latents) * row.evaluations(self.config), row.name, "eval", self.runtime.is_main
        ) as bar:
            for expert in self.teacher.info.experts:
                if sigmas := expert_sigmas(row.sigmas, expert, self.config.boundary):
                    self._carry(latents, row, expert, sigmas, negative, bar)
        return latents

    def _carry(
        self,
        latents: Tensor,
        row: Sampler,
        expert,
        sigmas: tuple[float, ...],
        negative: Tensor,
        bar,
    ) -> None:
        """One expert's steps, in place; the expert is let go before the next one is loaded."""
        denoiser, size = self._denoiser(expert, row.role), self.config.sample_batch_size
        for start in range(0, len(latents), size):
            self.runtime.stop_here_if_asked()
            part = slice(start, start + size)
            velocity = self._velocity(
                denoiser, row, expert, self.bank.batch(self.prompts[part]), negative, bar
            )
            latents[part] = sample(velocity, latents[part].to(self.runtime.device), sigmas).cpu()

    def _denoiser(self, expert, role: str) -> Denoiser:
        transformer = self.teacher.load_expert(expert)
        student = student_file(self.folder, expert)
        if role == "student" and self._distilled(expert):
            if not student.exists():
                raise UsageError(
                    f"--output_dir {self.folder}: holds no {student.name} to evaluate; train first"
                )
            load_student(transformer, student)
        return Denoiser(
            {expert: transformer}, self.config.boundary, self.teacher.info.expand_timesteps
        )

    def _distilled(self, expert) -> bool:
        """Whether the student has this expert of its own: trained here, or carried over from a warm
        start.
        """
        return expert in self.config.experts or student_file(self.folder, expert).exists()

    def _velocity(
        self, denoiser: Denoiser, row: Sampler, expert, prompt: Tensor, negative: Tensor, bar
    ) -> Velocity:
        teacher = guided(denoiser, self.config, expert, prompt, negative)
        trained = row.role == "student" and self._distilled(expert)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            with self.runtime.autocast():
                bar.update(len(x) * (2 if row.guided else 1))
                if row.guided:
                    return teacher(x, sigma)
                return denoiser.velocity(x, sigma, prompt, role="student" if trained else "teacher")

        return velocity

    # ----------------------------------------------------------------------------------- comparison

    def _compare(self, rows: list[Sampler], drawn: dict[str, tuple[Tensor, float]]) -> dict:
        reference, paired = drawn[REFERENCE][0], drawn[rows[1].name][0]
        project = principal_components(torch.cat([reference, paired]), COMPONENTS)
        vae = self.teacher.load_vae()
        base = picture_statistics(decode(vae, paired[:PICTURES]))
        table = []
        for row in rows[1:]:
            latents, seconds = drawn[row.name]
            pictures = picture_statistics(decode(vae, latents[:PICTURES]))
            table.append(
                dict(
                    sampler=row.name,
                    steps=row.steps,
                    evaluations=row.evaluations(self.config),
                    frechet=frechet_distance(project(latents), project(reference)),
                    paired_distance=float(
                        (latents - paired).square().flatten(1).mean(1).sqrt().mean()
                    ),
                    motion=pictures["motion"] / base["motion"],
                    diversity=diversity(latents, self.distinct) / diversity(paired, self.distinct),
                    luminance_drift=pictures["luminance"] - base["luminance"],
                    seconds_per_sample=seconds,
                )
            )
        by_name = {line["sampler"]: line["frechet"] for line in table}
        floor, worst = table[0]["frechet"], by_name[f"teacher {BASELINE_STEPS} unguided"]
        closed = {
            n: 1 - (by_name[f"student {n}"] - floor) / (worst - floor)
            for n in self.config.sampling_steps
        }
        return dict(
            rows=table,
            floor=floor,
            gap_closed=closed[self.config.grid_steps],
            gap_closed_by_steps={str(n): value for n, value in closed.items()},
            samples=len(self.prompts),
            prompts=self.distinct,
            components=project(reference).shape[1],
            eval_seed=self.config.eval_seed,
        )


COLUMNS = {
    "sampler": ("sampler", "{}"),
    "evaluations": ("evals", "{}"),
    "frechet": ("Fréchet", "{:.2f}"),
    "paired_distance": ("paired", "{:.3f}"),
    "motion": ("motion", "{:.3f}"),
    "diversity": ("diversity", "{:.3f}"),
    "luminance_drift": ("luminance", "{:+.4f}"),
    "seconds_per_sample": ("s/sample", "{:.4f}"),
}


def as_markdown(result: dict) -> str:
    """The table, and the one line below it."""
    cells = [[title for title, _ in COLUMNS.values()]]
    cells += [
        [form.format(row[key]) for key, (_, form) in COLUMNS.items()] for row in result["rows"]
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    closed = ", ".join(
        f"{value:.3f} in {n} steps" for n, value in result["gap_closed_by_steps"].items()
    )
    return "\n".join(
        [
            *lines,
            "",
            f"gap closed: {closed} (1 = as close to the teacher as the teacher is to itself, "
            f"0 = its own {BASELINE_STEPS} unguided steps; floor {result['floor']:.2f}; "
            f"{result['samples']} samples a side)",
        ]
    )
