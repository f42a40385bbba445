"""Every setting of a run: one frozen dataclass, from which the command line is derived.

Settings left at None are filled in by `checks.resolve`, which knows what suits the teacher at hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from dataclasses import dataclass, field

from wan_distill.maths.sigmas import sigma_grid, steps_of

# Wan's own negative prompt (Wan2.2, wan/configs/shared_config.py); the teacher was tuned to be
# guided by it.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def flag(default, help: str, group: str, *, choices=None, alias: tuple[str, ...] = (), parse=None):
    """A dataclass field that is also the command-line flag `--<field name>`."""
    return field(
        default=default,
        metadata=dict(help=help, group=group, choices=choices, alias=alias, parse=parse),
    )


def step_counts(text: str) -> tuple[int, ...]:
    """'4' -> (4,); '2,4,8' -> (2, 4, 8)."""
    parts = str(text).split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a step count; give one such as 4, or several such as 2,4,8"
        )
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
        None,
        "hub id or folder of a Wan text-to-video pipeline (default: the tiny embedded teacher)",
        START,
        alias=("--pretrained_teacher_model",),
    )
    prompts: str | None = flag(
        None,
        ".txt (one a line), .json, .jsonl, .csv, a folder of .txt, or a `datasets` id (default: "
        "built in)",
        START,
    )
    output_dir: str | None = flag(
        None, "where everything goes (default: outputs/<teacher>-<method>-<steps>)", START
    )
    method: str | None = flag(
        None,
        "objective the student is trained with",
        START,
        choices=("dmd", "trajectory", "consistency"),
    )
    sampling_steps: tuple[int, ...] | None = flag(
        None,
        "steps the student samples in, e.g. 4, or 2,4,8 for one student that does all (default 4)",
        START,
        parse=step_counts,
    )
    max_train_steps: int | None = flag(None, "optimizer updates of the student, per expert", START)
    height: int | None = flag(None, "pixels, divisible by 16", START)
    width: int | None = flag(None, "pixels, divisible by 16", START)
    num_frames: int | None = flag(None, "frames, 4k+1", START)
    seed: int = flag(0, "every random draw follows from it", START)
    dry_run: bool = flag(False, "print the resolved plan and exit", START)

    expert: str = flag(
        "both",
        "which expert to distil; both = high noise first, then low",
        STUDENT,
        choices=("both", "high", "low"),
    )
    flow_shift: float = flag(
        5.0, "shift of the student's sigmas (not the teacher's: --teacher_shift)", STUDENT
    )
    boundary_ratio: float | None = flag(
        None,
        "sigma at and above which the high expert works (default: as the teacher folder says)",
        STUDENT,
    )
    max_sequence_length: int | None = flag(
        None, "text tokens the transformers see, padding included", STUDENT
    )
    rank: int = flag(64, "rank of the LoRA adapters", STUDENT, alias=("--lora_rank",))
    lora_alpha: float | None = flag(None, "scale of the student's adapter is alpha/rank", STUDENT)
    lora_layers: tuple[str, ...] = flag(
        LORA_TARGETS,
        "module-name suffixes that get an adapter",
        STUDENT,
        alias=("--lora_target_modules",),
        parse=words,
    )

    student_layers: int | None = flag(
        None,
        "a shallower student: this many of the teacher's blocks, all weights trained (--method "
        "trajectory)",
        STUDENT,
    )
    init_student_from: str | None = flag(
        None, "output folder of a run whose student this one begins with", STUDENT
    )

    teacher_steps: int = flag(40, "solver steps of the guided teacher (Wan2.2: 40)", TEACHER)
    teacher_shift: float | None = flag(
        None, "shift of the teacher's sigmas (Wan2.2 T2V-A14B: 12)", TEACHER
    )
    guidance_scale: float | None = flag(
        None, "guidance of the high expert; 1 = off (Wan2.2: 4)", TEACHER
    )
    guidance_scale_2: float | None = flag(
        None, "guidance of the low expert; 1 = off (Wan2.2: 3)", TEACHER
    )
    negative_prompt: str | None = flag(
        None, "prompt the teacher is guided away from (default: Wan's own)", TEACHER
    )
    revision: str | None = flag(
        None, "branch, tag or commit on the hub", TEACHER, alias=("--teacher_revision",)
    )
    variant: str | None = flag(None, "weight file variant, e.g. fp16", TEACHER)
    cache_dir: str | None = flag(None, "where hub files are kept", TEACHER)
    verbose_loading: bool = flag(False, "show every message of the loaders", TEACHER)
    allow_pickle: bool = flag(
        False, "also read .bin weights; unpickling can run code: only for files you trust", TEACHER
    )

    train_batch_size: int | None = flag(None, "samples per micro-batch and process", OPTIMISER)
    gradient_accumulation_steps: int = flag(1, "micro-batches per update", OPTIMISER)
    learning_rate: float | None = flag(None, "peak learning rate of the student", OPTIMISER)
    lr_scheduler: str | None = flag(
        None,
        "learning-rate schedule",
        OPTIMISER,
        choices=("constant", "constant_with_warmup", "linear", "cosine"),
    )
    lr_warmup_steps: int = flag(10, "updates until the peak learning rate", OPTIMISER)
    adam_beta1: float | None = flag(None, "AdamW's first-moment decay", OPTIMISER)
    adam_beta2: float = flag(0.999, "AdamW's second-moment decay", OPTIMISER)
    adam_weight_decay: float = flag(0.0, "AdamW's weight decay (adapters want none)", OPTIMISER)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", OPTIMISER)
    max_grad_norm: float = flag(1.0, "clip the gradient's norm to this", OPTIMISER)
    ema_decay: float | None = flag(
        None, "decay of the student's moving average, which is exported; 0 = off", OPTIMISER
    )
    ema_start: int | None = flag(None, "update from which the average is taken", OPTIMISER)

    num_trajectories: int | None = flag(
        None, "samples to solve and store once, by any --method", TRAJECTORY
    )

    critic_warmup_steps: int | None = flag(
        None, "updates of each score alone before the first of the student", DMD
    )
    critic_updates: int | None = flag(
        None,
        "updates of each score before each of the student",
        DMD,
        alias=("--dfake_gen_update_ratio",),
    )
    fake_score_learning_rate: float | None = flag(
        None, "learning rate of the scores", DMD, alias=("--lr_critic",)
    )
    fake_score_lora_alpha: float | None = flag(
        None, "scale of the scores' adapters is this / rank", DMD
    )
    real_score: str | None = flag(
        None,
        "what the student is matched with: the teacher's guided score (published), or that of "
        "samples it solved "
        "(a third adapter learns it)",
        DMD,
        choices=("guided", "samples"),
    )
    score_sigma_max: float | None = flag(None, "largest sigma at which scores are compared", DMD)
    score_draws: int | None = flag(
        None, "(sigma, noise) draws per sample in the scores' loss, high phase", DMD
    )
    real_score_guidance_scale: float | None = flag(
        None,
        "--real_score guided: guidance of the high teacher's score (default: the teacher's own)",
        DMD,
    )
    real_score_guidance_scale_2: float | None = flag(
        None,
        "--real_score guided: guidance of the low teacher's score (default: the teacher's own)",
        DMD,
    )
    diversity_weight: float | None = flag(
        None, "weight of the DP-DMD first-step loss; 0 = off", DMD
    )

    solver_points: int | None = flag(
        None, "points of the solver's grid, at --flow_shift", CONSISTENCY
    )
    huber_c: float = flag(
        1e-3, "where the pseudo-Huber loss turns from square to linear", CONSISTENCY
    )

    mixed_precision: str | None = flag(
        None,
        "dtype of the frozen base and of its arithmetic",
        MEMORY,
        choices=("no", "bf16", "fp16"),
    )
    base_precision: str = flag(
        "bf16",
        "the frozen base: bf16 = as --mixed_precision says, or quantised",
        MEMORY,
        choices=("bf16", "fp8", "int8", "nf4"),
    )
    shard: bool = flag(
        False, "spread the frozen base over all processes, where one card cannot hold it", MEMORY
    )
    context_parallel: bool = flag(
        False, "all processes work on each clip together, each on its part of the tokens", MEMORY
    )
    offload: bool = flag(
        False,
        "keep the frozen base's matrices in host memory; each travels when it is used",
        MEMORY,
    )
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit moments (pip install bitsandbytes)", MEMORY)
    compile: bool = flag(
        False, "compile the transformer's blocks: slow to begin, faster afterwards", MEMORY
    )
    gradient_checkpointing: bool | None = flag(
        None, "recompute activations in the backward pass", MEMORY
    )
    sample_batch_size: int | None = flag(None, "samples at a time when nothing is trained", MEMORY)

    checkpointing_steps: int | None = flag(None, "updates between checkpoints", OUTPUT)
    checkpoints_total_limit: int | None = flag(2, "checkpoints kept per expert", OUTPUT)
    resume_from_checkpoint: str = flag(
        "latest",
        "'latest' (a run without checkpoints begins anew), or the folder of one checkpoint",
        OUTPUT,
    )
    allow_config_change: bool = flag(False, "resume although settings that matter differ", OUTPUT)
    on_nonfinite: str = flag(
        "stop",
        "when a loss or gradient is NaN or infinite; the update is never made",
        OUTPUT,
        choices=("stop", "skip"),
    )
    nonfinite_limit: int = flag(
        10, "skipped updates per expert after which the run stops all the same", OUTPUT
    )
    logging_steps: int = flag(10, "updates between lines of metrics.jsonl", OUTPUT)
    monitor_steps: int | None = flag(
        None,
        "student updates between looks at its samples (motion, exposure, diversity); 0 = never",
        OUTPUT,
    )
    monitor_samples: int | None = flag(None, "clips a look, two seeds a prompt", OUTPUT)
    save_merged: bool | None = flag(
        None, "also write a complete pipeline, adapters merged in (default: tiny only)", OUTPUT
    )
    evaluate: bool | None = flag(
        None, "measure the student against its teacher at the end (default: tiny only)", OUTPUT
    )
    evaluate_only: bool = flag(
        False, "measure what --output_dir already holds, train nothing", OUTPUT
    )
    eval_samples: int = flag(512, "samples a side in the evaluation", OUTPUT)
    eval_seed: int = flag(1, "seed of the evaluation's noise", OUTPUT)
    validation_steps: int | None = flag(
        None, "updates between previews, teacher beside student; 0 = none", OUTPUT
    )
    validation_prompt: str | None = flag(
        None,
        "prompt of the previews, several separated by | (default: three that are not trained on)",
        OUTPUT,
    )
    fps: int = flag(16, "frames a second of the videos written (Wan: 16)", OUTPUT)
    report_to: str = flag(
        "none",
        "tracker that gets the metrics too",
        OUTPUT,
        choices=("tensorboard", "wandb", "trackio", "none"),
    )
    tracker_project_name: str = flag("wan-distill", "project in the tracker", OUTPUT)
    push_to_hub: bool = flag(
        False, "upload LoRAs, scheduler, model card and previews at the end", OUTPUT
    )
    hub_model_id: str | None = flag(
        None, "repository on the hub (default: the output folder's name)", OUTPUT
    )
    hub_token: str | None = flag(
        None, "token to upload with (default: the one of `hf auth login`)", OUTPUT
    )
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
        return tuple(
            e for e in ("high", "low") if any(steps_of(e, grid, self.boundary) for grid in grids)
        )

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
        scale = (
            self.real_score_guidance_scale if expert == "high" else self.real_score_guidance_scale_2
        )
        return self.guidance(expert) if scale is None else scale

    def adapter_alpha(self, role: str) -> float:
        """alpha of a role's adapter; its effect is scaled by alpha / rank."""
        return self.lora_alpha if role == "student" else self.fake_score_lora_alpha

    @property
    def base_key(self) -> dict:
        """What tells a quantised teacher's stored samples from the plain one's, in the keys they
        are found by.
        """
        return {} if self.base_precision == "bf16" else {"base": self.base_precision}

    def to_json(self) -> dict:
        """Plain values of every setting but the secret one, for run.json and for telling whether
        two runs agree.
        """
        return {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in dataclasses.asdict(self).items()
            if k != "hub_token"
        }
