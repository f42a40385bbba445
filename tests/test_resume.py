"""Running the same command again goes on bit for bit; a damaged checkpoint is passed over; nothing
whole is lost.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, SMALL
from safetensors.torch import load_file, save, save_file

import train_distillation
from wan_distill.data.samples import StoredSamples
from wan_distill.errors import RESUMABLE
from wan_distill.layout import LORA_FILE
from wan_distill.methods.base import Loss
from wan_distill.methods.trajectory import Trajectory
from wan_distill.system import files
from wan_distill.training import checkpoint
from wan_distill.training.learner import Learner
from wan_distill.training.metrics import Metrics

METHODS = ("trajectory", "dmd", "dmd-samples", "consistency")


@pytest.fixture
def run(random_teacher, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball\na blue ball\na green box\n")

    def start(name: str, method: str, *more: str) -> int:
        flags = SMALL | dict(
            max_train_steps=4, checkpointing_steps=2, logging_steps=1, ema_decay=0.5, ema_start=1
        )
        flags |= dict(
            teacher_path=random_teacher,
            prompts=tmp_path / "prompts.txt",
            output_dir=tmp_path / name,
            method=method.removesuffix("-samples"),
            critic_warmup_steps=2,
            critic_updates=1,
            real_score="samples" if method.endswith("-samples") else "guided",
            checkpoints_total_limit=9,
        )
        return train_distillation.main([f"--{k}={v}" for k, v in flags.items()] + list(more))

    return start


@pytest.fixture
def hub(random_teacher, tmp_path, monkeypatch):
    """someone/wan on the hub: each call brings the files it asks for into the snapshot's folder;
    gives that folder.
    """
    snapshot = tmp_path / "hub" / "snapshots" / "0123abc"

    def arrive(repo, revision=None, cache_dir=None, allow_patterns=()):
        assert repo == "someone/wan" and revision in (None, snapshot.name)
        for file in (
            f for pattern in allow_patterns for f in random_teacher.glob(pattern) if f.is_file()
        ):
            (snapshot / file.relative_to(random_teacher)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, snapshot / file.relative_to(random_teacher))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", arrive)
    monkeypatch.chdir(tmp_path)
    return snapshot


def lora(folder):
    return {file: (folder / file).read_bytes() for file in LORA_FILE.values()}


def losses(folder) -> list[tuple]:
    lines = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    seen = ("student_loss", "fake_score_loss", "real_score_loss")
    return [(line["expert"], line["step"], *map(line.get, seen)) for line in lines]


def stop_at(monkeypatch, update):
    """SIGTERM arrives during the given update of the first run."""
    real, done = Learner.update, []

    def stopping(self, *args):
        done.append(1)
        if len(done) == update:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(Learner, "update", stopping)


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_bit_for_bit(run, tmp_path, monkeypatch, method):
    assert run("whole", method) == 0
    stop_at(monkeypatch, 3)
    assert run("stopped", method) == RESUMABLE
    assert not (tmp_path / "stopped" / LORA_FILE["low"]).exists()
    assert run("stopped", method) == 0
    assert lora(tmp_path / "stopped") == lora(tmp_path / "whole")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_stands(random_teacher, tmp_path):
    """The second arrives while the first one's save is being written."""
    script = tmp_path / "impatient.py"
    script.write_text("""
import os, signal, sys, time
import train_distillation
from wan_distill.training import checkpoint
real = checkpoint.write_tensors

def slow(file, *rest):
    real(file, *rest)
    if "partial-3" in str(file):
        print("saving", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

checkpoint.write_tensors = slow
update = train_distillation.update

def stopping(config, expert, step, *rest):
    if expert == "high" and step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return update(config, expert, step, *rest)

train_distillation.update = stopping
sys.exit(train_distillation.main(sys.argv[1:]))
""")
    flags = SMALL | dict(
        max_train_steps=4,
        checkpointing_steps=2,
        teacher_path=random_teacher,
        method="trajectory",
        output_dir=tmp_path / "out",
        monitor_steps=0,
    )
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, str(script), *(f"--{k}={v}" for k, v in flags.items())],
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        timeout=120,
    )
    assert ended.returncode == 128 + signal.SIGTERM and "saving" in ended.stdout, ended.stderr
    assert time.monotonic() - started < 60
    assert checkpoint.latest(tmp_path / "out" / "high").name == "checkpoint-2"


def test_updates_lost_in_a_crash_are_done_again_and_logged_once(run, tmp_path, monkeypatch):
    assert run("whole", "trajectory") == 0
    updates = Learner.update
    done = []

    def crash_at_fourth(self, *args):
        done.append(1)
        if len(done) == 4:
            raise MemoryError("as if killed")
        return updates(self, *args)

    monkeypatch.setattr(Learner, "update", crash_at_fourth)
    with pytest.raises(MemoryError):
        run("crashed", "trajectory")  # update 3 is logged, but only update 2 is in a checkpoint
    assert run("crashed", "trajectory") == 0
    assert lora(tmp_path / "crashed") == lora(tmp_path / "whole")
    assert losses(tmp_path / "crashed") == losses(tmp_path / "whole")


def test_a_log_interval_that_a_stop_cuts_is_averaged_as_if_uncut(run, tmp_path, monkeypatch):
    assert run("whole", "dmd", "--logging_steps=4") == 0
    stop_at(monkeypatch, 3)
    assert run("stopped", "dmd", "--logging_steps=4") == RESUMABLE
    assert run("stopped", "dmd", "--logging_steps=4") == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_other_settings_are_refused_and_named_unless_allowed(run, capsys):
    assert run("out", "trajectory", "--max_train_steps=2") == 0
    capsys.readouterr()
    assert run("out", "trajectory", "--learning_rate=0.123") == 2
    error = capsys.readouterr().err.strip()
    assert "learning_rate was" in error and "0.123" in error and "--allow_config_change" in error
    assert error.splitlines()[-1].startswith("error:")
    assert run("out", "trajectory", "--gradient_accumulation_steps=2") == 2
    assert "processes x gradient_accumulation_steps were 1, are 2" in capsys.readouterr().err
    assert run("out", "trajectory", "--learning_rate=0.123", "--allow_config_change") == 0
    assert "going on although learning_rate was" in capsys.readouterr().out


def test_more_updates_may_be_asked_for_later(run, tmp_path):
    assert run("short", "trajectory", "--lr_scheduler=constant", "--max_train_steps=2") == 0
    assert run("short", "trajectory", "--lr_scheduler=constant") == 0
    assert run("long", "trajectory", "--lr_scheduler=constant") == 0
    assert lora(tmp_path / "short") == lora(tmp_path / "long")


def test_an_explicit_checkpoint_is_resumed_and_later_ones_are_set_aside(run, tmp_path, capsys):
    assert run("out", "trajectory") == 0
    before = lora(tmp_path / "out")
    root = tmp_path / "out" / "high"
    assert run("out", "trajectory", f"--resume_from_checkpoint={root / 'checkpoint-2'}") == 0
    assert f"Going on from {root / 'checkpoint-2'}" in capsys.readouterr().out
    assert lora(tmp_path / "out") == before and len(losses(tmp_path / "out")) == 8
    assert (root / "set-aside-0-checkpoint-4" / "state.json").exists() and (
        root / "checkpoint-4"
    ).exists()


def test_an_explicit_checkpoint_that_is_missing_or_damaged_fails_loudly(run, tmp_path, capsys):
    assert run("out", "trajectory", "--max_train_steps=2") == 0
    assert run("out", "trajectory", "--resume_from_checkpoint=/no/such") == 2
    assert "--resume_from_checkpoint /no/such" in capsys.readouterr().err
    folder = tmp_path / "out" / "low" / "checkpoint-2"
    (folder / "student.safetensors").write_bytes(b"")
    assert run("out", "trajectory", f"--resume_from_checkpoint={folder}") == 2
    assert "is damaged" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- not finite


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of the given update calls (from 0) NaN."""

    def install(*when):
        calls, real = [], Trajectory.loss

        def loss(self, *args):
            calls.append(1)
            found = real(self, *args)
            return Loss(found.value * float("nan")) if len(calls) - 1 in when else found

        monkeypatch.setattr(Trajectory, "loss", loss)

    return install


def test_a_loss_that_is_not_finite_stops_the_run_with_the_state_before_it(
    run, tmp_path, poison, monkeypatch, capsys
):
    assert run("whole", "trajectory") == 0
    poison(2)
    assert run("out", "trajectory") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for words in ("loss nan", "update 3", "student", "high expert", "sigma 1.0000 to 0.8333"):
        assert words in error
    saved, state = checkpoint.load(tmp_path / "out" / "high" / "checkpoint-2")
    assert state["step"] == 2 and all(torch.isfinite(t).all() for t in saved["student"].values())
    monkeypatch.undo()
    assert run("out", "trajectory") == 0
    assert lora(tmp_path / "out") == lora(tmp_path / "whole")


def test_a_loss_that_is_not_finite_may_be_skipped_up_to_a_limit(run, tmp_path, poison, capsys):
    poison(1)
    assert run("out", "trajectory", "--on_nonfinite=skip") == 0
    assert "skipped (1 of at most 10)" in capsys.readouterr().out
    steps = [(expert, step) for expert, step, loss, *_ in losses(tmp_path / "out") if loss is None]
    assert steps == [("high", 2)]
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")
    poison(0, 1, 2)
    assert run("other", "trajectory", "--on_nonfinite=skip", "--nonfinite_limit=2") == 1


def test_a_poisoned_weight_is_named(run, random_teacher, tmp_path, capsys):
    teacher = shutil.copytree(random_teacher, tmp_path / "poisoned")
    file = teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["blocks.0.ffn.net.2.weight"][0, 0] = float("nan")
    save_file(weights, file)
    assert run("out", "dmd", f"--teacher_path={teacher}") == 1
    assert "blocks.0.ffn.net.2" in capsys.readouterr().err.splitlines()[-1]
    assert run("two", "trajectory", f"--teacher_path={teacher}") == 1
    assert "blocks.0.ffn.net.2.weight" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "two" / "trajectories").rglob("*.safetensors"))


def test_a_poisoned_prompt_embedding_is_named(run, tmp_path, capsys):
    assert run("out", "trajectory", "--max_train_steps=2") == 0
    file = next((tmp_path / "out" / "prompts").glob("*.safetensors"))
    for content in (save({"embedding": torch.full((3, 16), float("nan"))}), b"damaged"):
        for other in (tmp_path / "out" / "prompts").glob("*.safetensors"):
            other.write_bytes(content)
        assert run("out", "trajectory") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(file.parent) in error and "delete it" in error


# -------------------------------------------------------------------------------------- checkpoints


def save_one(root, step):
    return checkpoint.save(
        root, step, {"student": {"a": torch.full((3,), float(step))}}, {"config": {}}, keep=2
    )


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


def test_the_limit_prunes_only_after_the_new_one_is_whole(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save_one(tmp_path, step)
    assert [f.name for f in checkpoint.found(tmp_path)] == ["checkpoint-3", "checkpoint-2"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="space"):
        save_one(tmp_path, 4)
    assert [f.name for f in checkpoint.found(tmp_path)] == ["checkpoint-3", "checkpoint-2"]
    assert (tmp_path / "LATEST").read_text() == "checkpoint-3"


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
            return
    raise AssertionError("the save never finished")


def test_a_hub_teachers_samples_are_solved_once_though_its_files_arrive_one_by_one(
    hub, run, tmp_path, monkeypatch
):
    solved = []
    solve_shard = StoredSamples._solve_shard
    monkeypatch.setattr(
        StoredSamples,
        "_solve_shard",
        lambda self, index, expert, *more: (
            solved.append((self.folder.parent.name, index, expert))
            or solve_shard(self, index, expert, *more)
        ),
    )
    assert run("first", "trajectory", "--teacher_path", "someone/wan") == 0
    assert hub.joinpath("transformer_2").is_dir()
    first = [
        ("trajectories", 0, "high"),
        ("trajectories", 0, "low"),
        ("handovers", 0, "high"),
    ]  # these for the monitor
    assert solved == first
    assert (
        run("first", "trajectory", "--teacher_path", "someone/wan") == 0
    )  # the same command resumes
    assert (
        run(
            "second",
            "dmd-samples",
            "--teacher_path",
            "someone/wan",
            "--init_student_from",
            str(tmp_path / "first"),
            "--diversity_weight",
            "0",
        )
        == 0
    )
    assert solved == [*first, ("handovers", 0, "high")]  # the warm start's samples are found


def test_an_interval_that_a_stop_cuts_is_still_the_mean_of_all_ranks(tmp_path, monkeypatch):
    runtime = SimpleNamespace(sample_groups=2, device=torch.device("cpu"), is_main=True)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda total: total.add_(3.0)
    )  # what the other rank has
    before, after = (Metrics(tmp_path / "metrics.jsonl", runtime) for _ in range(2))
    before.add(loss=1.0)
    after.resume(before.state(), "high", 1)  # 2 on both: the mean of 1 and 3
    after.add(loss=5.0)  # 1 on the other
    assert after.write(expert="high", step=2)["loss"] == (2 + 5 + 3) / 2 / 2
