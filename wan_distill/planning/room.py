"""Room for a run: on the disks, in the hub's cache, in the host's memory."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import psutil
from huggingface_hub.constants import HF_HUB_CACHE

from wan_distill.errors import UsageError
from wan_distill.layout import RunFolder
from wan_distill.planning.disk import SHARED, disk_needs
from wan_distill.planning.memory import estimate, host_needs, shape_of
from wan_distill.planning.teacher_files import download_left
from wan_distill.planning.trace import trace
from wan_distill.planning.wording import size
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.cleaning import bytes_of
from wan_distill.system.files import ASIDE, nearest_existing, place_to_write
from wan_distill.system.runtime import process_state


def check_disk(stages: Sequence[Config], info: TeacherInfo, prompts: int = 0) -> str:
    """Free room, in words. Raises UsageError where this run may write more than that.

    What a run that goes on has already written is not written again.
    """
    config, found, writes = stages[-1], [], dict[int, float]()
    needs = disk_needs(stages, info, trace(shape_of(config, info)), prompts)
    shared = sum(needs.get(kind, 0.0) for kind in SHARED) if config.samples_dir else 0.0
    asked = {"--output_dir": (config.output_dir, sum(needs.values()) - shared)}
    if config.samples_dir:
        asked["--samples_dir"] = (config.samples_dir, shared)
    has_begun = RunFolder(Path(config.output_dir)).plan.exists()
    for flag, (folder, most) in asked.items():
        place = place_to_write(folder, flag)
        there = bytes_of(_written(Path(folder))) if has_begun else 0
        needed = max(0.0, most - there)
        free, disk = shutil.disk_usage(place).free, place.stat().st_dev
        writes[disk] = writes.get(disk, 0.0) + needed  # both folders may be on one disk
        if free < writes[disk]:
            raise UsageError(
                f"{flag} {folder}: {size(free)} free on its disk, this run writes up to "
                f"{size(writes[disk])}; free some, choose another, or lower --num_trajectories"
            )
        found.append(f"{size(free)} free at {place}")
    return ", ".join(found)


def _written(folder: Path) -> list[Path]:
    """The files below it that are whole and in use: the others are no part of what is planned."""
    return [
        file
        for file in folder.rglob("*")
        if not any(part.startswith((ASIDE, ".")) for part in file.relative_to(folder).parts)
    ]


def check_download(config: Config, info: TeacherInfo) -> str | None:
    """What is still to be downloaded, in words. Raises UsageError where the hub's cache has no room
    for it.
    """
    needed = download_left(info)
    if not needed:
        return None
    cache = Path(config.cache_dir or HF_HUB_CACHE).resolve()
    free = shutil.disk_usage(nearest_existing(cache)).free
    if free < needed:
        raise UsageError(
            f"--cache_dir {cache}: {size(free)} free on its disk, the teacher's weights take "
            f"{size(needed)}; free some, or choose another"
        )
    return f"Download  {size(needed)} of weights, to {cache}"


def check_memory(config: Config, info: TeacherInfo) -> float:
    """Available bytes of host memory. Raises UsageError where loading, or training on a CPU, cannot
    fit.
    """
    cost = trace(shape_of(config, info))
    available = psutil.virtual_memory().available
    on_cpu = process_state().device.type == "cpu"
    needed = max(host_needs(config, info, cost).values(), default=0.0)
    if on_cpu:  # there, offloading keeps the base in the same memory
        needed = estimate(dataclasses.replace(config, offload=False), info).peak
    if needed > available:
        remedy = "use a CUDA device" if on_cpu else "close other programs"
        raise UsageError(
            f"--teacher_path {info.source}: needs {size(needed)} of host memory, {size(available)} "
            f"are available; {remedy}"
        )
    return available
