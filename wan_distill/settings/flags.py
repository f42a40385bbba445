"""What turns a field of the settings into a command-line flag: help, group, choices, parser."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any

START = "start here"
STUDENT = "the student and its schedule"
TEACHER = "the teacher"
OPTIMISER = "optimisation"
TRAJECTORY = "guided-trajectory distillation (--method trajectory)"
DMD = "phased distribution matching (--method dmd)"
CONSISTENCY = "consistency distillation (--method consistency)"
MEMORY = "memory and speed"
OUTPUT = "what is written and shown"


def flag(
    default: Any,
    help: str,
    group: str,
    *,
    choices: tuple[str, ...] | None = None,
    alias: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
    free: bool = False,
    repeated: bool = False,
    optional: Any = None,
) -> Any:
    """A dataclass field that is also the command-line flag `--<field name>`.

    Args:
        default: None means: `resolve.resolve_stages` chooses, for the teacher and the method at
            hand. The field's type is that of the resolved value.
        choices: the values that may be given.
        alias: other names of the flag.
        parse: text -> value, where the field's type alone does not say how.
        repeated: whether the flag may be given several times; its values are then a tuple.
        optional: the value where the flag is given without one; None: it needs one.
        free: whether the value may differ between a run and its continuation. Everything that
            decides what an update does, or which weights are exported, is not free.
    """
    about = dict(
        help=help,
        group=group,
        choices=choices,
        alias=alias,
        parse=parse,
        free=free,
        repeated=repeated,
        optional=optional,
    )
    return dataclasses.field(default=default, metadata=about)


def step_counts(text: str) -> tuple[int, ...]:
    """'4' -> (4,); '2,4,8' -> (2, 4, 8)."""
    parts = str(text).split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(
            "is not a step count; give one such as 4, or several such as 2,4,8"
        )
    return tuple(sorted({int(part) for part in parts}))


def words(text: str) -> tuple[str, ...]:
    """'to_q,to_k' or 'to_q to_k' -> ('to_q', 'to_k')."""
    return tuple(re.split(r"[,\s]+", text.strip()))


def text(given: str) -> str:
    """A text that is not empty, as that of a variable of the shell without a value is."""
    if not given.strip():
        raise argparse.ArgumentTypeError("is empty; give a value, or leave the flag out")
    if "\0" in given:
        raise argparse.ArgumentTypeError("holds a NUL character; retype it")
    return given


def path(given: str) -> str:
    """A path, in which `~` is the home folder: the shell does not replace it everywhere."""
    return os.path.expanduser(text(given))


def paths(given: str) -> str:
    """Paths separated by commas."""
    return ",".join(path(part) for part in text(given).split(","))
