"""sample.py samples LoRAs of other tools with the schedule that its flags declare."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from foreign_loras import LAYOUTS, write_in
from safetensors.torch import load_file, save_file
from written_students import write_student

import sample
from wan_distill.layout import LORA_FILE

PROMPT = "a small red circle moving left"
SIZE = ("--height=32", "--width=32", "--num_frames=5")
SHIFT, STEPS = 4.0, 2


@pytest.fixture
def student(make_run, tmp_path: Path) -> Path:
    """A folder with this tool's LoRAs of both experts."""
    length = dict(max_sequence_length=512)  # what is taken of a teacher that does not say another
    schedule = dict(flow_shift=SHIFT, sampling_steps=(STEPS,))
    out = str(tmp_path / "student")
    # alpha / rank is a power of two, so that nothing is rounded where a layout multiplies it in.
    run = make_run(method="trajectory", lora_alpha=2.0, output_dir=out, **length, **schedule)
    write_student(run, "high", "low")
    return Path(out)


@pytest.fixture
def declared(random_teacher: Path) -> list[str]:
    return [f"--teacher_path={random_teacher}", f"--flow_shift={SHIFT}", f"--steps={STEPS}", *SIZE]


def in_layout(layout: str, student: Path, folder: Path) -> Path:
    """The student of both experts in another layout."""
    for expert, name in LORA_FILE.items():
        write_in(layout, student / name, folder / f"theirs_{expert}_noise.safetensors")
    return folder


def sampled(student: Path | str, *flags: str) -> int:
    return sample.main([f"--student={student}", f"--prompt={PROMPT}", *flags])


@pytest.mark.journey  # together as long as a whole run
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "extras" not in name])
def test_every_layout_is_sampled_like_our_own(layout, student, declared, tmp_path, clips, capsys):
    assert sampled(student) == 0
    folder = in_layout(layout, student, tmp_path / "theirs")
    assert sampled(folder, *declared) == 0
    assert "theirs_high_noise.safetensors x 1 (high); theirs_low" in capsys.readouterr().out
    numpy.testing.assert_allclose(clips[1], clips[0], rtol=0, atol=1e-5)


def test_the_declared_schedule_is_the_one_that_is_sampled(student, declared, tmp_path, clips):
    folder = in_layout("lightning", student, tmp_path / "theirs")
    for change in ((), ("--flow_shift=9",), ("--steps=4",)):
        assert sampled(folder, *declared, *change) == 0
    right, *others = clips
    for other in others:
        assert numpy.abs(other - right).max() > 1e-3


def test_one_expert_alone_and_its_teacher_beside_it(
    student, declared, tmp_path, clips, capsys, monkeypatch
):
    monkeypatch.setattr("wan_distill.results.sampling.TEACHER_STEPS", 2)
    assert sampled(student / LORA_FILE["high"], "--compare") == 0
    (file, _) = sorted(in_layout("kohya", student, tmp_path / "theirs").iterdir())
    assert sampled(file, *declared, "--compare") == 0
    assert "half a student: nothing of the low expert" in capsys.readouterr().err
    numpy.testing.assert_allclose(clips[1], clips[0], rtol=0, atol=1e-5)


def refused(capsys, student: Path | str, *flags: str) -> str:
    assert sampled(student, *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_what_is_not_declared_is_asked_for_in_one_line(
    student, declared, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("wan_distill.results.sampling.load_pipeline", None)
    folder = in_layout("kohya", student, tmp_path / "theirs")
    said = refused(capsys, folder)
    assert "carries no schedule, since another tool wrote it; give --teacher_path, --flow_shift, -"
    assert "--steps as it was made for" in said
    for flag in ("--teacher_path", "--flow_shift", "--steps"):
        others = [given for given in declared if not given.startswith(flag)]
        assert f"; give {flag} as it was made for" in refused(capsys, folder, *others)
    assert "--flow_shift nan: must be greater than 0" in refused(capsys, folder, "--flow_shift=nan")


def test_what_does_not_fit_is_refused_before_anything_loads(
    student, declared, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("wan_distill.results.sampling.load_pipeline", None)
    high, low = sorted(in_layout("kohya", student, tmp_path / "theirs").iterdir())
    mixed = f"{high},{student / LORA_FILE['low']}"
    assert f"{high}: carries no schedule" in refused(capsys, mixed, *declared)
    assert "given for the high expert, but it says" in refused(capsys, f"{low},{high}", *declared)
    unnamed = high.rename(high.with_name("model.safetensors"))
    assert "does not say which expert it is for" in refused(capsys, unnamed, *declared)
    wider = {k: v.repeat(1, 2) if ".lora_down" in k else v for k, v in load_file(low).items()}
    save_file(wider, low)
    assert "this teacher's is [24, 24]; give a LoRA" in refused(capsys, low, *declared)


def test_the_files_may_lie_on_the_hub(student, declared, tmp_path, clips, monkeypatch):
    folder = in_layout("lightning", student, tmp_path / "theirs")
    asked = []

    def snapshot(repository: str, cache_dir: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, cache_dir))
        return str(tmp_path)

    monkeypatch.setattr("wan_distill.settings.lora_sources.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path / "theirs")
    assert sampled("some/loras/theirs", *declared, "--cache_dir=here") == 0
    assert set(asked) == {("some/loras", "here")}
    assert sampled(folder, *declared) == 0
    assert numpy.array_equal(clips[0], clips[1])
