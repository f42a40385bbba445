"""What a finished student does not need, and what stays."""

from __future__ import annotations

from pathlib import Path

import pytest

import train_distillation
from wan_distill.layout import RunFolder

CACHES = (
    "prompts/0a23456789abcdef0a23456789abcdef.safetensors",
    "prompts/encoder.json",
    "trajectories/ab12/000001.safetensors",
    "handovers/ab12/000001.safetensors",
    "evaluation/cd34cd34cd34cd34.safetensors",
    "trajectory/handovers/ef56/000002.safetensors",
)
KEPT = (
    "plan.txt",
    "run.json",
    "evaluation.json",
    "high_noise_lora.safetensors",
    "high/checkpoint-4/student.safetensors",
    "high/best.safetensors",
    "trajectory/metrics.jsonl",
    "trajectory/high_noise_lora.safetensors",
    "prompts/mine.txt",
    "prompts/my_prompts.json",
    "evaluation/my_lora.safetensors",
    "other_run/metrics.jsonl",
    "other_run/prompts/0a23456789abcdef0a23456789abcdef.safetensors",
    "mine/prompts/0a.safetensors",
    "student/vae/diffusion_pytorch_model.safetensors",
)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a finished run, with files of the user's in it."""
    for name in (*CACHES, *KEPT):
        file = tmp_path / "out" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 1000)
    return tmp_path / "out"


def files_in(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def test_clean_deletes_the_caches_and_nothing_else(finished, capsys):
    argv = ["--clean", f"--output_dir={finished}"]
    assert train_distillation.main(argv) == 0
    assert files_in(finished) - {".lock"} == set(KEPT)
    assert "Deleted 6 KB of caches" in (said := capsys.readouterr().out) and "1 KB of ch" in said
    assert not (finished / "trajectories").exists() and (finished / "prompts").is_dir()
    assert train_distillation.main(argv) == 0  # once more does no harm


def test_what_an_unfinished_run_has_solved_stays(finished, capsys):
    RunFolder(finished).spent.write_text('{"seconds": {}, "finished": null}')
    before = files_in(finished)
    assert train_distillation.main(["--clean", f"--output_dir={finished}"]) == 2
    assert files_in(finished) - {".lock"} == before
    assert "is not finished, and would solve its samples anew" in capsys.readouterr().err
    RunFolder(finished).spent.write_text('{"seconds": {}, "finished": "2026-11-28T00:00:00Z"}')
    assert train_distillation.main(["--clean", f"--output_dir={finished}"]) == 0


def test_a_folder_that_is_no_run_stays(finished, capsys):
    RunFolder(finished).plan.unlink()
    before = files_in(finished)
    assert train_distillation.main(["--clean", f"--output_dir={finished}"]) == 2
    assert files_in(finished) == before
    assert "holds no run; give its --output_dir" in capsys.readouterr().err
    absent = finished / "mistyped"
    assert train_distillation.main(["--clean", f"--output_dir={absent}"]) == 2
    assert not absent.exists()
