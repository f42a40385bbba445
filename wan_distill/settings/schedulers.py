"""What gives a student's sigmas in which version of diffusers, in words and in code; no torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from packaging.version import Version

from wan_distill.errors import UsageError

SECOND_EXPERT = Version("0.35")  # has `load_into_transformer_2`
FLOW_MAP = Version("0.39")  # has FlowMapEulerDiscreteScheduler
DTYPE = Version("0.41")  # reads `dtype`; before, only `torch_dtype` is


def check_diffusers(student: Mapping[str, Any]) -> None:
    """Raises UsageError where the installed diffusers is missing, or too old to sample with, saying
    what gives the sigmas of `student` (its metadata) in that version.
    """
    try:
        installed = importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError("diffusers: not installed; pip install -r requirements.txt") from error
    version = Version(installed)
    if version >= DTYPE:
        return
    shift, steps = float(student["flow_shift"]), max(student["sampling_steps"])
    if version >= FLOW_MAP:
        words = f"FlowMapEulerDiscreteScheduler(shift={shift}) gives its sigmas"
    elif version >= SECOND_EXPERT:
        words = (
            f"FlowMatchEulerDiscreteScheduler(shift={shift}), with set_timesteps always given "
            f"sigmas={grid_before_shift(steps)}, gives its sigmas"
        )
    else:
        words = "nothing loads a LoRA into the second expert"
    raise UsageError(
        f"diffusers {installed}: sample.py needs {DTYPE} or newer; pip install -U diffusers (in "
        f"your own code {words} with this version; docs/use_your_student.md shows how)"
    )


def grid_before_shift(steps: int) -> list[float]:
    """The sigmas that `FlowMatchEulerDiscreteScheduler` is given, which shifts them itself."""
    return [step / steps for step in range(steps, 0, -1)]


def older_diffusers(shift: float, steps: int) -> str:
    """What to change in the code of a README for older versions of diffusers."""
    return (
        f"The code needs diffusers {DTYPE} or newer. In {FLOW_MAP} and 0.40 write `torch_dtype` "
        f"for `dtype`. A merged pipeline (`student/`) needs {FLOW_MAP}. In {SECOND_EXPERT} to 0.38 "
        "take the LoRAs, write `torch_dtype`, and replace the scheduler; nothing else there visits "
        "the trained sigmas:\n\n"
        "```python\n"
        "import functools\n"
        "from diffusers import FlowMatchEulerDiscreteScheduler\n\n"
        f"scheduler = FlowMatchEulerDiscreteScheduler(shift={shift})\n"
        "scheduler.set_timesteps = functools.partial(\n"
        f"    scheduler.set_timesteps, sigmas={grid_before_shift(steps)}\n"
        ")\n"
        "pipe.scheduler = scheduler\n"
        "```"
    )
