"""A method that nobody knows but its recipe and its class: planned, trained, stopped, resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import stop_at, tiny_flags

import train_distillation
from wan_distill.errors import RESUMABLE
from wan_distill.layout import LORA_FILE
from wan_distill.maths import flow
from wan_distill.maths.flow import sigma_batch
from wan_distill.methods import METHODS
from wan_distill.methods.base import Loss, Method
from wan_distill.planning.plan import describe_needs, describe_plan
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.defaults import TRAJECTORY
from wan_distill.settings.description import read_teacher
from wan_distill.settings.recipes import RECIPES, Recipe, UpdateCost, trajectories
from wan_distill.settings.resolve import resolve
from wan_distill.training import checkpoint
from wan_distill.training.metrics import read_lines


class RegressionRecipe(Recipe):
    """The student's first step, and a critic that nobody listens to."""

    defaults = TRAJECTORY

    def roles(self, config):
        return ("student", "fake_score")

    def samples(self, config, expert, distilled):
        return {"pairs": trajectories(config)}

    def costs(self, config, expert):
        cost = UpdateCost(1, 0, 0, config.max_train_steps)
        return {"student": cost, "fake_score": cost}


class Regression(Method):
    def role_at(self, step):
        return "student" if step % 2 else "fake_score"

    def updates(self, student_updates):
        return 2 * student_updates

    def rows_at(self, step, micro_batch):
        return {"pairs": [micro_batch % 3]}

    def batch_at(self, inputs, step, micro_batch):
        samples, (row,) = inputs.samples["pairs"], self.rows_at(step, micro_batch)["pairs"]
        start, end = {"high": (1.0, 0.9375), "low": (5 / 6, 0.625)}[self.expert]
        x, x_end = samples.at([row], [start]), samples.at([row], [end])
        sigma = sigma_batch(start, x)
        target = flow.mean_velocity(x, x_end, sigma, sigma_batch(end, x))
        return x, sigma, target, samples.condition([row])

    def losses(self, role, denoiser, batch, rng) -> Iterator[Loss]:
        x, sigma, target, condition = batch
        velocity = denoiser.velocity(x, sigma, condition, role=role)
        yield Loss((velocity - target).square().mean())


@pytest.fixture
def flags(random_teacher, monkeypatch) -> Callable[[Path], list[str]]:
    """Makes the flags of a short run by the fourth method, given the folder."""
    monkeypatch.setitem(RECIPES, "regression", RegressionRecipe())
    monkeypatch.setitem(METHODS, "regression", Regression)

    def make(out: Path) -> list[str]:
        return tiny_flags(
            random_teacher,
            out,
            method="regression",
            learning_rate=1e-2,
            lr_warmup_steps=0,
            ema_decay=0,
            logging_steps=1,
            checkpointing_steps=1,
        )

    return make


def test_it_is_planned(flags, tmp_path):
    config = parse_args(flags(tmp_path / "out"))
    info = read_teacher(config)
    config = resolve(config, info)
    plan = describe_plan((config,), info, ["a", "b"], ["c"])
    assert "Method    regression; roles on one frozen base: teacher, student, critic" in plan
    needs = describe_needs((config,), info)
    for words in ("student", "fake_score", "solve", "for checkpoints"):
        assert words in needs, words


def test_it_is_trained_stopped_and_resumed(flags, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "out", tmp_path / "stopped"
    assert train_distillation.main(flags(whole)) == 0
    lines = read_lines(whole / "metrics.jsonl")
    assert [(line["expert"], line["step"], line["student_updates"]) for line in lines] == [
        (expert, 2 * done, done) for expert in ("high", "low") for done in (1, 2)
    ]
    assert all(line["student_loss"] > 0 and line["fake_score_loss"] > 0 for line in lines)
    names = sorted(file.name for file in (whole / "trajectories").glob("*/*.safetensors"))
    assert names == [f"{row:06d}.safetensors" for row in range(3)]  # those it reads, not all four

    stop_at(monkeypatch, 3)
    assert train_distillation.main(flags(stopped)) == RESUMABLE
    tensors, state = checkpoint.load(checkpoint.latest(stopped / "high"))
    assert state["done"] == {"student": 1, "fake_score": 2} and set(tensors) == set(state["done"])
    assert train_distillation.main(flags(stopped)) == 0
    for file in LORA_FILE.values():
        assert (whole / file).read_bytes() == (stopped / file).read_bytes()
