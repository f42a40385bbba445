"""Pictures that a text-to-video teacher makes, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import REPOSITORY, tiny_flags
from processes import compare, run_killed
from safetensors.torch import load_file

import train_distillation
from wan_distill.data import solving
from wan_distill.layout import LORA_FILE, RunFolder

PROMPTS = REPOSITORY / "tests" / "prompts.txt"


def flags_of(teacher: Path, source: Path, out: Path, **changes: Any) -> list[str]:
    given: dict[str, Any] = dict(image_source=source, prompts=PROMPTS, method="trajectory")
    given |= dict(
        diversity_weight=None,
        teacher_solver="ab2",
        solver_steps=4,
        num_trajectories=2,
        sample_batch_size=1,
    )
    return tiny_flags(teacher, out, **given | changes)


def made(out: Path) -> dict[Path, int]:
    """The pictures and the clips that they are of, with the times at which they were written."""
    folder = RunFolder(out).image_source
    found = [
        *folder.pictures.glob("*.png"),
        *folder.samples("trajectories").glob("*/*.safetensors"),
    ]
    return {file: file.stat().st_mtime_ns for file in found}


def test_a_student_is_trained_and_measured_on_them(
    random_teacher, random_picture_teacher, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    changes = dict(evaluate=True, eval_samples=2, monitor_steps=1, monitor_samples=2)
    flags = flags_of(random_picture_teacher, random_teacher, out, **changes)
    assert train_distillation.main(flags) == 0
    said = capsys.readouterr().out
    # Of four prompts three are trained on, two of these are read, and one measures.
    assert "random makes 3 of the pictures" in said.replace("\n", " ")
    assert len(list(RunFolder(out).image_source.pictures.glob("*.png"))) == 3
    assert len(list(RunFolder(out).pictures.glob("*.safetensors"))) == 3
    plan = RunFolder(out).plan.read_text()
    assert "Pictures  first frames of clips of random, solved in 4 steps, guidance 4" in plan
    numbers = json.loads(RunFolder(out).plan_numbers.read_text())
    assert numbers["seconds_by_stage"]["making pictures"] > 0
    assert "making pictures" in json.loads(RunFolder(out).spent.read_text())["seconds"]
    before, carry = made(out), solving.carry

    def of_clips_alone(run, *given, **named):
        assert run.info.takes_picture, "the pictures are made again"
        return carry(run, *given, **named)

    monkeypatch.setattr(solving, "carry", of_clips_alone)
    assert train_distillation.main([*flags, "--max_train_steps=3", "--no-evaluate"]) == 0
    assert made(out) == before
    # Other pictures make another run, and the plan is printed before anything is made.
    assert train_distillation.main([*flags, "--seed=1", "--allow_config_change", "--dry_run"]) == 0
    assert "making pictures" in capsys.readouterr().out and made(out) == before


KILLED = """
import os, signal, sys
import wan_distill.data.picture_source as picture_source
import train_distillation
real, kept = picture_source.write_atomically, []

def kill_at_third(file, content):
    kept.append(file)
    if len(kept) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(file, content)

picture_source.write_atomically = kill_at_third
sys.exit(train_distillation.main(sys.argv[1:]))
"""


def test_a_kill_while_they_are_made_loses_one(random_teacher, random_picture_teacher, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    flags = flags_of(random_picture_teacher, random_teacher, out)
    run_killed(KILLED, flags)
    before = made(out)
    assert len([file for file in before if file.suffix == ".png"]) == 1
    assert train_distillation.main(flags) == 0
    after = made(out)
    assert len(after) == 4 and all(after[file] == state for file, state in before.items())
    assert train_distillation.main(flags_of(random_picture_teacher, random_teacher, whole)) == 0
    for file in LORA_FILE.values():
        assert (out / file).read_bytes() == (whole / file).read_bytes()


def test_two_processes_make_the_pictures_that_one_makes(
    random_teacher, random_picture_teacher, tmp_path
):
    changes = dict(image_source=random_teacher, diversity_weight=None, expert="high")
    changes |= dict(sample_batch_size=1, solver_steps=4)
    assert compare(random_picture_teacher, tmp_path, "trajectory", **changes) < 1e-5
    one, two = (
        {f.name: f.read_bytes() for f in RunFolder(out).image_source.pictures.glob("*.png")}
        for out in sorted(p for p in tmp_path.iterdir() if RunFolder(p).image_source.path.exists())
    )
    assert one == two and len(one) == 3  # nothing is measured on the fourth


def test_damage_to_a_made_picture_is_named_with_its_flag(
    random_teacher, random_picture_teacher, tmp_path, capsys
):
    out = tmp_path / "out"
    flags = flags_of(random_picture_teacher, random_teacher, out)
    assert train_distillation.main(flags) == 0
    for file in RunFolder(out).pictures.glob("*.safetensors"):
        file.unlink()
    (picture, *_) = sorted(RunFolder(out).image_source.pictures.glob("*.png"))
    picture.write_bytes(picture.read_bytes()[:50])
    assert train_distillation.main([*flags, "--max_train_steps=3"]) == 2
    assert "--image_source" in capsys.readouterr().err
    assert load_file(out / LORA_FILE["high"])
