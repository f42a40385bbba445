"""Seconds per sample of every row of the table, measured side by side.

A row's seconds are its steps times the median seconds of one step. Steps of both kinds, guided and
not, are timed in turn on the same warm weights, so that the load of the machine is the same for
all. The student's adapters are merged, as users run it: a merged adapter costs nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from wan_distill.data.first_frames import Prompt
from wan_distill.data.rollout import carry
from wan_distill.data.run import Run
from wan_distill.maths.randomness import keyed_noise
from wan_distill.maths.sigmas import Expert, expert_sigmas
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.student_files import load_student

CLIPS = 16  # sampled at once, where --sample_batch_size allows as many
ROUNDS = 5  # that count, after one that warms up
ENOUGH = 30.0  # seconds after which no further round of one expert begins

Who = Literal["teacher", "student"]


class Way(NamedTuple):
    """How one row samples."""

    role: Who
    sigmas: tuple[float, ...]
    guided: bool


def seconds_per_sample(
    run: Run, ways: Mapping[str, Way], prompts: Sequence[Prompt]
) -> dict[str, float]:
    """Name of a row -> seconds that one of its samples takes here, decoding aside.

    One expert is in memory at any time. Where every forward needs all processes, all must call it.

    Args:
        prompts: at least one; as many clips as there are prompts are sampled at once, `CLIPS` and
            `--sample_batch_size` at most.
    """
    seconds = dict.fromkeys(ways, 0.0)
    prompts = prompts[: min(CLIPS, run.config.sample_batch_size)]
    both: list[tuple[Who, ...]] = [("teacher", "student")]
    apart: list[tuple[Who, ...]] = [("teacher",), ("student",)]
    for expert in run.info.experts:
        phases = {name: _phase(run, way, expert) for name, way in ways.items()}
        for roles in apart if run.config.whole_student else both:
            timed = {name: ways[name] for name in ways if ways[name].role in roles and phases[name]}
            if not timed:
                continue
            step = next(phases[name][:2] for name in timed)
            kinds = sorted({way.guided for way in timed.values()})
            each = _seconds_per_step(run, expert, roles, step, kinds, prompts)
            for name, way in timed.items():
                seconds[name] += (len(phases[name]) - 1) * each[way.guided] / len(prompts)
    return seconds


def _phase(run: Run, way: Way, expert: Expert) -> tuple[float, ...]:
    """The sigmas of a row between which `expert` works; empty where it makes no step."""
    sigmas = expert_sigmas(way.sigmas, expert, run.config.boundary_ratio)
    return sigmas if len(sigmas) > 1 else ()


def _seconds_per_step(
    run: Run,
    expert: Expert,
    roles: Sequence[Who],
    step: tuple[float, ...],
    kinds: Sequence[bool],
    prompts: Sequence[Prompt],
) -> dict[bool, float]:
    """Guided or not -> the median seconds of one step with all `prompts` at once."""
    denoiser = _expert(run, expert, roles)
    role: Who = "student" if denoiser.whole else "teacher"
    noise = [keyed_noise(run.latent_shape, "timing", i) for i in range(len(prompts))]
    latents = torch.stack(noise)
    times: dict[bool, list[float]] = {kind: [] for kind in kinds}
    began = time.perf_counter()
    for turn in range(1 + ROUNDS):
        for guided in kinds:
            started = time.perf_counter()
            # The latents arrive on the CPU, so the device has finished.
            list(carry(run, denoiser, expert, latents, prompts, step, role=role, guided=guided))
            times[guided].append(time.perf_counter() - started)
        if turn and _longest(run, time.perf_counter() - began) > ENOUGH:
            break
    return {kind: statistics.median(taken[1:]) for kind, taken in times.items()}


def _longest(run: Run, seconds: float) -> float:
    """The same on all processes where they work together: they must stop together."""
    return run.runtime.max_over_ranks(seconds) if run.runtime.joint else seconds


def _expert(run: Run, expert: Expert, roles: Sequence[Who]) -> Denoiser:
    """One loaded expert with the student's adapter merged into it. Onto a base that is quantised,
    offloaded or sharded nothing is merged: the base alone takes as long.
    """
    config = run.config
    transformer = run.teacher.load_expert(expert)
    file = run.folder.student(expert)
    whole = config.whole_student and "student" in roles and file.exists()
    plain = config.base_precision == "bf16" and not (config.offload or run.runtime.sharded)
    if whole:
        load_student(transformer, file)
    elif plain and not config.whole_student and file.exists():
        load_student(transformer, file)
        transformer.fuse_lora()
        transformer.unload_lora()
    return run.denoiser(expert, transformer, whole)
