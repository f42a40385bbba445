"""A few clips, each beside its teacher's: against hand-made clips, and after an interruption."""

from __future__ import annotations

import math

import pytest
import torch
from written_students import write_student

from wan_distill.data import solving
from wan_distill.errors import Stopped
from wan_distill.maths.distances import sharpness
from wan_distill.results.paired import PairedEvaluation, rows
from wan_distill.results.recorded import read_evaluation
from wan_distill.results.table import sentence

HELD_OUT = ["a red circle", "a blue square"]


@pytest.fixture
def evaluated(make_run):
    """A run with a student of both experts, and its evaluation of four clips."""
    run = make_run(evaluation="pairs", eval_samples=4, method="trajectory")
    write_student(run, "high", "low")
    return run, PairedEvaluation(run, HELD_OUT)


@pytest.mark.journey  # as long as a whole run
def test_the_table_compares_each_row_with_the_teacher_from_the_same_noise(evaluated):
    run, evaluation = evaluated
    result = evaluation.measure()
    assert result == read_evaluation(run.folder)
    reference, few, student = result["rows"]
    assert [row["sampler"] for row in result["rows"]] == [
        "teacher 6 guided",
        "teacher 4 guided",
        "student 4",
    ]
    assert [row["evaluations"] for row in result["rows"]] == [12, 8, 4]
    assert reference["paired_distance"] == 0 and reference["luminance_drift"] == 0
    for ratio in ("motion", "saturation", "sharpness", "diversity"):
        assert reference[ratio] == pytest.approx(1)
    assert few["paired_distance"] > 0 and student["paired_distance"] > 0
    assert result["sentence"] == sentence(result["rows"], 4)
    assert len(list(run.folder.pairs.glob("*.mp4"))) == 4 and run.folder.comparison.exists()
    assert all(row["seconds_per_sample"] > 0 for row in result["rows"])
    sides = {"teacher", "few", "student"}
    clips = {f"{who}-{i:04d}.mp4" for who in sides for i in range(4)}
    assert {file.name for file in run.folder.clips.iterdir()} == clips
    own = [clip["paired_distance"] for clip in result["clips"]]
    others = [clip["few_paired_distance"] for clip in result["clips"]]
    assert sum(own) / 4 == pytest.approx(student["paired_distance"])
    assert result["nearer"] == pytest.approx(1 - sum(own) / sum(others), abs=1e-4)
    low, high = result["nearer_interval"]
    assert low < result["nearer"] < high


def test_each_clip_is_compared_with_its_own_picture(picture_run, monkeypatch):
    """Clips that are shown as their pictures, a little lighter."""
    run = picture_run(evaluation="pairs", eval_samples=4, method="trajectory")
    pixels = run.first_frames.pixels(run.prompts[:2])
    clips = iter([(pixels[i % 2] + 0.125).expand(1, 5, -1, -1, -1) for i in range(4)])
    monkeypatch.setattr("wan_distill.results.paired.decode", lambda *_: next(clips))
    monkeypatch.setattr(PairedEvaluation, "_write_videos", lambda *_: None)
    evaluation = PairedEvaluation(run, run.prompts)
    found = evaluation._pictures({"student 4": [torch.zeros(run.latent_shape)] * 4})
    for clip in found["student 4"]:
        assert clip["first_frame"] == pytest.approx(0.125)
        assert clip["departure"] == pytest.approx(0.125)


def test_the_paired_distance_is_the_mean_over_clips_of_the_root_mean_square(evaluated):
    run, evaluation = evaluated
    shape = run.latent_shape
    rng = torch.Generator().manual_seed(0)
    clips = [torch.randn(shape, generator=rng) for _ in range(4)]
    moved = [clip + i for i, clip in enumerate(clips)]
    pictures = [dict(motion=2.0, saturation=1.0, luminance=0.5, sharpness=1.0)] * 4
    darker = [values | dict(luminance=0.25, motion=1.0) for values in pictures]
    reference, _, student = rows(run.config)
    line = evaluation._line(
        student,
        reference.name,
        {reference.name: clips, student.name: moved},
        {reference.name: pictures, student.name: darker},
    )
    assert line["paired_distance"] == pytest.approx((0 + 1 + 2 + 3) / 4)
    assert line["motion"] == 0.5 and line["luminance_drift"] == -0.25


def test_training_never_sees_the_evaluations_noise_and_each_prompt_has_two_seeds(evaluated):
    run, evaluation = evaluated
    from wan_distill.data.samples import SampleStore
    from wan_distill.settings.sample_specs import trajectories

    reference = SampleStore(run, rows(run.config)[0].spec, evaluation.prompts)
    trained = SampleStore(run, trajectories(run.config), evaluation.prompts)
    assert reference.prompts_of(range(4)) == HELD_OUT * 2
    assert not any(torch.equal(reference.noise(i), trained.noise(i)) for i in range(4))


@pytest.mark.journey  # as long as a whole run
def test_an_interruption_loses_one_batch_at_most(make_run, monkeypatch):
    run = make_run(evaluation="pairs", eval_samples=4, sample_batch_size=1)
    write_student(run, "high", "low")
    solved = []
    solve = solving._solve_batch

    def counting(run, expert, denoiser, store, batch, bar):
        if len(solved) == 5:
            raise Stopped("as if a signal had come")
        solve(run, expert, denoiser, store, batch, bar)
        solved.append((store.folder.name, expert, tuple(batch)))

    monkeypatch.setattr(solving, "_solve_batch", counting)
    with pytest.raises(Stopped):
        PairedEvaluation(run, HELD_OUT).measure()
    before = set(solved)
    solved.clear()

    def recording(run, expert, denoiser, store, batch, bar):
        solve(run, expert, denoiser, store, batch, bar)
        solved.append((store.folder.name, expert, tuple(batch)))

    monkeypatch.setattr(solving, "_solve_batch", recording)
    assert PairedEvaluation(run, HELD_OUT).measure()["samples"] == 4
    assert len(before) == 5 and not before & set(solved)


def test_sharpness_of_known_pictures():
    flat = torch.full((1, 1, 5, 5, 3), 0.3)
    assert sharpness(flat) == pytest.approx(0, abs=1e-6)
    dot = torch.zeros(1, 1, 3, 3, 3)
    dot[0, 0, 1, 1] = 1.0
    assert sharpness(dot) == pytest.approx(4)  # one interior pixel, 4 below each of its neighbours


def test_the_sentence_says_what_is_nearer_and_leaves_out_what_is_unknown():
    line = dict(paired_distance=0.2, motion=0.9, sharpness=1.0, diversity=0.8)
    table = [
        line | dict(sampler="teacher", steps=40),
        line | dict(sampler="few", steps=4, paired_distance=0.5),
        line | dict(sampler="student 4", steps=4),
    ]
    words = sentence(table, 4)
    assert "move 0.90 times as much" in words and "are nearer to them" in words
    table[2] |= dict(paired_distance=0.7, motion=math.nan)
    words = sentence(table, 4)
    assert "farther from" in words and "move" not in words
