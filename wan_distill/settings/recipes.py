"""Defaults of each method, with their reasons."""

from __future__ import annotations

from typing import Literal

from wan_distill.settings.config import WAN_NEGATIVE_PROMPT

Role = Literal["teacher", "student", "fake_score", "real_score"]
EMBEDDED = dict(
    height=64,
    width=64,
    num_frames=17,
    max_sequence_length=16,
    negative_prompt="",
    method="trajectory",
    mixed_precision="no",
    gradient_checkpointing=False,
    save_merged=True,
    evaluate=True,
    train_batch_size=32,
    sample_batch_size=64,
    checkpointing_steps=250,
    validation_steps=200,
    monitor_steps=200,
    monitor_samples=32,
)
REAL = dict(
    height=480,
    width=832,
    num_frames=81,
    max_sequence_length=512,
    negative_prompt=WAN_NEGATIVE_PROMPT,
    method="dmd",
    mixed_precision="bf16",
    gradient_checkpointing=True,
    save_merged=False,
    evaluate=False,
    train_batch_size=1,
    sample_batch_size=1,
    checkpointing_steps=50,
    validation_steps=100,
    monitor_steps=50,
    monitor_samples=8,
)
SHARED = dict(
    critic_warmup_steps=100,
    critic_updates=5,
    fake_score_learning_rate=2e-5,
    fake_score_lora_alpha=64.0,
    score_draws=2,
    real_score="guided",
    score_sigma_max=0.98,
    diversity_weight=0.05,
    solver_points=48,
)
METHOD = {  # (method, embedded teacher?) -> defaults
    ("trajectory", True): dict(
        max_train_steps=600,
        learning_rate=2e-3,
        num_trajectories=1024,
        adam_beta1=0.9,
        lr_scheduler="cosine",
        ema_decay=0.0,
        ema_start=0,
        lora_alpha=64.0,
    ),
    ("trajectory", False): dict(
        max_train_steps=2000,
        learning_rate=1e-4,
        num_trajectories=2000,
        adam_beta1=0.9,
        lr_scheduler="cosine",
        ema_decay=0.99,
        ema_start=200,
        lora_alpha=64.0,
    ),
    ("dmd", True): dict(
        max_train_steps=120,
        learning_rate=7e-4,
        num_trajectories=1024,
        adam_beta1=0.9,
        lr_scheduler="cosine",
        ema_decay=0.95,
        ema_start=20,
        lora_alpha=64.0,
        fake_score_learning_rate=1e-3,
        critic_warmup_steps=100,
        critic_updates=2,
        score_draws=2,
        real_score="samples",
        diversity_weight=1.0,
        train_batch_size=16,
        monitor_steps=20,
        monitor_samples=256,
    ),
    ("dmd", False): dict(
        max_train_steps=400,
        learning_rate=5e-5,
        num_trajectories=2000,
        adam_beta1=0.0,
        lr_scheduler="constant_with_warmup",
        ema_decay=0.99,
        ema_start=200,
        lora_alpha=8.0,
    ),
    ("consistency", True): dict(
        max_train_steps=500,
        learning_rate=2e-3,
        num_trajectories=1024,
        adam_beta1=0.9,
        lr_scheduler="cosine",
        ema_decay=0.95,
        ema_start=50,
        lora_alpha=64.0,
        solver_points=24,
    ),
    ("consistency", False): dict(
        max_train_steps=3000,
        learning_rate=1e-5,
        num_trajectories=1000,
        adam_beta1=0.9,
        lr_scheduler="constant_with_warmup",
        ema_decay=0.99,
        ema_start=200,
        lora_alpha=64.0,
    ),
}
# What --method dmd changes where it refines a student (--init_student_from): at full rate, or
# judged by a critic that
# does not know that student yet, the first updates undo what it began with.
WARM_DMD = {
    True: dict(
        max_train_steps=45,
        learning_rate=1e-4,
        critic_warmup_steps=200,
        critic_updates=3,
        monitor_steps=15,
    ),
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
