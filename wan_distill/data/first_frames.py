"""Pictures that clips begin with: each is encoded once by the VAE, stored, and reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan_distill.errors import Halted, UsageError, one_line
from wan_distill.system.console import progress_bar
from wan_distill.system.files import DamagedFile, read_hashed, write_hashed
from wan_distill.system.runtime import to_device

HELD = 2**29  # bytes that are kept in host memory


class PicturedPrompt(NamedTuple):
    """A caption, and the picture that its clip begins with. Part of keys, as JSON."""

    text: str
    picture: str
    """the digest of its bytes"""


Prompt = str | PicturedPrompt


def text_of(prompt: Prompt) -> str:
    """The words of a prompt."""
    return prompt if isinstance(prompt, str) else prompt.text


class FirstFrames:
    """Latents and pixels of the pictures of one size, read from their cache when a batch asks for
    them.

    Args:
        folder: the cache; one file a picture.
        key: everything besides a picture's bytes that its latents depend on: the VAE's files, the
            size in pixels and frames, the device's kind.
        mask_channels: of the mask in front of the latents: frames per latent frame.
    """

    def __init__(
        self, folder: Path, key: Mapping[str, Any], mask_channels: int, device: torch.device
    ):
        self.folder = folder
        self.key = dict(key)
        self.mask_channels = mask_channels
        self.device = device
        self._held: dict[str, dict[str, Tensor]] = {}

    def file(self, picture: str) -> Path:
        """Of the picture with this digest."""
        text = json.dumps([self.key, picture], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def fill(
        self,
        pictures: Mapping[str, Callable[[], Tensor]],
        encode: Callable[[Tensor], Tensor],
        shown: bool,
    ) -> None:
        """Stores what is missing.

        Args:
            pictures: digest -> what reads its pixels [3, H, W] in [-1, 1].
            encode: such pixels -> normalised latents [C, F, h, w].
            shown: whether to show a progress bar.

        Raises Halted where the VAE gives latents that are not finite.
        """
        missing = self.missing(pictures)
        self.folder.mkdir(parents=True, exist_ok=True)
        with progress_bar(len(missing), "pictures", "picture", shown) as bar:
            for picture in missing:
                pixels = pictures[picture]()
                latents = encode(pixels).cpu()
                if not latents.isfinite().all():
                    raise Halted(
                        f"picture {picture}: the VAE gives latents that are not finite; download "
                        "the teacher again"
                    )
                write_hashed(self.file(picture), {"latents": latents, "pixels": pixels})
                bar.update()

    def missing(self, pictures: Iterable[str]) -> list[str]:
        """Those that are not in the cache."""
        return [picture for picture in dict.fromkeys(pictures) if not self.file(picture).exists()]

    def batch(self, prompts: Sequence[Prompt]) -> Tensor:
        """Mask and latents [B, M + C, F, h, w] of the prompts' pictures, on the device."""
        latents = torch.stack([self._read(prompt)["latents"] for prompt in prompts])
        mask = latents.new_zeros(len(latents), self.mask_channels, *latents.shape[2:])
        mask[:, :, 0] = 1  # the frames that are given
        return to_device(torch.cat([mask, latents], dim=1), self.device)

    def pixels(self, prompts: Sequence[Prompt]) -> Tensor:
        """The pictures [B, H, W, 3] in [0, 1], on the CPU."""
        pixels = torch.stack([self._read(prompt)["pixels"] for prompt in prompts])
        return pixels.permute(0, 2, 3, 1) / 2 + 0.5

    def _read(self, prompt: Prompt) -> dict[str, Tensor]:
        if isinstance(prompt, str):
            raise ValueError(f"prompt {prompt!r} has no picture")
        if prompt.picture not in self._held:
            size = sum(tensor.nbytes for held in self._held.values() for tensor in held.values())
            if size > HELD:
                self._held.clear()
            self._held[prompt.picture] = self._from_disk(prompt.picture)
        return self._held[prompt.picture]

    def _from_disk(self, picture: str) -> dict[str, Tensor]:
        try:
            return read_hashed(self.file(picture))
        except DamagedFile as error:
            raise UsageError(
                f"a damaged picture's latents, {one_line(error)}; delete it and run again"
            ) from error
