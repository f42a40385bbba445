"""Which settings that the user gave does no stage of the job read?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from wan_distill.settings.config import Config
from wan_distill.settings.recipes import RECIPES, recipe_of


def unread(given: Config, stages: Sequence[Config]) -> Iterator[str]:
    """A line of the plan for each method that is not the job's and whose own settings are given.

    They are no bad input: one --config file may serve several methods.

    Args:
        given: before it is resolved.
        stages: the resolved settings of each stage.
    """
    job = "+".join(stage.method for stage in stages)
    own = {recipe_of(stage).group for stage in stages}
    for name, recipe in RECIPES.items():
        flags = [
            f"--{item.name}"
            for item in dataclasses.fields(given)
            if item.metadata["group"] == recipe.group and getattr(given, item.name) != item.default
        ]
        if flags and recipe.group not in own:
            them = "it" if len(flags) == 1 else "them"
            yield (
                f"Unread    {', '.join(flags)}: of --method {name}, and this job is {job}; nothing "
                f"here depends on {them}"
            )
