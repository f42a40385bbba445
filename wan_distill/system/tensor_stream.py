"""Writes a safetensors file tensor by tensor: of a model of many gigabytes, one is in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from wan_distill.system.files import written_aside

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape of each tensor that will come."""

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint8: "U8",
}


def write_stream(
    file: Path,
    layout: Layout,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes `tensors` as they come, in any order; the name `file` appears once all are on disk.

    Raises ValueError where a tensor is not as `layout` says or is missing, OSError where the disk
    is full.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    begins, end = {}, 0
    for name, (dtype, shape) in layout.items():
        begins[name], size = end, prod(shape) * dtype.itemsize
        end += size
        header[name] = dict(dtype=CODES[dtype], shape=list(shape), data_offsets=[end - size, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    written = set()
    with written_aside(file) as aside, aside.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            if layout.get(name) != (tensor.dtype, tuple(tensor.shape)):
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was not announced")
            out.seek(8 + len(text) + begins[name])
            data = tensor.detach().cpu().contiguous().reshape(-1)
            out.write(data.view(torch.uint8).numpy().data)  # numpy knows neither bf16 nor fp8
            written.add(name)
        if missing := layout.keys() - written:
            raise ValueError(f"{sorted(missing)[0]}: was announced and never came")
