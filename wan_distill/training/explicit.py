"""The checkpoint that `--resume_from_checkpoint` names, which may be another stage's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import wan_distill.training.checkpoint as checkpoint
from wan_distill.errors import UsageError
from wan_distill.layout import RunFolder
from wan_distill.settings.config import Config


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
