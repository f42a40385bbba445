"""Runs with different settings do not meet in one folder; a run and its continuation do."""

from __future__ import annotations

import pytest

from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.output_name import output_name
from wan_distill.settings.resolve import resolve


def name_of(**settings) -> str:
    settings = dict(method="dmd", sampling_steps=(4,)) | settings
    return output_name(Config(**settings), "wan")


def test_without_further_settings_the_name_is_short():
    config = resolve(Config(), read_teacher(Config()))
    assert config.output_dir.endswith("tiny_wan22-trajectory+dmd-4steps")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "wan-dmd-4steps"),
        (dict(sampling_steps=(2, 4)), "wan-dmd-2-4steps"),
        (dict(rank=32, seed=1), "wan-dmd-4steps-seed_1-rank_32"),
        (dict(max_train_steps=9, offload=True, expert="high"), "wan-dmd-4steps"),  # the same run
        (dict(learning_rate=1e-4), "wan-dmd-4steps-learning_rate_0.0001"),
    ],
)
def test_settings_that_make_another_student_stand_in_the_name(settings, expected):
    assert name_of(**settings) == expected


def test_names_are_short_and_differ_and_are_names_on_every_system():
    names = [
        name_of(init_student_from="a/student"),
        name_of(init_student_from="b/student"),
        name_of(teacher_lora=("style.safetensors:0.8",)),
        name_of(teacher_lora=("style.safetensors:0.9",)),
        name_of(negative_prompt="blurred, 色调艳丽 " * 40),
        name_of(negative_prompt="blurred, 色调艳丽 " * 41),
    ]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name.encode()) < 200 and not set(name) & set('/\\:*?"<>| ')
