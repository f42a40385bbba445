"""What identifies the files that a part of the teacher is loaded from; no torch.

The content counts, not the container: a checkpoint that was divided into other shards, renamed for
a variant, or lies beside files that nothing loads, is the same checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from wan_distill.settings.reading import read_header, read_json
from wan_distill.settings.weight_files import variant_or_none, weight_files

READ_WHOLE = 64 << 20  # bytes: the weights of a part up to this size are hashed whole
SAMPLE_BYTES = 1 << 14  # read at the start, the middle and the end of each larger tensor
# What transformers reads of a tokenizer's folder.
TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)
# Entries of config.json that only say where the file comes from.
NOT_CONTENT = ("_name_or_path", "_diffusers_version", "transformers_version")


def fingerprint_part(folder: Path, variant: str | None = None) -> str:
    """64 hexadecimal digits that change with the configuration or the weights that are loaded from
    `folder`, one part of a pipeline; of a tokenizer, with any file that is read.

    Each tensor's name, dtype and shape are hashed, and its values: all of them in a part of up to
    64 MiB, otherwise 16 KiB at three places of each tensor, since whole files of 28 GB would take
    minutes. Raises FileError where a loader finds no whole weight files.
    """
    digest = hashlib.sha256()
    if folder.name == "tokenizer":
        for file in (folder / name for name in TOKENIZER_FILES):
            if file.is_file():
                digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
        return digest.hexdigest()
    files = weight_files(folder, variant_or_none(folder, variant))
    config = read_json(folder / "config.json")
    content = {name: value for name, value in config.items() if name not in NOT_CONTENT}
    digest.update(json.dumps(content, sort_keys=True).encode())
    states = [(file, file.stat()) for file in files]
    digest.update(_of_weights(tuple((file, s.st_size, s.st_mtime_ns) for file, s in states)))
    return digest.hexdigest()


def fingerprint_file(file: Path) -> str:
    """The same of a single safetensors file. Raises FileError where it is damaged."""
    state = file.stat()
    return _of_weights(((file, state.st_size, state.st_mtime_ns),)).hex()


def _of_weights(files: tuple[tuple[Path, int, int], ...]) -> bytes:
    """The hash of what lies in (file, size, time of its last change)."""
    if sum(size for _, size, _ in files) <= READ_WHOLE:
        return _hash_weights(files, whole=True)
    return _of_large(files)


@lru_cache
def _of_large(files: tuple[tuple[Path, int, int], ...]) -> bytes:
    return _hash_weights(files, whole=False)


def _hash_weights(files: tuple[tuple[Path, int, int], ...], whole: bool) -> bytes:
    digest = hashlib.sha256()
    places: dict[str, tuple[Path, int, int, Any]] = {}
    for file, size, _ in files:
        if file.suffix == ".safetensors":
            header, data = read_header(file)
            for name, about in header.items():
                if name != "__metadata__":
                    begin, end = about["data_offsets"]
                    what = (about["dtype"], about["shape"])
                    places[name] = (file, data + begin, end - begin, what)
        else:  # a pickle has no header to find its tensors by
            places[file.name] = (file, 0, size, "pickle")
    for name in sorted(places):
        file, start, size, what = places[name]
        digest.update(f"{name} {what} {size}\n".encode())
        with file.open("rb") as content:
            for offset, count in _samples(size, whole):
                content.seek(start + offset)
                digest.update(content.read(count))
    return digest.digest()


def _samples(size: int, whole: bool) -> list[tuple[int, int]]:
    """(offset, bytes) of what is read of `size` bytes."""
    if whole or size <= 3 * SAMPLE_BYTES:
        return [(0, size)]
    middle, last = size // 2, size - SAMPLE_BYTES
    return [(offset, SAMPLE_BYTES) for offset in (0, middle, last)]
