"""Runs of the tool in forked processes, and what they promise to reproduce; used by chaos.py.

A fork has everything imported already, so a run of a second costs a second. Linux only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / part) for part in ("", "tests")]

import random_teachers

import train_distillation
import wan_distill
from wan_distill.training import checkpoint, metrics

# What a run imports late is imported here once, before the forks.
for module in pkgutil.walk_packages(wan_distill.__path__, "wan_distill."):
    importlib.import_module(module.name)

CRASH = 70  # exit code of a forked run that ended in a traceback
PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in "abcd"]
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
    evaluate=False,  # they take more time than all the rest; runs that are about them say so
    save_merged=False,
)


def small_teacher(folder: Path) -> Path:
    """Writes the test suite's random two-expert teacher to `folder`, with PROMPTS in it."""
    random_teachers.write_pipeline(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return folder


def flags(teacher: Path, output_dir: Path, **changes: Any) -> list[str]:
    """The command line of a small run with the prompts of `small_teacher`.

    Args:
        changes: settings that differ from SETTINGS.
    """
    paths = dict(teacher_path=teacher, prompts=teacher / "prompts.txt", output_dir=output_dir)
    settings = SETTINGS | paths | changes
    return [
        (f"--{name}" if value else f"--no-{name}")
        if isinstance(value, bool)
        else f"--{name}={value}"
        for name, value in settings.items()
    ]


def start(
    argv: list[str],
    log: Path,
    prepare: Callable[[], None] | None = None,
    main: Callable[[list[str]], int] = train_distillation.main,
) -> int:
    """Starts the tool with `argv` in a fork; its output goes to the end of `log`.

    Args:
        prepare: called in the fork before the run.
        main: which script.
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
                # torch's pool is made anew in a fork, which two threads may not do at once.
                torch.set_num_threads(1)
                if prepare:
                    prepare()
                code = main(argv)
            except SystemExit as refused:  # argparse's way
                code = refused.code if isinstance(refused.code, int) else CRASH
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Waits for a fork. Returns its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(
    argv: list[str],
    log: Path,
    prepare: Callable[[], None] | None = None,
    main: Callable[[list[str]], int] = train_distillation.main,
) -> int:
    """`start`, then `wait`."""
    return wait(start(argv, log, prepare, main))


def run_undisturbed(argv: list[str], log: Path) -> None:
    """A run that must succeed, since others are compared with it."""
    if run(argv, log) != 0:
        raise SystemExit(f"an undisturbed run failed, see {log}")


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
    lines = metrics.read_lines(folder / "metrics.jsonl")
    for line in sorted(lines, key=lambda line: (line["expert"], line["step"])):
        values = {name: value for name, value in line.items() if name != "seconds"}
        digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()
