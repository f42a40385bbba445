"""LoRA files from one layout into another, and LoRAs out of fine-tuned experts, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from wan_distill.errors import FileError, UsageError
from wan_distill.lora.files import Layer, LoraFile
from wan_distill.lora.layouts import named_for
from wan_distill.lora.ranks import Cut, cut_matrix
from wan_distill.model.expert_weights import ExpertWeights
from wan_distill.settings.lora_headers import PEFT_METADATA, LoraHeader
from wan_distill.settings.lora_names import Layout, is_trained, read_name
from wan_distill.settings.reading import read_header
from wan_distill.settings.weight_files import weight_files
from wan_distill.system.files import write_tensors
from wan_distill.system.tensor_stream import write_stream


def convert(header: LoraHeader, out: Path, layout: Layout) -> str:
    """Writes a LoRA in another layout; its dtypes and its metadata stay.

    Returns what was done, in words, and what the layout has no place for. Raises UsageError where
    the file holds values that are no numbers.
    """
    lora = LoraFile(header)
    lora.check()
    left_out = list(header.unknown)

    def layers() -> Iterator[tuple[str, Tensor]]:
        for module in header.layers:
            yield from named_for(layout, module, lora.read(module))[0].items()

    announced = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in layers()}
    for module in header.layers:
        left_out += named_for(layout, module, lora.read(module))[1]
    if not announced:
        raise UsageError(f"{header.label}: nothing of it has a place in the {layout} layout")
    # alpha is written with each layer, or multiplied in.
    metadata = {k: v for k, v in header.metadata.items() if k != PEFT_METADATA}
    write_stream(out, announced, layers(), metadata)
    said = f"{out}: {len(header.layers)} layers, {header.layout} -> {layout}"
    if left_out:
        said += f"; left out, since it has no place for them: {len(left_out)} ({left_out[0]}, ...)"
    return said


def extract_lora(base: Path, tuned: Path, out: Path, rank: int, layout: Layout, dtype: str) -> str:
    """Writes the difference of two experts as a LoRA of `rank`. Returns what was lost, in words.

    Args:
        base, tuned: each a .safetensors file or a transformer's folder.
        dtype: `bf16` or `float32`.

    Raises UsageError where they are not two experts of one model.
    """
    stored = torch.bfloat16 if dtype == "bf16" else torch.float32
    before, after = open_expert(base), open_expert(tuned)
    if {n: before.shape(n) for n in before} != {n: after.shape(n) for n in after}:
        raise UsageError(f"--extract {tuned}: not of the same model as {base}; give two that are")
    tensors: dict[str, Tensor] = {}
    lost = total = 0.0
    others = []
    for name in before:
        difference = after[name].float() - before[name].float()
        module, _, leaf = name.rpartition(".")
        if not difference.isfinite().all():
            raise UsageError(
                f"--extract: {name} of {tuned} or of {base} holds values that are no numbers (nan "
                "or inf); give other files"
            )
        if not difference.any():
            continue
        if leaf != "weight" or not is_trained(module):
            others.append(name)
            continue
        part: Cut = cut_matrix(difference, rank)
        lost, total = lost + part.lost, total + part.total
        layer = Layer(part.down.to(stored), part.up.to(stored), 1.0, None, None)
        tensors |= named_for(layout, module, layer)[0]
    if not tensors:
        raise UsageError(f"--extract {tuned}: differs from {base} in no linear layer of a block")
    write_tensors(out, tensors)
    said = f"{out}: rank {rank}; relative error {math.sqrt(max(0.0, lost) / total):.2g}"
    if others:
        said += f"; left out, since no LoRA holds them: {len(others)} tensors ({others[0]}, ...)"
    return said


def open_expert(path: Path) -> ExpertWeights:
    """The tensors of an expert. Raises UsageError where there are none."""
    if not path.exists():
        raise UsageError(f"--extract {path}: there is no such file or folder; check the spelling")
    if (path / "model_index.json").is_file():
        raise UsageError(f"--extract {path}: is a pipeline; give its transformer/ folder")
    try:
        files = [path] if path.is_file() else weight_files(path)
        for file in files:
            if file.suffix == ".safetensors" and any(map(read_name, read_header(file)[0])):
                raise UsageError(f"--extract {path}: is a LoRA; give a whole expert")
    except FileError as error:
        raise UsageError(f"--extract {error}") from error
    if any(file.suffix != ".safetensors" for file in files):
        raise UsageError(f"--extract {path}: reads safetensors only; convert it")
    return ExpertWeights(files)
