#!/usr/bin/env python
"""Which expert is to blame? A finished student, with the teacher in the place of one expert at a
time (for a tiny teacher with the share of decoded clips that obey their captions), and how much of
the teacher's spread is left where the high expert ends. Then what part of the low expert's error is
the same whatever the noise, and how near it comes to the teacher with new noise: on other prompts,
on those that it learned from, and on as few of these. A set of few prompts shows what is wrong with
each, which averages out over many.

    python benchmarks/experts.py --teacher_path tiny-i2v --output_dir outputs/...

The flags are those of the run, whose evaluation is compared with (`--evaluation sets`). The teacher
is integrated as the samples to learn from are (`--teacher_solver`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_distillation import encode_prompts
from wan_distill.data import Run, encode_pictures, prompts_of, read_picture_sets, text_of
from wan_distill.data.first_frames import Prompt
from wan_distill.data.rollout import carry
from wan_distill.maths.distances import frechet_distance, principal_components
from wan_distill.maths.randomness import keyed_noise
from wan_distill.maths.sigmas import Expert, expert_sigmas, handover
from wan_distill.model import Teacher
from wan_distill.model.student_files import load_student
from wan_distill.results.comparison import COMPONENTS, gap_closed, shown
from wan_distill.results.evaluation import Evaluation
from wan_distill.results.samplers import samplers
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.config import Config
from wan_distill.settings.picture_source import read_teachers
from wan_distill.settings.resolve import resolve
from wan_distill.system.runtime import Runtime

WHO = ("student", "teacher")


def run_of(config: Config) -> tuple[Run, Evaluation]:
    """The run that `config` describes, and its evaluation."""
    info = read_teachers(config)
    config = resolve(config, info)
    pictures = read_picture_sets(config, info)
    prompts, held_out = prompts_of(config, info, pictures)
    runtime = Runtime(config)
    teacher = Teacher(info, config, runtime)
    texts = [*map(text_of, (*prompts, *held_out)), config.negative_prompt]
    embeddings, _ = encode_prompts(config, teacher, texts, runtime)
    first_frames = None
    if info.takes_picture:
        read = [*prompts, *held_out]
        first_frames = encode_pictures(config, teacher, pictures, read, runtime)
    run = Run(config, teacher, embeddings, tuple(prompts), runtime, first_frames)
    return run, Evaluation(run, held_out)


class Mixed:
    """Samples from the evaluation's noise, by the student or by the teacher in each expert."""

    def __init__(self, run: Run, prompts: Sequence[Prompt]):
        self.run, self.prompts = run, prompts
        key = ("evaluation", run.config.eval_seed, "paired")
        noise = [keyed_noise(run.latent_shape, *key, i) for i in range(len(self.prompts))]
        self.noise = torch.stack(noise)
        self._handed_over: dict[str, Tensor] = {}

    def handed_over(self, who: str) -> Tensor:
        """Latents where `who`'s high expert ends, made once."""
        if who not in self._handed_over:
            self._handed_over[who] = self.carried("high", self.noise, who)
        return self._handed_over[who]

    def ended(self, high: str, low: str) -> Tensor:
        return self.carried("low", self.handed_over(high), low)

    def carried(self, expert: Expert, latents: Tensor, who: str) -> Tensor:
        """Latents [N, C, F, H, W] at the end of the expert's phase. The teacher may change experts
        on the way.
        """
        config = self.run.config
        sigmas = expert_sigmas(config.sigmas(), expert, config.boundary_ratio)
        if who == "student":
            return self._along(expert, latents, sigmas, role="student")
        points = config.solver_sigmas(config.sigmas())
        points = tuple(s for s in points if sigmas[-1] <= s <= sigmas[0])
        for owner in self.run.info.experts:
            if part := expert_sigmas(points, owner, config.boundary_ratio):
                how = dict(role="teacher", guided=True, solver=config.teacher_solver)
                latents = self._along(owner, latents, part, **how)
        return latents

    def _along(
        self, expert: Expert, latents: Tensor, sigmas: Sequence[float], **how: Any
    ) -> Tensor:
        run, transformer = self.run, self.run.teacher.load_expert(expert)
        if how["role"] == "student":
            load_student(transformer, run.folder.student(expert))
        denoiser = run.denoiser(expert, transformer)
        batches = carry(run, denoiser, expert, latents, self.prompts, sigmas, **how)
        return torch.cat([reached[sigmas[-1]] for _, reached in batches])


def spread(own: Tensor, reference: Tensor) -> tuple[float, float]:
    """(slope, share of the variance) of samples [N, ...] along the principal components of their
    references: both 1 where they are equal, the slope below 1 where a part is missing.
    """
    project = principal_components(reference, COMPONENTS)
    a, b = (x - x.mean(0) for x in (project(own), project(reference)))
    return float((a * b).sum() / b.square().sum()), float(a.square().sum() / b.square().sum())


def with_texts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Those of `prompts` that have one of `count` texts, which are spread over all."""
    texts = sorted({*map(text_of, prompts)})
    chosen = {texts[i * len(texts) // count] for i in range(min(count, len(texts)))}
    return [prompt for prompt in prompts if text_of(prompt) in chosen]


def obeying(run: Run, latents: Tensor, prompts: Sequence[Prompt]) -> str:
    """The share of clips that obey their captions; empty where no judge is there."""
    if run.info.world is None:
        return ""
    measures = shown(run, latents, prompts)
    return f"{measures['obeys']:.3f}" if "obeys" in measures else ""


def means_of(values: Tensor, groups: Sequence[object]) -> Tensor:
    """[N, D], each row replaced by the mean of those that belong to the same group."""
    members: dict[object, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    means = torch.empty_like(values)
    for rows in members.values():
        means[rows] = values[rows].mean(0)
    return means


def error_lines(
    evaluation: Evaluation, own: Tensor, teachers: Tensor, reference: Tensor, floor: float
) -> Iterator[str]:
    """What of the low expert's error does not depend on the noise, and what it costs.

    Args:
        own: the student's ends [N, K], along the components of the evaluation.
        teachers: the same where the teacher goes on from the student's hand-overs.
        reference: an independent set of the teacher's.
    """
    error = own - teachers
    parts = {
        "all": error,
        "the same for each noise of a prompt": means_of(error, evaluation.prompts),
        "the same for each clip of a caption": means_of(error, evaluation.texts),
    }
    variance = float(teachers.var(0).sum())
    yield f"\n| low expert's error (variance {variance:.0f}) | mean square | excess without it |"
    yield "| --- | --- | --- |"
    for name, part in parts.items():
        square, left = part.square().sum(1).mean(), frechet_distance(own - part, reference)
        yield f"| {name} | {square:.2f} | {left / floor:.2f} |"


def lines(run: Run, evaluation: Evaluation) -> Iterator[str]:
    rows, mixed = samplers(run.config), Mixed(run, evaluation.prompts)
    reference, paired, worst = (
        evaluation.draw(row) for row in (rows.independent, rows.paired, rows.few_unguided)
    )
    project = principal_components(torch.cat([reference, paired]), COMPONENTS)
    floor, most = (frechet_distance(project(x), project(reference)) for x in (paired, worst))
    yield "| high expert | low expert | Fréchet | excess | gap closed | obeys |"
    yield "| --- | --- | --- | --- | --- | --- |"
    ends = {(high, low): mixed.ended(high, low) for high in WHO for low in WHO}
    for (high, low), ended in ends.items():
        distance = frechet_distance(project(ended), project(reference))
        closed, obeyed = gap_closed(distance, floor, most), obeying(run, ended, evaluation.prompts)
        yield (
            f"| {high} | {low} | {distance:.2f} | {distance / floor:.2f} | {closed:.3f} "
            f"| {obeyed} |"
        )
    student, teacher = (project(ends["student", who]) for who in WHO)
    yield from error_lines(evaluation, student, teacher, project(reference), floor)
    config = run.config
    end = handover(config.sigmas(), config.boundary_ratio)
    own, teachers = ((mixed.handed_over(who) - end * mixed.noise) / (1 - end) for who in WHO)
    slope, share = spread(own, teachers)
    yield f"\nWhere the high expert ends: slope {slope:.3f}, {share:.3f} of the teacher's variance"
    yield "\n| prompts | mean squared error of the low expert | Fréchet to its teacher |"
    yield "| --- | --- | --- |"
    # Both from the student's hand-over, so that all of the difference is the low expert's.
    wanted = len(evaluation.prompts)
    known = Mixed(run, list(islice(cycle(run.prompts), wanted)))
    few = Mixed(run, list(islice(cycle(with_texts(run.prompts, len({*evaluation.texts}))), wanted)))
    pairs = {"others": [ends["student", who] for who in WHO]}
    for name, samples in {"learned from": known, "learned from, as few as the others": few}.items():
        pairs[name] = [samples.ended("student", who) for who in WHO]
    for name, (own, teachers) in pairs.items():
        project = principal_components(teachers, COMPONENTS)  # of this set: another has others
        distance = frechet_distance(project(own), project(teachers))
        yield f"| {name} | {(own - teachers).square().mean():.4f} | {distance:.2f} |"


@torch.no_grad()
def main() -> int:
    run, evaluation = run_of(parse_args(sys.argv[1:]))
    for line in lines(run, evaluation):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
