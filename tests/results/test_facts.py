"""The page's tables of settings, and of what was planned and spent."""

from __future__ import annotations

from wan_distill.results.facts import changed_settings, plan_basis, planned_and_spent
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve_stages


def test_settings_are_those_that_differ_from_the_teachers_defaults(random_teacher, tmp_path):
    prompts = tmp_path / "mine.txt"
    plain = dict(teacher_path=str(random_teacher), output_dir=str(tmp_path))
    info = read_teacher(Config(**plain))
    stages = resolve_stages(Config(**plain), info)
    plan = dict(stages=[stage.to_json() for stage in stages])
    assert changed_settings(stages[-1], info, plan) == []
    stages = resolve_stages(Config(**plain, rank=8, prompts=str(prompts), method="dmd"), info)
    plan = dict(stages=[stage.to_json() for stage in stages])
    found = {
        flag: (value, usual) for flag, value, usual in changed_settings(stages[-1], info, plan)
    }
    assert found["--rank"] == ("8", "64") and found["--prompts"] == ("mine.txt", "none")
    assert not {"--output_dir", "--teacher_path", "--learning_rate"} & set(found)
    # An evaluation with other flags does not change what the run was trained with.
    other = resolve_stages(Config(**plain, method="dmd"), info)[-1]
    assert dict.fromkeys(found) == dict.fromkeys(f for f, *_ in changed_settings(other, info, plan))


def test_plan_and_spent_stand_side_by_side():
    plan = dict(seconds_by_stage={"a": 60.0, "b": 120.0}, peak_bytes=2e9)
    spent = dict(seconds={"a": 30.0, "c": 60.0}, peak_bytes=1.5e9, gpu=True)
    assert planned_and_spent(plan, spent) == [
        ("a", "1.0 minutes", "30 s"),
        ("b", "2.0 minutes", ""),
        ("c", "", "1.0 minutes"),
        ("in all", "3.0 minutes", "1.5 minutes"),
        ("peak of memory", "2 GB", "1.5 GB"),
    ]
    assert planned_and_spent({}, {}) == []
    assert "libraries included" in planned_and_spent(plan, spent | dict(gpu=False))[-1][0]


def test_what_the_plan_was_computed_from_is_said():
    assert plan_basis({}) == ""
    reason = "20% of the rate measured here; other work took 60% of the processor"
    said = plan_basis(dict(hardware=dict(rate=2.5e11, reason=reason)))
    assert said == f"Planned at 0.25 TFLOP/s per device: {reason}."
