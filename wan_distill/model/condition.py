"""What a clip is to show, in tensors: the same at every sigma, for every role."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What B clips are to show."""

    prompt: Tensor
    """[B, L, D], text embeddings, zero past each prompt's end."""
    image: Tensor | None = None
    """[B, M + C, F, H, W] of an image-to-video teacher: the mask of the frames that are given, and
    the latents of the given first frame, as `WanImageToVideoPipeline` makes them.
    """

    def beside(self, x: Tensor) -> Tensor:
        """What a transformer is given: noisy latents `x` [B, C, F, H, W], and after their channels
        those of the image.
        """
        return x if self.image is None else torch.cat([x, self.image], dim=1)

    def and_negative(self, negative: Tensor) -> Condition:
        """Of 2 B clips, for guidance in one forward: first these, then the same with the negative
        prompt. What is given of the clip is given to both.

        Args:
            negative: the negative prompt's embedding [1 or B, L, D].
        """
        prompt = torch.cat([self.prompt, negative.expand_as(self.prompt)])
        return Condition(prompt, None if self.image is None else self.image.repeat(2, 1, 1, 1, 1))
