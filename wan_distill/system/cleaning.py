"""The part of a run's folder that a finished student does not need."""

from __future__ import annotations

import re
from pathlib import Path

from wan_distill.errors import UsageError
from wan_distill.layout import RunFolder
from wan_distill.system.spent import read_spent

# A hash, or the number of a sample; notes about them. Whatever else lies there is the user's.
OURS = re.compile(r"([0-9a-f]{16,64}|\d{6}(\.handed-over)?)\.safetensors|(key|encoder)\.json")


def caches_in(folder: RunFolder) -> list[Path]:
    """The files of its caches: embeddings and solved samples, of earlier stages too."""
    return [
        file
        for cache in folder.caches
        for file in sorted(cache.rglob("*"))
        if OURS.fullmatch(file.name) and file.is_file()
    ]


def checkpoints_in(folder: RunFolder) -> list[Path]:
    """The files of its checkpoints."""
    return [file for f in folder.path.rglob("checkpoint-*") for file in f.rglob("*")]


def bytes_of(files: list[Path]) -> int:
    """Their bytes in all."""
    return sum(file.stat().st_size for file in files if file.is_file())


def check_run(folder: RunFolder) -> None:
    """Raises UsageError where `folder` is not a run's."""
    if not folder.plan.exists():
        raise UsageError(f"--clean: {folder.path} holds no run; give its --output_dir")


def remove_caches(folder: RunFolder) -> int:
    """Deletes them, and folders that are empty then. Returns the bytes that they took.

    Raises UsageError where the run is not finished.
    """
    if (spent := read_spent(folder.spent)) and not spent["finished"]:
        raise UsageError(
            f"--clean: the run in {folder.path} is not finished, and would solve its samples anew; "
            "run the same command without --clean to finish it, or delete the folder"
        )
    files = caches_in(folder)
    freed = bytes_of(files)
    for file in files:
        file.unlink()
    for cache in folder.caches:
        for place in [*sorted((p for p in cache.rglob("*") if p.is_dir()), reverse=True), cache]:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
    return freed
