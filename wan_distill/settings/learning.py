"""The settings of the optimizer and of each method."""

from __future__ import annotations

from dataclasses import dataclass

from wan_distill.settings.flags import CONSISTENCY, DMD, OPTIMISER, TRAJECTORY, flag


@dataclass(frozen=True)
class LearningSettings:
    """How the student learns."""

    train_batch_size: int = flag(None, "samples per micro-batch and process", OPTIMISER)
    gradient_accumulation_steps: int = flag(1, "micro-batches per update", OPTIMISER, free=True)
    learning_rate: float = flag(None, "peak learning rate of the student", OPTIMISER)
    lr_scheduler: str = flag(
        None,
        "learning-rate schedule",
        OPTIMISER,
        choices=("constant", "constant_with_warmup", "linear", "cosine"),
    )
    lr_warmup_steps: int = flag(10, "updates until the peak learning rate", OPTIMISER)
    adam_beta1: float = flag(None, "AdamW's first-moment decay", OPTIMISER)
    adam_beta2: float = flag(0.999, "AdamW's second-moment decay", OPTIMISER)
    adam_weight_decay: float = flag(0.0, "AdamW's weight decay (adapters want none)", OPTIMISER)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", OPTIMISER)
    max_grad_norm: float = flag(1.0, "clip the gradient's norm to this", OPTIMISER)
    ema_decay: float = flag(
        None, "decay of the student's moving average, which is exported; 0 = off", OPTIMISER
    )
    ema_start: int = flag(None, "update from which the average is taken", OPTIMISER)

    num_trajectories: int = flag(
        None, "samples to solve and store once, by any --method", TRAJECTORY
    )

    critic_warmup_steps: int = flag(
        None, "updates of each score alone before the first of the student", DMD
    )
    critic_updates: int = flag(
        None,
        "updates of each score before each of the student",
        DMD,
        alias=("--dfake_gen_update_ratio",),
    )
    fake_score_learning_rate: float = flag(
        None, "learning rate of the scores", DMD, alias=("--lr_critic",)
    )
    fake_score_lora_alpha: float = flag(None, "scale of the scores' adapters is this / rank", DMD)
    real_score: str = flag(
        None,
        "what the student is matched with: the teacher's guided score (published), or that of "
        "samples it solved "
        "(a third adapter learns it)",
        DMD,
        choices=("guided", "samples"),
    )
    score_sigma_max: float = flag(None, "largest sigma at which scores are compared", DMD)
    score_draws: int = flag(
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
    diversity_weight: float = flag(None, "weight of the DP-DMD first-step loss; 0 = off", DMD)

    solver_points: int = flag(None, "points of the solver's grid, at --flow_shift", CONSISTENCY)
    huber_c: float = flag(
        1e-3, "where the pseudo-Huber loss turns from square to linear", CONSISTENCY
    )
