"""Running the same command again goes on bit for bit; a damaged checkpoint is passed over; nothing whole is lost."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from conftest import SMALL

import train_distillation
from wan_distill import checkpoint
from wan_distill.config import RESUMABLE
from wan_distill.export import LORA_FILE
from wan_distill.runtime import Learner

METHODS = ("trajectory", "dmd", "consistency")


@pytest.fixture
def run(random_teacher, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball\na blue ball\na green box\n")

    def start(name: str, method: str, *more: str) -> int:
        flags = SMALL | dict(max_train_steps=4, checkpointing_steps=2, logging_steps=1, ema_decay=0.5, ema_start=1)
        flags |= dict(teacher_path=random_teacher, prompts=tmp_path / "prompts.txt", output_dir=tmp_path / name,
                      method=method, critic_warmup_steps=2, critic_updates=1, checkpoints_total_limit=9)
        return train_distillation.main([f"--{k}={v}" for k, v in flags.items()] + list(more))

    return start


def lora(folder):
    return {file: (folder / file).read_bytes() for file in LORA_FILE.values()}


def losses(folder) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["expert"], line["step"], line.get("student_loss"), line.get("fake_score_loss")) for line in lines]


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_bit_for_bit(run, tmp_path, monkeypatch, method):
    assert run("whole", method) == 0
    updates = Learner.update
    done = []

    def stop_at_third(self, runtime):
        done.append(1)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return updates(self, runtime)

    monkeypatch.setattr(Learner, "update", stop_at_third)
    assert run("stopped", method) == RESUMABLE
    assert not (tmp_path / "stopped" / LORA_FILE["low"]).exists()
    assert run("stopped", method) == 0
    assert lora(tmp_path / "stopped") == lora(tmp_path / "whole")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_updates_lost_in_a_crash_are_done_again_and_logged_once(run, tmp_path, monkeypatch):
    assert run("whole", "trajectory") == 0
    updates = Learner.update
    done = []

    def crash_at_fourth(self, runtime):
        done.append(1)
        if len(done) == 4:
            raise MemoryError("as if killed")
        return updates(self, runtime)

    monkeypatch.setattr(Learner, "update", crash_at_fourth)
    with pytest.raises(MemoryError):
        run("crashed", "trajectory")  # update 3 is logged, but only update 2 is in a checkpoint
    assert run("crashed", "trajectory") == 0
    assert lora(tmp_path / "crashed") == lora(tmp_path / "whole")
    assert losses(tmp_path / "crashed") == losses(tmp_path / "whole")


def test_other_settings_are_refused_and_named(run, capsys):
    assert run("out", "trajectory") == 0
    assert run("out", "trajectory", "--learning_rate=0.123") == 2
    error = capsys.readouterr().err
    assert "learning_rate was" in error and "0.123" in error and "--output_dir" in error


def test_more_updates_may_be_asked_for_later(run, tmp_path):
    assert run("short", "trajectory", "--lr_scheduler=constant", "--max_train_steps=2") == 0
    assert run("short", "trajectory", "--lr_scheduler=constant") == 0
    assert run("long", "trajectory", "--lr_scheduler=constant") == 0
    assert lora(tmp_path / "short") == lora(tmp_path / "long")


# --------------------------------------------------------------------------------------------------- checkpoints


def save(root, step):
    return checkpoint.save(root, step, {"student": {"a": torch.full((3,), float(step))}}, {"config": {}}, keep=2)


def test_a_damaged_checkpoint_is_passed_over_saying_so(tmp_path):
    said = []
    for step in (1, 2):
        save(tmp_path, step)
    file = tmp_path / "checkpoint-2" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert checkpoint.latest(tmp_path, said.append).name == "checkpoint-1"
    assert "damaged" in said[0] and "checkpoint-2" in said[0]
    (tmp_path / "checkpoint-1" / "state.json").unlink()
    assert checkpoint.latest(tmp_path, said.append) is None and "incomplete" in said[-1]


def test_the_limit_prunes_only_after_the_new_one_is_whole(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert [f.name for f in checkpoint.found(tmp_path)] == ["checkpoint-3", "checkpoint-2"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="space"):
        save(tmp_path, 4)
    assert [f.name for f in checkpoint.found(tmp_path)] == ["checkpoint-3", "checkpoint-2"]
    assert (tmp_path / "LATEST").read_text() == "checkpoint-3"


@pytest.mark.parametrize("point", ["replace", "fsync", "rmtree"])
def test_a_kill_at_any_moment_of_a_save_leaves_the_last_good_one(tmp_path, monkeypatch, point):
    """Every call to the file system is once the last one that happens."""
    class Killed(BaseException):
        pass

    module = checkpoint.shutil if point == "rmtree" else checkpoint.os
    real = getattr(module, point)
    for survived in range(20):
        root = tmp_path / str(survived)
        save(root, 1)
        save(root, 2)
        calls = []

        def dies(*args, calls=calls, survived=survived, **kwargs):
            if len(calls) == survived:
                raise Killed
            calls.append(1)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, point, dies)
        try:
            save(root, 3)
            finished = True
        except Killed:
            finished = False
        monkeypatch.setattr(module, point, real)
        newest = checkpoint.latest(root, lambda _: None)
        assert newest is not None and newest.name in ("checkpoint-2", "checkpoint-3")
        save(root, 4)
        assert checkpoint.latest(root).name == "checkpoint-4"
        if finished:
            return
    raise AssertionError("the save never finished")
