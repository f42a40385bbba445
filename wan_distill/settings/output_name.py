"""The name of the folder of a run that the user gives no name."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import Any

from wan_distill.settings.config import Config

LONGEST = 80  # characters of what settings add; file systems allow 255 in all
IN_THE_NAME = ("method", "sampling_steps")
# They may differ between a run and its continuation, but not between two students.
OF_THE_STUDENT = ("teacher_lora", "teacher_transformer", "teacher_transformer_2")


def output_name(config: Config, teacher: str) -> str:
    """`<teacher>-<method>-<steps>`, and each setting that is given and may not change on resuming,
    or changes the teacher: runs that differ in one of them never meet in one folder.

    Prompts, pictures and the counts of updates (`--budget` too) are not in it. What a folder that
    holds another run then refuses, training/resume.py says.

    Args:
        config: with `method` and `sampling_steps` filled in, and otherwise as given.
        teacher: its name.
    """
    steps = "-".join(map(str, config.sampling_steps))
    given = [
        f"{item.name}_{_short(getattr(config, item.name))}"
        for item in dataclasses.fields(config)
        if item.name not in IN_THE_NAME
        and (not item.metadata["free"] or item.name in OF_THE_STUDENT)
        and getattr(config, item.name) != item.default
    ]
    added = "".join(f"-{text}" for text in given)
    if len(added) > LONGEST:
        added = "-" + hashlib.sha256(added.encode()).hexdigest()[:8]
    return f"{teacher}-{config.method}-{steps}steps{added}"


def _short(value: Any) -> str:
    """A value in characters that every file system takes; of paths the last parts."""
    values = value if isinstance(value, tuple) else str(value).split(",")
    ends = [re.split(r"[/\\]", str(each).rstrip("/\\"))[-1] for each in values]
    name = re.sub(r"[^\w.+-]+", "_", "+".join(ends))
    return name if name == str(value) else f"{name}-{_digest(value)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:4]
