"""Checkpoints and the stages of a job: which stage wrote one, and what the second began with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import wan_distill.training.checkpoint as checkpoint
from wan_distill.errors import UsageError
from wan_distill.layout import RunFolder
from wan_distill.maths.sigmas import Expert
from wan_distill.model.warm_start import warm_start_files
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.fingerprints import fingerprint_file
from wan_distill.settings.job import STAGES
from wan_distill.settings.recipes import recipe_of


def explicit_checkpoint(config: Config) -> Path:
    """The folder that `--resume_from_checkpoint` names. Raises UsageError where it holds no whole
    checkpoint.
    """
    folder = Path(config.resume_from_checkpoint)
    if not folder.is_dir():
        raise UsageError(
            f"--resume_from_checkpoint {folder}: there is no such folder; give 'latest', or the "
            f"path of a checkpoint-N in {Path(config.output_dir) / config.experts[0]}"
        )
    try:
        checkpoint.verify(folder)
    except checkpoint.DamagedCheckpoint as error:
        raise UsageError(
            f"--resume_from_checkpoint {folder}: {error}; give 'latest' or a whole checkpoint-N "
            "folder"
        ) from error
    return folder


def stage_of(folder: Path, config: Config) -> Literal["earlier", "this", "later"]:
    """Which stage of its job wrote a checkpoint, as the stage with `config` sees it; `this` also
    for one of another job, which is refused where its settings are others.
    """
    job, own = folder.resolve().parent.parent, Path(config.output_dir).resolve()
    if config.is_second_stage and job == Path(config.init_student_from or "").resolve():
        return "earlier"
    is_within = RunFolder(job).stage(config.method).path == own
    return "later" if is_within else "this"


def begun_with(config: Config, info: TeacherInfo) -> dict[Expert, str]:
    """What identifies each LoRA of the first stage that a second one begins with; nothing
    elsewhere. Its weights count, not what its file says of the teacher's place.
    """
    files = warm_start_files(config, info) if config.is_second_stage else {}
    return {expert: fingerprint_file(file.path) for expert, file in files.items()}


def check_stages(config: Config, info: TeacherInfo) -> None:
    """Raises UsageError where the job's folder holds what a job of other stages made: experts of
    two methods would be exported as one student, or a first stage would be made anew.

    Args:
        config: of the job's last stage.
    """
    if config.allow_config_change:
        return
    folder = RunFolder(Path(config.output_dir))
    for expert in info.experts:
        newest = newest_of(checkpoint.found(folder.expert(expert)))
        if newest and (before := newest[1]["config"])["method"] != config.to_json()["method"]:
            remedy = f"choose another --output_dir, with --init_student_from {folder.path} to go on"
            if config.evaluate_only:
                remedy = f"give that method and its other settings ({folder.run_json})"
            raise UsageError(
                f"{newest[0]}: is of --method {before['method']}, and this is --method "
                f"{config.method_title}; {remedy}"
            )
        for first, *_ in () if config.is_second_stage else STAGES.values():
            begun = newest_of(checkpoint.found(folder.stage(first).expert(expert)))
            if begun is not None:
                raise UsageError(
                    f"{begun[0]}: is of a job of two stages; leave out --method {config.method} to "
                    "go on with it, or choose another --output_dir"
                )


def check_left(config: Config, info: TeacherInfo) -> None:
    """Raises UsageError where the folder of a stage holds a student that nothing is left to go on
    from, and that is not what `--init_student_from` brought.
    """
    begun = warm_start_files(config, info) if config.init_student_from else {}
    brought = {fingerprint_file(lora.path) for lora in begun.values()}
    folder = RunFolder(Path(config.output_dir))
    for expert in () if config.evaluate_only else config.experts:
        file = folder.student(expert)
        if not file.exists() or any(folder.expert(expert).glob("*checkpoint-*")):
            continue
        if not brought or fingerprint_file(file) not in brought:
            raise UsageError(
                f"{file}: is a student whose checkpoints are gone, and would be replaced by one "
                "that begins anew; move it away for that, or give --evaluate_only to measure it"
            )


def is_done(config: Config, info: TeacherInfo, expert: Expert) -> bool:
    """Whether nothing is left to train of an expert: its newest checkpoint is whole, has all the
    updates, and began with the student that is there; and no other one is asked for.
    """
    newest = newest_of(checkpoint.found(RunFolder(Path(config.output_dir)).expert(expert)))
    if newest is None or config.resume_from_checkpoint != "latest":
        return False
    if newest[1]["step"] < all_updates(config, expert):
        return False
    now = begun_with(config, info)
    if newest[1].get("begun_with", now) != now:
        return False
    try:
        checkpoint.verify(newest[0])  # last: it reads all of it
    except checkpoint.DamagedCheckpoint:
        return False
    return True


def is_trained(config: Config) -> bool:
    """Whether the checkpoints of a stage say that it has made all its updates."""
    folder = RunFolder(Path(config.output_dir))
    for expert in config.experts:
        newest = newest_of(checkpoint.found(folder.expert(expert)))
        if newest is None or newest[1]["step"] < all_updates(config, expert):
            return False
    return True


def all_updates(config: Config, expert: Expert) -> int:
    """Of all roles of an expert, those that were skipped (`--on_nonfinite`) too."""
    return sum(cost.updates for cost in recipe_of(config).costs(config, expert).values())


def newest_of(folders: Sequence[Path]) -> tuple[Path, dict[str, Any]] | None:
    """The first of `folders`, the highest step first, whose state is there, and that state."""
    for folder in folders:
        try:
            return folder, checkpoint.read_state(folder)
        except checkpoint.DamagedCheckpoint:
            continue  # an older one will be resumed from
    return None
