"""A student exported for a teacher is sampled with its own schedule, and with no other."""

from __future__ import annotations

import json
import sys

import numpy
import pytest
import torch
from conftest import REPOSITORY, write_pipeline
from safetensors.torch import load_file, save_file

from wan_distill.layout import LORA_FILE
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.loading import Teacher
from wan_distill.model.student_files import METADATA_KEY, read_metadata, save_lora
from wan_distill.settings.description import read_teacher
from wan_distill.system import pictures
from wan_distill.system.runtime import Runtime

sys.path.insert(0, str(REPOSITORY))
import sample


@pytest.fixture
def student(small_config, tmp_path):
    """A folder with the LoRAs of both experts, far enough from zero to be seen."""
    config = small_config()
    info = read_teacher(config)
    teacher = Teacher(info, config, Runtime(config))
    folder = tmp_path / "student"
    folder.mkdir()
    for seed, (expert, name) in enumerate(LORA_FILE.items()):
        transformer = teacher.load_expert(expert)
        add_adapter(
            transformer,
            "student",
            rank=4,
            alpha=config.lora_alpha,
            layers=config.lora_layers,
            seed=seed,
        )
        adapter = {
            n: torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
            for n, p in adapter_parameters(transformer, "student").items()
        }
        save_lora(folder / name, adapter, config, info, expert)
    return folder


def rewrite(file, **changes):
    meta = read_metadata(file) | changes
    save_file(load_file(file), file, {METADATA_KEY: json.dumps(meta), "format": "pt"})


def test_a_prompt_becomes_a_video_beside_its_teacher(student, tmp_path, capsys):
    out = tmp_path / "new" / "clip.mp4"
    assert (
        sample.main(
            ["--student", str(student), "--prompt", "a ball", "--out", str(out), "--compare"]
        )
        == 0
    )
    import imageio.v3

    assert imageio.v3.imread(out).shape == (5, 32, 64, 3)
    said = capsys.readouterr().out
    assert "student: 4 steps" in said and "speed-up" in said


def test_the_lora_files_alone_give_the_same_video_and_both_matter(student, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(pictures, "write_video", lambda file, frames, fps: shown.append(frames))
    both = ",".join(str(student / name) for name in LORA_FILE.values())
    for files in (str(student), both, *both.split(",")):
        assert sample.main(["--student", files, "--prompt", "a ball"]) == 0
    folder, files, high, low = shown
    assert numpy.array_equal(folder, files)
    assert not numpy.array_equal(folder, high) and not numpy.array_equal(folder, low)


def test_another_teacher_is_refused(student, tmp_path, capsys):
    other = write_pipeline(tmp_path / "other")
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 0.01 for k, v in load_file(file).items()}, file, {"format": "pt"})
    command = ["--student", str(student), "--prompt", "a ball", "--teacher_path", str(other)]
    assert sample.main(command) == 2
    assert "not known to be the same" in capsys.readouterr().err
    assert sample.main([*command, "--allow_other_teacher", "--out", str(tmp_path / "x.mp4")]) == 0


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(flow_shift=7.0), "flow_shift 7.0 against 5.0"),
        (dict(sampling_steps=[8]), "sampling_steps"),
        (dict(expert="high"), "both are for the high expert"),
    ],
)
def test_files_of_two_students_are_refused(student, change, reason, capsys):
    rewrite(student / LORA_FILE["low"], **change)
    assert sample.main(["--student", str(student), "--prompt", "a ball"]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_a_step_count_it_was_not_trained_for_is_refused(student, capsys):
    assert sample.main(["--student", str(student), "--prompt", "a ball", "--steps", "3"]) == 2
    assert "--steps 3: this student was trained for 4 steps" in capsys.readouterr().err


def test_what_is_not_a_student_is_refused(student, tmp_path, capsys):
    for given, reason in ((str(tmp_path), "train first"), ("nowhere.safetensors", "no such file")):
        assert sample.main(["--student", given, "--prompt", "a ball"]) == 2
        assert reason in capsys.readouterr().err


def test_without_an_encoder_a_strip_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    file = pictures.write_video(tmp_path / "a.mp4", numpy.random.rand(3, 16, 32, 3), 16)
    assert file.suffix == ".png"
    assert pictures.Image.open(file).size == (96, 16)
