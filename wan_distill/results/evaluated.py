"""Whether the student that is measured is this run's."""

from __future__ import annotations

from wan_distill.errors import UsageError
from wan_distill.layout import student_file
from wan_distill.results.student import check_teacher
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.students import SAME_SCHEDULE, read_one


def check_evaluated(config: Config, info: TeacherInfo) -> None:
    """Raises UsageError where `--evaluate_only` would measure no student, one of a job that is not
    done, or one on another teacher or schedule than it was made for.
    """
    if not config.evaluate_only:
        return
    whole = [e for e in info.experts if config.phases(e)]  # a second stage's folder has both
    for expert in whole if config.is_second_stage else config.experts:
        file = student_file(config.output_dir, expert)
        if not file.exists():
            raise UsageError(
                f"--evaluate_only: {config.output_dir} holds no {file.name}; give the --output_dir "
                "of a student that is trained"
            )
        if config.allow_config_change:
            continue
        student, settings = read_one(file), config.to_json()
        check_teacher(info, student, False, "--allow_config_change")
        differing = [
            f"{name} was {student[name]}, is {settings[name]}"
            for name in SAME_SCHEDULE
            if name != "teacher" and student[name] != settings[name]
        ]
        if differing:
            raise UsageError(
                f"{file}: was trained with other settings ({'; '.join(differing)}); set them back, "
                "or give --allow_config_change"
            )
