#!/usr/bin/env python
"""What a run survives: kills, full and read-only disks, a dead rank, malformed input. Prints a
tally.

    python benchmarks/chaos.py                         100 kills, 300 malformed inputs: about 15 minutes on two cores
    python benchmarks/chaos.py --kills 9 --inputs 30   a taste

Linux: runs are forked from one process that has everything imported, and the full disk is a small
tmpfs (needs root; without it that part says so and counts as not shown). Every undisturbed result
is compared by content: LoRA files, last checkpoints, logged losses, best weights.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / part) for part in ("", "tests")]

import conftest

import train_distillation
from wan_distill.data import samples  # noqa: F401  all that a run imports late, so that forks are quick
from wan_distill.methods import consistency, dmd, trajectory  # noqa: F401
from wan_distill.planning import plan, preflight  # noqa: F401
from wan_distill.results import evaluation, export, hub, page, readme  # noqa: F401
from wan_distill.settings.assets import REPOSITORY
from wan_distill.system import files
from wan_distill.training import checkpoint, metrics, monitor, previews, resume  # noqa: F401
from wan_distill.umt5 import repair  # noqa: F401

METHODS = ("trajectory", "dmd", "consistency")
KILLS_A_RUN = 4
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


def flags(teacher: Path, output_dir: Path, **changes) -> list[str]:
    settings = SETTINGS | dict(teacher_path=teacher, output_dir=output_dir) | changes
    return [f"--{name}={value}" for name, value in settings.items()]


def forked(argv: list[str], log: Path, prepare=None) -> int:
    """Process id of a fork that runs the tool with its output in `log`."""
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
    """Its exit code; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder: Path) -> str:
    """One hash of all that a finished run promises to reproduce."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*/best.safetensors")]):
        digest.update(file.name.encode() + file.read_bytes())
    for expert in ("high", "low"):
        for file in sorted(
            checkpoint.latest(folder / expert, lambda _: None).glob("*.safetensors")
        ):
            for name, tensor in sorted(load_file(file).items()):
                digest.update(name.encode() + tensor.numpy().tobytes())
    for line in metrics.read_lines(folder / "metrics.jsonl"):
        digest.update(
            json.dumps({k: v for k, v in line.items() if k != "seconds"}, sort_keys=True).encode()
        )
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------- kills


def die_in_save(rng: random.Random):
    """A preparation of a fork: SIGKILL at a random call to the file system inside a save of a
    checkpoint.
    """
    target, real_save = rng.randrange(1, 60), checkpoint.save
    calls, inside = [0], [False]

    def counting(real):
        def call(*args, **kwargs):
            if inside[0]:
                calls[0] += 1
                if calls[0] == target:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    def save(*args, **kwargs):
        inside[0] = True
        try:
            return real_save(*args, **kwargs)
        finally:
            inside[0] = False

    def prepare():
        for module, name in (
            (os, "replace"),
            (os, "fsync"),
            (os, "open"),
            (files, "save_file"),
            (shutil, "rmtree"),
        ):
            setattr(module, name, counting(getattr(module, name)))
        checkpoint.save = save

    return prepare


def kills(count: int, teacher: Path, root: Path, rng: random.Random, tally: Counter) -> None:
    """Runs are killed a few times each, then left to end; each must end as the undisturbed one did."""
    expected, seconds = {}, {}
    for method in METHODS:
        started = time.monotonic()
        folder = root / f"undisturbed-{method}"
        if wait(forked(flags(teacher, folder, method=method), root / "log.txt")) != 0:
            raise SystemExit(f"the undisturbed {method} run failed, see {root / 'log.txt'}")
        expected[method], seconds[method] = outcome(folder), time.monotonic() - started
    done = inside = number = 0
    while done < count:
        method = METHODS[number % len(METHODS)]
        folder, number, struck = root / f"run-{number}", number + 1, 0
        argv = flags(teacher, folder, method=method)
        while struck < KILLS_A_RUN and done < count:
            in_save = 3 * inside < done + 1
            pid = forked(argv, root / "log.txt", die_in_save(rng) if in_save else None)
            if not in_save:
                time.sleep(rng.uniform(0, seconds[method]))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if wait(pid) != -signal.SIGKILL:
                break  # it ended before the blow
            struck, done, inside = struck + 1, done + 1, inside + in_save
        code = wait(forked(argv, root / "log.txt"))
        same = code == 0 and outcome(folder) == expected[method]
        tally[
            "runs that ended like the undisturbed one"
            if same
            else f"LOST: a {method} run ({folder})"
        ] += 1
        if same:
            shutil.rmtree(folder)
    tally["kills"], tally["kills inside a save"] = done, inside


def dead_rank(teacher: Path, root: Path, tally: Counter) -> None:
    """One of two processes is killed: both end soon, and the next launch goes on to the undisturbed
    result.
    """
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(REPOSITORY / "train_distillation.py"),
    ]
    settings = dict(
        method="trajectory", train_batch_size=1, max_train_steps=200, checkpointing_steps=40
    )
    whole, struck = root / "ranks-undisturbed", root / "ranks-struck"
    subprocess.run([*launcher, *flags(teacher, whole, **settings)], check=True, capture_output=True)
    process = subprocess.Popen(
        [*launcher, *flags(teacher, struck, **settings)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(struck.glob("high/checkpoint-*/state.json")) and process.poll() is None:
        time.sleep(0.05)
    ranks = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    started = time.monotonic()
    code = process.wait(timeout=120)
    ended = code != 0 and time.monotonic() - started < 60
    tally[
        "a dead rank ended the other within a minute"
        if ended
        else "LOST: a dead rank left the other waiting"
    ] += 1
    subprocess.run(
        [*launcher, *flags(teacher, struck, **settings)], check=True, capture_output=True
    )
    same = outcome(struck) == outcome(whole)
    tally["runs that went on after a dead rank" if same else f"LOST: {struck}"] += 1


# -------------------------------------------------------------------------------------------- disks


def full_disk(teacher: Path, root: Path, tally: Counter) -> None:
    """On a disk that fills up: one line, the last checkpoint whole, and the same end once there is
    room.
    """
    place, argv = root / "small", dict(method="trajectory", checkpoints_total_limit=9)
    expected = root / "roomy"
    wait(forked(flags(teacher, expected, **argv), root / "log.txt"))
    used = sum(f.stat().st_size for f in expected.rglob("*") if f.is_file())
    for share in (0.05, 0.3, 0.5, 0.7, 0.9):
        place.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={int(used * share)}", "none", str(place)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
            tally["full disk: NOT SHOWN, a tmpfs cannot be mounted here"] += 1
            return
        try:
            log = root / f"full-{share}.txt"
            code = wait(forked(flags(teacher, place / "out", **argv), log, no_preflight))
            told = code in (1, 2) and log.read_text().strip().splitlines()[-1].startswith("error:")
            tally["full disks told in one line" if told else f"LOST: {log}"] += 1
            subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)
            code = wait(forked(flags(teacher, place / "out", **argv), log))
            same = code == 0 and outcome(place / "out") == outcome(expected)
            tally[
                "runs that went on once there was room"
                if same
                else f"LOST: after a full disk, {log}"
            ] += 1
        finally:
            subprocess.run(["umount", str(place)], check=True)


def no_preflight() -> None:
    """The disk fills up later than the check before the run could see."""
    train_distillation_checks = preflight.check_surroundings
    preflight.check_surroundings = lambda config, info: train_distillation_checks and []


def read_only(teacher: Path, root: Path, tally: Counter) -> None:
    """A folder that may not be written to: one line, exit code 2."""
    place, log = root / "read-only", root / "read-only.txt"
    place.mkdir()
    if os.geteuid() == 0:  # permissions do not bind root
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(place)], check=True)
    place.chmod(0o555) if os.geteuid() else None
    code = wait(forked(flags(teacher, place / "out", method="trajectory"), log))
    told = code == 2 and "cannot be written" in log.read_text()
    tally["a read-only folder told in one line" if told else f"LOST: {log}"] += 1
    if os.geteuid() == 0:
        subprocess.run(["umount", str(place)], check=True)


# --------------------------------------------------------------------------------- malformed inputs


def damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` cut, overwritten, lengthened or emptied somewhere."""
    at = rng.randrange(max(1, len(data)))
    return rng.choice(
        [
            lambda: data[:at],
            lambda: b"",
            lambda: data[:at] + rng.randbytes(8) + data[at + 8 :],
            lambda: data + rng.randbytes(16),
            lambda: data[:at] + data[at + 1 :],
            lambda: rng.randbytes(64),
        ]
    )()


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """One value of a JSON object replaced by something of another kind, or removed."""
    content = json.loads(data)
    key = rng.choice(list(content))
    if rng.random() < 0.2:
        del content[key]
    else:
        content[key] = rng.choice(
            [None, -1, 0, 10**9, 1.5, "", "nonsense", [], {}, True, [1, "a"], float("nan")]
        )
    return json.dumps(content).encode()


WORDS = [
    "-1",
    "0",
    "nan",
    "inf",
    "1e400",
    "",
    " ",
    "x",
    "None",
    "9" * 30,
    "../..",
    "\u0000",
    "1,2",
    "[]",
    "--",
    "a" * 5000,
]


def bad_flags(rng: random.Random) -> list[str]:
    names = [
        f"--{item.name}" for item in __import__("dataclasses").fields(train_distillation.Config)
    ]
    name = rng.choice(names)
    if rng.random() < 0.2:
        name = name[:-1] + rng.choice("qxz")
    return ["--dry_run", *(f"{name}={rng.choice(WORDS)}" for _ in range(rng.randrange(1, 3)))]


def malformed(count: int, teacher: Path, root: Path, rng: random.Random, tally: Counter) -> None:
    """Damaged flags, prompts, configurations, headers and checkpoints: one line each, and nothing
    else is touched.
    """
    finished = root / "finished"
    short = dict(method="trajectory", max_train_steps=3, num_trajectories=4)
    wait(forked(flags(teacher, finished, **short), root / "log.txt"))
    kinds = ("flags", "prompts", "json", "header", "checkpoint")
    for number in range(count):
        kind, case = kinds[number % len(kinds)], root / "case"
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        log, out, argv = case / "log.txt", case / "out", flags(teacher, case / "out", **short)
        shutil.copytree(finished, out)
        if kind == "flags":
            argv = [*argv, *bad_flags(rng)]
        elif kind == "prompts":
            file = case / f"prompts{rng.choice(['.txt', '.json', '.jsonl', '.csv'])}"
            seed = b'[{"caption": "a red ball"}, {"caption": "a blue box"}]\n"caption"\n'
            file.write_bytes(
                damaged(rng.choice([seed, b"a red ball\na blue box\n", b"caption\na\n"]), rng)
            )
            argv.append(f"--prompts={file}")
        elif kind == "checkpoint":
            file = rng.choice(
                [f for f in out.rglob("*") if f.is_file() and "checkpoint-" in str(f)]
            )
            file.write_bytes(damaged(file.read_bytes(), rng))
        else:
            copied = Path(shutil.copytree(teacher, case / "teacher"))
            wanted = ".json" if kind == "json" else ".safetensors"
            file = rng.choice([f for f in copied.rglob(f"*{wanted}") if "tokenizer" not in str(f)])
            content = file.read_bytes()
            file.write_bytes(
                mutated_json(content, rng)
                if kind == "json" and rng.random() < 0.7
                else damaged(content[:2000], rng) + content[2000:]
            )
            argv[argv.index(f"--teacher_path={teacher}")] = f"--teacher_path={copied}"
        before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
        code = wait(forked(argv, log))
        said = log.read_text(errors="replace")
        if (
            code == CRASH
            or "Traceback" in said
            or (code in (1, 2) and "error: " not in said)
            or code < 0
        ):
            kept = shutil.copytree(case, root / f"lost-{number}")
            tally[f"LOST: a traceback, {kind}, {kept / 'log.txt'}"] += 1
            continue
        changed = [
            f
            for f, data in before.items()
            if code == 2 and (not f.exists() or f.read_bytes() != data)
        ]
        if changed:
            tally[f"LOST: {kind} changed {changed[0]}"] += 1
        tally[
            f"malformed {kind}: " + ("told in one line" if code else "harmless or passed over")
        ] += 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--inputs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # forked processes may not share a thread pool
    rng, tally = random.Random(args.seed), Counter()
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    teacher = conftest.write_pipeline(root / "teacher")
    for part in (
        lambda: kills(args.kills, teacher, root, rng, tally),
        lambda: dead_rank(teacher, root, tally),
        lambda: full_disk(teacher, root, tally),
        lambda: read_only(teacher, root, tally),
        lambda: malformed(args.inputs, teacher, root, rng, tally),
    ):
        part()
        print("\n".join(f"{count:>5}  {what}" for what, count in tally.items()), "\n", flush=True)
    lost = sum(count for what, count in tally.items() if what.startswith("LOST"))
    print(f"{lost} lost" if lost else "none lost")
    if not lost:
        shutil.rmtree(root)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
