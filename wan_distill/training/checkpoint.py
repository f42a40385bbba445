"""Checkpoints that survive a kill at any instruction: a new folder, fsync, rename, verify, and only
then prune.

<root>/checkpoint-200/state.json     step, settings, and the SHA-256 of every file
<root>/checkpoint-200/*.safetensors  tensors, one file per role
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from wan_distill.errors import Halted
from wan_distill.system.files import (
    remove_folder,
    rename_aside,
    sha256,
    sync,
    write_atomically,
    write_tensors,
)

STATE = "state.json"
WRITTEN = dict(step=int, sha256=dict, config=dict)
Tensors = dict[str, dict[str, Tensor]]


class DamagedCheckpoint(Exception):
    """A checkpoint that is incomplete or whose bytes are not those that were written."""


def save(root: Path, step: int, tensors: Tensors, state: dict, keep: int | None) -> Path:
    """Writes `checkpoint-<step>` below `root` and verifies it, then prunes to `keep` checkpoints.

    Raises DamagedCheckpoint, before anything is pruned, where it does not read back as written.
    """
    final = root / f"checkpoint-{step}"
    if final.exists() and not made_here(final, tensors):
        raise Halted(f"{final}: was not written by this tool; move it away and run again")
    for left in root.glob(".partial-*"):  # by a run that was killed, or whose disk was full
        remove_folder(left)
    partial = root / f".partial-{step}"
    partial.mkdir(parents=True)
    for name, group in tensors.items():
        write_tensors(partial / f"{name}.safetensors", group)
    hashes = {file.name: sha256(file) for file in sorted(partial.glob("*.safetensors"))}
    state = state | {"step": step, "sha256": hashes}
    state["sha256_state"] = _state_hash(state)
    write_atomically(partial / STATE, json.dumps(state, indent=1).encode())
    sync(partial)
    remove_folder(final)  # only ever a damaged one: a good one would have been resumed from
    os.replace(partial, final)
    sync(root)
    verify(final)
    for old in [folder for folder in found(root) if made_here(folder)][keep:] if keep else []:
        remove_folder(old)
    return final


def found(root: Path) -> list[Path]:
    """Checkpoint folders below `root`, the highest step first; by their exact names."""
    steps = {folder: _step(folder) for folder in root.glob("checkpoint-*") if folder.is_dir()}
    known = {folder: step for folder, step in steps.items() if step is not None}
    return sorted(known, key=lambda folder: -known[folder])


def made_here(folder: Path, roles: Iterable[str] = ()) -> bool:
    """Whether `folder` holds nothing but what `save` writes: it may be deleted or renamed.

    Args:
        roles: whose tensors it may hold where its state, which says that, is damaged.
    """
    if folder.is_symlink():
        return False
    try:
        names = set(read_state(folder)["sha256"])
    except DamagedCheckpoint:
        names = {f"{role}.safetensors" for role in roles}
    return {entry.name for entry in folder.iterdir()} <= names | {STATE}


def _step(folder: Path) -> int | None:
    """N of `checkpoint-N`, for names as `save` writes them."""
    number = folder.name.removeprefix("checkpoint-")
    is_ours = number.isascii() and number.isdecimal() and str(int(number)) == number
    return int(number) if is_ours else None


def latest(root: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are passed over, saying so."""
    for folder in found(root):
        try:
            verify(folder)
        except DamagedCheckpoint as damage:
            say(f"{damage}; going back to the one before")
            continue
        return folder
    return None


def set_aside(root: Path, step: int) -> list[Path]:
    """Renames checkpoints after `step`, so that training anew from there neither trusts nor
    destroys them.
    """
    moved = []
    for folder in found(root):
        if (_step(folder) or 0) > step and made_here(folder):
            moved.append(rename_aside(folder))
    return moved


def read_state(folder: Path) -> dict:
    """What `state.json` of a checkpoint says. Raises DamagedCheckpoint."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if not all(isinstance(state[key], kind) for key, kind in WRITTEN.items()):
            raise ValueError(f"{STATE} holds something else")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(
            f"{folder} is incomplete ({type(error).__name__}: {error})"
        ) from error
    return state


def verify(folder: Path) -> dict:
    """The state of a whole checkpoint. Raises DamagedCheckpoint."""
    state = read_state(folder)
    if _state_hash(state) != state.get("sha256_state"):
        raise DamagedCheckpoint(f"{folder} is damaged ({STATE} changed since it was written)")
    try:
        damaged = [
            name for name, digest in state["sha256"].items() if sha256(folder / name) != digest
        ]
    except OSError as error:
        raise DamagedCheckpoint(f"{folder} is incomplete ({error})") from error
    if damaged:
        raise DamagedCheckpoint(
            f"{folder} is damaged ({', '.join(damaged)} changed since it was written)"
        )
    return state


def is_whole(root: Path, step: int) -> bool:
    """Whether the checkpoint of `step` below `root` is there, and as it was written."""
    try:
        verify(root / f"checkpoint-{step}")
    except DamagedCheckpoint:
        return False
    return True


def load(folder: Path) -> tuple[Tensors, dict]:
    """Tensors by file name, and the state. Raises DamagedCheckpoint."""
    state = verify(folder)
    return {Path(name).stem: load_file(folder / name) for name in state["sha256"]}, state


def _state_hash(state: dict) -> str:
    """SHA-256 of all that a state says but this hash."""
    rest = {key: value for key, value in state.items() if key != "sha256_state"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
