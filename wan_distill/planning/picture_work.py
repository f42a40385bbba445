"""The pictures that clips begin with: how many a job reads, and what encoding one takes."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode

from wan_distill.planning.decoding import TRACED
from wan_distill.planning.trace import Ledger
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.picture_source import source_config
from wan_distill.settings.recipes import reads_all_prompts
from wan_distill.settings.sample_specs import clips_of_source
from wan_distill.training.monitor import SEEDS
from wan_distill.training.previews import SHOWN


def pictures_read(stages: Sequence[Config], info: TeacherInfo, prompts: int) -> int:
    """How many pictures a job looks at, at most, where each of `prompts` has one. 0 for a teacher
    that takes none.
    """
    return prompts_read(stages, prompts) if info.takes_picture else 0


def prompts_read(stages: Sequence[Config], prompts: int) -> int:
    """How many of `prompts` a job reads, at most; `training.prompts_read` says which."""
    if any(map(reads_all_prompts, stages)):
        return prompts
    solved = max(stage.num_trajectories for stage in stages)
    checked = max(stage.monitor_samples // SEEDS * bool(stage.monitor_steps) for stage in stages)
    last = stages[-1]
    shown = SHOWN if last.validation_steps else 0
    if last.evaluate or last.evaluate_only:
        shown = max(shown, last.eval_samples // SEEDS)
    return min(prompts, solved + checked + shown)


def source_words(config: Config, info: TeacherInfo) -> list[str]:
    """Lines of the plan about the teacher that makes the pictures, where there is one."""
    source = info.picture_source
    if source is None:
        return []
    own = source_config(config, source)
    steps = len(clips_of_source(own, 1).sigmas) - 1
    return [
        f"Pictures  first frames of clips of {source.title}, solved in {steps} steps, guidance "
        f"{own.guidance_scale:g} (high), {own.guidance_scale_2:g} (low)"
    ]


def encoding_flops(config: Config, info: TeacherInfo) -> float:
    """Operations of the VAE for one picture that a clip begins with; 0 where a teacher takes none,
    or its VAE is not described.
    """
    if not (info.takes_picture and info.vae):
        return 0.0
    settings = json.dumps({k: v for k, v in info.vae.items() if not k.startswith("_")})
    frames = info.latent_shape(config)[1]
    clips = [(n - 1) * info.mask_channels + 1 for n in (min(frames, TRACED[0]), TRACED[1])]
    fewer, more = (_encoded(settings, (n, config.height, config.width)) for n in clips)
    return fewer + max(0, frames - TRACED[0]) * (more - fewer)


@functools.lru_cache(maxsize=64)
def _encoded(settings: str, clip: tuple[int, int, int]) -> float:
    """Operations of encoding a clip of (frames, height, width)."""
    with FakeTensorMode(), Ledger() as ledger, torch.no_grad():
        AutoencoderKLWan.from_config(json.loads(settings)).encode(torch.zeros(1, 3, *clip))
    return float(ledger.flops)
