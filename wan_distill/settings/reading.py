"""Reads JSON files and the headers of weight files, and says what is wrong with one that cannot be
read; no torch.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from wan_distill.errors import FileError, one_line

AGAIN = "download it again"
# The same of a file of the hub, whose cache keeps what it has.
FETCH_AGAIN = (
    "the hub's cache is not whole: delete that file if it is there, and run once with the network "
    "and without HF_HUB_OFFLINE"
)
# What lies under a name although it is something else: its first bytes, what it is, what helps.
PRETENDERS = (
    (b"version https://git-lfs", "a pointer of Git LFS and not the file", "run `git lfs pull`"),
    (b"\xef\xbb\xbf", "text that begins with a byte-order mark", "save it as UTF-8 without BOM"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"<", "a web page and not the file", "download it again, after `hf auth login`"),
    (b"GGUF", "a GGUF file", "give the folder of the same model in diffusers' layout"),
    (b"PK\x03\x04", "a pickle of torch", "convert it to safetensors"),
    (b"\x80\x02", "a pickle of torch", "convert it to safetensors"),
)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError, also where it is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileError."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "is a link to nothing" if file.is_symlink() else "is missing"
        raise FileError(f"{file}: {what}", AGAIN) from error
    except OSError as error:
        raise unreadable(file, error) from error
    except ValueError as error:
        _refuse_pretender(file)
        if not file.stat().st_size:
            raise FileError(f"{file}: is empty", AGAIN) from error
        reason = f"{file}: cannot be read ({one_line(error)})"
        raise FileError(reason, f"correct it, or {AGAIN}") from error
    if not isinstance(content, dict):
        raise FileError(f"{file}: is not a JSON object", AGAIN)
    return content


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the position in bytes where its data begins.

    The header maps each tensor's name to its dtype, shape and data_offsets (bytes from the start of
    the data); `__metadata__` is an entry of its own. Raises FileError on a damaged file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as data:
            start = data.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            text = data.read(length) if 8 + length <= size else b""
    except OSError as error:
        raise unreadable(file, error) from error
    if 8 + length > size:
        _refuse_pretender(file)
        raise FileError(f"{file}: truncated or not safetensors ({size} bytes)", AGAIN)
    try:
        header = parse_json(text)
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        _refuse_pretender(file)
        raise FileError(f"{file}: its header is damaged", AGAIN) from error
    if 8 + length + end > size:
        raise FileError(f"{file}: truncated ({size} of {8 + length + end} bytes)", AGAIN)
    return header, 8 + length


def check_pickle(file: Path) -> None:
    """Raises FileError where a .bin file is none of torch's, as far as its first bytes say."""
    try:
        with file.open("rb") as data:
            start = data.read(4)
    except OSError as error:
        raise unreadable(file, error) from error
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        _refuse_pretender(file)
        raise FileError(f"{file}: not a torch checkpoint", AGAIN)


def check_vocabulary(file: Path) -> None:
    """Raises FileError where a tokenizer's file is known to be something else, or empty."""
    if file.suffix == ".json":
        read_json(file)
        return
    try:
        size = file.stat().st_size
        _refuse_pretender(file)
    except OSError as error:
        raise unreadable(file, error) from error
    if not size:
        raise FileError(f"{file}: is empty", AGAIN)


def unreadable(file: Path, error: OSError) -> FileError:
    """What to tell about a file that is there and cannot be read."""
    if isinstance(error, PermissionError):
        remedy = "give this user permission to read it"
    else:
        remedy = AGAIN if isinstance(error, IsADirectoryError) else "check the disk"
    return FileError(f"{file}: cannot be read ({error.strerror})", remedy)


def _refuse_pretender(file: Path) -> None:
    """Raises FileError where `file` is known to be something else."""
    with file.open("rb") as data:
        start = data.read(32)
    for first_bytes, what, remedy in PRETENDERS:
        if start.startswith(first_bytes):
            raise FileError(f"{file}: is {what}", remedy)
