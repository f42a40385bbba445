"""Runs in several processes, and their comparison with runs in one."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
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
# Parts of a loss are summed in another order, which a large rate would enlarge; Muon most of all,
# which takes a gradient's small directions for as good as its large ones.
SMALL = dict(learning_rate=1e-4, fake_score_learning_rate=1e-4)
METHODS: dict[str, dict[str, Any]] = {  # ten updates per expert: of dmd's, five are the student's
    "trajectory": dict(method="trajectory", max_train_steps=UPDATES, optimizer="adamw", **SMALL),
    "consistency": dict(method="consistency", max_train_steps=UPDATES),
    "dmd": dict(
        method="dmd", max_train_steps=UPDATES // 2, critic_updates=1, critic_warmup_steps=0, **SMALL
    ),
}
METHODS["dmd-samples"] = METHODS["dmd"] | dict(real_score="samples")  # as many of one role more
# Sums over tokens in another order differ by 1e-7; Adam, which divides by the gradient's own size,
# enlarges it.
ROUNDING = 4e-3
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
    """Runs `script` in two processes, with one of LAUNCHERS, or as "forks" of this process, which
    has everything imported: half a minute less. Where forks cannot be, torchrun.
    """
    if launcher == "forks":
        if hasattr(os, "fork") and not torch.accelerator.is_available():
            return launch_forks(script, flags)
        launcher = "torchrun"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*LAUNCHERS[launcher], str(script), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_killed(code: str, flags: list[str]) -> None:
    """Runs `code`, in which the tool kills itself, on `flags`, in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-c", code, *flags],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        timeout=300,
    )
    assert ended.returncode == -signal.SIGKILL


def launch_forks(script: Path, flags: list[str]) -> subprocess.CompletedProcess:
    """What torchrun does: two processes, with the environment by which they find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        forks = [start_fork(rank, port, script, flags, out, errors) for rank in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in forks]
        texts = [file.read_text(encoding="utf-8") for file in (out, errors)]
    return subprocess.CompletedProcess([str(script), *flags], max(codes, key=abs), *texts)


def start_fork(
    rank: int, port: int, script: Path, flags: list[str], out: Path, errors: Path
) -> int:
    """The id of a process that runs `script` as one of two."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        for number, file in ((1, out), (2, errors)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        local = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
        names = local | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in names.items()})
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(1)  # forks may not share a thread pool
        warnings.resetwarnings()  # pytest makes errors of those of other packages too
        signal.alarm(600)  # never for ever, where the other one has failed
        sys.argv = [str(script), *flags]
        code = 0
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 70
    except BaseException:
        code = 70
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
    launcher: str = "forks",
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
    compare_metrics(folder, ROUNDING if only_two else 1e-4)
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
