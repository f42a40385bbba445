#!/usr/bin/env python
"""What a run survives: kills, full and read-only disks, a dead rank, a second run, altered files, a
clock that jumps, malformed input.

    python benchmarks/chaos.py                         about 25 minutes on two cores
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
from altered_files import altered, clock, two_runs
from bad_disks import full_disk, read_only
from forked_runs import flags, outcome, run, run_undisturbed, small_teacher, start, wait
from malformed_inputs import malformed

from wan_distill.data import solving
from wan_distill.results import export, merged
from wan_distill.results.paired import PairedEvaluation
from wan_distill.settings.assets import REPOSITORY
from wan_distill.system import files
from wan_distill.training import checkpoint

KILLS_PER_RUN = 4
LAUNCHER = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    str(REPOSITORY / "train_distillation.py"),
]
# What is killed. "refined" begins with the undisturbed trajectory student.
RUNS: dict[str, dict[str, Any]] = {
    "trajectory": dict(method="trajectory"),
    "dmd": dict(method="dmd"),
    "consistency": dict(method="consistency"),
    "bf16": dict(method="trajectory", mixed_precision="bf16"),
    "refined": dict(method="dmd", init_student_from="trajectory"),
    "previews": dict(method="trajectory", validation_steps=4),
    "merged": dict(method="trajectory", save_merged=True),
    "evaluated": dict(method="trajectory", evaluate=True, evaluation="pairs", eval_samples=4),
}
# Where every other kill comes: inside one of these functions, at one of its file system calls.
PLACES: dict[str, tuple[Any, str]] = {
    "in a checkpoint": (checkpoint, "save"),
    "while solving": (solving, "_solve_batch"),
    "while exporting": (export, "export_student"),
    "in the merged pipeline": (merged, "_write_pipeline"),
    "while evaluating": (PairedEvaluation, "measure"),
}
FILE_CALLS: tuple[tuple[Any, str], ...] = (
    *((os, "replace"), (os, "fsync"), (os, "open"), (files, "save_file"), (Path, "replace")),
    *((Path, "mkdir"), (Path, "write_text"), (shutil, "copyfile")),
)


def die_in(place: str, rng: random.Random) -> Callable[[], None]:
    """Prepares a fork to kill itself in one of PLACES, at one of its file system calls."""
    module, name = PLACES[place]
    inner = getattr(module, name)
    fatal_call = rng.randrange(1, 60 if place == "in a checkpoint" else 12)
    calls = 0
    inside = 0

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += inside > 0
            if inside and calls == fatal_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        inside += 1
        try:
            return inner(*args, **kwargs)
        finally:
            inside -= 1

    def prepare() -> None:
        for owner, function in FILE_CALLS:
            setattr(owner, function, counting(getattr(owner, function)))
        for owner in {module, *sys.modules.values()}:  # also under the names it was imported by
            if getattr(owner, name, None) is inner:
                setattr(owner, name, watched)

    return prepare


def killed(argv: list[str], log: Path, rng: random.Random, place: str, seconds: float) -> bool:
    """Starts a run and kills it: in one of PLACES, or within `seconds`. False if it ended first."""
    pid = start(argv, log, die_in(place, rng) if place in PLACES else None)
    if place not in PLACES:
        time.sleep(rng.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return wait(pid) == -signal.SIGKILL


def kills(count: int, teacher: Path, root: Path, rng: random.Random, tally: Counter[str]) -> None:
    """Kills each run a few times; then it must end as the undisturbed one of its kind did."""
    log = root / "log.txt"
    expected: dict[str, str] = {}
    seconds: dict[str, float] = {}

    def do_undisturbed(kind: str) -> None:
        started = time.monotonic()
        folder = root / f"undisturbed-{kind}"
        run_undisturbed(flags_of(kind, teacher, folder, root), log)
        expected[kind] = outcome(folder)
        seconds[kind] = time.monotonic() - started

    do_undisturbed("trajectory")  # others begin with it
    turns = {kind: itertools.cycle(["anywhere", *places_of(kind)]) for kind in RUNS}
    for number in itertools.count():
        if tally["kills"] >= count:
            return
        kind = list(RUNS)[number % len(RUNS)]
        if kind not in expected:
            do_undisturbed(kind)
        folder = root / f"run-{number}"
        argv = flags_of(kind, teacher, folder, root)
        for _ in range(min(KILLS_PER_RUN, count - tally["kills"])):
            place = next(turns[kind])
            if not killed(argv, log, rng, place, seconds[kind]):
                continue
            tally["kills"] += 1
            tally[f"kills {place}"] += 1
        if run(argv, log) == 0 and outcome(folder) == expected[kind]:
            tally[f"{kind} runs that ended like the undisturbed one"] += 1
            shutil.rmtree(folder)
        else:
            tally[f"LOST: a {kind} run ({folder})"] += 1


def places_of(kind: str) -> list[str]:
    """Those of PLACES that a run comes to."""
    needs = {"in the merged pipeline": "save_merged", "while evaluating": "evaluate"}
    return [place for place in PLACES if needs.get(place) in (None, *RUNS[kind])]


def flags_of(kind: str, teacher: Path, folder: Path, root: Path) -> list[str]:
    """The command line of one of RUNS."""
    settings = dict(RUNS[kind])
    if "init_student_from" in settings:
        settings["init_student_from"] = root / f"undisturbed-{settings['init_student_from']}"
    return flags(teacher, folder, **settings)


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


PARTS = (
    *("kills", "ranks", "two_runs", "altered", "clock", "full_disk", "merged_disk", "read_only"),
    "inputs",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="default %(default)s")
    parser.add_argument("--inputs", type=int, default=500, help="default %(default)s")
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
        "two_runs": lambda: two_runs(teacher, root, tally),
        "altered": lambda: altered(teacher, root, rng, tally),
        "clock": lambda: clock(teacher, root, tally),
        "full_disk": lambda: full_disk(teacher, root, tally),
        "merged_disk": lambda: full_disk(teacher, root, tally, save_merged=True),
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
