"""Is a student healthy? Limits, and what is said where one is passed."""

from __future__ import annotations

# As ratios to the teacher; of luminance: the difference.
FROZEN = 0.6
COLLAPSED = 0.6
UNFAITHFUL = 1.5
OVEREXPOSED = 0.1
OVERSATURATED = 1.4


def warnings(values: dict[str, float], has_critic: bool = True) -> list[str]:
    """What is going wrong, in plain words, and what to do.

    Args:
        values: what a check found, some of it relative to the teacher.
        has_critic: whether the method has one: its flags help nobody else.
    """
    problems = []
    if values.get("motion", 1.0) < FROZEN:
        problems.append(
            f"the student freezes: its clips move {values['motion']:.2f} times as much as the "
            "teacher's. Lower --learning_rate, or begin from a trajectory student "
            "(--init_student_from)."
        )
    if values.get("departure", 1.0) < FROZEN:
        problems.append(
            f"the student holds on to the picture: its clips leave it {values['departure']:.2f} "
            "times as far as the teacher's. Lower --learning_rate, or begin from a trajectory "
            "student (--init_student_from)."
        )
    if values.get("first_frame", 1.0) > UNFAITHFUL:
        problems.append(
            f"the student does not begin with the picture: its first frames are "
            f"{values['first_frame']:.2f} times as far from it as the teacher's. Lower "
            "--learning_rate, or train for longer."
        )
    if values["luminance"] > OVEREXPOSED or values.get("saturation", 1.0) > OVERSATURATED:
        problems.append(
            f"the student over-exposes: luminance {values['luminance']:+.2f}, saturation "
            f"{values.get('saturation', 1.0):.2f} times the teacher's. Stop earlier, lower "
            "--learning_rate or the guidance scales."
        )
    if values.get("diversity", 1.0) < COLLAPSED:
        remedy = "Raise --diversity_weight or --critic_updates."
        if not has_critic:
            remedy = "Raise --max_train_steps, or refine the student: --method trajectory+dmd."
        problems.append(
            f"the student collapses: samples of one prompt differ {values['diversity']:.2f} times "
            f"as much as the teacher's. {remedy}"
        )
    return problems
