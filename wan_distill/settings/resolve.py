"""Fills in what was left open, for the teacher and the method at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_distill.errors import UsageError
from wan_distill.layout import RunFolder
from wan_distill.settings.checks import check_all
from wan_distill.settings.clip_sizes import check_clip
from wan_distill.settings.config import Config
from wan_distill.settings.defaults import WHOLE_STUDENT, Default
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.job import (
    REFINED,
    SECOND_STAGE_FLAGS,
    STAGES,
    TWO_STAGES,
)
from wan_distill.settings.output_name import output_name
from wan_distill.settings.ranges import check_values
from wan_distill.settings.recipes import RECIPES, recipe_of
from wan_distill.settings.scale import Scale, scale_of

STEPS = (4,)


def resolve_stages(config: Config, teacher: TeacherInfo) -> tuple[Config, ...]:
    """The resolved settings of each stage of a job, in order: each begins with the student that the
    one before left, and the last one's output folder is the job's.

    Raises UsageError where the result cannot work.
    """
    check_values(config)  # what follows computes with what was given
    config = _fill(config, {"sampling_steps": STEPS})
    config = _fill(config, {"method": default_method(config)})
    methods = STAGES.get(config.method, (config.method,))
    config = _fill(config, {"output_dir": str(Path("outputs") / output_name(config, teacher.name))})
    if len(methods) == 1:
        _check_one_stage(config)
        return (_resolve_one(config, teacher),)
    if config.student_layers is not None:
        raise UsageError(
            f"--student_layers {config.student_layers}: --method {config.method} needs the teacher "
            "beneath the student; use --method trajectory"
        )
    first, second = methods
    begun = RunFolder(Path(config.output_dir)).stage(first)
    before: dict[str, Any] = dict(
        method=first,
        output_dir=str(begun.path),
        samples_dir=config.samples_dir or config.output_dir,
        save_merged=False,
        evaluate=False,
        export=(),
        **_without_second_stage(first),
        # Muon learns more from few updates, and the second stage takes more memory anyway.
        use_8bit_adam=config.use_8bit_adam and config.optimizer == "adamw",
    )
    after: dict[str, Any] = dict(
        method=second,
        init_student_from=str(begun.path),
        max_train_steps=config.refine_steps,
        optimizer=None,  # --optimizer is the regression's: matching has its own
        learning_rate=config.refine_learning_rate,
    )
    usual = _resolve_one(
        dataclasses.replace(config, **before | dict(max_train_steps=None)), teacher
    )
    begun_with = _resolve_one(dataclasses.replace(config, **before), teacher)
    if len(begun_with.experts) > 1:
        after["expert"] = config.refine_expert or REFINED
    elif config.refine_expert not in (None, "both", *begun_with.experts):
        raise UsageError(
            f"--refine_expert {config.refine_expert}: --expert {config.expert} trains that one "
            "alone; leave one out"
        )
    refined = _resolve_one(dataclasses.replace(config, **after), teacher)
    share = begun_with.max_train_steps / usual.max_train_steps
    return begun_with, _shorten(refined, config, share) if share < 1 else refined


def _without_second_stage(method: str) -> dict[str, Any]:
    """The settings that a first stage of `method` does not read, each with no value of the user's:
    those of the refinement, and those of other methods alone.
    """
    own = RECIPES[method].group
    others = {recipe.group for recipe in RECIPES.values()} - {own, None}
    return {
        item.name: item.default
        for item in dataclasses.fields(Config)
        if item.metadata["group"] in others or item.name.startswith("refine_")
    }


def _check_one_stage(config: Config) -> None:
    """Raises UsageError where a student that is given is refined, and a setting is named that only
    a job's second stage reads.
    """
    if config.init_student_from is None or config.is_second_stage:
        return
    for setting, flag in SECOND_STAGE_FLAGS.items():
        if (given := getattr(config, flag)) is not None:
            raise UsageError(
                f"--{flag} {given}: --method {config.method} has no second stage; give --{setting}"
            )
    if config.refine_expert is not None:
        raise UsageError(
            f"--refine_expert {config.refine_expert}: --method {config.method} has no second "
            "stage; give --expert"
        )


def _shorten(refined: Config, given: Config, share: float) -> Config:
    """The second stage of a job whose first one is shorter than usual: a trial of a few updates is
    one in both stages. What the user gave stays.
    """
    counts = {
        "max_train_steps": given.refine_steps,
        "critic_warmup_steps": given.critic_warmup_steps,
        "ema_start": given.ema_start,
        "lr_warmup_steps": given.lr_warmup_steps,
    }
    shorter = {
        name: max(1, round(share * getattr(refined, name)))
        for name, chosen in counts.items()
        if chosen is None
    }
    return dataclasses.replace(refined, **shorter)


def resolve(config: Config, teacher: TeacherInfo) -> Config:
    """The resolved settings of a job's last stage. Raises UsageError where they cannot work."""
    return resolve_stages(config, teacher)[-1]


def default_method(config: Config) -> str:
    """The best that is known: a regression and then a refinement of it. What begins with a student
    is refined; a shallower student has no teacher beneath it to be refined with; in one step
    matching does harm.
    """
    if config.init_student_from is not None:
        return "dmd"
    if config.student_layers is not None or config.grid_steps == 1:
        return "trajectory"
    if config.expert == "high" and config.refine_expert is None:
        return "trajectory"  # the refinement is the low expert's
    return TWO_STAGES


def _resolve_one(config: Config, teacher: TeacherInfo) -> Config:
    """`config`, whose method has a single stage, with every None filled in."""
    config = _fill(config, {"boundary_ratio": teacher.boundary_ratio})
    config = _fill(config, teacher.sampling_defaults)
    check_clip(config, teacher.side_multiple)  # the scale is of whole patches
    if "diffusers" in config.export:
        config = _fill(config, {"save_merged": True})
    scale = scale_of(config, teacher)
    recipe = recipe_of(config)
    micro, count = scale.batch(recipe.batch(config, scale))
    if config.train_batch_size is not None:
        count = 1  # as many samples as the user says
    config = _fill(config, {"train_batch_size": micro, "gradient_accumulation_steps": count})
    rules = {**recipe.defaults, **recipe.adjusted(config)}
    if config.whole_student:
        rules |= WHOLE_STUDENT
    config = _fill(config, _values(rules, scale))
    # Finer than the base that it is added to would not show.
    exact = config.mixed_precision == "no"
    config = _fill(config, {"lora_dtype": "float32" if exact else "bf16"})
    check_all(config, teacher)
    return config


def _values(rules: Mapping[str, Default], scale: Scale) -> dict[str, Any]:
    return {name: default.value(scale) for name, default in rules.items()}


def _fill(config: Config, values: dict[str, Any]) -> Config:
    missing = {name: value for name, value in values.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)
