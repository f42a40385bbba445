"""Runs whose files are altered, whose clock jumps, and that meet a second run; used by chaos.py."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from forked_runs import flags, outcome, run, run_undisturbed, start, wait

SETTINGS = dict(method="trajectory", checkpointing_steps=6, checkpoints_total_limit=9)
# What a run reads again when it goes on, as patterns below its output folder.
STORED = (
    "trajectories/*/0*.safetensors",
    "prompts/*.safetensors",
    "evaluation/**/*.safetensors",
    "*/best.safetensors",
    "*/checkpoint-*/*.safetensors",
)
ALTERED_EACH = 6  # files of each kind


def altered(teacher: Path, root: Path, rng: random.Random, tally: Counter[str]) -> None:
    """Changes one bit of a stored file's data: a run that goes on from the middle is refused in one
    line, or ends as the one that nobody disturbed.
    """
    finished, half = root / "never-altered", root / "half"
    settings = dict(evaluate=True, eval_samples=4, **SETTINGS)
    run_undisturbed(flags(teacher, finished, **settings), root / "altered.txt")
    shutil.copytree(finished, half)
    for last in half.glob("*/checkpoint-12"):
        shutil.rmtree(last)
    for pattern in STORED:
        for number in range(ALTERED_EACH):
            folder = root / "altered"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(half, folder)
            file = rng.choice(sorted(folder.glob(pattern)))
            data = bytearray(file.read_bytes())
            begin = 8 + int.from_bytes(data[:8], "little")  # behind the header, which stays whole
            data[rng.randrange(begin, len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
            kind = pattern.split("/")[0].replace("*", "checkpoints and best weights")
            log = root / f"altered-{kind.replace(' ', '-')}-{number}.txt"
            log.unlink(missing_ok=True)
            code = run(flags(teacher, folder, **settings), log)
            last_line = log.read_text().strip().splitlines()[-1]
            if code == 2 and last_line.startswith("error:") and file.name in last_line:
                tally[f"altered bytes in {kind}: refused in one line"] += 1
            elif code == 0 and outcome(folder) == outcome(finished):
                tally[f"altered bytes in {kind}: no effect on the result"] += 1
            else:
                shutil.copytree(folder, copy := log.with_suffix(""))
                tally[f"LOST: {copy} ({file.relative_to(folder)})"] += 1


def clock(teacher: Path, root: Path, tally: Counter[str]) -> None:
    """A clock that jumps by days, back and forth: the result is that of a steady one."""
    log = root / "clock.txt"
    steady = root / "steady-clock"
    run_undisturbed(flags(teacher, steady, **SETTINGS), log)
    for seed in range(3):
        folder = root / f"clock-{seed}"
        argv = flags(teacher, folder, **SETTINGS)
        if run(argv, log, jumping_clock(seed)) == 0 and outcome(folder) == outcome(steady):
            tally["runs under a clock that jumps, with the result of a steady one"] += 1
        else:
            tally[f"LOST: under a clock that jumps ({folder})"] += 1


def jumping_clock(seed: int) -> Callable[[], None]:
    """Prepares a fork in which every reading of the clock is off by up to a month."""
    rng = random.Random(seed)
    month = 30 * 24 * 3600

    def jumping(real: Callable[[], float]) -> Callable[[], float]:
        return lambda: real() + rng.uniform(-month, month)

    def prepare() -> None:
        for name in ("time", "perf_counter", "monotonic"):
            setattr(time, name, jumping(getattr(time, name)))

    return prepare


def two_runs(teacher: Path, root: Path, tally: Counter[str]) -> None:
    """A second run in the folder of one that is at work is told so, and the first is not harmed."""
    log = root / "two-runs.txt"
    alone, shared = root / "alone", root / "shared"
    run_undisturbed(flags(teacher, alone, **SETTINGS), log)
    argv = flags(teacher, shared, **SETTINGS)
    pid = start(argv, log)
    while not (shared / "plan.txt").exists():
        time.sleep(0.01)
    second_log = root / "second-run.txt"
    code = run(argv, second_log)
    told = code == 2 and "another run is writing into it" in second_log.read_text()
    tally["second runs in one folder that were told so" if told else f"LOST: {second_log}"] += 1
    if wait(pid) == 0 and outcome(shared) == outcome(alone):
        tally["first runs that a second one did not harm"] += 1
    else:
        tally[f"LOST: the first of two runs ({shared})"] += 1
