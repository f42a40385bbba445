"""What must be right before a run begins: versions, files, disk and memory, settings, machine."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE

from wan_distill.errors import UsageError, one_line
from wan_distill.model.warm_start import check_warm_start
from wan_distill.planning.changed_files import check_changes
from wan_distill.planning.memory import estimate, host_needs, shape_of
from wan_distill.planning.teacher_files import (
    check_files,
    check_picture_source,
    check_text,
    download_left,
)
from wan_distill.planning.trace import trace
from wan_distill.planning.versions import check_versions
from wan_distill.planning.wording import size
from wan_distill.planning.work import SHARED, disk_needs
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.scale import processes
from wan_distill.system.files import nearest_existing, place_to_write
from wan_distill.system.runtime import process_state

Check = Callable[[], str | None]
"""Returns a line for the plan, or nothing. Raises UsageError on what must stop a run."""


def checks(stages: Sequence[Config], info: TeacherInfo, prompts: Sequence[str] = ()) -> list[Check]:
    """All checks of one job, in their order."""
    config = stages[-1]
    return [
        lambda: check_tracker(config),
        lambda: check_processes(config, info),
        lambda: check_optional(config),
        lambda: check_place(config),
        lambda: check_begin(stages[0], info),
        lambda: f"Versions  {check_versions()}",
        lambda: f"Files     {check_files(info, config)}",
        lambda: (found := check_changes(info, config)) and f"Changed   {found}",
        lambda: f"Text      {check_text(info, prompts, config)}",
        lambda: (found := check_picture_source(info, config, prompts)) and f"Pictures  {found}",
        lambda: f"Disk      {check_disk(stages, info, len(prompts))}",
        *[partial(check_download, config, t) for t in (info, info.picture_source) if t],
        lambda: f"RAM       {size(min(check_memory(c, info) for c in stages))} available",
    ]


def check_surroundings(
    stages: Sequence[Config], info: TeacherInfo, prompts: Sequence[str] = ()
) -> list[str]:
    """What was found, in lines. Raises UsageError at the first obstacle."""
    lines = [check() for check in checks(stages, info, prompts)]
    return [line for line in lines if line is not None]


def examine_surroundings(
    stages: Sequence[Config], info: TeacherInfo, prompts: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """(what was found, everything that stands against a run here), in lines."""
    lines: list[str] = []
    obstacles: list[str] = []
    for check in checks(stages, info, prompts):
        try:
            line = check()
        except UsageError as error:
            obstacles.append(str(error))
        else:
            lines += [line] if line is not None else []
    return lines, obstacles


# --------------------------------------------------------------------- settings against the machine


def check_place(config: Config) -> None:
    """Raises UsageError where the output folder is a pipeline's, or that of a part of one."""
    for name in ("model_index.json", "config.json"):
        if (Path(config.output_dir) / name).exists():
            raise UsageError(
                f"--output_dir {config.output_dir}: holds a {name}, so it is a model's folder, "
                "whose files would be mixed with the run's or replaced; choose another"
            )


def check_tracker(config: Config) -> None:
    """Raises UsageError where the tracker's package is not installed."""
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UsageError(
            f"--report_to {config.report_to}: not installed; pip install {config.report_to}"
        )


def check_processes(config: Config, info: TeacherInfo) -> None:
    """Raises UsageError where `--shard` or `--context_parallel` clashes with the rest."""
    if not (config.shard or config.context_parallel):
        return
    flag = "--shard" if config.shard else "--context_parallel"
    if "WORLD_SIZE" not in os.environ and not config.dry_run:
        raise UsageError(
            f"{flag}: there is one process only; start several, with torchrun or accelerate launch"
        )
    if (config.evaluate or config.evaluate_only) and config.evaluation == "sets":
        raise UsageError(
            f"{flag}: --evaluation sets runs in one process; give --no-evaluate, and measure "
            f"afterwards with --evaluate_only and without {flag}"
        )
    if config.shard and config.base_precision != "bf16":
        raise UsageError(
            f"--base_precision {config.base_precision}: a quantised base is not sharded; leave one "
            "out"
        )
    clashing = ["compile", *(["context_parallel", "offload"] if config.shard else [])]
    for name in clashing:
        if getattr(config, name):
            raise UsageError(f"--{name}: does not go together with {flag}; leave one out")
    if config.context_parallel:
        _check_context_parallel(config, info)


def _check_context_parallel(config: Config, info: TeacherInfo) -> None:
    if not torch.accelerator.device_count() and not config.dry_run:
        raise UsageError(
            "--context_parallel: diffusers' needs an accelerator, and there is none; leave it out"
        )
    heads = info.transformer["num_attention_heads"]
    for name, count in {"tokens": shape_of(config, info).tokens, "heads": heads}.items():
        if count % processes(config):
            raise UsageError(
                f"--context_parallel: {count} {name} are not shared evenly by {processes(config)} "
                "processes; start another number of them"
            )


def check_optional(config: Config) -> None:
    """Raises UsageError where `--use_8bit_adam` or `--compile` lacks what it needs."""
    if config.use_8bit_adam:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"--use_8bit_adam: needs bitsandbytes ({one_line(error)}); pip install "
                "bitsandbytes, or leave the flag out"
            ) from error
    if config.compile:
        try:
            torch.compile(torch.cos)(torch.zeros(2, device=process_state().device))
        except Exception as error:  # a missing compiler shows in any way
            raise UsageError(
                f"--compile: torch cannot compile here ({one_line(error)[:200]}); install a C++ "
                "compiler (on CUDA: triton), or leave the flag out"
            ) from error


def check_begin(config: Config, info: TeacherInfo) -> str | None:
    """What the student begins with. Raises UsageError where it does not fit this run."""
    found = None if config.evaluate_only else check_warm_start(config, info)
    return found and f"Begins    {found}"


# ------------------------------------------------------------------------------- versions and room


def check_disk(stages: Sequence[Config], info: TeacherInfo, prompts: int = 0) -> str:
    """Free room, in words. Raises UsageError where this run may write more than that."""
    config, found, writes = stages[-1], [], dict[int, float]()
    needs = disk_needs(stages, info, trace(shape_of(config, info)), prompts)
    shared = sum(needs.get(kind, 0.0) for kind in SHARED) if config.samples_dir else 0.0
    asked = {"--output_dir": (config.output_dir, sum(needs.values()) - shared)}
    if config.samples_dir:
        asked["--samples_dir"] = (config.samples_dir, shared)
    for flag, (folder, needed) in asked.items():
        place = place_to_write(folder, flag)
        free, disk = shutil.disk_usage(place).free, place.stat().st_dev
        writes[disk] = writes.get(disk, 0.0) + needed  # both folders may be on one disk
        if free < writes[disk]:
            raise UsageError(
                f"{flag} {folder}: {size(free)} free on its disk, this run writes up to "
                f"{size(writes[disk])}; free some, choose another, or lower --num_trajectories"
            )
        found.append(f"{size(free)} free at {place}")
    return ", ".join(found)


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
