"""What travels together through a run: the settings, the teacher, the prompts, the processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from wan_distill.data.embeddings import PromptEmbeddings
from wan_distill.data.first_frames import FirstFrames, Prompt, text_of
from wan_distill.layout import RunFolder
from wan_distill.maths.first_frames import first_frame_statistics
from wan_distill.maths.randomness import generator
from wan_distill.maths.sigmas import Expert
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.loading import Teacher, share_tokens
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.sample_specs import sampling_key
from wan_distill.system.runtime import Runtime


def caches_of(config: Config) -> RunFolder:
    """The folder below which samples and embeddings are kept. `config` must be resolved."""
    return RunFolder(Path(config.samples_dir or config.output_dir))


@dataclass(frozen=True)
class Run:
    """One run, after its settings are resolved and its prompts are encoded."""

    config: Config
    teacher: Teacher
    embeddings: PromptEmbeddings
    prompts: tuple[Prompt, ...]
    """The prompts to train on."""
    runtime: Runtime
    first_frames: FirstFrames | None = None
    """Of the prompts' pictures, where the teacher takes some."""

    @property
    def info(self) -> TeacherInfo:
        return self.teacher.info

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.output_dir))

    @property
    def caches(self) -> RunFolder:
        """Where samples and embeddings are kept: the run's own folder, or one it shares."""
        return caches_of(self.config)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[C, F, H, W] of one sample."""
        return self.info.latent_shape(self.config)

    def sampling_key(self, sigmas: Sequence[float], guided: bool) -> dict[str, Any]:
        """`sample_specs.sampling_key` of this run, with the text side and the pictures."""
        key = sampling_key(self.config, self.info, sigmas, guided) | dict(text=self.embeddings.key)
        if self.first_frames is not None:
            key |= dict(first_frames=self.first_frames.key)
        return key

    def condition(self, prompts: Sequence[Prompt]) -> Condition:
        """What clips of `prompts` are to show, on the device."""
        embeddings = self.embeddings.batch([text_of(prompt) for prompt in prompts])
        pictures = self.first_frames
        return Condition(embeddings, None if pictures is None else pictures.batch(prompts))

    def first_frame_statistics(self, prompts: Sequence[Prompt], frames: Tensor) -> dict[str, float]:
        """`maths.first_frames.first_frame_statistics` of clips [N, F, H, W, 3] of at least as many
        `prompts`; nothing where the teacher takes no pictures.
        """
        if self.first_frames is None:
            return {}
        return first_frame_statistics(frames, self.first_frames.pixels(prompts[: len(frames)]))

    def generator(self, expert: Expert, index: int) -> torch.Generator:
        """The source of every draw of one micro-batch of one expert, by its global index."""
        return generator(self.config.seed, expert, index)

    def denoiser(
        self, expert: Expert, transformer: WanTransformer3DModel, whole: bool = False
    ) -> Denoiser:
        """The Denoiser of one loaded expert with its adapters, in this run's arithmetic. One only.

        Args:
            whole: the transformer is a student itself, without a teacher beneath.
        """
        share_tokens(transformer, self.runtime)
        return Denoiser(
            {expert: transformer},
            self.config.boundary_ratio,
            self.info.expand_timesteps,
            whole,
            self.runtime.autocast,
        )

    @cached_property
    def negative(self) -> Tensor:
        """Embedding [1, L, D] of the negative prompt, on the device."""
        return self.embeddings.batch([self.config.negative_prompt])
