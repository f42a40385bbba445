"""What a run has to do: samples to solve, updates to make, bytes to write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wan_distill.errors import UsageError
from wan_distill.maths.sigmas import Expert, expert_sigmas
from wan_distill.methods import make_method
from wan_distill.model.warm_start import warm_start_files
from wan_distill.planning.memory import teacher_trace
from wan_distill.planning.solved import solved_before
from wan_distill.planning.trace import Trace
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.recipes import Role, recipe_of
from wan_distill.settings.sample_specs import SampleSpec, handovers, student_of, trajectories
from wan_distill.settings.scale import processes
from wan_distill.training.previews import SHOWN, validation_prompts


@dataclass(frozen=True)
class SampleWork:
    """Samples of one set that a run reads."""

    spec: SampleSpec
    rows: int
    """how many are still to be solved"""
    evaluations: int
    """transformer evaluations per sample"""


@dataclass(frozen=True)
class UpdateWork:
    """The updates of one role of one expert."""

    expert: Expert
    role: Role
    flops: float
    """of one update, over its micro-batches on one process"""
    updates: int


def sample_work(stages: Sequence[Config], info: TeacherInfo) -> list[SampleWork]:
    """The samples that training reads, and those that it is checked and previewed with.

    The teacher's samples are shared by all stages, the student's by those with the same high
    expert.
    """
    rows: dict[tuple[str, SampleSpec], frozenset[int]] = {}
    has_high = hands_over(stages, info)
    high = ""  # the stage that trained it last
    for config in stages:
        high = config.method if "high" in config.experts else high
        for owner, spec, chosen in _reads(config, has_high, high):
            rows[owner, spec] = rows.get((owner, spec), frozenset()) | chosen
    config, work = stages[0], []
    for (owner, spec), chosen in rows.items():
        left = len(chosen)
        if spec.sampler == "teacher" and owner == TRAINING:
            left -= solved_before(stages, info, spec, chosen)
        work.append(
            SampleWork(spec, left, config.evaluations(spec.sigmas, spec.sampler == "teacher"))
        )
    return work


TRAINING = "training"


def hands_over(stages: Sequence[Config], info: TeacherInfo) -> bool:
    """Whether a high expert's student hands its latents over to the low one: a trained one, one
    that is there already, or one that --init_student_from brings.
    """
    if any("high" in config.experts or student_of(config, "high") for config in stages):
        return True
    try:
        return "high" in warm_start_files(stages[0], info)
    except UsageError:  # the preflight says why
        return False


def _reads(
    config: Config, has_high: bool, high: str
) -> Iterator[tuple[str, SampleSpec, frozenset[int]]]:
    """(for what, set, samples) of everything that one stage reads; `high` says whose student's."""
    micro_batches = config.gradient_accumulation_steps * processes(config)
    for expert in config.experts:
        specs = recipe_of(config).samples(config, expert, has_high)
        read = make_method(config, expert).rows_read(micro_batches)
        asked = [(TRAINING, specs[purpose], chosen) for purpose, chosen in read.items()]
        for purpose, count in _check_counts(config).items():
            for spec in _check_specs(config, expert, has_high, count):
                asked.append((purpose, spec, frozenset(range(count))))
        for purpose, spec, chosen in asked:
            stage = f" of {high}" if spec.sampler == "student" else ""
            yield purpose + stage, spec, chosen


def _check_counts(config: Config) -> dict[str, int]:
    """Purpose -> samples. Monitor and previews show different prompts, so they share none."""
    counts = {}
    if config.monitor_steps:
        counts["monitor"] = config.monitor_samples
    if config.validation_steps:
        counts["previews"] = preview_count(config)
    return counts


def preview_count(config: Config) -> int:
    """Clips of one preview, where as many prompts are held out."""
    return len(validation_prompts(config, [""] * SHOWN))


def _check_specs(
    config: Config, expert: Expert, has_high: bool, count: int
) -> tuple[SampleSpec, ...]:
    if expert == "high":
        return (trajectories(config, count),)
    start = handovers(config, config.grid_steps, has_high, complete=True, count=count)
    return trajectories(config, count), start


def solve_flops(stages: Sequence[Config], info: TeacherInfo, cost: Trace) -> float:
    """Operations to solve all samples, over all processes.

    Args:
        cost: of the first stage.
    """
    return flops_of(sample_work(stages, info), stages[0], info, cost)


def flops_of(work: Sequence[SampleWork], config: Config, info: TeacherInfo, cost: Trace) -> float:
    """The same of these samples; `cost` is that of `config`."""
    flops = dict(teacher=teacher_trace(config, info).forward_flops, student=cost.forward_flops)
    done = sum(each.rows * each.evaluations * flops[each.spec.sampler] for each in work)
    return done / config.train_batch_size


def check_flops(config: Config, info: TeacherInfo, cost: Trace) -> float:
    """Operations of the student's samples in all checks and previews."""
    forward = cost.forward_flops / config.train_batch_size
    total = 0.0
    for expert in config.experts:
        steps = max(0, len(expert_sigmas(config.sigmas(), expert, config.boundary_ratio)) - 1)
        if config.monitor_steps:
            checks = 1 + config.max_train_steps // config.monitor_steps
            total += checks * config.monitor_samples * steps * forward
        if config.validation_steps:
            previews = 1 + config.max_train_steps // config.validation_steps
            total += previews * preview_count(config) * steps * forward
    return total


def update_work(config: Config, cost: Trace) -> list[UpdateWork]:
    """All updates, by expert and role."""
    micro = config.gradient_accumulation_steps
    work = []
    for expert in config.experts:
        for role, needs in recipe_of(config).costs(config, expert).items():
            learned = needs.with_gradient * cost.update_flops
            flops = micro * (learned + needs.without_gradient * cost.forward_flops)
            work.append(UpdateWork(expert, role, flops, needs.updates))
    return work
