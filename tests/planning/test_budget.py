"""`--budget`: the largest job that fits, the same again where it continues."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import tiny_flags
from wan_shapes import A14B, teacher_of

import train_distillation
from wan_distill.errors import UsageError
from wan_distill.layout import RunFolder
from wan_distill.planning import hardware
from wan_distill.planning.budget import SHARES, remember, scaled, within_budget
from wan_distill.planning.hardware import hardware_of, measured_share
from wan_distill.planning.matrix_rate import MatrixRate
from wan_distill.planning.parts import parts
from wan_distill.settings.config import Config


@pytest.fixture
def a14b(tmp_path):
    return teacher_of(A14B, tmp_path)


@pytest.fixture
def asked(tmp_path):
    """Settings before they are resolved."""

    def make(**changes) -> Config:
        named = dict(gpu="h100", dry_run=True, output_dir=str(tmp_path / "out"))
        return Config(teacher_path="random", **named | changes)

    return make


def hours(stages, info) -> float:
    chosen = hardware_of(stages[-1], info)
    return sum(part.seconds(chosen) for part in parts(stages, info, 100)) / 3600


@pytest.mark.journey  # as long as a whole run
def test_the_usual_job_of_a14b_takes_at_most_two_days_of_one_h100(a14b, asked):
    usual = within_budget(asked(), a14b, 100)
    assert usual.words == () and 24 < hours(usual.stages, a14b) <= 48


@pytest.mark.journey  # as long as a whole run
def test_the_job_is_the_largest_that_fits(a14b, asked):
    config = asked(budget=24.0)
    choice = within_budget(config, a14b, 100)
    usual = within_budget(asked(), a14b, 100).stages
    larger = scaled(config, usual, a14b, SHARES[SHARES.index(choice.share) + 1])
    assert hours(choice.stages, a14b) <= 24 < hours(larger, a14b)
    counts = dict(num_trajectories=(0, 1), max_train_steps=(0, 1), critic_warmup_steps=(1,))
    for name, concerned in counts.items():
        for stage in concerned:
            wanted = choice.share * getattr(usual[stage], name)
            assert getattr(choice.stages[stage], name) == pytest.approx(wanted, abs=0.5)
    measured = choice.share * usual[-1].eval_samples
    assert choice.stages[-1].eval_samples == pytest.approx(measured, abs=0.5)
    assert scaled(config, usual, a14b, 1 / 16)[-1].eval_samples == usual[-1].eval_samples / 4
    for stage, before in zip(choice.stages, usual, strict=True):
        assert stage.train_batch_size == before.train_batch_size
        assert stage.gradient_accumulation_steps == before.gradient_accumulation_steps
    said = f"{choice.stages[0].num_trajectories} samples, {choice.stages[0].max_train_steps} + "
    assert said in choice.words[0] and "twice the hours" in choice.words[-1]


@pytest.mark.journey  # traces A14B
def test_counts_that_the_user_gave_stay(a14b, asked):
    given = dict(num_trajectories=40, refine_steps=7)
    first, second = within_budget(asked(budget=24.0, **given), a14b, 100).stages
    assert (first.num_trajectories, second.max_train_steps) == (40, 7)
    assert first.max_train_steps != within_budget(asked(), a14b, 100).stages[0].max_train_steps


@pytest.mark.journey  # as long as a whole run
def test_a_budget_without_room_is_refused_and_one_without_use_says_so(a14b, asked):
    with pytest.raises(UsageError, match=r"--budget 0\.5: even .* takes about .*; give more hours"):
        within_budget(asked(budget=0.5), a14b, 100)
    plenty = within_budget(asked(budget=1e5), a14b, 100)
    assert plenty.share == SHARES[-1] and "no larger job" in plenty.words[-1]


@pytest.mark.journey  # traces A14B
@pytest.mark.parametrize("named", [True, False])
def test_a_continued_run_makes_the_same_job_on_a_slower_machine(
    a14b, asked, named, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = asked(budget=24.0) if named else asked(budget=24.0, output_dir=None)
    begun = within_budget(config, a14b, 100)
    folder = RunFolder(Path(begun.stages[-1].output_dir))
    assert not named or folder.path == tmp_path / "out"
    folder.path.mkdir(parents=True)
    remember(begun)
    slower = dataclasses.replace(config, gpu="a100-80")
    goes_on = within_budget(slower, a14b, 100)
    assert goes_on.share == begun.share and str(folder.budget) in goes_on.words[0]
    assert within_budget(dataclasses.replace(slower, budget=23.0), a14b, 100).share < begun.share
    folder.budget.write_text("{")
    with pytest.raises(UsageError, match=r"budget\.json: is damaged .*delete it"):
        within_budget(slower, a14b, 100)


def test_a_narrow_transformer_reaches_less_of_the_rate_that_is_measured(a14b, asked, monkeypatch):
    monkeypatch.setattr(hardware, "measured", lambda *given: MatrixRate(1e12))
    assert [round(measured_share(width), 2) for width in (64, 128, 5120)] == [0.2, 0.4, 0.5]
    assert measured_share(5120, "cuda") == 0.7 and measured_share(5120, "mps") == 0.4
    here = hardware_of(within_budget(asked(gpu=None), a14b, 100).stages[-1], a14b)
    assert here.rate == 5e11


@pytest.mark.journey  # as long as a whole run
def test_a_run_within_a_budget_prints_its_plan_and_keeps_its_choice(
    random_teacher, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(hardware, "measured", lambda *given: MatrixRate(1e11))
    out = tmp_path / "out"
    flags = tiny_flags(random_teacher, out, budget=1.0)
    assert train_distillation.main([*flags, "--dry_run"]) == 0
    assert "\nBudget    4 samples, 2 updates per expert" in capsys.readouterr().out
    assert train_distillation.main(flags) == 0
    note = json.loads((out / "budget.json").read_text())
    assert (note["budget"], note["share"]) == (1.0, SHARES[-1])
    assert "\nBudget    4 samples" in (out / "plan.txt").read_text()
