"""Whole runs on a card that is emulated in the host's memory, to their very end: what a run does
beside its updates (checks, previews, evaluation, exports) was once refused by every real card.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, tiny_flags
from emulated_card import PROPERTIES

from wan_distill.settings.assets import EMBEDDED_TEACHER

COUNTS: dict[str, Any] = dict(
    mixed_precision="bf16",
    gradient_checkpointing=True,
    method=None,
    max_train_steps=1,
    refine_steps=2,
    num_trajectories=2,
    monitor_steps=1,
    monitor_samples=2,
    evaluate=True,
    eval_samples=2,
    save_merged=True,
)
MEMORY: dict[str, Any] = dict(base_precision="fp8", offload=True, keep_attention=True)
LONG: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": dict(base_precision="int8", method="dmd", real_score="guided"),
    "nf4": dict(base_precision="nf4", method="dmd", real_score="paired"),
    "consistency": dict(method="consistency", validation_steps=1),
    "image to video": MEMORY | dict(teacher_path="tiny-i2v", prompts=None),
    "fewer blocks": dict(method="trajectory", student_layers=2),
}
pytestmark = [
    pytest.mark.journey,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("g++") is None,
        reason="the card is compiled by g++, for the libraries of torch on Linux",
    ),
]


def on_the_card(script: str, *flags: str) -> str:
    """What a script prints that ends with exit code 0."""
    command = [sys.executable, "tests/emulated_card.py", script, *flags]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-3000:]
    return ended.stdout


def flags(out: Path, **changes: Any) -> list[str]:
    return tiny_flags(EMBEDDED_TEACHER, out, **COUNTS | changes)


def test_the_default_job_ends_and_its_student_makes_a_video(tmp_path):
    out = tmp_path / "out"
    on_the_card("train_distillation.py", *flags(out, **MEMORY))
    run = (out / "run.json").read_text(encoding="utf-8")
    assert json.loads(run)["evaluation"] and "NaN" not in run  # two samples have no interval
    assert PROPERTIES.name in (out / "spent.json").read_text(encoding="utf-8")
    video = tmp_path / "video.mp4"
    on_the_card("sample.py", f"--student={out}", "--prompt=a circle", f"--out={video}")
    assert video.stat().st_size > 1000


@pytest.mark.long
@pytest.mark.parametrize("changes", LONG.values(), ids=LONG.keys())
def test_every_method_and_engine_ends_and_goes_on(changes, tmp_path):
    out = tmp_path / "out"
    on_the_card("train_distillation.py", *flags(out, **changes))
    on_the_card("train_distillation.py", *flags(out, **changes | dict(max_train_steps=2)))
    judged = out / "evaluation.json"
    judged.unlink()
    on_the_card("train_distillation.py", *flags(out, **changes, evaluate_only=True))
    assert json.loads(judged.read_text(encoding="utf-8"))["rows"]
