"""What a run needs: memory by kind, arithmetic, disk, and the settings that fit a card."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from wan_distill.errors import UsageError
from wan_distill.maths.sigmas import sigma_grid
from wan_distill.planning.trace import Shape, Trace, trace
from wan_distill.settings.config import Config
from wan_distill.system.runtime import DTYPES

GB = 1e9
FP32 = 4
ADAM_MOMENTS = 2
USABLE = 0.92  # of a card: the rest is the CUDA context (0.5 GB) and what fragmentation takes
# Bytes per weight of the blocks' matrices. nf4: 4 bits and one fp32 scale per 64 weights (QLoRA,
# arXiv 2305.14314).
BASE_BYTES = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + FP32 / 64}


@dataclass(frozen=True)
class Estimate:
    """Predicted bytes by kind while one expert trains, and operations of one update."""

    trace: Trace
    base: float
    adapters: float
    optimizer: float
    average: float
    activations: float

    @property
    def peak(self) -> float:
        return self.base + self.adapters + self.optimizer + self.average + self.activations

    def by_kind(self) -> dict[str, float]:
        """Bytes by kind, in the order they are made."""
        kinds = {
            "base": self.base,
            "adapters": self.adapters,
            "optimizer": self.optimizer,
            "average": self.average,
            "activations": self.activations,
        }
        return {name: size for name, size in kinds.items() if size}


def arithmetic(config: Config, info, cost: Trace) -> tuple[float, dict[str, tuple[float, int]]]:
    """(operations to solve what is stored, role -> (operations of one update, updates an expert)).

    A `dmd` rollout leaves at a uniformly drawn one of the expert's n steps: (n + 1) / 2 evaluations
    on average, the last of them with gradient on the student's turn, where the guided teacher (or
    the score of its samples) and the critic then score it.
    """
    micro, updates = config.gradient_accumulation_steps, config.max_train_steps
    forward, update = cost.forward_flops * micro, cost.update_flops * micro
    guided = sum(2 if g != 1 else 1 for g in (config.guidance_scale, config.guidance_scale_2)) / 2
    solve = (
        config.num_trajectories
        / config.train_batch_size
        * cost.forward_flops
        * config.teacher_steps
        * guided
    )
    solve *= 1 - solved_before(config, info)
    if config.method == "trajectory":
        return solve, {"student": (update, updates)}
    if config.method == "consistency":  # the guided teacher's step, and the student's own end point
        return solve, {"student": (update + (guided + 1) * forward, updates)}
    steps = config.grid_steps / len(info.experts)
    diversity = config.diversity_weight > 0
    sampled = "real_score" in config.roles
    judged = (1 if sampled else guided) + 1
    student = update * (1 + diversity / len(info.experts)) + ((steps - 1) / 2 + judged) * forward
    score, times = (
        update * config.score_draws,
        config.critic_warmup_steps + config.critic_updates * updates,
    )
    costs = {
        "student": (student, updates),
        "fake_score": (score + (steps + 1) / 2 * forward, times),
    }
    if sampled:
        return solve, costs | {"real_score": (score, times)}
    return solve * _anchor_share(config) * diversity, costs


def solved_before(config: Config, info) -> float:
    """The part of this run's trajectories that the one named by `--init_student_from` has, going by
    their size.
    """
    if config.init_student_from is None:
        return 0.0
    files = (Path(config.init_student_from) / "trajectories").glob("*/*.safetensors")
    found = sum(file.stat().st_size for file in files)
    return min(
        1.0,
        found
        / (
            FP32
            * config.num_trajectories
            * config.grid_steps
            * math.prod(info.latent_shape(config))
        ),
    )


def _anchor_share(config: Config) -> float:
    """The part of the teacher's steps above the student's second sigma, where its anchors for
    diversity lie.
    """
    grid = sigma_grid(config.teacher_steps, config.teacher_shift)
    return sum(s > config.sigmas()[1] for s in grid) / config.teacher_steps


def shape_of(config: Config, info) -> Shape:
    """The Shape of this run's updates; `info` is a `TeacherInfo`."""
    known = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in info.transformer.items()
        if not k.startswith("_")
    }
    known["num_layers"] = config.student_layers or known["num_layers"]
    return Shape(
        transformer=tuple(sorted(known.items())),
        latents=info.latent_shape(config),
        batch=config.train_batch_size,
        text=config.max_sequence_length,
        dtype=DTYPES[config.mixed_precision],
        rank=config.rank,
        layers=config.lora_layers,
        roles=len(config.roles),
        checkpointing=bool(config.gradient_checkpointing),
        expand_timesteps=info.expand_timesteps,
        whole=config.student_layers is not None,
    )


def estimate(config: Config, info, base_precision: str = "bf16") -> Estimate:
    """Memory of training one expert with these settings."""
    cost = trace(shape_of(config, info))
    base, spread_out = 0 if config.student_layers else cost.base_bytes, 0
    if base_precision in BASE_BYTES or config.offload:
        full = DTYPES[config.mixed_precision].itemsize
        base -= cost.matrices * (full - (0 if config.offload else BASE_BYTES[base_precision]))
        widths = info.transformer["num_attention_heads"] * info.transformer["attention_head_dim"]
        spread_out = full * widths * info.transformer["ffn_dim"]  # one matrix at a time, for use
    roles = config.roles
    one = FP32 * cost.adapter
    activations = _activations(config, info, cost)
    if config.shard:
        base /= int(os.environ.get("WORLD_SIZE", 1))
    if config.context_parallel:
        activations /= int(os.environ.get("WORLD_SIZE", 1))
    moments = len(roles) * ADAM_MOMENTS * one / (FP32 if config.use_8bit_adam else 1)
    return Estimate(
        cost,
        base,
        len(roles) * one,
        moments,
        one if config.ema_decay > 0 else 0,
        activations + spread_out,
    )


def _activations(config: Config, info, cost: Trace) -> int:
    """The largest of what the roles' updates need beyond what is always resident."""
    if config.method != "dmd":
        return cost.activations
    # Student: the guided teacher (two evaluations in one) or the score of its samples is asked
    # while the graph is
    # held, and the diversity loss adds a second graph. Critic: several draws make one larger batch.
    # (methods/dmd.py)
    asked = 1 if "real_score" in config.roles else 2
    second_graph = cost.graph if config.diversity_weight else 0
    draws = dataclasses.replace(
        config, train_batch_size=config.train_batch_size * config.score_draws
    )
    return max(
        cost.activations + second_graph,
        cost.graph + asked * cost.evaluation,
        trace(shape_of(draws, info)).activations,
    )


@contextmanager
def explain_out_of_memory(config: Config, info, phase: str) -> Iterator[None]:
    """Turns CUDA's out-of-memory error into a UsageError: peak, phase, what was resident, what to
    try next.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        need = estimate(config, info, config.base_precision)
        kinds = ", ".join(f"{name} {size / GB:.1f}" for name, size in need.by_kind().items())
        peak = (
            f"{torch.cuda.max_memory_allocated() / GB:.1f} GB"
            if torch.cuda.is_available()
            else "unknown"
        )
        tried = "; ".join(
            f"{flags} saves about {saved / GB:.1f} GB"
            for saved, flags in savings(config, info, need)
        )
        raise UsageError(
            f"out of GPU memory while {phase} (peak {peak}; an update needs about "
            f"{need.peak / GB:.1f} GB: {kinds}); "
            f"{tried or 'choose a smaller clip: --height, --width'}"
        ) from error


def savings(config: Config, info, need: Estimate) -> list[tuple[float, str]]:
    """(bytes saved, flags) of each single change that lowers the predicted peak, the largest saving
    first.
    """
    shorter = max(1, (config.num_frames - 1) // 8 * 4 + 1)
    changes = [
        dict(num_frames=shorter),
        dict(gradient_checkpointing=True),
        dict(train_batch_size=1),
        dict(use_8bit_adam=True),
    ]
    if config.student_layers is None:
        changes += [dict(base_precision="fp8"), dict(base_precision="nf4"), dict(offload=True)]
    if config.method == "dmd":
        changes += [dict(score_draws=1), dict(diversity_weight=0.0), dict(real_score="guided")]
    found = []
    for change in changes:
        changed = dataclasses.replace(config, **change)
        saved = need.peak - estimate(changed, info, changed.base_precision).peak
        flags = " ".join(
            f"--{name}" if value is True else f"--{name} {value}" for name, value in change.items()
        )
        found.append((saved, flags))
    return sorted((f for f in found if f[0] > 0.01 * need.peak), reverse=True)


CARDS = (24, 48, 80, 141)  # GB: RTX 4090, L40S, H100, H200
CLIPS = ((49, 480, 832), (17, 480, 832), (33, 256, 448), (17, 256, 448))


def what_fits(config: Config, info) -> dict[int, str]:
    """For each card size in GB: flags of the largest clip, then the most exact base, whose
    predicted peak fits.
    """

    found = dict.fromkeys(CARDS, "")
    for changed in _candidates(config):
        for card in CARDS:
            need = None if found[card] else estimate(changed, info, changed.base_precision)
            if need and need.peak < USABLE * card * GB:
                flags = ["--offload"] * changed.offload
                flags += [
                    f"--{name} {getattr(changed, name)}"
                    for name in VARIED
                    if name in ("base_precision", "num_frames")
                    or getattr(changed, name) != getattr(config, name)
                ]
                found[card] = f"{' '.join(flags)} (peak {_size(need.peak)})"
    return found


VARIED = ("base_precision", "num_frames", "height", "width", "score_draws", "diversity_weight")


def _candidates(config: Config) -> Iterator[Config]:
    """This run's settings, the clip growing smaller, what dmd can do without given up, the base
    coarser, then on the host, which is slowest."""
    own = (config.num_frames, config.height, config.width)
    clips = [own, *(c for c in CLIPS if c[0] * c[1] * c[2] < own[0] * own[1] * own[2])]
    lighter = [{}, {"score_draws": 1}, {"score_draws": 1, "diversity_weight": 0.0}]
    lighter = lighter if config.method == "dmd" else [{}]
    bases = [dict(base_precision=kind, offload=False) for kind in ("bf16", "fp8", "nf4")]
    on_host = [dict(base_precision="bf16", offload=True)]
    if config.student_layers is not None:  # there is no frozen base
        bases, on_host = [{}], []
    for frames, height, width in clips:
        for less, base in [
            *itertools.product(lighter, bases),
            *itertools.product(lighter, on_host),
        ]:
            yield dataclasses.replace(
                config,
                num_frames=frames,
                height=height,
                width=width,
                gradient_checkpointing=True,
                **base,
                **less,
            )


def disk_needs(config: Config, info, cost) -> dict[str, float]:
    """Bytes that this run writes below --output_dir, by kind."""
    latent = FP32 * shape_of(config, info).latent_values
    roles = len(config.roles)
    kept = 1 + (
        config.checkpoints_total_limit or config.max_train_steps // config.checkpointing_steps
    )
    tensors = roles * (1 + ADAM_MOMENTS) + (config.ema_decay > 0)
    needs = {
        "for checkpoints": kept * len(config.experts) * tensors * FP32 * cost.adapter,
        "for the exported LoRA files": len(config.experts) * FP32 * cost.adapter,
    }
    if config.method != "dmd" or "real_score" in config.roles:
        solved = config.grid_steps * (1 - solved_before(config, info))
    else:
        solved = 1  # anchors
    solved += len(config.sampling_steps) * (config.method == "dmd")  # hand-overs
    needs["for solved samples"] = config.num_trajectories * solved * latent
    if config.save_merged:
        needs["for the merged pipeline"] = len(info.experts) * cost.base_bytes
    return needs


def _size(number: float) -> str:
    return _scaled(number, {1e9: " GB", 1e6: " MB", 1e3: " KB"})


def _scaled(number: float, units: dict[float, str]) -> str:
    unit = next((u for u in units if number >= u), min(units))
    return f"{number / unit:.3g}{units[unit]}"
