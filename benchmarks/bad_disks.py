"""Runs on disks that fill up or cannot be written to; used by chaos.py."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from forked_runs import flags, outcome, run, run_undisturbed

from wan_distill import planning

# Sizes of the disk, as shares of what the run writes in all.
DISK_SHARES = (0.05, 0.3, 0.5, 0.7, 0.9)


def full_disk(teacher: Path, root: Path, tally: Counter[str], save_merged: bool = False) -> None:
    """Runs on disks that fill up: one line, and the undisturbed result once there is room.

    Args:
        save_merged: let them fill while the merged pipeline, the largest part, is written.
    """
    when = " during --save_merged" if save_merged else ""
    roomy = root / f"roomy{save_merged:d}"
    settings: dict[str, Any] = dict(method="trajectory", checkpoints_total_limit=9)
    more = dict(save_merged=True) if save_merged else dict(evaluate=True, eval_samples=4)
    settings |= more
    run_undisturbed(flags(teacher, roomy, **settings), root / "log.txt")
    used = size_of(roomy)
    without = used - (size_of(roomy / "student") if save_merged else used)
    place = root / f"small{save_merged:d}"
    argv = flags(teacher, place / "out", **settings)
    for share in DISK_SHARES:
        place.mkdir(exist_ok=True)
        if not mount(place, "-o", f"size={int(without + share * (used - without))}"):
            tally["full disk: NOT SHOWN, a tmpfs cannot be mounted here"] += 1
            return
        try:
            log = root / f"full-{share}{when.replace(' ', '-')}.txt"
            code = run(argv, log, skip_disk_check)
            last_line = log.read_text().strip().splitlines()[-1]
            one_line = code in (1, 2) and last_line.startswith("error:")
            # Where the pipeline is there, it is all there: what came after it did not fit.
            found, expected = (content(folder / "student") for folder in (place / "out", roomy))
            fine = one_line and found in ({}, expected)
            tally[f"full disks{when} reported in one line" if fine else f"LOST: {log}"] += 1
            subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)
            if run(argv, log) == 0 and outcome(place / "out") == outcome(roomy):
                tally[f"runs that continued once there was room{when}"] += 1
            else:
                tally[f"LOST: after a full disk, {log}"] += 1
        finally:
            subprocess.run(["umount", str(place)], check=True)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its name there."""
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`, each in whole pages, as a tmpfs counts."""
    pages = [-(-f.stat().st_size // 4096) for f in folder.rglob("*") if f.is_file()]
    return 4096 * sum(pages)


def mount(place: Path, *options: str) -> bool:
    """Mounts a tmpfs at `place`, if this user may."""
    command = ["mount", "-t", "tmpfs", *options, "none", str(place)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def skip_disk_check() -> None:
    """Prepares a fork whose disk fills up later than the check before the run could foresee."""
    setattr(planning, "check_surroundings", lambda config, info, prompts: [])  # noqa: B010


def read_only(teacher: Path, root: Path, tally: Counter[str]) -> None:
    """Runs with a folder that may not be written to: one line, exit code 2."""
    place = root / "read-only"
    log = root / "read-only.txt"
    place.mkdir()
    is_root = os.geteuid() == 0  # permissions do not bind root: a read-only disk does
    if not is_root:
        place.chmod(0o555)
    elif not mount(place, "-o", "ro"):
        tally["read-only folder: NOT SHOWN, a tmpfs cannot be mounted here"] += 1
        return
    code = run(flags(teacher, place / "out", method="trajectory"), log)
    one_line = code == 2 and log.read_text().splitlines()[-1].startswith("error: --output_dir")
    tally["a read-only folder reported in one line" if one_line else f"LOST: {log}"] += 1
    if is_root:
        subprocess.run(["umount", str(place)], check=True)
