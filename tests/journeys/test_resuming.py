"""Running the same command again goes on, bit for bit, wherever the run ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, stop_at, tiny_flags
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_distillation
from wan_distill.errors import RESUMABLE
from wan_distill.layout import LORA_FILE
from wan_distill.training import checkpoint
from wan_distill.training.learner import Learner
from wan_distill.training.metrics import read_lines

METHODS = ("trajectory", "dmd", "dmd-samples", "consistency")


def flags_of(teacher: Path, out: Path, method: str, **changes) -> list[str]:
    settings = dict(
        method=method.removesuffix("-samples"),
        real_score="samples" if method.endswith("-samples") else "guided",
        max_train_steps=4,
        checkpointing_steps=2,
        checkpoints_total_limit=9,
        logging_steps=1,
        ema_decay=0.5,
        ema_start=1,
        critic_warmup_steps=2,
        monitor_steps=50,
    )
    return tiny_flags(teacher, out, **(settings | changes))


@pytest.fixture
def run(random_teacher: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs the command line in the folder `name`; gives its exit code."""

    def start(name: str, method: str, **changes) -> int:
        return train_distillation.main(flags_of(random_teacher, tmp_path / name, method, **changes))

    return start


@pytest.fixture(scope="module")
def finished(random_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a whole run, made once for each method and length. Do not write to it."""
    folders: dict[tuple, Path] = {}

    def folder_of(method: str, **changes) -> Path:
        key = (method, *sorted(changes.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("finished") / "out"
            flags = flags_of(random_teacher, folders[key], method, **changes)
            assert train_distillation.main(flags) == 0
        return folders[key]

    return folder_of


def loras(folder: Path) -> dict[str, bytes]:
    return {file: (folder / file).read_bytes() for file in LORA_FILE.values()}


def losses(folder: Path) -> list[tuple]:
    """(expert, step, each role's loss) of each line of the metrics."""
    names = ("student_loss", "fake_score_loss", "real_score_loss")
    lines = read_lines(folder / "metrics.jsonl")
    return [(line["expert"], line["step"], *map(line.get, names)) for line in lines]


# -------------------------------------------------------------------------------- stops and crashes


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_bit_for_bit(run, finished, tmp_path, monkeypatch, method):
    whole = finished(method)
    stop_at(monkeypatch, 3)
    assert run("stopped", method) == RESUMABLE
    assert not (tmp_path / "stopped" / LORA_FILE["low"]).exists()
    assert run("stopped", method) == 0
    assert loras(tmp_path / "stopped") == loras(whole)
    assert losses(tmp_path / "stopped") == losses(whole)


def test_updates_lost_in_a_crash_are_done_again_and_logged_once(
    run, finished, tmp_path, monkeypatch
):
    whole = finished("trajectory")
    real, done = Learner.update, []

    def crash_at_fourth(self, *given):
        done.append(1)
        if len(done) == 4:
            raise MemoryError("as if killed")
        return real(self, *given)

    monkeypatch.setattr(Learner, "update", crash_at_fourth)
    with pytest.raises(MemoryError):
        run("crashed", "trajectory")  # update 3 is logged, but only update 2 is in a checkpoint
    assert losses(tmp_path / "crashed")[-1][1] == 3
    assert run("crashed", "trajectory") == 0
    assert loras(tmp_path / "crashed") == loras(whole)
    assert losses(tmp_path / "crashed") == losses(whole)


def test_a_log_interval_that_a_stop_cuts_is_averaged_as_if_uncut(
    run, finished, tmp_path, monkeypatch
):
    whole = finished("dmd", logging_steps=2)
    stop_at(monkeypatch, 5)
    assert run("stopped", "dmd", logging_steps=2) == RESUMABLE
    assert run("stopped", "dmd", logging_steps=2) == 0
    assert losses(tmp_path / "stopped") == losses(whole)


def test_the_dry_run_says_what_the_run_would_refuse(run, finished, tmp_path, capsys):
    """Before a job waits in a queue."""
    shutil.copytree(finished("trajectory"), tmp_path / "out")
    assert run("out", "trajectory", dry_run=True) == 0
    for changes in (dict(rank=8), dict(seed=9)):
        assert run("out", "trajectory", dry_run=True, **changes) == 2
        planned = capsys.readouterr().err
        assert run("out", "trajectory", **changes) == 2
        assert capsys.readouterr().err in planned and "trained with other settings" in planned
    for folder in (tmp_path / "out").glob("*/checkpoint-*"):
        shutil.rmtree(folder)
    assert run("out", "trajectory", dry_run=True) == 2
    assert "whose checkpoints are gone" in capsys.readouterr().err


def test_an_expert_that_was_carried_over_may_be_trained_later(run, finished, tmp_path, capsys):
    """Nothing is lost: the first stage has it."""
    settings = dict(refine_steps=2, checkpointing_steps=1, critic_warmup_steps=1)
    out = shutil.copytree(finished("trajectory+dmd", **settings), tmp_path / "out")
    assert not (out / "high").exists() and (out / LORA_FILE["high"]).exists()
    more = dict(refine_expert="both", allow_config_change=True)
    assert run("out", "trajectory+dmd", dry_run=True, **settings | more) == 0
    (out / LORA_FILE["high"]).write_bytes((out / LORA_FILE["low"]).read_bytes())
    assert run("out", "trajectory+dmd", dry_run=True, **settings | more) == 2
    assert "whose checkpoints are gone" in capsys.readouterr().err


def test_after_clean_a_trained_expert_solves_nothing(run, tmp_path):
    """What people run then only exports: --push_to_hub, --export."""
    assert run("cleaned", "trajectory") == 0
    before = loras(tmp_path / "cleaned")
    assert train_distillation.main(["--clean", f"--output_dir={tmp_path / 'cleaned'}"]) == 0
    assert run("cleaned", "trajectory") == 0
    assert loras(tmp_path / "cleaned") == before
    assert not [*tmp_path.glob("cleaned/*ories/*/*"), *tmp_path.glob("cleaned/handovers/*/*")]


IMPATIENT = """
import os, signal, sys, time
import train_distillation
from wan_distill.training import checkpoint
real = checkpoint.write_tensors

def slow(file, *rest):
    real(file, *rest)
    if "partial-3" in str(file):
        print("saving", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        print("slept", flush=True)

checkpoint.write_tensors = slow
update = train_distillation.update

def stopping(run, step, method, *rest):
    if method.expert == "high" and step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return update(run, step, method, *rest)

train_distillation.update = stopping
sys.exit(train_distillation.main(sys.argv[1:]))
"""


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_stands(random_teacher, tmp_path):
    """The second arrives while the first one's save is being written."""
    flags = flags_of(random_teacher, tmp_path / "out", "trajectory", monitor_steps=0)
    ended = subprocess.run(
        [sys.executable, "-c", IMPATIENT, *flags],
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        timeout=300,
    )
    assert ended.returncode == 128 + signal.SIGINT, ended.stderr
    assert "saving" in ended.stdout and "slept" not in ended.stdout
    assert checkpoint.latest(tmp_path / "out" / "high").name == "checkpoint-2"


# ------------------------------------------------------------------------------ changed on resuming


def test_other_settings_are_refused_and_named_unless_allowed(run, finished, tmp_path, capsys):
    shutil.copytree(finished("trajectory", max_train_steps=2), tmp_path / "out")
    capsys.readouterr()
    assert run("out", "trajectory", learning_rate=0.123) == 2
    error = capsys.readouterr().err.strip()
    assert "learning_rate was" in error and "0.123" in error and "--allow_config_change" in error
    assert error.splitlines()[-1].startswith("error:")
    assert run("out", "trajectory", gradient_accumulation_steps=2) == 2
    assert "processes x gradient_accumulation_steps were 1, are 2" in capsys.readouterr().err
    assert run("out", "trajectory", learning_rate=0.123, allow_config_change=True) == 0
    assert "going on although learning_rate was" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["monitor_samples", "monitor_steps"])
def test_what_decides_the_exported_weights_is_refused(run, finished, tmp_path, capsys, setting):
    shutil.copytree(finished("trajectory", max_train_steps=2), tmp_path / "out")
    assert run("out", "trajectory", **{setting: 2}) == 2
    assert f"{setting} was" in capsys.readouterr().err


def test_another_teachers_checkpoint_and_other_prompts_are_refused(
    run, finished, random_teacher, tmp_path, capsys
):
    shutil.copytree(finished("trajectory", max_train_steps=2), tmp_path / "out")
    (tmp_path / "prompts.txt").write_text("a red circle\nanother prompt\na third one\n")
    assert run("out", "trajectory", prompts=tmp_path / "prompts.txt") == 2
    assert "the prompts were" in capsys.readouterr().err
    other = shutil.copytree(random_teacher, tmp_path / "other")
    weights = other / "transformer_2" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert run("out", "trajectory", teacher_path=other) == 2
    assert "the teacher's files were" in capsys.readouterr().err
    # The same files and prompts elsewhere are the same.
    (tmp_path / "moved.txt").write_bytes((REPOSITORY / "tests" / "prompts.txt").read_bytes())
    moved = shutil.copytree(random_teacher, tmp_path / "moved")
    settings = dict(teacher_path=moved, prompts=tmp_path / "moved.txt", logging_steps=2)
    assert run("out", "trajectory", max_train_steps=2, **settings) == 0


def test_more_updates_may_be_asked_for_later(run, finished, tmp_path):
    """As if they had been asked for at once; but the first updates of the low expert began with
    what another high one hands over.
    """
    constant = dict(lr_scheduler="constant")
    short = finished("trajectory", max_train_steps=2, **constant)
    shutil.copytree(short, tmp_path / "short")
    assert run("short", "trajectory", **constant) == 0
    later, whole = loras(tmp_path / "short"), loras(finished("trajectory", **constant))
    assert later != loras(short)
    same = {name: file == whole[name] for name, file in later.items()}
    assert same == {LORA_FILE["high"]: True, LORA_FILE["low"]: False}


# ----------------------------------------------------------------------------- explicit checkpoints


def test_an_explicit_checkpoint_is_resumed_and_later_ones_are_set_aside(
    run, finished, tmp_path, capsys
):
    out = shutil.copytree(finished("trajectory"), tmp_path / "out")
    before, root = loras(out), out / "high"
    assert run("out", "trajectory", resume_from_checkpoint=root / "checkpoint-2") == 0
    assert f"Going on from {root / 'checkpoint-2'}" in capsys.readouterr().out
    assert loras(out) == before and len(losses(out)) == 8
    assert (root / "set-aside-0-checkpoint-4" / "state.json").exists()
    assert (root / "checkpoint-4").exists()


def test_the_best_weights_of_what_is_set_aside_are_not_exported(run, finished, tmp_path):
    """Going back with other settings, whatever the later ones' score was."""
    checked = dict(monitor_steps=2, monitor_samples=4)
    out = shutil.copytree(finished("trajectory", **checked), tmp_path / "out")
    left, root = loras(out), out / "high"
    best = root / "best.safetensors"
    weights = load_file(best)
    with safe_open(best, framework="pt") as file:
        about = json.loads(file.metadata()["seen"])
    about |= dict(updates=4, score=-1.0, best=[-1.0] * len(about["best"]))  # later than the second
    save_file(weights, best, {"seen": json.dumps(about)})
    changes = dict(learning_rate=1e-9, allow_config_change=True)
    wanted = root / "checkpoint-2"
    assert run("out", "trajectory", resume_from_checkpoint=wanted, **checked, **changes) == 0
    assert (root / "set-aside-0-best.safetensors").exists()
    assert loras(out)[LORA_FILE["high"]] != left[LORA_FILE["high"]]
    with safe_open(best, framework="pt") as file:
        assert json.loads(file.metadata()["seen"])["score"] != -1.0


def test_an_explicit_checkpoint_that_is_pruned_before_the_low_expert_begins(
    run, finished, tmp_path
):
    out = shutil.copytree(finished("trajectory"), tmp_path / "out")
    before = loras(out)
    settings = dict(checkpoints_total_limit=1, checkpointing_steps=1)
    wanted = out / "high" / "checkpoint-2"
    assert run("out", "trajectory", resume_from_checkpoint=wanted, **settings) == 0
    assert loras(out) == before and not wanted.exists()


@pytest.mark.parametrize("stage", ["trajectory/high", "low"])
def test_an_explicit_checkpoint_of_either_stage(run, finished, tmp_path, capsys, stage):
    settings = dict(refine_steps=2, checkpointing_steps=1, critic_warmup_steps=1)
    out = shutil.copytree(finished("trajectory+dmd", **settings), tmp_path / "out")
    before, root = loras(out), out / stage
    second = {folder.name for folder in (out / "low").glob("checkpoint-*")}
    step = min(int(folder.name.split("-")[1]) for folder in root.glob("checkpoint-*"))
    wanted = root / f"checkpoint-{step}"
    assert run("out", "trajectory+dmd", resume_from_checkpoint=wanted, **settings) == 0
    said = capsys.readouterr().out
    assert f"Going on from {wanted}." in said and loras(out) == before
    # What a stage does anew, the ones after it do too.
    moved = (out / "low").glob("set-aside-*-checkpoint-*")
    aside = {folder.name.split("-", 3)[-1] for folder in moved}
    assert (aside == second) == (stage == "trajectory/high")


# The counts of the second stage, which follow from the length of the first, are not given here.
TRIAL = dict(refine_steps=2, checkpointing_steps=1, critic_warmup_steps=None, ema_start=None)


def test_a_longer_first_stage_is_refined_anew(run, finished, tmp_path, capsys):
    out = shutil.copytree(finished("trajectory+dmd", **TRIAL), tmp_path / "out")
    before = loras(out)
    assert run("out", "trajectory+dmd", max_train_steps=8, **TRIAL) == 0
    assert "set aside, since the student it began with changed" in capsys.readouterr().out
    after = loras(out)
    assert after[LORA_FILE["high"]] == loras(out / "trajectory")[LORA_FILE["high"]]
    assert not any(after[file] == before[file] for file in after)
    shutil.rmtree(out / "low")  # as if the second stage had never run
    (out / LORA_FILE["low"]).unlink()
    assert run("out", "trajectory+dmd", max_train_steps=8, **TRIAL) == 0
    assert loras(out) == after
    assert run("out", "trajectory+dmd", max_train_steps=8, **TRIAL) == 0
    assert "set aside" not in capsys.readouterr().out


def test_of_the_same_student_other_settings_are_refused(run, finished, tmp_path, capsys):
    out = shutil.copytree(finished("trajectory+dmd", **TRIAL), tmp_path / "out")
    shutil.rmtree(out / "trajectory")  # so that the first stage is made again, the same
    assert run("out", "trajectory+dmd", **TRIAL | dict(score_draws=3)) == 2
    assert "score_draws was 2, is 3" in capsys.readouterr().err


def test_an_explicit_checkpoint_that_is_missing_or_damaged_fails_loudly(
    run, finished, tmp_path, capsys
):
    out = shutil.copytree(finished("trajectory", max_train_steps=2), tmp_path / "out")
    assert run("out", "trajectory", resume_from_checkpoint="/no/such") == 2
    assert "--resume_from_checkpoint /no/such: there is no such folder" in capsys.readouterr().err
    folder = out / "low" / "checkpoint-2"
    (folder / "student.safetensors").write_bytes(b"")
    assert run("out", "trajectory", resume_from_checkpoint=folder) == 2
    assert "is damaged" in capsys.readouterr().err
