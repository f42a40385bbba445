"""Sets of samples to be solved once and stored, in plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wan_distill.layout import RunFolder
from wan_distill.maths.sigmas import SUBFOLDER, Expert, expert_sigmas, handover
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo

SampleKind = Literal["trajectories", "anchors", "handovers", "evaluation"]


@dataclass(frozen=True)
class SampleSpec:
    """A set of samples to be solved once and stored.

    Its values without `count`, as JSON with sorted keys, are part of the name under which the set
    is found again.
    """

    kind: SampleKind
    sampler: Literal["teacher", "student"]
    """Who integrates: the guided teacher, or the student without guidance."""
    sigmas: tuple[float, ...]
    """The solver's points, from 1 down to the last stored sigma."""
    stored: tuple[float, ...]
    """Those of `sigmas` at which latents are kept."""
    count: int
    """How many samples there are to draw from; only those that are read get solved."""
    noise: Literal["training", "evaluation"] = "training"
    """Whose noise they begin with: the evaluation's is never trained on."""
    solver: str = "euler"
    """A name in `maths.flow.SOLVERS`."""

    def key(self) -> dict[str, Any]:
        """The plain values that tell this set from others."""
        key: dict[str, Any] = dict(
            sampler=self.sampler, sigmas=list(self.sigmas), stored=list(self.stored)
        )
        if self.noise != "training":
            key |= dict(noise=self.noise)
        return key if self.solver == "euler" else key | dict(solver=self.solver)


def trajectories(config: Config, count: int | None = None) -> SampleSpec:
    """The guided teacher at every student sigma."""
    count = config.num_trajectories if count is None else count
    return SampleSpec(
        "trajectories",
        "teacher",
        config.solver_sigmas(config.sigmas()),
        config.sigmas()[1:],
        count,
        solver=config.teacher_solver,
    )


def clips_of_source(config: Config, count: int) -> SampleSpec:
    """Clips of the guided text-to-video teacher whose first frames are an image-to-video teacher's
    pictures; `config` is that of `picture_source.source_config`.
    """
    sigmas = config.solver_sigmas(())
    solver = config.teacher_solver
    return SampleSpec("trajectories", "teacher", sigmas, sigmas[-1:], count, solver=solver)


def anchors(config: Config) -> SampleSpec:
    """The guided teacher at the student's second sigma, for the diversity loss."""
    second = config.sigmas()[1]
    sigmas = config.solver_sigmas(config.sigmas())
    until = sigmas[: sigmas.index(second) + 1]
    count = config.num_trajectories
    solver = config.teacher_solver
    return SampleSpec("anchors", "teacher", until, (second,), count, solver=solver)


def handovers(
    config: Config, steps: int, distilled: bool, complete: bool, count: int | None = None
) -> SampleSpec:
    """What the high expert hands to the low one in a grid of `steps`.

    The `distilled` high expert's latents where it exists. Otherwise the guided teacher's: those of
    its `trajectories` where these are solved to their end anyway (`complete`).
    """
    count = config.num_trajectories if count is None else count
    end = handover(config.sigmas(steps), config.boundary_ratio)
    if distilled:
        sigmas = config.sigmas(steps)
        until = sigmas[: sigmas.index(end) + 1]
        return SampleSpec("handovers", "student", until, (end,), count)
    if complete:
        return trajectories(config, count)
    sigmas = config.solver_sigmas((end,))
    until = sigmas[: sigmas.index(end) + 1]
    return SampleSpec("handovers", "teacher", until, (end,), count, solver=config.teacher_solver)


def sampling_key(
    config: Config, info: TeacherInfo, sigmas: Sequence[float], guided: bool
) -> dict[str, Any]:
    """What samples depend on besides prompts, pictures, noise, solver and student, in plain values:
    the experts that own `sigmas`, with the guidance of those.
    """
    experts = [e for e in info.experts if expert_sigmas(sigmas, e, config.boundary_ratio)]
    key = dict(
        teacher=info.fingerprint(tuple(SUBFOLDER[expert] for expert in experts)),
        shape=list(info.latent_shape(config)),
        boundary=config.boundary_ratio,
        weights=config.weights_key,
    )
    scales = [config.guidance(expert) for expert in experts]
    if not guided or set(scales) == {1}:
        return key
    return key | dict(guidance=scales, negative=config.negative_prompt)


def student_of(config: Config, expert: Expert) -> Path | None:
    """One expert's student of this run, or of the run it begins with."""
    folders = [config.output_dir, config.init_student_from]
    files = [RunFolder(Path(folder)).student(expert) for folder in folders if folder]
    return next((file for file in files if file.exists()), None)


def inputs(
    config: Config, expert: Expert, distilled: bool, complete: bool
) -> dict[str, SampleSpec]:
    """`inputs <n>`: where the low phase of n sampling steps begins; none of the high expert's."""
    if expert == "high":
        return {}
    return {
        f"inputs {steps}": handovers(config, steps, distilled, complete)
        for steps in config.phases(expert)
    }
