"""What else leaves the output folder: metrics for trackers, and the merged pipeline."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file

import train_distillation
from wan_distill.results import merged

pytestmark = pytest.mark.journey  # they share a whole run
HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


@pytest.fixture(scope="module")
def run(random_teacher, tmp_path_factory):
    """Runs a finished job once more, with further flags: it then only exports."""
    folder = tmp_path_factory.mktemp("share")
    flags = SMALL | dict(
        teacher_path=random_teacher,
        prompts=folder / "prompts.txt",
        method="trajectory",
        output_dir=folder / "out",
    )
    (folder / "prompts.txt").write_text("a red ball\na blue ball\na green box\n", encoding="utf-8")

    def start(*more: str) -> int:
        return train_distillation.main([f"--{k}={v}" for k, v in flags.items()] + list(more))

    start.out = folder / "out"
    tracker = ["--report_to=tensorboard"] if HAS_TENSORBOARD else []
    assert start("--logging_steps=1", *tracker) == 0
    return start


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed")
def test_a_tracker_gets_the_metrics_of_both_experts(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = {}
    for file in (run.out / "logs").rglob("*tfevents*"):
        log = EventAccumulator(str(file))
        log.Reload()
        for tag in log.Tags()["scalars"]:
            scalars[tag] = [(event.step, event.value) for event in log.Scalars(tag)]
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    losses = {
        expert: [line["student_loss"] for line in lines if line["expert"] == expert]
        for expert in ("high", "low")
    }
    assert [step for step, _ in scalars["high/student_loss"]] == [1, 2]
    assert [step for step, _ in scalars["low/student_loss"]] == [3, 4]
    for expert in ("high", "low"):
        values = [value for _, value in scalars[f"{expert}/student_loss"]]
        assert values == pytest.approx(losses[expert])


def test_a_tracker_that_is_not_installed_is_named(run, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert run("--report_to=trackio") == 2
    assert "pip install trackio" in capsys.readouterr().err


def test_a_merged_pipeline_that_is_not_the_student_is_refused(run, monkeypatch, capsys):
    assert run("--save_merged") == 0
    assert "student/transformer_2: loaded back; differs" in capsys.readouterr().out
    before = (run.out / "student" / "model_index.json").stat().st_mtime_ns
    real = merged.WanTransformer3DModel.save_pretrained

    def forgetful(self, folder, **kwargs):
        real(self, folder, **kwargs)
        file = Path(folder) / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights["proj_out.weight"] = torch.randn_like(weights["proj_out.weight"])
        save_file(weights, file, {"format": "pt"})

    monkeypatch.setattr(merged.WanTransformer3DModel, "save_pretrained", forgetful)
    assert run("--save_merged") == 1
    assert "do not use it" in capsys.readouterr().err
    assert (run.out / "student" / "model_index.json").stat().st_mtime_ns == before
