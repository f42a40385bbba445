"""Folders with tiny weight files under every name that a loader reads, or must not read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# by the stem of its file names, what each library writes into config.json
SETTINGS = {"model": {"model_type": "tiny"}, "diffusion_pytorch_model": {"_class_name": "Tiny"}}
KINDS = ("single", "shards", "bin", "bin shards", "single fp16", "shards fp16", "stray")


def empty_part(folder: Path, stem: str) -> Path:
    """A new folder with the config.json of one library and no weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SETTINGS[stem]))
    return folder


def save(tensors: dict[str, float], file: Path) -> None:
    content = {name: torch.tensor([value]) for name, value in tensors.items()}
    if file.suffix == ".bin":
        torch.save(content, file)
    else:
        save_file(content, file, {"format": "pt"})


def write(kind: str, folder: Path, stem: str, value: float) -> None:
    """Writes one checkpoint of KINDS, whose two weights a and b are `value`. "stray" is three files
    that no loader reads.
    """
    both = {"a": value, "b": value}
    if kind == "stray":
        for name in ("another.safetensors", f"._{stem}.safetensors", f"{stem}.tmp.safetensors"):
            save(both, folder / name)
        return
    variant = ".fp16" if kind.endswith("fp16") else ""
    suffix = "bin" if kind.startswith("bin") else "safetensors"
    if (stem, suffix) == ("model", "bin"):
        stem = "pytorch_model"
    if "shards" not in kind:
        save(both, folder / f"{stem}{variant}.{suffix}")
        return
    names = [f"{stem}{variant}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    save({"a": value}, folder / names[0])
    save({"b": value}, folder / names[1])
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}
    (folder / f"{stem}.{suffix}.index{variant}.json").write_text(json.dumps(index))


def values_in(files: list[Path]) -> set[float]:
    """The distinct weights in `files`."""
    values: set[float] = set()
    for file in files:
        is_pickle = file.suffix == ".bin"
        tensors = torch.load(file, weights_only=True) if is_pickle else load_file(file)
        values |= {float(tensor) for tensor in tensors.values()}
    return values
