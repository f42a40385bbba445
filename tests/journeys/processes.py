"""Runs in several processes, and their comparison with runs in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import REPOSITORY, tiny_flags
from safetensors.torch import load_file

import train_distillation
from wan_distill.training.metrics import read_lines

UPDATES = 10
SETTINGS = dict(
    train_batch_size=1,
    num_trajectories=8,
    checkpointing_steps=100,
    lr_warmup_steps=1,
    lr_scheduler="constant",
    logging_steps=2,
    monitor_steps=50,
    evaluate=False,
    save_merged=False,
)
METHODS: dict[str, dict[str, Any]] = {  # ten updates per expert: of dmd's, five are the student's
    "trajectory": dict(method="trajectory", max_train_steps=UPDATES),
    "consistency": dict(method="consistency", max_train_steps=UPDATES),
    "dmd": dict(
        method="dmd", max_train_steps=UPDATES // 2, critic_updates=1, critic_warmup_steps=0
    ),
}
METHODS["dmd-samples"] = METHODS["dmd"] | dict(real_score="samples")  # as many of one role more
# Sums over tokens in another order differ by 1e-7; Adam, which divides by the gradient's own size,
# enlarges it.
ROUNDING = 1e-3
LAUNCHERS = {
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--nproc_per_node", "2"),
    ],
    # with --cpu accelerate 1.15 starts one process whatever their number; --multi_gpu starts two,
    # also without a GPU
    "accelerate": [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ],
}
# diffusers counts accelerators before it spreads a clip's tokens, also where gloo does the work of
# the absent ones.
TOGETHER = """
import sys
import torch
torch.accelerator.device_count = lambda: 1
import train_distillation
sys.exit(train_distillation.main(sys.argv[1:]))
"""


def launch(launcher: str, script: Path, flags: list[str]) -> subprocess.CompletedProcess:
    """Runs `script` in two processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*LAUNCHERS[launcher], str(script), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def alone(flags: list[str]) -> None:
    """The same job in this process, with one thread, as each of two has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train_distillation.main(flags) == 0
    finally:
        torch.set_num_threads(threads)


def compare(
    teacher: Path,
    folder: Path,
    method: str,
    launcher: str = "torchrun",
    alone_first: int = 0,
    only_two: dict[str, Any] | None = None,
    **changes: Any,
) -> float:
    """The largest relative difference of any tensor of any role: one process with twice the
    accumulation against two processes.

    Args:
        alone_first: student updates that the run of two makes as one process: a run may change its
            processes.
        only_two: settings of the run of two alone.
    """
    settings = SETTINGS | METHODS[method] | changes
    only_two = only_two or {}
    twice = settings | dict(gradient_accumulation_steps=2)
    alone(tiny_flags(teacher, folder / "one", **twice))
    if alone_first:
        alone(tiny_flags(teacher, folder / "two", **twice | dict(max_train_steps=alone_first)))
    script = REPOSITORY / "train_distillation.py"
    if only_two.get("context_parallel"):
        script = folder / "together.py"
        script.write_text(TOGETHER)
    ended = launch(launcher, script, tiny_flags(teacher, folder / "two", **settings | only_two))
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ("Going on from" in ended.stdout) == bool(alone_first)
    compare_metrics(folder, ROUNDING if only_two.get("context_parallel") else 1e-6)
    return largest_difference(folder)


def largest_difference(folder: Path) -> float:
    """Of all tensors in the checkpoints of `folder`/one and /two, relative to their norm."""
    worst, moved = 0.0, 0
    for file in sorted((folder / "one").glob("*/checkpoint-*/*.safetensors")):
        expected = load_file(file)
        found = load_file(folder / "two" / file.relative_to(folder / "one"))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            difference = (tensor - found[name]).norm() / tensor.norm().clamp_min(1e-12)
            worst = max(worst, float(difference))
            trained = name.startswith("weight.") and ".lora_B." in name
            moved += trained and bool(tensor.abs().max() > 0)
    assert moved, "nothing was trained"
    return worst


def compare_metrics(folder: Path, rounding: float) -> None:
    """Adam hides a gradient of half the size; the norms in metrics.jsonl do not."""
    one, two = (read_lines(folder / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        names = [name for name in a if name.endswith(("_loss", "_gradient_norm"))]
        assert all(abs(a[name] - b[name]) <= rounding * abs(a[name]) for name in names), (a, b)
