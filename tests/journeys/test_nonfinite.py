"""Losses, weights, samples and embeddings that are not finite: named, and nothing is destroyed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_flags
from safetensors.torch import load_file, save, save_file

import train_distillation
from wan_distill.layout import LORA_FILE
from wan_distill.methods.base import Loss
from wan_distill.methods.trajectory import Trajectory
from wan_distill.training import checkpoint
from wan_distill.training.metrics import read_lines


@pytest.fixture
def run(random_teacher: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs the command line in the folder `name`; gives its exit code."""

    def start(name: str, method: str = "trajectory", **changes) -> int:
        settings = dict(max_train_steps=4, checkpointing_steps=2, logging_steps=1)
        flags = tiny_flags(random_teacher, tmp_path / name, method=method, **(settings | changes))
        return train_distillation.main(flags)

    return start


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the losses of the given updates (from 0, of both experts) NaN."""

    def install(*when: int) -> None:
        calls, real = [], Trajectory.losses

        def losses(self, *given):
            calls.append(1)
            factor = float("nan") if len(calls) - 1 in when else 1.0
            for part in real(self, *given):
                yield Loss(part.value * factor, part.metrics)

        monkeypatch.setattr(Trajectory, "losses", losses)

    return install


def loras(folder: Path) -> dict[str, bytes]:
    return {file: (folder / file).read_bytes() for file in LORA_FILE.values()}


def test_a_loss_that_is_not_finite_stops_the_run_with_the_state_before_it(
    run, tmp_path, poison, monkeypatch, capsys
):
    assert run("whole") == 0
    poison(2)
    assert run("out") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for words in ("loss nan", "update 3", "student", "high expert", "sigma 1.0000 to 0.8333"):
        assert words in error
    saved, state = checkpoint.load(tmp_path / "out" / "high" / "checkpoint-2")
    assert state["step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in saved["student"].values())
    monkeypatch.undo()
    assert run("out") == 0
    assert loras(tmp_path / "out") == loras(tmp_path / "whole")


def test_a_loss_that_is_not_finite_may_be_skipped_up_to_a_limit(run, tmp_path, poison, capsys):
    poison(1)
    assert run("out", on_nonfinite="skip") == 0
    assert "skipped (1 of at most 10)" in capsys.readouterr().out
    lines = read_lines(tmp_path / "out" / "metrics.jsonl")
    without = [(each["expert"], each["step"]) for each in lines if "student_loss" not in each]
    assert without == [("high", 2)]
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")
    # Exactly as many as the limit says are skipped, and one more is one too many.
    poison(0, 1)
    assert run("two", on_nonfinite="skip", nonfinite_limit=2) == 0
    poison(0, 1, 2)
    assert run("three", on_nonfinite="skip", nonfinite_limit=2) == 1
    assert "at update 3" in capsys.readouterr().err.splitlines()[-1]


def test_a_poisoned_weight_is_named(run, random_teacher, tmp_path, capsys):
    teacher = shutil.copytree(random_teacher, tmp_path / "poisoned")
    file = teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["blocks.0.ffn.net.2.weight"][0, 0] = float("nan")
    save_file(weights, file)
    # While training, where nothing is solved before; and while solving, where nothing is stored.
    assert run("out", "dmd", teacher_path=teacher, diversity_weight=0) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "blocks.0.ffn.net.2" in error and "at update 1" in error
    assert run("two", teacher_path=teacher) == 1
    assert "blocks.0.ffn.net.2.weight" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "two" / "trajectories").rglob("*.safetensors"))


def test_a_poisoned_prompt_embedding_is_named(run, tmp_path, capsys):
    assert run("out", max_train_steps=2) == 0
    folder = tmp_path / "out" / "prompts"
    for content in (save({"embedding": torch.full((3, 16), float("nan"))}), b"damaged"):
        for file in folder.glob("*.safetensors"):
            file.write_bytes(content)
        assert run("out") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(folder) in error and "delete it" in error
