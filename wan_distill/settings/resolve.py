"""Fills in what was left open, for the teacher and the method at hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from wan_distill.settings.checks import check_all
from wan_distill.settings.config import Config
from wan_distill.settings.defaults import EVERY_METHOD, WHOLE_STUDENT
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.recipes import recipe_of

STEPS = (4,)


def resolve(config: Config, teacher: TeacherInfo) -> Config:
    """`config` with every None filled in. Raises UsageError where the result cannot work."""
    config = _fill(config, {"sampling_steps": STEPS, "boundary_ratio": teacher.boundary_ratio})
    config = _fill(config, teacher.sampling_defaults)
    config = _fill(config, {"method": _pick(EVERY_METHOD, teacher.embedded)["method"]})
    if "diffusers" in config.export:
        config = _fill(config, {"save_merged": True})
    recipe = recipe_of(config)
    chosen = _pick(recipe.defaults, teacher.embedded)
    chosen |= recipe.adjusted(config, teacher.embedded)
    if config.whole_student:
        chosen |= _pick(WHOLE_STUDENT, teacher.embedded)
    config = _fill(config, chosen)
    # Finer than the base that it is added to would not show.
    exact = config.mixed_precision == "no"
    config = _fill(config, {"lora_dtype": "float32" if exact else "bf16"})
    steps = "-".join(map(str, config.sampling_steps))
    name = f"{teacher.name}-{config.method}-{steps}steps"
    config = _fill(config, {"output_dir": str(Path("outputs") / name)})
    check_all(config, teacher)
    return config


def _pick(defaults: Any, embedded: bool) -> dict[str, Any]:
    return {k: v.embedded if embedded else v.real for k, v in defaults.items()}


def _fill(config: Config, values: dict[str, Any]) -> Config:
    missing = {name: value for name, value in values.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)
