"""Files that survive a kill at any instruction: the name appears only when the content is on disk."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from wan_distill.errors import UsageError


def write_atomically(file: Path, data: bytes) -> None:
    """The file holds either its old content or all of `data`, never part of it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)


def write_tensors(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """`save_file`, atomically: the name appears only when the content is on disk."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            temporary,
            metadata,
        )
    except SafetensorError as error:  # it wraps what the system said
        number = re.search(r"os error (\d+)", str(error))
        raise (
            OSError(int(number[1]), os.strerror(int(number[1])), str(file)) if number else error
        ) from error
    _sync(temporary)
    os.replace(temporary, file)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Forces a file, or on POSIX the entries of a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows has no handle to sync a folder by
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def claim(output_dir: Path) -> None:
    """Makes the output folder and shows that it can be written to. Raises UsageError."""
    probe = (
        output_dir / f".writable.{os.getpid()}"
    )  # its own: the processes of one run claim the same folder at once
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output_dir {output_dir}: cannot be written ({error.strerror}); choose another"
        ) from error
