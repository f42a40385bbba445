"""Does what lies in the output folder belong to this job?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import wan_distill.training.checkpoint as checkpoint
from wan_distill.data.first_frames import Prompt
from wan_distill.errors import UsageError
from wan_distill.layout import RunFolder
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.records import read_record
from wan_distill.training.resume import changed_settings, check_resume, identity
from wan_distill.training.stages import check_left, check_stages, is_trained


def check_belonging(
    stages: Sequence[Config],
    info: TeacherInfo,
    prompts: Sequence[Prompt],
    sample_groups: int,
    say: Callable[[str], None],
) -> None:
    """Raises UsageError where a job goes on from what another has left, before anything is written.

    Args:
        sample_groups: processes that work on samples of their own.
        say: gets one line for each difference that is permitted.
    """
    check_stages(stages[-1], info)
    check_measured(stages[-1])
    for stage in stages:
        check_left(stage, info)
        folder = RunFolder(Path(stage.output_dir))
        begun = any(checkpoint.found(folder.expert(expert)) for expert in stage.experts)
        if begun or stage.resume_from_checkpoint != "latest":
            check_resume(stage, identity(stage, info, prompts, sample_groups), say)
        if not is_trained(stage):
            break  # what a later one has made of its student, it will make anew


def check_measured(config: Config) -> None:
    """Raises UsageError where `--evaluate_only` would call a student one of other settings than
    run.json says: its checkpoints, which know them, may be gone.

    Args:
        config: of the job's last stage.
    """
    file = RunFolder(Path(config.output_dir)).run_json
    if not config.evaluate_only or config.allow_config_change or not file.exists():
        return
    record = read_record(file, "delete it, or take it from where the run was made")
    changes = changed_settings(config, config.to_json() | record.get("config", {}))
    if changes:
        raise UsageError(
            f"{file}: the student was trained with other settings ({'; '.join(changes)}); set them "
            "back, or give --allow_config_change"
        )
