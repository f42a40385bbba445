#!/usr/bin/env python
"""What a run survives: kills, full and read-only disks, a dead rank, malformed input.

    python benchmarks/chaos.py                         about 15 minutes on two cores
    python benchmarks/chaos.py --kills 9 --inputs 30   a short version

Prints a tally, and exits with 1 if anything is lost. Each result is compared, by content, with that
of a run that nothing disturbed: LoRA files, last checkpoints, logged losses, best weights. Linux
only: runs are forks, and the full disk is a small tmpfs, which only root can mount (for other users
that part is listed as not shown).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_disks import full_disk, read_only
from forked_runs import flags, outcome, run, run_undisturbed, small_teacher, start, wait
from malformed_inputs import malformed

from wan_distill.settings.assets import REPOSITORY
from wan_distill.system import files
from wan_distill.training import checkpoint

METHODS = ("trajectory", "dmd", "consistency")
KILLS_PER_RUN = 4
LAUNCHER = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    str(REPOSITORY / "train_distillation.py"),
]


def die_in_save(rng: random.Random) -> Callable[[], None]:
    """Prepares a fork to kill itself at a random file system call while it saves a checkpoint."""
    fatal_call = rng.randrange(1, 60)
    real_save = checkpoint.save
    calls = 0
    saving = False

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if saving:
                calls += 1
                if calls == fatal_call:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    def save(*args: Any, **kwargs: Any) -> Path:
        nonlocal saving
        saving = True
        try:
            return real_save(*args, **kwargs)
        finally:
            saving = False

    def prepare() -> None:
        for module, name in (
            (os, "replace"),
            (os, "fsync"),
            (os, "open"),
            (files, "save_file"),
            (shutil, "rmtree"),
        ):
            setattr(module, name, counting(getattr(module, name)))
        setattr(checkpoint, "save", save)  # noqa: B010  an assignment would be a type error

    return prepare


def killed(argv: list[str], log: Path, rng: random.Random, in_save: bool, seconds: float) -> bool:
    """Starts a run and kills it: inside a save, or within `seconds`. False if it ended before."""
    pid = start(argv, log, die_in_save(rng) if in_save else None)
    if not in_save:
        time.sleep(rng.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return wait(pid) == -signal.SIGKILL


def kills(count: int, teacher: Path, root: Path, rng: random.Random, tally: Counter[str]) -> None:
    """Kills each run a few times; then it must end as the undisturbed run of its method did."""
    log = root / "log.txt"
    expected: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for method in METHODS:
        started = time.monotonic()
        folder = root / f"undisturbed-{method}"
        run_undisturbed(flags(teacher, folder, method=method), log)
        expected[method] = outcome(folder)
        seconds[method] = time.monotonic() - started
    for number in itertools.count():
        if tally["kills"] >= count:
            return
        method = METHODS[number % len(METHODS)]
        folder = root / f"run-{number}"
        argv = flags(teacher, folder, method=method)
        for _ in range(min(KILLS_PER_RUN, count - tally["kills"])):
            # A third of all kills are inside a save.
            in_save = 3 * tally["kills inside a save"] < tally["kills"] + 1
            if not killed(argv, log, rng, in_save, seconds[method]):
                break
            tally["kills"] += 1
            tally["kills inside a save"] += in_save
        if run(argv, log) == 0 and outcome(folder) == expected[method]:
            tally["runs that ended like the undisturbed one"] += 1
            shutil.rmtree(folder)
        else:
            tally[f"LOST: a {method} run ({folder})"] += 1


def dead_rank(teacher: Path, root: Path, tally: Counter[str]) -> None:
    """Kills one of two ranks: both must end soon, and the next launch must end as undisturbed."""
    settings = dict(
        method="trajectory", train_batch_size=1, max_train_steps=100, checkpointing_steps=20
    )
    undisturbed = root / "ranks-undisturbed"
    disturbed = root / "ranks-disturbed"
    command = [*LAUNCHER, *flags(teacher, disturbed, **settings)]
    subprocess.run(
        [*LAUNCHER, *flags(teacher, undisturbed, **settings)], check=True, capture_output=True
    )
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(disturbed.glob("high/checkpoint-*/state.json")) and process.poll() is None:
        time.sleep(0.05)
    children = ["pgrep", "-P", str(process.pid)]
    ranks = subprocess.run(children, capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    started = time.monotonic()
    code = process.wait(timeout=120)
    if code != 0 and time.monotonic() - started < 60:
        tally["a dead rank ended the other within a minute"] += 1
    else:
        tally["LOST: a dead rank left the other waiting"] += 1
    subprocess.run(command, check=True, capture_output=True)
    same = outcome(disturbed) == outcome(undisturbed)
    tally["runs that continued after a dead rank" if same else f"LOST: {disturbed}"] += 1


PARTS = ("kills", "ranks", "full_disk", "read_only", "inputs")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="default %(default)s")
    parser.add_argument("--inputs", type=int, default=300, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to try (default: all)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # forked processes may not share a thread pool
    rng = random.Random(args.seed)
    tally: Counter[str] = Counter()
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    teacher = small_teacher(root / "teacher")
    parts = {
        "kills": lambda: kills(args.kills, teacher, root, rng, tally),
        "ranks": lambda: dead_rank(teacher, root, tally),
        "full_disk": lambda: full_disk(teacher, root, tally),
        "read_only": lambda: read_only(teacher, root, tally),
        "inputs": lambda: malformed(args.inputs, teacher, root, rng, tally),
    }
    for name in args.parts:
        parts[name]()
        print("\n".join(f"{count:>5}  {what}" for what, count in tally.items()), "\n", flush=True)
    lost = sum(count for what, count in tally.items() if what.startswith("LOST"))
    print(f"{lost} lost" if lost else "none lost")
    if not lost:
        shutil.rmtree(root)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
