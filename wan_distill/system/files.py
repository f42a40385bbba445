"""Files that survive a kill at any moment: a name appears once its content is on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wan_distill.errors import UsageError, one_line

ASIDE = "set-aside-"  # before the names of what is kept and not read any more
HASH = "sha256"  # of the tensors, in a file's metadata


class DamagedFile(Exception):
    """A file whose content is not what was written."""


@contextmanager
def written_aside(file: Path, ending: str = ".tmp", keep: bool = False) -> Iterator[Path]:
    """A name beside `file`, since a rename needs one disk, for this process to write to: it becomes
    `file` once all of it is on the disk. Where writing fails nothing stays: the next attempt needs
    the room.

    Args:
        ending: of that name, for writers that take the format from it.
        keep: whether a `file` of the same bytes stays as it is, with its time.
    """
    aside = file.with_name(f".{file.name}.{os.getpid()}{ending}")
    try:
        yield aside
        if keep and _same_bytes(aside, file):
            aside.unlink()
            return
        sync(aside)
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _same_bytes(file: Path, other: Path) -> bool:
    return other.is_file() and sha256(file) == sha256(other)


def write_atomically(file: Path, data: bytes) -> None:
    """Writes `data` to `file`, which at any moment holds either its old content or all of `data`.

    Raises OSError where the disk is full or the folder cannot be written to.
    """
    with written_aside(file) as aside:
        aside.write_bytes(data)


def write_tensors(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, as atomically as `write_atomically` does. One of the same bytes
    keeps its time, which tells of weights that have changed.

    Raises OSError, with the system's own error number, as `write_atomically` does.
    """
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with written_aside(file, keep=True) as aside:
        with system_errors(file):
            save_file(contiguous, aside, metadata)
        open_to_umask(aside)


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Raises what safetensors says of the system, while `path` is written, as an OSError."""
    try:
        yield
    except SafetensorError as error:  # the system's error is in its text only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def write_hashed(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """`write_tensors`, with a hash of all that is written, for `read_hashed`."""
    metadata = metadata or {}
    write_tensors(file, tensors, metadata | {HASH: hash_tensors(tensors, metadata)})


def read_hashed(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that `write_hashed` wrote. Raises DamagedFile where it is missing, cut
    off, or any of its bytes has changed since.
    """
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.offset_keys()}
            metadata = dict(content.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{file}: missing or damaged ({one_line(error)})") from error
    if metadata.pop(HASH, None) != hash_tensors(tensors, metadata):
        raise DamagedFile(f"{file}: missing or damaged (its bytes changed since it was written)")
    return tensors


def hash_tensors(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """SHA-256 of names, dtypes, shapes, values and metadata, as 64 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(metadata or {}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_to_umask(path: Path) -> None:
    """Gives a file, or all safetensors files below a folder, the permissions of any new file.

    safetensors lets nobody but the owner read what it writes, whatever the umask is.
    """
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        # The umask cannot be read without setting it, for all threads: a new file shows it.
        example = file.with_name(f".{file.name}.{os.getpid()}.mode")
        example.touch(0o666)
        mode = example.stat().st_mode
        example.unlink()
        file.chmod(mode & 0o777)


def sync(path: Path) -> None:
    """Forces a file's content, or on POSIX a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows has no handle to sync a folder by
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def rename_aside(path: Path) -> Path:
    """Gives a checkpoint or a file a name under which nothing looks for it."""
    count = sum(1 for _ in path.parent.glob(f"{ASIDE}*-{path.name}"))
    return path.rename(path.with_name(f"{ASIDE}{count}-{path.name}"))


def remove_folder(folder: Path) -> None:
    """Deletes a folder and what is in it, if it exists."""
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def lock_file(file: Path, is_main: bool) -> Iterator[None]:
    """Keeps other runs out of the folder of `file`; the system ends that with the process.

    Args:
        is_main: of several processes of one run, only the main one holds the lock.

    Raises UsageError where another run holds it.
    """
    lock = FileLock(file)
    try:
        if is_main:
            lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            f"--output_dir {file.parent}: another run is writing into it; wait until it ends, or "
            "choose another"
        ) from error
    except NotImplementedError:  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()


def make_output_folder(folder: Path, flag: str = "--output_dir") -> None:
    """Makes the folder that `flag` names and tries to write to it. Raises UsageError where that
    fails.
    """
    # The processes of one run do this at the same time, each with a file of its own.
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"{flag} {folder}: cannot be written ({error.strerror}); choose another"
        ) from error


def nearest_existing(path: Path) -> Path:
    """`path` or, where it does not exist yet, the nearest folder above it that does."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())


def place_to_write(folder: str, flag: str) -> Path:
    """Where the folder that `flag` names is or will be made: the nearest one that exists. Raises
    UsageError where that cannot be written.
    """
    place = nearest_existing(Path(folder))
    if not place.is_dir() or not os.access(place, os.W_OK):
        why = "not writable" if place.is_dir() else "a file, not a folder"
        raise UsageError(f"{flag} {folder}: {place} is {why}; choose another")
    return place
