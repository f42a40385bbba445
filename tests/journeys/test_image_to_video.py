"""Image to video as a user runs it: pictures in, a student that stock diffusers samples out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import REPOSITORY, stop_at, tiny_flags
from diffusers import FlowMapEulerDiscreteScheduler, WanImageToVideoPipeline
from PIL import Image
from processes import compare, run_killed
from random_teachers import write_pictures
from safetensors.torch import load_file

import sample as sample_script
import train_distillation
from wan_distill.data.pictures import read_picture
from wan_distill.errors import RESUMABLE
from wan_distill.layout import LORA_FILE, RunFolder
from wan_distill.maths import flow
from wan_distill.maths.sigmas import SUBFOLDER, sigma_grid
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.student_files import load_student
from wan_distill.model.vae import encode_first_frame
from wan_distill.settings.lora_names import is_trained, read_name
from wan_distill.system import pictures
from wan_distill.training.metrics import read_lines

PROMPT = "a red circle"
SIZE = dict(height=32, width=32, num_frames=5)
METHODS: dict[str, dict[str, Any]] = {
    "trajectory": dict(method="trajectory"),
    "consistency": dict(method="consistency"),
    "dmd": dict(method="dmd"),
    "dmd-samples": dict(method="dmd", real_score="samples"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "images", 6)


def flags_of(teacher: Path, images: Path, out: Path, **changes: Any) -> list[str]:
    given = dict(prompts=None, images=images, diversity_weight=None, learning_rate=1e-2)
    return tiny_flags(teacher, out, **given | changes)


@pytest.fixture(scope="module")
def distilled(random_picture_teacher, images, tmp_path_factory) -> Path:
    """The folder of the default job, shortened. Do not write to it."""
    out = tmp_path_factory.mktemp("run") / "out"
    changes: dict[str, Any] = dict(
        method="trajectory+dmd", refine_steps=2, monitor_steps=1, monitor_samples=4
    )
    changes |= dict(validation_steps=1, evaluate=True, save_merged=True, real_score=None)
    assert train_distillation.main(flags_of(random_picture_teacher, images, out, **changes)) == 0
    return out


@pytest.fixture(scope="module")
def stock(random_picture_teacher, distilled) -> WanImageToVideoPipeline:
    """The student in diffusers, without a line of this project."""
    pipe = WanImageToVideoPipeline.from_pretrained(random_picture_teacher)
    pipe.set_progress_bar_config(disable=True)
    for expert, file in LORA_FILE.items():
        second = expert == "low"
        pipe.load_lora_weights(
            distilled, weight_name=file, adapter_name=expert, load_into_transformer_2=second
        )
    pipe.scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(distilled, subfolder="scheduler")
    return pipe


def call_of(images: Path, **changes: Any) -> dict[str, Any]:
    """What any of these pipelines is called with."""
    picture = read_picture(images / "0.png").cropped(32, 32)
    call = dict(image=picture, prompt=PROMPT, num_inference_steps=4, guidance_scale=1.0)
    call |= dict(max_sequence_length=12, generator=torch.Generator().manual_seed(7))
    return call | SIZE | changes


# --------------------------------------------------------------------------------- what is left


def test_the_stock_pipeline_samples_the_student_as_our_own_sampler_does(
    random_picture_teacher, distilled, stock, images
):
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    call = call_of(images, latents=noise, output_type="latent")
    expected = stock(**call).frames
    plain = WanImageToVideoPipeline.from_pretrained(random_picture_teacher)
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = stock.scheduler
    assert not torch.allclose(plain(**call).frames, expected, rtol=1e-3, atol=1e-4)
    prompt, _ = plain.encode_prompt(
        PROMPT, do_classifier_free_guidance=False, max_sequence_length=12
    )
    pixels = read_picture(images / "0.png").pixels(32, 32)
    latents = encode_first_frame(plain.vae, pixels, 5)
    mask = torch.zeros(4, *latents.shape[1:])
    mask[:, 0] = 1
    condition = Condition(prompt, torch.cat([mask, latents])[None])
    experts = {expert: getattr(plain, SUBFOLDER[expert]) for expert in LORA_FILE}
    for expert, transformer in experts.items():
        load_student(transformer, RunFolder(distilled).student(expert))
    denoiser = Denoiser(experts, 0.9)
    with torch.no_grad():
        ours = flow.sample(
            lambda x, sigma: denoiser.velocity(x, sigma, condition, role="student"),
            noise,
            sigma_grid(4, 5.0),
        )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_lora_files_name_trained_layers_alone(distilled):
    """None of an image encoder's, which Wan2.2 has not."""
    for file in LORA_FILE.values():
        names = load_file(distilled / file)
        assert names and all(is_trained(read_name(name).module) for name in names)
        assert not [name for name in names if re.search("img|k_img|v_img|add_k|add_v", name)]


def test_the_merged_pipeline_takes_a_picture_and_samples_the_same(distilled, stock, images):
    pipe = WanImageToVideoPipeline.from_pretrained(distilled / "student")
    pipe.set_progress_bar_config(disable=True)
    expected = stock(**call_of(images, output_type="np")).frames
    found = pipe(**call_of(images, output_type="np")).frames
    numpy.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_readmes_code_runs(distilled, images, tmp_path, monkeypatch):
    text = (distilled / "README.md").read_text(encoding="utf-8")
    assert Image.open(distilled / "first_frame.png").size == (32, 32)
    for file in distilled.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], {})
    assert (tmp_path / "video.mp4").exists()


def test_sample_py_is_given_the_picture(distilled, stock, images, monkeypatch, tmp_path):
    frames_of: list[numpy.ndarray] = []
    monkeypatch.setattr(
        pictures, "write_video", lambda file, frames, fps: frames_of.append(frames) or file
    )
    flags = ["--student", str(distilled), "--prompt", PROMPT, "--seed=7"]
    flags += ["--out", str(tmp_path / "video.mp4")]
    assert sample_script.main([*flags, "--image", str(images / "0.png"), "--compare"]) == 0
    expected = stock(**call_of(images, output_type="np")).frames[0]
    (both,) = frames_of
    teachers, students = both[:, 32::10, :320:10], both[:, 32::10, 328::10]  # below their names
    numpy.testing.assert_allclose(students, expected, atol=1e-4)
    assert numpy.abs(teachers - expected).max() > 1e-3


def test_sample_py_asks_for_a_picture(distilled, capsys):
    assert sample_script.main(["--student", str(distilled), "--prompt", PROMPT]) == 2
    error = capsys.readouterr().err
    assert (
        error == "error: --image: this student's clips begin with a picture; give the file of one\n"
    )


def test_the_first_frame_is_measured_and_watched(distilled):
    table = json.loads((distilled / "evaluation.json").read_text())
    for row in table["rows"]:
        assert row["first_frame"] > 0 and row["departure"] > 0
    assert table["rows"][0]["first_frame"] == table["rows"][0]["departure"] == 1
    lines = read_lines(distilled / "metrics.jsonl")
    assert all(line["monitor_first_frame"] > 0 for line in lines if "monitor_score" in line)
    assert any("monitor_departure" in line for line in lines)
    run = json.loads((distilled / "run.json").read_text())
    assert run["config"]["diversity_weight"] == 0  # it harms image to video


# ------------------------------------------------------------------------- whatever happens to it


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_bit_for_bit(
    random_picture_teacher, images, tmp_path, monkeypatch, method
):
    changes = METHODS[method] | dict(max_train_steps=3, checkpointing_steps=1)

    def start(name: str) -> int:
        return train_distillation.main(
            flags_of(random_picture_teacher, images, tmp_path / name, **changes)
        )

    assert start("whole") == 0
    stop_at(monkeypatch, 3)
    assert start("stopped") == RESUMABLE
    assert start("stopped") == 0
    for file in LORA_FILE.values():
        whole = (tmp_path / "whole" / file).read_bytes()
        assert (tmp_path / "stopped" / file).read_bytes() == whole


KILLED = """
import os, signal, sys
import wan_distill.data.first_frames as first_frames
import train_distillation
real, kept = first_frames.write_hashed, []

def kill_at_third(file, *rest):
    kept.append(file)
    if len(kept) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(file, *rest)

first_frames.write_hashed = kill_at_third
sys.exit(train_distillation.main(sys.argv[1:]))
"""


def test_a_kill_while_pictures_are_encoded_loses_one(
    random_picture_teacher, images, tmp_path, capsys
):
    flags = flags_of(random_picture_teacher, images, tmp_path / "out", method="trajectory")
    run_killed(KILLED, flags)
    cache = RunFolder(tmp_path / "out").pictures
    before = {file: file.stat().st_mtime_ns for file in cache.glob("*.safetensors")}
    assert len(before) == 2
    assert train_distillation.main(flags) == 0
    after = {file: file.stat().st_mtime_ns for file in cache.glob("*.safetensors")}
    # Of five pictures to train on, four samples read four; nothing is measured.
    assert len(after) == 4 and all(after[file] == state for file, state in before.items())


def test_two_processes_equal_one_with_accumulation(random_picture_teacher, images, tmp_path):
    changes = dict(prompts=None, images=images, diversity_weight=None, expert="high")
    changes |= dict(score_draws=1, sample_batch_size=1)
    assert compare(random_picture_teacher, tmp_path, "dmd-samples", **changes) == 0


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("pictured", "changes", "reason"),
    [
        (True, dict(prompts=REPOSITORY / "tests" / "prompts.txt"), "--prompts .*give --images"),
        (True, dict(images="no/such/folder"), "--images no/such/folder: "),
        (False, dict(), "--images .*: random is a text-to-video teacher"),
    ],
)
def test_what_a_teacher_does_not_learn_from_is_refused(
    random_teacher, random_picture_teacher, images, tmp_path, capsys, pictured, changes, reason
):
    teacher = random_picture_teacher if pictured else random_teacher
    given = dict(images=images) | changes
    flags = flags_of(teacher, given.pop("images"), tmp_path / "out", **given)
    assert train_distillation.main(flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"error: {reason}", error)
    assert not (tmp_path / "out").exists()


def test_one_picture_and_other_pictures_and_another_caption(
    random_picture_teacher, tmp_path, capsys
):
    """One is enough to try; a run is known by its pictures and their captions."""
    one = write_pictures(tmp_path / "one", 1)
    out = tmp_path / "out"
    flags = flags_of(random_picture_teacher, one, out, method="trajectory", max_train_steps=1)
    assert train_distillation.main(flags) == 0
    assert "one picture only" in capsys.readouterr().err
    (one / "0.txt").write_text("a green circle")
    assert train_distillation.main(flags) == 2
    assert "the prompts were" in capsys.readouterr().err
