"""Embeddings of prompts: each distinct prompt is encoded once, stored at its true length, and
reused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wan_distill.errors import Halted, UsageError, one_line
from wan_distill.system.console import progress_bar
from wan_distill.system.files import DamagedFile, read_hashed, write_hashed
from wan_distill.system.runtime import to_device


class PromptEmbeddings:
    """Embeddings of prompts, read from their cache when a batch asks for them.

    Args:
        folder: the cache; one small file a prompt.
        key: everything besides the prompt that an embedding depends on: the files of the text
            encoder and the tokenizer, the token table in use, the length, the dtype.
        length: tokens the transformers see; shorter prompts are padded with zeros, as `WanPipeline`
            does.
    """

    def __init__(self, folder: Path, key: dict, length: int, device: torch.device):
        self.folder = folder
        self.key = json.dumps(key, sort_keys=True)
        self.length = length
        self.device = device
        self._held: dict[str, Tensor] = {}

    def file(self, prompt: str) -> Path:
        return self.folder / (
            hashlib.sha256(f"{self.key}\n{prompt}".encode()).hexdigest()[:32] + ".safetensors"
        )

    def missing(self, prompts: Sequence[str]) -> list[str]:
        return [p for p in dict.fromkeys(prompts) if not self.file(p).exists()]

    def store(self, prompt: str, embedding: Tensor) -> None:
        """Keeps `embedding` [L, D] at the prompt's true length: the rows past its end are zero, and
        are cut.
        """
        if not embedding.isfinite().all():
            raise Halted(
                f"prompt {prompt!r}: its embedding is not finite; try --mixed_precision no"
            )
        length = int(embedding.any(dim=1).nonzero().max()) + 1
        embedding = embedding[:length]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_hashed(self.file(prompt), {"embedding": embedding}, {"prompt": prompt})

    def fill(self, prompts: Sequence[str], encode: Callable[[str], Tensor], shown: bool) -> None:
        """Stores what `encode` makes of those of `prompts` that are missing.

        Args:
            encode: prompt -> embedding [L, D], zero past the prompt's end.
            shown: whether to show a progress bar.
        """
        missing = self.missing(prompts)
        with progress_bar(len(missing), "prompts", "prompt", shown) as bar, torch.no_grad():
            for prompt in missing:
                self.store(prompt, encode(prompt))
                bar.update()

    def batch(self, prompts: Sequence[str]) -> Tensor:
        """[B, length, D] on the device, zero past each prompt's end."""
        rows = [self._embedding(p) for p in prompts]
        batch = rows[0].new_zeros(len(rows), self.length, rows[0].shape[1])
        for padded, row in zip(batch, rows, strict=True):
            padded[: row.shape[0]] = row
        return to_device(batch, self.device)

    def _embedding(self, prompt: str) -> Tensor:
        if prompt not in self._held:
            if (
                len(self._held) > 4096
            ):  # bounds host memory; a file is read in well under a millisecond
                self._held.clear()
            file = self.file(prompt)
            try:
                embedding = read_hashed(file)["embedding"]
            except (DamagedFile, KeyError) as error:
                raise UsageError(
                    f"a damaged prompt embedding, {one_line(error)}; delete it and run again"
                ) from error
            if not embedding.isfinite().all():
                raise UsageError(
                    f"{file}: the embedding of {prompt!r} is not finite; delete it and run again"
                )
            self._held[prompt] = embedding
        return self._held[prompt]
