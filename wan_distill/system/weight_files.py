"""Which weight files a folder holds, and what their headers say, without loading a weight."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from wan_distill.errors import TextEncoderError


def weight_files(folder: Path) -> list[Path]:
    """The weight files that the index names, or all there are; safetensors before pickles."""
    for pattern in ("*.safetensors", "*.bin"):
        for index in sorted(folder.glob(f"{pattern}.index.json")):
            named = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
            missing = [name for name in named if not (folder / name).is_file()]
            if missing:
                raise TextEncoderError(
                    f"{folder}: {missing[0]} is named by {index.name} but missing; "
                    "download it again"
                )
            return [folder / name for name in named]
        if files := sorted(folder.glob(pattern)):
            return files
    raise TextEncoderError(
        f"{folder}: no weight file (*.safetensors or *.bin) here; download the text encoder again"
    )


def read_header(file: Path) -> tuple[dict, int]:
    """A safetensors file's header, and where its data begins. Raises TextEncoderError on a damaged
    file.
    """
    size = file.stat().st_size
    with file.open("rb") as data:
        start = data.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise TextEncoderError(f"{file}: truncated or not safetensors; download it again")
        try:
            header = json.loads(data.read(length))
        except ValueError as error:
            raise TextEncoderError(f"{file}: its header is damaged; download it again") from error
    end = max(
        (t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0
    )
    if 8 + length + end > size:
        raise TextEncoderError(
            f"{file}: truncated ({size} of {8 + length + end} bytes); download it again"
        )
    return header, 8 + length
