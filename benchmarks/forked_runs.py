"""Runs of the tool in forked processes, and what they promise to reproduce; used by chaos.py.

A fork has everything imported already, so a run of a second costs a second. Linux only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / part) for part in ("", "tests")]

import conftest

import train_distillation

# All that a run imports late, so that it is imported once, before the forks.
from wan_distill.data import samples  # noqa: F401
from wan_distill.methods import consistency, dmd, trajectory  # noqa: F401
from wan_distill.planning import plan, preflight  # noqa: F401
from wan_distill.results import evaluation, export, hub, page, readme  # noqa: F401
from wan_distill.training import checkpoint, metrics, monitor, previews, resume  # noqa: F401
from wan_distill.umt5 import repair  # noqa: F401

CRASH = 70  # exit code of a forked run that ended in a traceback
SETTINGS = dict(
    height=32,
    width=32,
    num_frames=5,
    max_train_steps=12,
    train_batch_size=2,
    num_trajectories=64,
    teacher_steps=8,
    rank=4,
    max_sequence_length=12,
    negative_prompt="",
    mixed_precision="no",
    checkpointing_steps=3,
    validation_steps=0,
    monitor_steps=3,
    logging_steps=2,
    critic_warmup_steps=2,
    critic_updates=1,
    score_draws=1,
    diversity_weight=0.0,
    ema_decay=0.5,
    ema_start=1,
    sample_batch_size=8,
)


def small_teacher(folder: Path) -> Path:
    """Writes the test suite's random two-expert teacher to `folder`."""
    return conftest.write_pipeline(folder)


def flags(teacher: Path, output_dir: Path, **changes: Any) -> list[str]:
    """The command line of a small run: SETTINGS, with `changes` to them."""
    settings = SETTINGS | dict(teacher_path=teacher, output_dir=output_dir) | changes
    return [f"--{name}={value}" for name, value in settings.items()]


def start(argv: list[str], log: Path, prepare: Callable[[], None] | None = None) -> int:
    """Starts the tool with `argv` in a fork; its output goes to the end of `log`.

    Args:
        prepare: called in the fork before the run.
    Returns:
        The fork's process id.
    """
    pid = os.fork()
    if pid:
        return pid
    code = CRASH
    try:
        with log.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                if prepare:
                    prepare()
                code = train_distillation.main(argv)
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Waits for a fork. Returns its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(argv: list[str], log: Path, prepare: Callable[[], None] | None = None) -> int:
    """`start`, then `wait`."""
    return wait(start(argv, log, prepare))


def outcome(folder: Path) -> str:
    """One hash of what a finished run promises to reproduce.

    That is: LoRA files, best weights, the tensors of the last checkpoints, and all logged values
    but the seconds.
    """
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*/best.safetensors")]):
        digest.update(file.name.encode() + file.read_bytes())
    for expert in ("high", "low"):
        last = checkpoint.latest(folder / expert, lambda _: None)
        if last is None:
            raise FileNotFoundError(f"{folder / expert}: holds no checkpoint")
        for file in sorted(last.glob("*.safetensors")):
            for name, tensor in sorted(load_file(file).items()):
                digest.update(name.encode() + tensor.numpy().tobytes())
    for line in metrics.read_lines(folder / "metrics.jsonl"):
        values = {name: value for name, value in line.items() if name != "seconds"}
        digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()
