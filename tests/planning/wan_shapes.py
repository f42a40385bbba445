"""Teachers by their configurations alone, and the measured memory of a real update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from wan_distill.maths.randomness import generator
from wan_distill.methods import make_method
from wan_distill.methods.consistency import ConsistencyBatch
from wan_distill.methods.dmd import DMDBatch
from wan_distill.methods.trajectory import TrajectoryBatch
from wan_distill.model.adapters import make_roles
from wan_distill.model.checkpointing import recompute_blocks
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.planning.memory import shape_of
from wan_distill.planning.trace import Ledger
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.resolve import resolve
from wan_distill.system.runtime import Runtime
from wan_distill.training.learner import make_learners

A14B = dict(
    num_attention_heads=40,
    attention_head_dim=128,
    ffn_dim=13824,
    num_layers=40,
    text_dim=4096,
    freq_dim=256,
    in_channels=16,
    out_channels=16,
    patch_size=[1, 2, 2],
)
A14B_I2V = A14B | dict(in_channels=36)
MIDDLE = A14B | dict(
    num_attention_heads=4, attention_head_dim=64, ffn_dim=1024, num_layers=4, text_dim=64
)
MIDDLE_CLIP = dict(
    train_batch_size=1,
    height=64,
    width=64,
    num_frames=17,
    mixed_precision="no",
    rank=8,
    max_sequence_length=32,
)


def teacher_of(transformer: dict[str, Any], folder: Path, **changes: Any) -> TeacherInfo:
    """A two-expert teacher without any file."""
    settings: dict[str, Any] = dict(
        source="random",
        folder=folder,
        name="random",
        embedded=False,
        boundary_ratio=0.875,
        expand_timesteps=False,
        transformer=transformer,
        vae={},
    )
    return TeacherInfo(**settings | changes)


def config_of(info: TeacherInfo, **changes: Any) -> Config:
    """Resolved settings for that teacher."""
    return resolve(Config(teacher_path="random", **changes), info)


def random_batch(config: Config, info: TeacherInfo, role: str) -> Any:
    """A micro-batch of the high expert, as `batch_at` gives it: noise in place of latents."""
    size = config.train_batch_size
    latents, tokens = info.latent_shape(config), config.max_sequence_length
    prompt = torch.randn(size, tokens, info.transformer["text_dim"])
    channels = info.transformer["in_channels"] - latents[0]
    given = torch.randn(size, channels, *latents[1:])
    condition = Condition(prompt, given if channels else None)
    x, end = torch.randn(size, *latents), torch.randn(size, *latents)
    sigmas = tuple(s for s in config.sigmas() if s > 0.8)
    if config.method == "trajectory":
        return TrajectoryBatch(x, sigmas, [end] * (len(sigmas) - 1), condition)
    if config.method == "consistency":
        points = (sigmas[0], (sigmas[0] + sigmas[1]) / 2, sigmas[1])
        return ConsistencyBatch(x, end, condition, prompt[:1], points)
    return DMDBatch(
        x=x,
        condition=condition,
        negative=prompt[:1],
        sigmas=sigmas,
        exit=len(sigmas) - 2,
        anchor=end if role == "student" and config.diversity_weight > 0 else None,
        teacher_end=end if config.real_score != "guided" else None,
    )


def measured(config: Config, info: TeacherInfo) -> Ledger:
    """A ledger of everything that is alive during two real updates of each role of the high expert:
    model, optimizers, one graph at a time. `flops` are those of all these updates.
    """
    ledger = Ledger()
    method = make_method(config, "high")
    with ledger:
        model = WanTransformer3DModel(**dict(shape_of(config, info).transformer))
        model.requires_grad_(False)
        parameters = make_roles(model, method.roles, config, "high")
        recompute_blocks(model, config)
        denoiser = Denoiser({"high": model}, config.boundary_ratio)
        learners = make_learners(method, parameters, config)
        runtime = Runtime(config)
        for role in method.roles * 2:
            batch = random_batch(config, info, role)
            total = torch.zeros(())
            with denoiser.training(role):
                for loss in method.losses(role, denoiser, batch, generator("measured")):
                    loss.value.backward()
                    total += loss.value.detach()
            learners[role].update(runtime, total)
    return ledger
