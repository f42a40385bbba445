"""What of a teacher and its clips the defaults depend on."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from wan_distill.settings.assets import CAPTIONS
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo

# An evaluation of more operations is too slow for the counts that suit a CPU.
LARGE = 1e10
FLOAT32_LIMIT = 4e9  # bytes of one expert's float32 weights, beyond which they are kept in bf16


@dataclass(frozen=True)
class Scale:
    """The size of one teacher and of its clips."""

    width: int
    """channels of the transformer (A14B: 5120)"""
    parameters: float
    """of one expert, matrices only (A14B: 14e9)"""
    tokens: int
    """of one clip (A14B, 81 frames of 480x832: 32,760)"""
    devices: int
    """processes that share a batch"""
    takes_picture: bool = False
    """whether clips begin with a picture that is given (image to video)"""
    captions: int = 0
    """that a tiny teacher comes with, if no others are given (the embedded one: 120)"""

    @property
    def is_large(self) -> bool:
        """Whether one evaluation of one clip is beyond a CPU."""
        return 2 * self.parameters * self.tokens > LARGE

    @property
    def fits_float32(self) -> bool:
        return 4 * self.parameters < FLOAT32_LIMIT

    @property
    def caption_sets(self) -> int:
        """How many sets as large as the embedded teacher's hold its captions; at least 1."""
        return max(1, math.ceil(self.captions / REFERENCE_CAPTIONS))

    def by_width(self, value: float, power: float = 1.0) -> float:
        """A rate that is `value` at the embedded teacher's width and falls as 1 / width ** power.

        1 for Adam, which moves every weight by about the rate, whatever the gradient's size; the
        sum over a layer's inputs then moves by rate x width. (Yang et al., Tensor Programs V,
        arXiv 2203.03466, table 3: hidden weights under Adam.)

        0.5 for Muon, which changes a matrix of an adapter by 0.2 rate sqrt(width) in spectral norm.
        For the one with `width` inputs that norm should fall as 1 / sqrt(width), for the one with
        `width` outputs grow as sqrt(width). (Yang et al., A spectral condition for feature
        learning, arXiv 2310.17813, condition 1.) Both have one rate, so the norm is kept as it is.
        """
        return float(f"{value * (REFERENCE_WIDTH / self.width) ** power:.3g}")

    def at_once(self, most: int, tokens: int) -> int:
        """The largest power of 2 of samples that are at most `most` and `tokens`; at least 1."""
        room = min(float(most), tokens / self.tokens)
        return 2 ** max(0, math.floor(math.log2(room)))

    def batch(self, total: int) -> tuple[int, int]:
        """(samples per micro-batch and device, micro-batches per update), so that an update has
        about `total` samples over all devices: exactly where both are powers of 2.
        """
        share = max(1, total // self.devices)
        at_once = self.at_once(share, TOKENS_AT_ONCE)
        return at_once, share // at_once


REFERENCE_WIDTH = 128  # the embedded teacher's
REFERENCE_CAPTIONS = 120  # the embedded teacher's
TOKENS_AT_ONCE = 4096  # of a micro-batch: enough to keep the arithmetic busy


def scale_of(config: Config, teacher: TeacherInfo) -> Scale:
    """The scale of `teacher`, for the clip of `config`, whose sizes must be resolved."""
    shape = teacher.transformer
    width = shape["num_attention_heads"] * shape["attention_head_dim"]
    _, frames, height, cross = teacher.latent_shape(config)
    patch = shape["patch_size"]
    tokens = max(1, frames // patch[0] * (height // patch[1]) * (cross // patch[2]))
    # Two attentions of four matrices each, two matrices of the feed-forward.
    block = 8 * width**2 + 2 * width * shape["ffn_dim"]
    shares = 1 if config.context_parallel else processes(config)
    parameters = shape["num_layers"] * block
    captions = _captions_of(teacher) if config.prompts is None else 0
    return Scale(width, parameters, tokens, shares, teacher.takes_picture, captions)


def _captions_of(teacher: TeacherInfo) -> int:
    own = teacher.folder / CAPTIONS
    if teacher.world is None or not own.is_file():
        return 0
    return len(own.read_bytes().splitlines())  # what is no text, the reader of prompts refuses


def processes_here(config: Config) -> int:
    """Those on one machine; of several, this one."""
    here = None if config.gpu else os.environ.get("LOCAL_WORLD_SIZE")
    return processes(config) if here is None else int(here)


def processes(config: Config) -> int:
    """One per device: those that `--gpu` names, or this run's."""
    if config.gpu is None:
        return int(os.environ.get("WORLD_SIZE", 1))
    _, _, count = config.gpu.partition(":")
    return int(count) if count.isdecimal() and int(count) else 1
