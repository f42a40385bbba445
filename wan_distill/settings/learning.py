"""The settings of the optimizer and of each method."""

from __future__ import annotations

from dataclasses import dataclass

from wan_distill.settings.flags import CONSISTENCY, DMD, OPTIMISER, TRAJECTORY, flag


@dataclass(frozen=True)
class LearningSettings:
    """How the student learns."""

    train_batch_size: int = flag(
        None,
        "samples per micro-batch and process (default: as many as --method wants per update, in "
        "micro-batches of about 4096 tokens)",
        OPTIMISER,
    )
    gradient_accumulation_steps: int = flag(
        None,
        "micro-batches per update and process (default: what is missing to that number; 1 where "
        "--train_batch_size is given)",
        OPTIMISER,
        free=True,
    )
    learning_rate: float = flag(
        None,
        "peak learning rate of the student (trajectory+dmd: of the first stage)",
        OPTIMISER,
    )
    refine_steps: int = flag(
        None,
        "trajectory+dmd: updates of the second stage, per expert (default: fewer where the first "
        "stage is shorter than usual)",
        OPTIMISER,
        free=True,
    )
    refine_expert: str = flag(
        None,
        "trajectory+dmd: which expert the second stage refines (default: low); both = high noise "
        "first, then low. The high one's took most of the time and changed nothing that was "
        "measured",
        OPTIMISER,
        choices=("low", "high", "both"),
    )
    refine_learning_rate: float = flag(
        None, "trajectory+dmd: peak learning rate of the second stage", OPTIMISER
    )
    optimizer: str = flag(
        None,
        "of adapters: muon (matrices only; half of AdamW's memory) or adamw",
        OPTIMISER,
        choices=("muon", "adamw"),
    )
    lr_scheduler: str = flag(
        None,
        "learning-rate schedule",
        OPTIMISER,
        choices=("constant", "constant_with_warmup", "linear", "cosine"),
    )
    lr_warmup_steps: int = flag(None, "updates until the peak learning rate", OPTIMISER)
    adam_beta1: float = flag(None, "AdamW's first-moment decay", OPTIMISER)
    adam_beta2: float = flag(0.999, "AdamW's second-moment decay", OPTIMISER)
    adam_weight_decay: float = flag(
        0.0, "weight decay of --optimizer (0 is usual for adapters)", OPTIMISER
    )
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", OPTIMISER)
    max_grad_norm: float = flag(
        1.0, "largest norm of the gradient; longer ones are scaled down", OPTIMISER
    )
    ema_decay: float = flag(
        None,
        "decay of the moving average of the student's weights, which is exported; 0 = off",
        OPTIMISER,
    )
    ema_start: int = flag(None, "student update at which the moving average begins", OPTIMISER)

    num_trajectories: int = flag(
        None,
        "number of teacher samples to draw from (any --method); those that are read are solved "
        "once and stored",
        TRAJECTORY,
    )

    critic_warmup_steps: int = flag(None, "critic updates before the student's first one", DMD)
    critic_updates: int = flag(
        None,
        "critic updates per student update",
        DMD,
        alias=("--dfake_gen_update_ratio",),
    )
    fake_score_learning_rate: float = flag(
        None, "learning rate of the critic (and of the samples' score)", DMD, alias=("--lr_critic",)
    )
    fake_score_lora_alpha: float = flag(None, "the critic's adapter is scaled by this / rank", DMD)
    critic_from_student: bool = flag(
        False, "the scores begin with the LoRA of --init_student_from too", DMD
    )
    real_score: str = flag(
        None,
        "what the student is matched with: guided = the teacher's guided score, as published; "
        "samples = its solved samples, whose score a third adapter learns; paired = the guided "
        "score, half at the student's samples and half at the teacher's own from the same noise",
        DMD,
        choices=("guided", "samples", "paired"),
    )
    score_sigma_max: float = flag(None, "largest sigma at which scores are compared", DMD)
    score_draws: int = flag(
        None, "draws of (sigma, noise) per sample in the critic's loss of the high expert", DMD
    )
    real_score_guidance_scale: float | None = flag(
        None,
        "--real_score guided or paired: guidance scale of the high expert's score (default: the "
        "teacher's scale S; of paired 2 S - 1)",
        DMD,
    )
    real_score_guidance_scale_2: float | None = flag(
        None,
        "--real_score guided or paired: guidance scale of the low expert's score (default: the "
        "teacher's scale S; of paired 2 S - 1)",
        DMD,
    )
    diversity_weight: float = flag(
        None,
        "weight of the loss on the first step, which keeps samples diverse (DP-DMD); 0 = off",
        DMD,
    )

    solver_points: int = flag(
        None, "number of sigmas in the teacher's grid, shifted by --flow_shift", CONSISTENCY
    )
    huber_c: float = flag(
        1e-3, "error at which the pseudo-Huber loss turns from square to linear", CONSISTENCY
    )
