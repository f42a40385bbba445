"""Every setting of a run: one frozen dataclass, from which the command line is derived.

Nothing here imports torch, so `--help`, `--dry_run` errors and typos answer at once. Settings left at None
are filled in by `resolve`, which knows what suits the teacher at hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from wan_distill.schedule import expert_of, sigma_grid, steps_of

REPOSITORY = Path(__file__).resolve().parent.parent
# Beside the package in a checkout; installed by pip, a package of data.
ASSETS = next((p for p in (REPOSITORY / "assets", REPOSITORY / "wan_distill_assets") if p.is_dir()), REPOSITORY)
EMBEDDED_TEACHER = ASSETS / "tiny_wan22"

# Wan's own negative prompt (Wan2.2, wan/configs/shared_config.py); the teacher was tuned to be guided by it.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


class UsageError(Exception):
    """Bad input. The message is one line: value, reason, remedy. Ends the program with exit code 2."""


class Stopped(Exception):
    """A signal asked for an end, and everything worth keeping is on disk. Ends the program with exit code RESUMABLE."""


class Halted(Exception):
    """The run cannot go on, though nothing was mistyped. The message is one line. Ends the program with exit code 1."""


RESUMABLE = 75  # run the same command again to go on (sysexits.h: EX_TEMPFAIL)


def flag(default, help: str, group: str, *, choices=None, alias: tuple[str, ...] = (), parse=None):
    """A dataclass field that is also the command-line flag `--<field name>`."""
    return field(default=default, metadata=dict(help=help, group=group, choices=choices, alias=alias, parse=parse))


def step_counts(text: str) -> tuple[int, ...]:
    """'4' -> (4,); '2,4,8' -> (2, 4, 8)."""
    parts = str(text).split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a step count; give one such as 4, or several such as 2,4,8")
    return tuple(sorted({int(part) for part in parts}))


def words(text: str) -> tuple[str, ...]:
    """'to_q,to_k' or 'to_q to_k' -> ('to_q', 'to_k')."""
    return tuple(re.split(r"[,\s]+", text.strip()))


START = "start here"
STUDENT = "the student and its schedule"
TEACHER = "the teacher"
OPTIMISER = "optimisation"
TRAJECTORY = "guided-trajectory distillation (--method trajectory)"
DMD = "phased distribution matching (--method dmd)"
CONSISTENCY = "consistency distillation (--method consistency)"
MEMORY = "memory and speed"
OUTPUT = "what is written and shown"
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


@dataclass(frozen=True)
class Config:
    """Settings of one run. None means: chosen by `resolve` for the teacher and method at hand."""

    teacher_path: str | None = flag(
        None, "hub id or folder of a Wan text-to-video pipeline (default: the tiny embedded teacher)", START,
        alias=("--pretrained_teacher_model",))
    prompts: str | None = flag(
        None, ".txt (one a line), .json, .jsonl, .csv, a folder of .txt, or a `datasets` id (default: built in)", START)
    output_dir: str | None = flag(None, "where everything goes (default: outputs/<teacher>-<method>-<steps>)", START)
    method: str | None = flag(None, "objective the student is trained with", START,
                              choices=("dmd", "trajectory", "consistency"))
    sampling_steps: tuple[int, ...] | None = flag(
        None, "steps the student samples in, e.g. 4, or 2,4,8 for one student that does all (default 4)", START,
        parse=step_counts)
    max_train_steps: int | None = flag(None, "optimizer updates of the student, per expert", START)
    height: int | None = flag(None, "pixels, divisible by 16", START)
    width: int | None = flag(None, "pixels, divisible by 16", START)
    num_frames: int | None = flag(None, "frames, 4k+1", START)
    seed: int = flag(0, "every random draw follows from it", START)
    dry_run: bool = flag(False, "print the resolved plan and exit", START)

    expert: str = flag("both", "which expert to distil; both = high noise first, then low", STUDENT,
                       choices=("both", "high", "low"))
    flow_shift: float = flag(5.0, "shift of the student's sigmas (not the teacher's: --teacher_shift)", STUDENT)
    boundary_ratio: float | None = flag(
        None, "sigma at and above which the high expert works (default: as the teacher folder says)", STUDENT)
    max_sequence_length: int | None = flag(None, "text tokens the transformers see, padding included", STUDENT)
    rank: int = flag(64, "rank of the LoRA adapters", STUDENT, alias=("--lora_rank",))
    lora_alpha: float | None = flag(None, "scale of the student's adapter is alpha/rank", STUDENT)
    lora_layers: tuple[str, ...] = flag(LORA_TARGETS, "module-name suffixes that get an adapter", STUDENT,
                                        alias=("--lora_target_modules",), parse=words)

    student_layers: int | None = flag(
        None, "a shallower student: this many of the teacher's blocks, all weights trained (--method trajectory)",
        STUDENT)
    init_student_from: str | None = flag(None, "output folder of a run whose student this one begins with", STUDENT)

    teacher_steps: int = flag(40, "solver steps of the guided teacher (Wan2.2: 40)", TEACHER)
    teacher_shift: float | None = flag(None, "shift of the teacher's sigmas (Wan2.2 T2V-A14B: 12)", TEACHER)
    guidance_scale: float | None = flag(None, "guidance of the high expert; 1 = off (Wan2.2: 4)", TEACHER)
    guidance_scale_2: float | None = flag(None, "guidance of the low expert; 1 = off (Wan2.2: 3)", TEACHER)
    negative_prompt: str | None = flag(None, "prompt the teacher is guided away from (default: Wan's own)", TEACHER)
    revision: str | None = flag(None, "branch, tag or commit on the hub", TEACHER, alias=("--teacher_revision",))
    variant: str | None = flag(None, "weight file variant, e.g. fp16", TEACHER)
    cache_dir: str | None = flag(None, "where hub files are kept", TEACHER)
    verbose_loading: bool = flag(False, "show every message of the loaders", TEACHER)
    allow_pickle: bool = flag(False, "also read .bin weights; unpickling can run code: only for files you trust",
                              TEACHER)

    train_batch_size: int | None = flag(None, "samples per micro-batch and process", OPTIMISER)
    gradient_accumulation_steps: int = flag(1, "micro-batches per update", OPTIMISER)
    learning_rate: float | None = flag(None, "peak learning rate of the student", OPTIMISER)
    lr_scheduler: str | None = flag(
        None, "learning-rate schedule", OPTIMISER, choices=("constant", "constant_with_warmup", "linear", "cosine"))
    lr_warmup_steps: int = flag(10, "updates until the peak learning rate", OPTIMISER)
    adam_beta1: float | None = flag(None, "AdamW's first-moment decay", OPTIMISER)
    adam_beta2: float = flag(0.999, "AdamW's second-moment decay", OPTIMISER)
    adam_weight_decay: float = flag(0.0, "AdamW's weight decay (adapters want none)", OPTIMISER)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", OPTIMISER)
    max_grad_norm: float = flag(1.0, "clip the gradient's norm to this", OPTIMISER)
    ema_decay: float | None = flag(None, "decay of the student's moving average, which is exported; 0 = off", OPTIMISER)
    ema_start: int | None = flag(None, "update from which the average is taken", OPTIMISER)

    num_trajectories: int | None = flag(None, "samples to solve and store once, by any --method", TRAJECTORY)

    critic_warmup_steps: int | None = flag(None, "updates of each score alone before the first of the student", DMD)
    critic_updates: int | None = flag(None, "updates of each score before each of the student", DMD,
                                      alias=("--dfake_gen_update_ratio",))
    fake_score_learning_rate: float | None = flag(None, "learning rate of the scores", DMD, alias=("--lr_critic",))
    fake_score_lora_alpha: float | None = flag(None, "scale of the scores' adapters is this / rank", DMD)
    real_score: str | None = flag(
        None, "what the student is matched with: the teacher's guided score (published), or that of samples it solved "
        "(a third adapter learns it)", DMD, choices=("guided", "samples"))
    score_sigma_max: float | None = flag(None, "largest sigma at which scores are compared", DMD)
    score_draws: int | None = flag(None, "(sigma, noise) draws per sample in the scores' loss, high phase", DMD)
    real_score_guidance_scale: float | None = flag(
        None, "--real_score guided: guidance of the high teacher's score (default: the teacher's own)", DMD)
    real_score_guidance_scale_2: float | None = flag(
        None, "--real_score guided: guidance of the low teacher's score (default: the teacher's own)", DMD)
    diversity_weight: float | None = flag(None, "weight of the DP-DMD first-step loss; 0 = off", DMD)

    solver_points: int | None = flag(None, "points of the solver's grid, at --flow_shift", CONSISTENCY)
    huber_c: float = flag(1e-3, "where the pseudo-Huber loss turns from square to linear", CONSISTENCY)

    mixed_precision: str | None = flag(None, "dtype of the frozen base and of its arithmetic", MEMORY,
                                       choices=("no", "bf16", "fp16"))
    base_precision: str = flag("bf16", "the frozen base: bf16 = as --mixed_precision says, or quantised",
                               MEMORY, choices=("bf16", "fp8", "int8", "nf4"))
    shard: bool = flag(False, "spread the frozen base over all processes, where one card cannot hold it", MEMORY)
    context_parallel: bool = flag(False, "all processes work on each clip together, each on its part of the tokens",
                                  MEMORY)
    offload: bool = flag(False, "keep the frozen base's matrices in host memory; each travels when it is used", MEMORY)
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit moments (pip install bitsandbytes)", MEMORY)
    compile: bool = flag(False, "compile the transformer's blocks: slow to begin, faster afterwards", MEMORY)
    gradient_checkpointing: bool | None = flag(None, "recompute activations in the backward pass", MEMORY)
    sample_batch_size: int | None = flag(None, "samples at a time when nothing is trained", MEMORY)

    checkpointing_steps: int | None = flag(None, "updates between checkpoints", OUTPUT)
    checkpoints_total_limit: int | None = flag(2, "checkpoints kept per expert", OUTPUT)
    resume_from_checkpoint: str = flag(
        "latest", "'latest' (a run without checkpoints begins anew), or the folder of one checkpoint", OUTPUT)
    allow_config_change: bool = flag(False, "resume although settings that matter differ", OUTPUT)
    on_nonfinite: str = flag("stop", "when a loss or gradient is NaN or infinite; the update is never made", OUTPUT,
                             choices=("stop", "skip"))
    nonfinite_limit: int = flag(10, "skipped updates per expert after which the run stops all the same", OUTPUT)
    logging_steps: int = flag(10, "updates between lines of metrics.jsonl", OUTPUT)
    monitor_steps: int | None = flag(
        None, "student updates between looks at its samples (motion, exposure, diversity); 0 = never", OUTPUT)
    monitor_samples: int | None = flag(None, "clips a look, two seeds a prompt", OUTPUT)
    save_merged: bool | None = flag(None, "also write a complete pipeline, adapters merged in (default: tiny only)",
                                    OUTPUT)
    evaluate: bool | None = flag(None, "measure the student against its teacher at the end (default: tiny only)",
                                 OUTPUT)
    evaluate_only: bool = flag(False, "measure what --output_dir already holds, train nothing", OUTPUT)
    eval_samples: int = flag(512, "samples a side in the evaluation", OUTPUT)
    eval_seed: int = flag(1, "seed of the evaluation's noise", OUTPUT)
    validation_steps: int | None = flag(None, "updates between previews, teacher beside student; 0 = none", OUTPUT)
    validation_prompt: str | None = flag(
        None, "prompt of the previews, several separated by | (default: three that are not trained on)", OUTPUT)
    fps: int = flag(16, "frames a second of the videos written (Wan: 16)", OUTPUT)
    report_to: str = flag("none", "tracker that gets the metrics too", OUTPUT,
                          choices=("tensorboard", "wandb", "trackio", "none"))
    tracker_project_name: str = flag("wan-distill", "project in the tracker", OUTPUT)
    push_to_hub: bool = flag(False, "upload LoRAs, scheduler, model card and previews at the end", OUTPUT)
    hub_model_id: str | None = flag(None, "repository on the hub (default: the output folder's name)", OUTPUT)
    hub_token: str | None = flag(None, "token to upload with (default: the one of `hf auth login`)", OUTPUT)
    debug: bool = flag(False, "show tracebacks of bad input too", OUTPUT)

    @property
    def boundary(self) -> float | None:
        return self.boundary_ratio

    @property
    def grid_steps(self) -> int:
        """Steps of the finest grid; the coarser ones of a many-step student are nested in it."""
        return max(self.sampling_steps)

    def sigmas(self, steps: int | None = None) -> tuple[float, ...]:
        """The student's sigmas for `steps` sampling steps, terminal 0 included."""
        return sigma_grid(steps or self.grid_steps, self.flow_shift)

    @property
    def experts(self) -> tuple[str, ...]:
        """Experts to distil, in order."""
        if self.boundary is None:
            return ("high",)
        if self.expert != "both":
            return (self.expert,)
        # A single step is the high expert's: the low one then has nothing to learn.
        grids = [self.sigmas(n) for n in self.sampling_steps]
        return tuple(e for e in ("high", "low") if any(steps_of(e, grid, self.boundary) for grid in grids))

    @property
    def roles(self) -> tuple[str, ...]:
        """Who is trained: each gets an adapter and an optimizer."""
        scores = ("fake_score", "real_score") if self.real_score == "samples" else ("fake_score",)
        return ("student", *scores) if self.method == "dmd" else ("student",)

    def guidance(self, expert: str) -> float:
        """The teacher's guidance scale while `expert` denoises."""
        return self.guidance_scale if expert == "high" else self.guidance_scale_2

    def score_guidance(self, expert: str) -> float:
        """Guidance of the teacher's score in distribution matching."""
        scale = self.real_score_guidance_scale if expert == "high" else self.real_score_guidance_scale_2
        return self.guidance(expert) if scale is None else scale

    def adapter_alpha(self, role: str) -> float:
        """alpha of a role's adapter; its effect is scaled by alpha / rank."""
        return self.lora_alpha if role == "student" else self.fake_score_lora_alpha

    @property
    def base_key(self) -> dict:
        """What tells a quantised teacher's stored samples from the plain one's, in the keys they are found by."""
        return {} if self.base_precision == "bf16" else {"base": self.base_precision}

    def to_json(self) -> dict:
        """Plain values of every setting but the secret one, for run.json and for telling whether two runs agree."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
                if k != "hub_token"}


# ---------------------------------------------------------------------------------- defaults by teacher and method

EMBEDDED = dict(
    height=64, width=64, num_frames=17, max_sequence_length=16, negative_prompt="", method="trajectory",
    mixed_precision="no", gradient_checkpointing=False, save_merged=True, evaluate=True, train_batch_size=32,
    sample_batch_size=64, checkpointing_steps=250, validation_steps=200, monitor_steps=200, monitor_samples=32,
)
REAL = dict(
    height=480, width=832, num_frames=81, max_sequence_length=512, negative_prompt=WAN_NEGATIVE_PROMPT,
    method="dmd", mixed_precision="bf16", gradient_checkpointing=True, save_merged=False, evaluate=False,
    train_batch_size=1, sample_batch_size=1, checkpointing_steps=50, validation_steps=100,
    monitor_steps=50, monitor_samples=8,
)
SHARED = dict(critic_warmup_steps=100, critic_updates=5, fake_score_learning_rate=2e-5, fake_score_lora_alpha=64.0,
              score_draws=2, real_score="guided", score_sigma_max=0.98, diversity_weight=0.05, solver_points=48)
METHOD = {  # (method, embedded teacher?) -> defaults
    ("trajectory", True): dict(max_train_steps=600, learning_rate=2e-3, num_trajectories=1024, adam_beta1=0.9,
                               lr_scheduler="cosine", ema_decay=0.0, ema_start=0, lora_alpha=64.0),
    ("trajectory", False): dict(max_train_steps=2000, learning_rate=1e-4, num_trajectories=2000, adam_beta1=0.9,
                                lr_scheduler="cosine", ema_decay=0.99, ema_start=200, lora_alpha=64.0),
    ("dmd", True): dict(max_train_steps=120, learning_rate=7e-4, num_trajectories=1024, adam_beta1=0.9,
                        lr_scheduler="cosine", ema_decay=0.95, ema_start=20, lora_alpha=64.0,
                        fake_score_learning_rate=1e-3, critic_warmup_steps=100, critic_updates=2, score_draws=2,
                        real_score="samples", diversity_weight=1.0, train_batch_size=16,
                        monitor_steps=20, monitor_samples=256),
    ("dmd", False): dict(max_train_steps=400, learning_rate=5e-5, num_trajectories=2000, adam_beta1=0.0,
                         lr_scheduler="constant_with_warmup", ema_decay=0.99, ema_start=200, lora_alpha=8.0),
    ("consistency", True): dict(max_train_steps=500, learning_rate=2e-3, num_trajectories=1024, adam_beta1=0.9,
                                lr_scheduler="cosine", ema_decay=0.95, ema_start=50, lora_alpha=64.0,
                                solver_points=24),
    ("consistency", False): dict(max_train_steps=3000, learning_rate=1e-5, num_trajectories=1000, adam_beta1=0.9,
                                 lr_scheduler="constant_with_warmup", ema_decay=0.99, ema_start=200, lora_alpha=64.0),
}
# What --method dmd changes where it refines a student (--init_student_from): at full rate, or judged by a critic that
# does not know that student yet, the first updates undo what it began with.
WARM_DMD = {
    True: dict(max_train_steps=45, learning_rate=1e-4, critic_warmup_steps=200, critic_updates=3, monitor_steps=15),
    False: dict(learning_rate=5e-6, real_score="samples"),
}
# What --student_layers changes: all weights are trained, not an adapter.
WHOLE_STUDENT = {True: dict(learning_rate=1e-3), False: dict(learning_rate=2e-5)}
REASONS = {  # printed at the start of a run with --method dmd
    "learning_rate": "no larger than the critic can follow; lower by default where a warm start is refined",
    "real_score": "guided scores are no distribution's: students drift; samples cost solving, and a third adapter",
    "fake_score_learning_rate": "the critic must keep up with the student",
    "real_score_guidance_scale": "of guided scores; None = the teacher's own; they over-saturate: lower it if it does",
    "real_score_guidance_scale_2": "the same for the low expert",
    "negative_prompt": "what the teacher's score is guided away from, as in its own sampling",
    "critic_warmup_steps": "the critic must know the student before it judges it",
    "critic_updates": "the student moves while the critic follows: 5 to 1 in DMD2",
    "score_sigma_max": "only near 1 can the score see a clip's brightness: raise it if clips grow light or dark",
    "score_draws": "the high phase's target is 100 times noisier than plain flow matching's: average",
    "diversity_weight": "matching alone lets samples of one prompt grow alike (DP-DMD)",
    "ema_decay": "single updates of a matching loss are noisy",
    "adam_beta1": "0 as published: the critic's direction turns (DMD2); the tiny teacher's large rates need momentum",
    "max_grad_norm": "one bad rollout must not undo a hundred good ones",
}


def resolve(config: Config, teacher) -> Config:
    """Fills every None for this teacher (`teacher.TeacherInfo`) and method, and refuses what cannot work."""
    family = EMBEDDED if teacher.embedded else REAL
    chosen = dict(sampling_steps=(4,), boundary_ratio=teacher.boundary_ratio, **teacher.sampling_defaults, **family)
    method = config.method or family["method"]
    chosen |= SHARED | METHOD[(method, teacher.embedded)]
    if method == "dmd" and config.init_student_from:
        chosen |= WARM_DMD[teacher.embedded]
    if method == "trajectory" and teacher.embedded and max(config.sampling_steps or chosen["sampling_steps"]) <= 2:
        chosen["max_train_steps"] = 900  # long steps are harder to regress: after 600, samples are a tenth too alike
    if config.student_layers is not None:
        chosen |= dict(save_merged=True) | WHOLE_STUDENT[teacher.embedded]
    missing = {k: v for k, v in chosen.items() if getattr(config, k) is None}
    config = dataclasses.replace(config, **missing)
    if config.output_dir is None:
        steps = "-".join(map(str, config.sampling_steps))
        name = f"{teacher.name}-{config.method}-{steps}steps"
        config = dataclasses.replace(config, output_dir=str(Path("outputs") / name))
    check_values(config)
    check_sides(config, teacher.side_multiple)
    check_student_layers(config, teacher)
    check_schedule(config, teacher)
    return config


POSITIVE = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "num_trajectories", "teacher_steps",
            "rank", "lora_alpha", "flow_shift", "teacher_shift", "max_sequence_length", "learning_rate",
            "max_grad_norm", "adam_epsilon", "sample_batch_size", "checkpointing_steps", "logging_steps",
            "eval_samples", "fps", "critic_updates", "fake_score_learning_rate", "fake_score_lora_alpha", "score_draws",
            "solver_points", "huber_c", "monitor_samples", "nonfinite_limit")
FRACTIONS = ("adam_beta1", "adam_beta2", "ema_decay")
NOT_NEGATIVE = ("critic_warmup_steps", "diversity_weight", "seed", "eval_seed", "lr_warmup_steps", "ema_start",
                "adam_weight_decay", "monitor_steps", "validation_steps")


def check_values(config: Config) -> None:
    """Ranges that hold for every teacher. Raises UsageError."""
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name} {value}: must be a finite number")
        if value is None or isinstance(value, (str, tuple)):
            continue
        if name in POSITIVE and not value > 0:
            raise UsageError(f"--{name} {value}: must be greater than 0")
        if name in FRACTIONS and not 0 <= value < 1:
            raise UsageError(f"--{name} {value}: must be at least 0 and below 1")
        if name in NOT_NEGATIVE and value < 0:
            raise UsageError(f"--{name} {value}: must not be negative")
        if name.removeprefix("real_score_") in ("guidance_scale", "guidance_scale_2") and value < 1:
            raise UsageError(f"--{name} {value}: guidance starts at 1, which is off")
    if config.checkpoints_total_limit is not None and config.checkpoints_total_limit < 1:
        raise UsageError(f"--checkpoints_total_limit {config.checkpoints_total_limit}: keep at least 1 to resume from")
    if foreign := [name for name in config.lora_layers if name not in LORA_TARGETS]:
        raise UsageError(f"--lora_layers {','.join(config.lora_layers)}: Wan's blocks have no {foreign[0] or 'such'} "
                         f"layer; choose from {','.join(LORA_TARGETS)}")
    if config.score_sigma_max is not None and not 0.9 <= config.score_sigma_max < 1:
        raise UsageError(f"--score_sigma_max {config.score_sigma_max}: must be at least 0.9 and below 1 (DMD2: 0.98)")
    if config.num_frames < 1 or config.num_frames % 4 != 1:
        near = max(1, (config.num_frames - 1) // 4 * 4 + 1)
        raise UsageError(f"--num_frames {config.num_frames}: Wan needs 4k+1 frames; use {near} or {near + 4}")
    if config.max_sequence_length < 2:
        raise UsageError(f"--max_sequence_length {config.max_sequence_length}: need room for one word and its end mark")


def check_sides(config: Config, multiple: int) -> None:
    """Height and width are whole patches. Raises UsageError."""
    for name in ("height", "width"):
        side = getattr(config, name)
        if side < multiple or side % multiple:
            near = max(multiple, side // multiple * multiple)
            raise UsageError(
                f"--{name} {side}: Wan's patches need a multiple of {multiple}; use {near} or {near + multiple}")


def check_student_layers(config: Config, teacher) -> None:
    """Raises UsageError where a shallower student cannot be made, or not in this way."""
    layers, total = config.student_layers, teacher.transformer["num_layers"]
    if layers is None:
        return
    if not 1 <= layers <= total:
        raise UsageError(f"--student_layers {layers}: {teacher.name} has {total} blocks; give 1 to {total}")
    if config.method != "trajectory":
        raise UsageError(f"--student_layers {layers}: --method {config.method} needs the teacher beneath the student; "
                         "use --method trajectory")
    clashing = [flag for flag, given in (
        ("--init_student_from", config.init_student_from), ("--offload", config.offload), ("--shard", config.shard),
        (f"--base_precision {config.base_precision}", config.base_precision != "bf16"),
        ("--no-save_merged", not config.save_merged)) if given]
    if clashing:
        raise UsageError(f"--student_layers {layers}: all weights are trained and a pipeline is written; leave "
                         f"{clashing[0]} out")


def check_schedule(config: Config, teacher) -> None:
    """Grids are nested; each expert that is trained owns a step, and owns it at inference too. Raises UsageError."""
    for steps in config.sampling_steps:
        if config.grid_steps % steps:
            listing = ",".join(map(str, config.sampling_steps))
            raise UsageError(f"--sampling_steps {listing}: the sigmas of {steps} steps "
                             f"are not among those of {config.grid_steps}; use divisors of the largest, such as 2,4,8")
    boundary = config.boundary
    if boundary is None:
        if config.expert == "low":
            raise UsageError(f"--expert low: {teacher.name} has a single transformer; leave --expert out")
        return
    if teacher.boundary_ratio is None:
        raise UsageError(f"--boundary_ratio {boundary}: {teacher.name} has a single transformer; leave it out")
    if not 0 < boundary < 1:
        raise UsageError(f"--boundary_ratio {boundary}: must lie between 0 and 1 (Wan2.2 T2V: 0.875)")
    if config.score_sigma_max <= boundary:
        raise UsageError(f"--score_sigma_max {config.score_sigma_max}: leaves the high expert, which works above "
                         f"{boundary:g}, no score; raise it")
    for steps in config.sampling_steps:
        sigmas = config.sigmas(steps)
        for sigma in sigmas[:-1]:
            if abs(sigma - boundary) < 1e-4:
                raise UsageError(
                    f"--flow_shift {config.flow_shift:g} with {steps} steps: sigma {sigma:.4f} sits on the boundary "
                    f"{boundary:g}, where rounding picks the expert; choose another --flow_shift, such as 5")
            if expert_of(sigma, boundary) != expert_of(sigma, teacher.boundary_ratio):
                raise UsageError(
                    f"--boundary_ratio {boundary:g}: the step at sigma {sigma:.4f} would be run by the other expert at "
                    f"inference, where the teacher's pipeline splits at {teacher.boundary_ratio:g}; "
                    "leave --boundary_ratio out")
    for expert in config.experts:
        if not any(steps_of(expert, config.sigmas(steps), boundary) for steps in config.sampling_steps):
            listing = ", ".join(f"{sigma:.4f}" for sigma in config.sigmas()[:-1])
            other = "high" if expert == "low" else "low"
            raise UsageError(
                f"--expert {config.expert}: the {expert} expert owns none of the steps (sigmas {listing}; "
                f"boundary {boundary:g}); use --expert {other}, more --sampling_steps or another --flow_shift")


# ------------------------------------------------------------------------------------------------ the command line


EXAMPLES = """\
examples:
  python train_distillation.py                                  the whole job on the embedded tiny teacher
  python train_distillation.py --sampling_steps 2               the same, for a 2-step student
  python train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers --dry_run
  python train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers --prompts prompts.txt

exit codes: 0 done, 2 bad input (one line says what to change), 75 stopped by a signal, all saved (run again to go on),
1 anything else
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def _kind(annotation) -> type:
    """The scalar type of an annotation such as `int | None`."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train_distillation.py", usage="%(prog)s [flags]", allow_abbrev=False, epilog=EXAMPLES,
        description="Distil a Wan text-to-video teacher into a student that samples in a few steps without guidance.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110))
    groups: dict[str, argparse._ArgumentGroup] = {}
    hints = typing.get_type_hints(Config)
    for item in dataclasses.fields(Config):
        meta = item.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        kind, text = _kind(hints[item.name]), meta["help"]
        if item.default not in (None, False, ()) and kind is not bool and not meta["parse"]:
            text += f" (default {item.default})"
        options = dict(dest=item.name, default=argparse.SUPPRESS, help=text.replace("%", "%%"))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= dict(type=meta["parse"] or kind, choices=meta["choices"])
            if not meta["choices"]:
                options["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
        group.add_argument(f"--{item.name}", *meta["alias"], **options)
    groups[START].add_argument("--config", metavar="FILE.yaml", default=None,
                               help="read settings from a file; flags on the command line win")
    return parser


def parse_args(argv: list[str]) -> Config:
    """Command line -> Config. Raises UsageError naming the flag, the value and the remedy."""
    parser = build_parser()
    if empty := [given for given in argv if given.endswith("=--")]:  # argparse would take it for a list
        raise UsageError(f"{empty[0]}: '--' is no value; leave the flag out")
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(_unknown(unknown[0], [o for a in parser._actions for o in a.option_strings]))
    settings = vars(known)
    file = settings.pop("config", None)
    return Config(**{**(_read_yaml(file) if file else {}), **settings})


def _unknown(given: str, flags: list[str]) -> str:
    name = given.split("=")[0]
    close = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), flags, n=1)
    hint = f"did you mean {close[0]}?" if close else "see --help"
    return f"{name}: there is no such flag; {hint}"


def _read_yaml(file: str) -> dict:
    """Settings of a flat YAML file, checked by the same parser as the flags."""
    import yaml

    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {file}: cannot be read ({one_line(error)}); give a YAML file") from error
    if not isinstance(settings, dict):
        raise UsageError(f"--config {file}: must hold 'flag: value' lines")
    argv = []
    for name, value in settings.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            argv.append(f"--{name}={text}")
    known, unknown = build_parser().parse_known_args(argv)
    if unknown:
        flags = [f"--{item.name}" for item in dataclasses.fields(Config)]
        raise UsageError(f"--config {file}: {_unknown(unknown[0], flags)}")
    return {k: v for k, v in vars(known).items() if k != "config"}


def speak_plainly() -> None:
    """What stdout or stderr cannot encode, such as Wan's negative prompt in a Windows pipe, is shown as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a caller has put something else in its place
            stream.reconfigure(errors="backslashreplace")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
