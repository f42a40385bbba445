"""What must be right before a run begins: versions, files, room, settings, machine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from wan_distill.errors import UsageError, one_line
from wan_distill.layout import RunFolder
from wan_distill.model.warm_start import check_warm_start, warm_start_files
from wan_distill.planning.changed_files import check_changes
from wan_distill.planning.memory import shape_of
from wan_distill.planning.room import check_disk, check_download, check_memory
from wan_distill.planning.teacher_files import (
    check_files,
    check_picture_source,
    check_text,
)
from wan_distill.planning.versions import check_versions
from wan_distill.planning.wording import size
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.scale import processes
from wan_distill.system.runtime import process_state
from wan_distill.training.stages import explicit_checkpoint

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
    """What the student begins with. Raises UsageError where it does not fit this run, or would be
    written over.
    """
    if config.resume_from_checkpoint != "latest":
        explicit_checkpoint(config)
    if config.evaluate_only:
        return None
    out = RunFolder(Path(config.output_dir))
    for expert, file in warm_start_files(config, info).items():
        if file.path.resolve() == out.lora(expert).resolve():
            raise UsageError(
                f"--output_dir {config.output_dir}: the student begins with {file.path.name} of "
                "this very folder, which would be replaced; choose another"
            )
    found = check_warm_start(config, info)
    return found and f"Begins    {found}"
