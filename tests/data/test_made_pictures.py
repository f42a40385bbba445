"""Pictures made by a text-to-video teacher: named by what decides them, made once, whole."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from random_teachers import TEXT_DIM
from safetensors.torch import load_file, save_file

from wan_distill.data import PictureSource, PromptEmbeddings, Run
from wan_distill.data.pictures import read_pictures
from wan_distill.data.samples import SampleRequest, SampleStore
from wan_distill.data.solving import solve_missing
from wan_distill.errors import Stopped
from wan_distill.layout import RunFolder
from wan_distill.model import Teacher
from wan_distill.model.vae import decode
from wan_distill.settings.config import Config
from wan_distill.settings.picture_source import read_teachers
from wan_distill.settings.resolve import resolve
from wan_distill.settings.sample_specs import trajectories
from wan_distill.system.runtime import Runtime

FLAGS = dict(height=32, width=32, num_frames=5, solver_steps=4, sample_batch_size=2)
Make = Callable[..., tuple[PictureSource, Run]]


@pytest.fixture
def job(random_teacher: Path, random_picture_teacher: Path, tmp_path: Path) -> Callable[..., tuple]:
    """(resolved settings, teachers) of a job whose pictures the random teacher makes."""

    def make(**changes) -> tuple:
        paths = dict(
            teacher_path=str(random_picture_teacher),
            image_source=str(random_teacher),
            output_dir=str(tmp_path / "out"),
            prompts=str(REPOSITORY / "tests" / "prompts.txt"),
        )
        config = Config(**(FLAGS | paths | changes))
        info = read_teachers(config)
        return resolve(config, info), info

    return make


@pytest.fixture
def source_run(job) -> Make:
    """The source, and a run of its teacher with drawn embeddings."""

    def make(**changes) -> tuple[PictureSource, Run]:
        config, info = job(**changes)
        source = PictureSource(config, info.picture_source)
        runtime = Runtime(source.config)
        folder, length = RunFolder(Path(source.config.output_dir)).prompts, 12
        embeddings = PromptEmbeddings(folder, {"encoder": "drawn"}, length, runtime.device)
        for i, prompt in enumerate([*source.prompts, source.config.negative_prompt]):
            rng = torch.Generator().manual_seed(i)
            embeddings.store(prompt, torch.randn(4, TEXT_DIM, generator=rng))
        teacher = Teacher(source.info, source.config, runtime)
        return source, Run(source.config, teacher, embeddings, source.prompts, runtime)

    return make


def keys(source: PictureSource) -> list[str]:
    return [record.key for record in source.records(source.prompts)]


def test_a_picture_is_the_first_frame_of_its_clip(source_run):
    source, run = source_run()
    source.make(run, [0, 2])
    store = SampleStore(run, source.spec)
    clips = decode(run.teacher.load_vae(), store.at([0, 2], 2 * source.spec.stored))
    records = source.records([source.prompts[0], source.prompts[2]])
    for record, clip in zip(records, clips[:, 0], strict=True):
        shown = (record.pixels(32, 32).permute(1, 2, 0) + 1) / 2
        torch.testing.assert_close(shown, clip, rtol=0, atol=0.6 / 255)  # of 8 bits
    assert not torch.equal(clips[0, 0], clips[1, 0])


def test_what_is_made_is_a_folder_for_images(source_run):
    source, run = source_run()
    source.make(run, [0, 1, 2, 3])
    said = []
    found = {r.name: r.caption for r in read_pictures(source.folder, said.append)}
    assert found == {r.name: r.caption for r in source.records(source.prompts)} and not said


def test_only_what_is_read_and_missing_is_made(source_run):
    source, run = source_run()
    first, second, *_ = keys(source)
    assert source.missing([first, "another"]) == [0]
    source.make(run, [0])
    assert source.missing([first, second]) == [1]
    assert len(list(source.folder.glob("*.png"))) == 1


def test_a_picture_is_known_by_everything_that_decides_it(job, random_teacher, tmp_path):
    def found(**changes) -> list[str]:
        config, info = job(**changes)
        return keys(PictureSource(config, info.picture_source))

    usual = found()
    assert len(set(usual)) == 4 and found() == usual
    for change in (
        dict(seed=1),
        dict(num_frames=9),
        dict(height=48),
        dict(solver_steps=5),
        dict(teacher_solver="euler"),
        dict(mixed_precision="bf16"),
    ):
        assert not set(found(**change)) & set(usual), change
    # Not by what is the student's or the image-to-video teacher's alone.
    assert found(guidance_scale=2.0, flow_shift=4.0, num_trajectories=7, rank=2) == usual
    other = Path(shutil.copytree(random_teacher, tmp_path / "other"))
    assert found(image_source=str(other)) == usual  # the same files
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: value + 0.01 for name, value in weights.items()}, file)
    assert not set(found(image_source=str(other))) & set(usual)


def test_a_picture_tells_nothing_of_the_noise_of_its_clip(source_run, job):
    """With the job's own seed both would begin with the same noise."""
    source, run = source_run()
    config, _ = job()
    assert source.config.seed != config.seed and job(seed=1)[0].seed == 1
    same = dataclasses.replace(run, config=dataclasses.replace(run.config, seed=config.seed))
    ours = SampleStore(same, trajectories(same.config)).noise(0)
    assert (
        abs(
            torch.corrcoef(torch.stack([SampleStore(run, source.spec).noise(0), ours]).flatten(1))[
                0, 1
            ]
        )
        < 0.2
    )


def test_a_stop_keeps_what_was_solved_and_made(source_run, monkeypatch):
    source, run = source_run()
    real = PictureSource._write

    def stopped_after_one(self, row, picture):
        real(self, row, picture)
        run.runtime.signal = signal.SIGTERM

    monkeypatch.setattr(PictureSource, "_write", stopped_after_one)
    with pytest.raises(Stopped, match="Run the same command"):
        source.make(run, [0, 1, 2])
    assert source.missing(keys(source)[:3]) == [1, 2]
    run.runtime.signal = None
    store = SampleStore(run, source.spec)
    before = {row: store.file(row).stat().st_mtime_ns for row in (0, 1, 2)}
    solve_missing(run, [SampleRequest(store, frozenset([0, 1, 2]))])
    assert before == {row: store.file(row).stat().st_mtime_ns for row in (0, 1, 2)}
