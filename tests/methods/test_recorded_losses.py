"""Twenty losses of each expert and method, as they were recorded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, tiny_flags
from random_teachers import write_pictures

import train_distillation
from wan_distill.data.first_frames import text_of
from wan_distill.data.picture_sets import encode_pictures, prompts_of, read_picture_sets
from wan_distill.data.run import Run
from wan_distill.model.loading import Teacher
from wan_distill.results import Reporting
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve_stages
from wan_distill.system.runtime import Runtime

RECORDED = REPOSITORY / "tests" / "recorded"


def losses_of(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What each update of each expert adds to the metrics, its losses only."""
    losses, update = [], train_distillation.update

    def recording(run, step, method, inputs, denoiser, learner, progress):
        made = update(run, step, method, inputs, denoiser, learner, progress)
        sums, counts = progress.metrics.sums, progress.metrics.counts
        values = {k: float(v) / counts[k] for k, v in sums.items() if k.endswith("_loss")}
        losses.append({"expert": method.expert} | values)
        sums.clear()
        counts.clear()
        return made

    monkeypatch.setattr(train_distillation, "update", recording)
    config = parse_args(flags)
    info = read_teacher(config)
    (config,) = stages = resolve_stages(config, info)
    pictures = read_picture_sets(config, info)
    prompts, _ = prompts_of(config, info, pictures)
    runtime = Runtime(config)
    teacher = Teacher(info, config, runtime)
    encoded = [*map(text_of, prompts), config.negative_prompt]
    embeddings, _ = train_distillation.encode_prompts(config, teacher, encoded, runtime)
    first_frames = None
    if info.takes_picture:
        first_frames = encode_pictures(config, teacher, pictures, prompts, runtime)
    run = Run(config, teacher, embeddings, tuple(prompts), runtime, first_frames)
    for expert in config.experts:
        train_distillation.distil(run, expert, [], Reporting(stages, info, runtime))
    return losses


CONSTANT = dict(lr_scheduler="constant_with_warmup", ema_decay=0.99, ema_start=200)
# What was recorded is not what is the default now.
SETTINGS = {
    "trajectory": dict(CONSTANT, lr_scheduler="cosine", optimizer="adamw"),
    "consistency": dict(CONSTANT, solver_points=48),
    "dmd": dict(CONSTANT, adam_beta1=0.0, lora_alpha=8.0),
}


@pytest.mark.journey  # as long as a whole run
@pytest.mark.parametrize("kind", ["", "-i2v"])
@pytest.mark.parametrize("name", ["trajectory", "consistency", "dmd", "dmd-samples"])
def test_twenty_recorded_losses(
    name: str,
    kind: str,
    random_teacher: Path,
    random_picture_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A refactor leaves them where they are; a change of behaviour records them anew and says so in
    its commit.

    Tolerance 1e-3: the same draws on another CPU or torch differ by rounding, 1e-6 after one update
    and growing by Adam's division with each; an objective that is wrong anywhere is off by far more
    (a dropped factor, sign, role). To record: delete the file and run the test twice.
    """
    method = name.removesuffix("-samples")
    samples = name.endswith("-samples")
    pictured: dict[str, Any] = {}
    if kind:
        images = write_pictures(tmp_path / "images", 4)
        pictured = dict(prompts=None, images=images, diversity_weight=None)
    flags = tiny_flags(
        random_picture_teacher if kind else random_teacher,
        tmp_path / "out",
        method=method,
        gradient_checkpointing=False,
        checkpointing_steps=50,
        max_train_steps=20 if method != "dmd" else 2 if samples else 5,
        real_score="samples" if samples else "guided",
        critic_warmup_steps=5,
        critic_updates=2,
        learning_rate=1e-3,
        fake_score_learning_rate=1e-3,
        **SETTINGS[method],
        **pictured,
    )
    losses = losses_of(flags, monkeypatch)
    assert [line["expert"] for line in losses] == ["high"] * 20 + ["low"] * 20
    recorded = RECORDED / f"{name}{kind}.json"
    if not recorded.exists():
        recorded.write_text(json.dumps(losses, indent=1) + "\n")
        pytest.fail(f"recorded {recorded.name}: look at it, run again, and commit it")
    for line, before in zip(losses, json.loads(recorded.read_text()), strict=True):
        assert line.pop("expert") == before.pop("expert")
        assert line == pytest.approx(before, rel=1e-3)
