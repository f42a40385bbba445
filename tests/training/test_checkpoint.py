"""Checkpoints: damaged ones are passed over; no kill or full disk destroys the last whole one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from wan_distill.errors import Halted
from wan_distill.system import files
from wan_distill.training import checkpoint


def save_one(root: Path, step: int, keep: int | None = 2) -> Path:
    tensors = {"student": {"a": torch.full((3,), float(step))}}
    return checkpoint.save(root, step, tensors, {"config": {}}, keep=keep)


def names(root: Path) -> list[str]:
    return [folder.name for folder in checkpoint.found(root)]


def test_what_is_loaded_is_what_was_saved(tmp_path):
    tensors = {
        "student": {"weight": torch.randn(2, 3), "step": torch.tensor(7)},
        "fake_score": {"weight": torch.randn(4)},
    }
    saved = checkpoint.save(tmp_path, 5, tensors, {"config": {"a": [1]}, "done": {"x": 2}}, None)
    assert saved == tmp_path / "checkpoint-5" and not list(tmp_path.glob(".partial*"))
    loaded, state = checkpoint.load(saved)
    assert {role: set(group) for role, group in loaded.items()} == {
        "student": {"weight", "step"},
        "fake_score": {"weight"},
    }
    for role, group in tensors.items():
        assert all(torch.equal(loaded[role][name], value) for name, value in group.items())
    assert (state["step"], state["config"], state["done"]) == (5, {"a": [1]}, {"x": 2})


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save_one(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-3"]  # by number, not by letters
    assert {entry.name for entry in tmp_path.iterdir()} == set(names(tmp_path))  # and nothing else
    for step in (11, 12):
        save_one(tmp_path, step, keep=None)
    assert len(names(tmp_path)) == 4


def test_what_a_killed_run_left_half_written_goes_with_the_next_checkpoint(tmp_path):
    """It may be 8 GB, and its step may never come again."""
    left = tmp_path / ".partial-17"
    left.mkdir()
    (left / "student.safetensors").write_bytes(b"half")
    save_one(tmp_path, 20)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-20"]


# ------------------------------------------------------------------------------------------ damage


def test_a_damaged_checkpoint_is_passed_over_saying_so(tmp_path):
    said = []
    for step in (1, 2):
        save_one(tmp_path, step)
    file = tmp_path / "checkpoint-2" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert checkpoint.latest(tmp_path, said.append).name == "checkpoint-1"
    assert "damaged" in said[0] and "checkpoint-2" in said[0]
    state = tmp_path / "checkpoint-1" / "state.json"
    good = state.read_text()
    state.write_text(good.replace('"step": 1', '"step": 3'))
    assert checkpoint.latest(tmp_path, said.append) is None and "state.json changed" in said[-1]
    state.unlink()
    assert checkpoint.latest(tmp_path, said.append) is None and "incomplete" in said[-1]


def test_a_checkpoint_that_lost_a_file_is_passed_over(tmp_path):
    said = []
    for step in (1, 2):
        save_one(tmp_path, step)
    (tmp_path / "checkpoint-2" / "student.safetensors").unlink()
    assert checkpoint.latest(tmp_path, said.append).name == "checkpoint-1"
    assert "incomplete" in said[0]
    with pytest.raises(checkpoint.DamagedCheckpoint, match="incomplete"):
        checkpoint.load(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": "1", "sha256": {}, "config": {}}'])
def test_a_state_that_is_something_else_is_damage(tmp_path, text):
    folder = save_one(tmp_path, 1)
    (folder / "state.json").write_text(text)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="incomplete"):
        checkpoint.verify(folder)


# ------------------------------------------------------------------------- nothing whole is lost


def test_a_full_disk_leaves_the_older_ones(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save_one(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-2"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="space"):
        save_one(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-2"]
    assert checkpoint.latest(tmp_path).name == "checkpoint-3"


def test_older_ones_are_pruned_only_after_the_new_one_is_verified(tmp_path, monkeypatch):
    """A disk that returns other bytes than it was given, from the rename on."""
    for step in (1, 2):
        save_one(tmp_path, step)
    replace = os.replace

    def damaging(source, target):
        replace(source, target)
        if Path(target).name == "checkpoint-3":
            file = Path(target) / "student.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"x")

    monkeypatch.setattr(os, "replace", damaging)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="checkpoint-3"):
        save_one(tmp_path, 3)
    assert {"checkpoint-1", "checkpoint-2"} < set(names(tmp_path))
    assert checkpoint.latest(tmp_path, lambda _: None).name == "checkpoint-2"


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    folder = save_one(tmp_path, 1)
    (folder / "state.json").write_bytes(b"")
    (folder / "student.safetensors").write_bytes(b"")
    save_one(tmp_path, 1)
    assert checkpoint.latest(tmp_path).name == "checkpoint-1"


# --------------------------------------------------------------------------- the user's own folders


COPIES = (
    "checkpoint-1-best",
    "checkpoint-1-backup",
    "checkpoint-01",
    "checkpoint-",
    "checkpoint-x",
)
COPIES += ("checkpoint-\u0661", "checkpoint-1.5", "old-checkpoint-1", "checkpoint--1")


def test_folders_of_other_names_are_no_checkpoints(tmp_path):
    folder = save_one(tmp_path, 1)
    for name in COPIES:
        shutil.copytree(folder, tmp_path / name)
    for step in (2, 3, 4):
        save_one(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-3"]
    checkpoint.set_aside(tmp_path, 0)
    assert all((tmp_path / name / "student.safetensors").exists() for name in COPIES)


def users_notes(folder: Path) -> None:
    (folder / "notes.txt").write_text("the best so far")


def of_another_tool(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"hours of work")


def with_a_subfolder(folder: Path) -> None:
    (folder / "clips").mkdir()


def link_to_elsewhere(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"), target_is_directory=True)


@pytest.mark.parametrize(
    "change", [users_notes, of_another_tool, with_a_subfolder, link_to_elsewhere]
)
def test_what_the_user_put_into_a_checkpoint_is_neither_deleted_nor_renamed(tmp_path, change):
    changed = save_one(tmp_path, 1)
    change(changed)
    before = sorted(changed.iterdir())
    for step in (2, 3, 4):
        save_one(tmp_path, step)
    checkpoint.set_aside(tmp_path, 0)
    assert sorted(changed.iterdir()) == before
    assert names(tmp_path) == ["checkpoint-1"]
    with pytest.raises(Halted, match="checkpoint-1: was not written by this tool; move it away"):
        save_one(tmp_path, 1)
    assert sorted(changed.iterdir()) == before


@pytest.mark.parametrize("point", ["replace", "fsync", "rmtree"])
def test_a_kill_at_any_moment_of_a_save_leaves_the_last_good_one(tmp_path, monkeypatch, point):
    """Every call to the file system is once the last one that happens."""

    class Killed(BaseException):
        pass

    module = files.shutil if point == "rmtree" else files.os
    real = getattr(module, point)
    for survived in range(20):
        root = tmp_path / str(survived)
        save_one(root, 1)
        save_one(root, 2)
        calls = []

        def dies(*args, calls=calls, survived=survived, **kwargs):
            if len(calls) == survived:
                raise Killed
            calls.append(1)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, point, dies)
        try:
            save_one(root, 3)
            finished = True
        except Killed:
            finished = False
        monkeypatch.setattr(module, point, real)
        newest = checkpoint.latest(root, lambda _: None)
        assert newest is not None and newest.name in ("checkpoint-2", "checkpoint-3")
        save_one(root, 4)
        assert checkpoint.latest(root).name == "checkpoint-4"
        if finished:
            # A save syncs two files and two folders, renames three times and prunes once.
            assert survived == {"replace": 3, "fsync": 4, "rmtree": 1}[point]
            return
    raise AssertionError("the save never finished")


def test_later_checkpoints_are_set_aside_under_new_names(tmp_path):
    for step in (1, 2, 3):
        save_one(tmp_path, step, keep=None)
    moved = checkpoint.set_aside(tmp_path, 1)
    assert {folder.name for folder in moved} == {
        "set-aside-0-checkpoint-2",
        "set-aside-0-checkpoint-3",
    }
    save_one(tmp_path, 2, keep=None)
    (again,) = checkpoint.set_aside(tmp_path, 1)
    assert again.name == "set-aside-1-checkpoint-2"
    assert names(tmp_path) == ["checkpoint-1"]
    assert all((folder / "state.json").exists() for folder in [*moved, again])
