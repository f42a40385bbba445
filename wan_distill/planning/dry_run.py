"""The answer to --dry_run: the plan, and what stands against a run on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from wan_distill.data.first_frames import Prompt, text_of
from wan_distill.errors import UsageError
from wan_distill.planning.plan import describe_needs, describe_plan, plan_numbers
from wan_distill.planning.preflight import examine_surroundings
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.scale import processes
from wan_distill.system.files import write_atomically
from wan_distill.training.belonging import check_belonging


def print_plan(
    stages: Sequence[Config],
    info: TeacherInfo,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    budget: Sequence[str] = (),
) -> int:
    """Prints the plan, which holds whatever this machine is, and then what stands against a run
    here. Exit code: 0, or 2 where anything does.
    """
    config, encoded = stages[-1], len(prompts) + len(held_out)
    print(describe_needs(stages, info, encoded), "", sep="\n")
    print(describe_plan(stages, info, prompts, held_out, budget), "", sep="\n")
    if config.plan_json is not None:
        numbers = plan_numbers(stages, info, encoded)
        try:
            write_atomically(Path(config.plan_json), json.dumps(numbers, indent=1).encode())
        except (OSError, ValueError) as error:  # a path without a name is a ValueError
            why = getattr(error, "strerror", None) or "it names no file"
            raise UsageError(
                f"--plan_json {config.plan_json}: cannot be written ({why}); choose another"
            ) from error
    lines, obstacles = examine_surroundings(stages, info, list(map(text_of, [*prompts, *held_out])))
    groups = 1 if config.context_parallel else processes(config)
    try:
        check_belonging(stages, info, prompts, groups, lines.append)
    except UsageError as error:
        obstacles += [] if str(error) in obstacles else [str(error)]
    print("On this machine:", *lines, sep="\n")
    for obstacle in obstacles:
        print(f"error: {obstacle}", file=sys.stderr)
    return 2 if obstacles else 0
