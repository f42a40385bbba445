"""A teacher whose files arrive from the hub one by one is the same teacher all along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import tiny_flags
from huggingface_hub import HfApi

import train_distillation
from wan_distill.data import solving
from wan_distill.model.hub_files import listed


@pytest.fixture
def hub(random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """someone/wan on the hub: each call brings the files it asks for into the snapshot's folder;
    gives that folder.
    """
    snapshot = tmp_path / "hub" / "snapshots" / "0123abc"

    def arrive(repo, revision=None, cache_dir=None, allow_patterns=()):
        assert repo == "someone/wan" and revision in (None, snapshot.name)
        for pattern in allow_patterns:
            for file in random_teacher.glob(pattern):
                if file.is_file():
                    copy = snapshot / file.relative_to(random_teacher)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, copy)
        return str(snapshot)

    def names(self, repo, revision):
        assert (repo, revision) == ("someone/wan", snapshot.name)
        return [f.relative_to(random_teacher).as_posix() for f in random_teacher.rglob("*.*")]

    listed.cache_clear()
    monkeypatch.setattr(HfApi, "list_repo_files", names)
    monkeypatch.setattr("huggingface_hub.snapshot_download", arrive)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_its_samples_are_solved_once(hub, tmp_path, monkeypatch):
    solved, solve = [], solving._solve_batch

    def recording(run, expert, denoiser, store, rows, bar):
        solved.append((store.spec.kind, tuple(rows), expert))
        solve(run, expert, denoiser, store, rows, bar)

    monkeypatch.setattr(solving, "_solve_batch", recording)

    def run(name: str, **changes) -> int:
        settings = dict(num_trajectories=6, max_train_steps=4, monitor_steps=50, **changes)
        return train_distillation.main(tiny_flags("someone/wan", tmp_path / name, **settings))

    assert run("first", method="trajectory") == 0
    assert hub.joinpath("transformer_2").is_dir()
    rows = (0, 1, 2, 3, 4, 5)  # the checks' clips are of the same prompts: three, two seeds each
    first = [
        ("trajectories", rows, "high"),
        ("trajectories", rows, "low"),
        ("handovers", rows, "high"),  # for the checks of the low expert
    ]
    assert solved == first
    assert run("first", method="trajectory") == 0  # the same command resumes
    following = dict(init_student_from=tmp_path / "first", diversity_weight=0)
    assert run("second", method="dmd", real_score="samples", **following) == 0
    assert solved == [*first, ("handovers", rows, "high")]  # the warm start's samples are found
    key = json.loads(next((tmp_path / "second" / "trajectories").glob("*/key.json")).read_text())
    assert key["sampler"] == "teacher"
