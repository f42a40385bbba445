"""Exactly the prompts that a job reads: what is not read is neither made nor encoded."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from conftest import tiny_flags

import train_distillation
from wan_distill.data import PicturedPrompt
from wan_distill.errors import UsageError
from wan_distill.planning import picture_work
from wan_distill.planning.picture_work import pictures_read
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve_stages
from wan_distill.training import prompts_read

TESTED = Path(__file__).parent.parent / "prompts.txt"
TRAINING = [PicturedPrompt(f"training {i}", f"t{i}") for i in range(100)]
HELD_OUT = [PicturedPrompt(f"held out {i}", f"h{i}") for i in range(40)]


def read_by(**changes) -> list[str]:
    given = dict(num_trajectories=10, monitor_samples=8, eval_samples=16)
    config = Config(teacher_path="tiny-i2v", **(given | changes))
    info = read_teacher(config)
    stages = resolve_stages(config, info)
    found = prompts_read(stages, TRAINING, HELD_OUT)
    assert len(found) == len(set(found))
    assert len(found) <= pictures_read(stages, info, 140)  # what is planned
    return [prompt.picture for prompt in found]


def test_samples_checks_previews_and_evaluation_and_no_more():
    checked = {f"t{i}" for i in (0, 25, 50, 75)}
    trained = {f"t{i}" for i in range(10)}
    assert set(read_by()) == trained | checked | {f"h{i}" for i in range(8)}
    assert not {"t25", "h0"} & set(read_by(monitor_steps=0, validation_steps=0, evaluate=False))
    assert "h2" in read_by(eval_samples=2) and "h3" not in read_by(eval_samples=2)  # the previews'


def test_a_given_preview_has_a_picture_that_is_read():
    assert {"h0", "h1"} <= set(read_by(validation_prompt="a fox|a cat", eval_samples=2))


@pytest.mark.parametrize(("real_score", "every"), [("guided", True), ("samples", False)])
def test_matching_from_fresh_noise_draws_from_all_prompts(real_score, every):
    found = read_by(method="dmd", real_score=real_score, diversity_weight=0.0)
    assert {prompt.picture for prompt in TRAINING}.issubset(found) == every


def test_a_job_with_fewer_prompts_than_samples_reads_all():
    config = Config(teacher_path="tiny-i2v")
    info = read_teacher(config)
    stages = resolve_stages(config, info)
    assert len(prompts_read(stages, TRAINING, HELD_OUT)) == 140 == pictures_read(stages, info, 140)
    assert pictures_read(stages, dataclasses.replace(info, takes_picture=False), 140) == 0


def test_what_is_not_read_is_not_encoded(random_teacher, tmp_path, monkeypatch):
    """Of a file of a thousand captions, and as many are planned for at least."""
    file = tmp_path / "prompts.txt"
    words = TESTED.read_text(encoding="utf-8").split()
    captions = [" ".join(chosen) for chosen in itertools.permutations(dict.fromkeys(words), 3)]
    file.write_text("\n".join(captions[:1000]), encoding="utf-8")
    seen = []

    def encode(config, teacher, texts, runtime):
        seen.extend(texts)
        raise UsageError("seen")

    monkeypatch.setattr(train_distillation, "encode_prompts", encode)
    flags = tiny_flags(random_teacher, tmp_path / "out", method="trajectory", prompts=file)
    assert train_distillation.main([*flags, "--num_trajectories=8"]) == 2
    config = parse_args([*flags, "--num_trajectories=8"])
    stages = resolve_stages(config, read_teacher(config))
    texts = {text for text in seen if text in captions}
    assert 8 <= len(texts) <= picture_work.prompts_read(stages, 1000) < 50
