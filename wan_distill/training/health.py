"""Is a student healthy? Limits, and what is said where one is passed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from wan_distill.maths.sigmas import Expert, expert_sigmas
from wan_distill.settings.config import Config
from wan_distill.settings.recipes import Role, recipe_of

# As ratios to the teacher; of luminance: the difference.
FROZEN = 0.6
COLLAPSED = 0.6
UNFAITHFUL = 1.5
OVEREXPOSED = 0.1
OVERSATURATED = 1.4


def warnings(values: Mapping[str, float], config: Config) -> list[str]:
    """What is going wrong, in plain words, and what to do.

    Args:
        values: what a check or the evaluation found, all but the luminance relative to the teacher.
        config: of the stage that made the student.
    """
    lower, longer = (f"--{config.flag(name)}" for name in ("learning_rate", "max_train_steps"))
    has_critic = "fake_score" in recipe_of(config).roles(config)
    more = f"Train for longer ({longer})."
    if has_critic:  # it learns from no clip, so a longer run makes it worse
        more = f"Lower {lower}."
        if config.init_student_from is None:
            more = f"Lower {lower}, or begin with a regression (--method trajectory+dmd)."
    problems = []
    if values.get("motion", 1.0) < FROZEN:
        problems.append(
            f"the student freezes: its clips move {values['motion']:.2f} times as much as the "
            f"teacher's. {more}"
        )
    if values.get("departure", 1.0) < FROZEN:
        problems.append(
            f"the student holds on to the picture: its clips leave it {values['departure']:.2f} "
            f"times as far as the teacher's. {more}"
        )
    if values.get("first_frame", 1.0) > UNFAITHFUL:
        problems.append(
            f"the student does not begin with the picture: its first frames are "
            f"{values['first_frame']:.2f} times as far from it as the teacher's. {more}"
        )
    if values["luminance"] > OVEREXPOSED or values.get("saturation", 1.0) > OVERSATURATED:
        guided = has_critic and config.real_score != "samples"
        scale = " or --real_score_guidance_scale (_2 for the low expert)" if guided else ""
        problems.append(
            f"the student over-exposes: luminance {values['luminance']:+.2f}, saturation "
            f"{values.get('saturation', 1.0):.2f} times the teacher's. Lower {lower}{scale}."
        )
    if values.get("diversity", 1.0) < COLLAPSED:
        remedy = "Raise --diversity_weight or --critic_updates."
        if not has_critic:
            remedy = f"Train for longer ({longer}), or refine it (--init_student_from)."
        problems.append(
            f"the student collapses: samples of one prompt differ {values['diversity']:.2f} times "
            f"as much as the teacher's. {remedy}"
        )
    return problems


def nonfinite_report(
    config: Config, expert: Expert, role: Role, step: int, error: Exception, weight: str | None
) -> str:
    """What is known of an update of `expert` that was not made, the one after `step` others.

    Args:
        error: what was found.
        weight: the name of one that is not finite, if there is any.
    """
    sigmas = expert_sigmas(config.sigmas(), expert, config.boundary_ratio)
    report = (
        f"{error} at update {step + 1}, {role}, {expert} expert (sigma {sigmas[0]:.4f} to "
        f"{sigmas[-1]:.4f})"
    )
    return f"{report}; its weight {weight} is not finite" if weight else report


def how_to_go_on(config: Config, role: Role, kept: Path | None, job: Path) -> str:
    """What to do after such an update of `role`.

    Args:
        kept: where the state before it is saved; None where its own weights are not finite.
        job: the output folder, whose default name another rate would change.
    """
    rate = config.flag("learning_rate" if role == "student" else "fake_score_learning_rate")
    state = f"no weight was changed and the state before it is saved in {kept}"
    if kept is None:
        state = "the updates before it went too far, so the last checkpoint is the last good state"
    return f"{state}. Lower --{rate} and give --allow_config_change and --output_dir {job} to go on"
