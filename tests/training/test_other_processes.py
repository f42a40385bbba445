"""Of several processes one writes. The others train, sample and check with it where every forward
needs all of them, and leave nothing behind.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import train_distillation
from wan_distill.results import Reporting
from wan_distill.training import previews

# What processes share the work of: stored samples are every process' own share.
SHARED = ("trajectories", "handovers", "anchors", "prompts")


def files_after(run) -> set[str]:
    """The files that training one expert leaves, stored samples and embeddings aside."""
    reporting = Reporting((run.config,), run.info, run.runtime)
    train_distillation.distil(run, "high", ["a red circle"], reporting)
    root: Path = run.folder.path
    files = {file.relative_to(root) for file in root.rglob("*") if file.is_file()}
    return {file.as_posix() for file in files if file.parts[0] not in SHARED}


@pytest.fixture
def checked_run(make_run, monkeypatch):
    """Makes a run with previews, checks and checkpoints after every update."""
    monkeypatch.setattr(previews, "MAX_SHARE", 1.0)

    def make(**changes):
        every = dict(validation_steps=1, monitor_steps=1, checkpointing_steps=1, logging_steps=1)
        return make_run(method="trajectory", **every, **changes)

    return make


@pytest.mark.journey  # as long as a whole run
def test_the_main_process_writes(checked_run):
    written = files_after(checked_run())
    for name in (
        "report.html",
        "metrics.jsonl",
        "high_noise_lora.safetensors",
        "high/best.safetensors",
        "high/checkpoint-2/state.json",
        "previews/high-000002-0.mp4",
        "previews/prompts.json",
    ):
        assert name in written, name


def test_other_processes_write_nothing(checked_run, monkeypatch):
    """Although they sample every preview and check: with --shard each forward needs them."""
    run = checked_run()
    run.runtime.is_main = False
    run.runtime.joint = True
    sampled = []
    student_x0 = previews.PhaseClips.student_x0

    def counted(self, denoiser):
        sampled.append(self)
        return student_x0(self, denoiser)

    monkeypatch.setattr(previews.PhaseClips, "student_x0", counted)
    assert files_after(run) == set()
    assert len(sampled) == 2 * 3  # before the first update and after each: previews and checks


def test_a_process_that_no_forward_needs_does_not_sample(checked_run, monkeypatch):
    run = checked_run()
    run.runtime.is_main = False
    monkeypatch.setattr(
        previews.PhaseClips, "student_x0", lambda self, denoiser: pytest.fail("sampled")
    )
    assert files_after(run) == set()
