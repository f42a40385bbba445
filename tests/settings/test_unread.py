"""Settings of another method than the job's: named in the plan, in no way refused."""

from __future__ import annotations

import pytest

import train_distillation
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve_stages
from wan_distill.settings.unread import unread


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--method trajectory --critic_updates 5",
            ["--critic_updates: of --method dmd, and this job is trajectory; nothing here depends "
            "on it"],
        ),
        (
            "--solver_points 12 --fake_score_lora_alpha 8 --method trajectory",
            ["--fake_score_lora_alpha: of --method dmd, and this job is trajectory; nothing here "
            "depends on it",
            "--solver_points: of --method consistency, and this job is trajectory; nothing here "
            "depends on it"],
        ),
        (
            "--solver_points 12 --huber_c 0.1",
            ["--solver_points, --huber_c: of --method consistency, and this job is trajectory+dmd; "
            "nothing here depends on them"],
        ),
        ("--critic_updates 5", []),
        ("--method dmd --critic_updates 5 --num_trajectories 8", []),
        ("--method consistency --solver_points 12 --huber_c 0.001", []),
    ],
)  # fmt: skip
def test_settings_of_a_method_that_no_stage_has_are_named(flags, expected):
    given = parse_args(flags.split())
    stages = resolve_stages(given, read_teacher(given))
    assert list(unread(given, stages)) == [f"Unread    {line}" for line in expected]


@pytest.mark.parametrize("budget", [[], ["--budget", "1000"]])
def test_the_plan_names_them(budget, tmp_path, capsys):
    flags = ["--method", "trajectory", "--huber_c", "0.1", "--output_dir", str(tmp_path / "out")]
    assert train_distillation.main([*flags, *budget, "--dry_run"]) == 0
    assert "\nUnread    --huber_c: of --method consistency" in capsys.readouterr().out
