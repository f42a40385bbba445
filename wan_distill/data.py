"""Prompts and their embeddings: each distinct prompt is encoded once, stored at its true length, and reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from wan_distill.checkpoint import write_tensors
from wan_distill.config import REPOSITORY, Config, UsageError

BUILT_IN_PROMPTS = REPOSITORY / "assets" / "prompts.txt"


def read_prompts(file: Path) -> list[str]:
    """Prompts of a text file, one a line; empty lines and lines beginning with # are passed over.

    Raises UsageError when the file is missing, empty, binary or not UTF-8.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"--prompts {file}: cannot be read ({error.strerror}); give a text file") from error
    if "\0" in text:
        raise UsageError(f"--prompts {file}: a binary file; give text, one prompt a line")
    prompts = [line.strip() for line in text.splitlines()]
    prompts = list(dict.fromkeys(line for line in prompts if line and not line.startswith("#")))
    if not prompts:
        raise UsageError(f"--prompts {file}: holds no prompt; write one a line")
    return prompts


def split_prompts(config: Config, teacher) -> tuple[list[str], list[str]]:
    """(training, evaluation) prompts: never the same one in both.

    The embedded teacher brings captions it has never seen itself; of other lists every tenth is held out, by
    hash, so that the split does not depend on the list's order or length.
    """
    if config.prompts is None and teacher.embedded:
        return read_prompts(teacher.folder / "prompts.txt"), read_prompts(teacher.folder / "heldout_prompts.txt")
    prompts = read_prompts(Path(config.prompts) if config.prompts else BUILT_IN_PROMPTS)
    if len(prompts) == 1:
        return prompts, prompts
    digests = {p: hashlib.sha256(p.encode()).hexdigest() for p in prompts}
    held_out = [p for p in prompts if int(digests[p], 16) % 10 == 0] or [min(prompts, key=digests.get)]
    return [p for p in prompts if p not in set(held_out)] or held_out, held_out


class PromptBank:
    """Embeddings of prompts, read from their cache when a batch asks for them.

    Args:
        folder: the cache; one small file a prompt.
        key: everything besides the prompt that an embedding depends on: the fingerprint of the text encoder,
            the tokenizer, the length.
        length: tokens the transformers see; shorter prompts are padded with zeros, as `WanPipeline` does.
    """

    def __init__(self, folder: Path, key: dict, length: int, device: torch.device):
        self.folder = folder
        self.key = json.dumps(key, sort_keys=True)
        self.length = length
        self.device = device
        self._held: dict[str, Tensor] = {}

    def file(self, prompt: str) -> Path:
        return self.folder / (hashlib.sha256(f"{self.key}\n{prompt}".encode()).hexdigest()[:32] + ".safetensors")

    def missing(self, prompts: Sequence[str]) -> list[str]:
        return [p for p in dict.fromkeys(prompts) if not self.file(p).exists()]

    def store(self, prompt: str, embedding: Tensor) -> None:
        """Keeps `embedding` [L, D] at the prompt's true length: the rows past its end are zero, and are cut."""
        length = int(embedding.any(dim=1).nonzero().max()) + 1
        embedding = embedding[:length]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.file(prompt), {"embedding": embedding}, {"prompt": prompt})

    def batch(self, prompts: Sequence[str]) -> Tensor:
        """[B, length, D] on the device, zero past each prompt's end."""
        rows = [self._embedding(p) for p in prompts]
        batch = rows[0].new_zeros(len(rows), self.length, rows[0].shape[1])
        for padded, row in zip(batch, rows, strict=True):
            padded[: row.shape[0]] = row
        return batch.to(self.device, non_blocking=True)

    def _embedding(self, prompt: str) -> Tensor:
        if prompt not in self._held:
            if len(self._held) > 4096:  # bounds host memory; a file is read in well under a millisecond
                self._held.clear()
            self._held[prompt] = load_file(self.file(prompt))["embedding"]
        return self._held[prompt]
