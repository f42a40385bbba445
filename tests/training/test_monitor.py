"""The checks of the student while it trains: what they measure, warn of, and which weights win."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from lessons import Lesson, make_lesson

from wan_distill.data.run import Run
from wan_distill.data.solving import solve_missing
from wan_distill.errors import UsageError
from wan_distill.maths.distances import (
    jackknife_error,
    relative,
    score,
)
from wan_distill.settings.config import Config
from wan_distill.training.health import warnings
from wan_distill.training.monitor import Monitor


def monitored(run: Run, expert, moved: float = 0.0) -> tuple[Monitor, Lesson]:
    """A monitor whose samples are solved, and the expert that it checks."""
    lesson = make_lesson(run, expert, moved)
    monitor = Monitor(run, expert)
    solve_missing(run, monitor.requests())
    return monitor, lesson


# --------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_student_as_good_as_its_teacher_is_left_alone_and_a_worse_one_is_not_kept(
    make_run, expert, capsys, monkeypatch
):
    run = make_run(method="trajectory", monitor_steps=1, ema_decay=0.5)
    monitor, lesson = monitored(run, expert)
    student = lesson.learners["student"]
    student_x0 = monitor.clips.student_x0
    monitor.clips.student_x0 = lambda denoiser: monitor.teacher_x0.clone()
    values = monitor.check(lesson.denoiser, student)
    assert values["monitor_score"] == pytest.approx(0, abs=1e-6)
    assert values["monitor_diversity"] == pytest.approx(1)
    best = monitor.exported(student)
    assert best.updates == 0
    assert "no nearer to the teacher than it began" in " ".join(capsys.readouterr().out.split())
    with monkeypatch.context() as refining:
        refining.setattr(Config, "is_second_stage", True)
        monitor.exported(student)
    said = capsys.readouterr().out
    assert "These are the first stage's" in said and "Warning" not in said
    for p in student.parameters.values():
        p.data.add_(0.05)
    for p in student.average.values():
        p.add_(0.05)
    monitor.clips.student_x0 = student_x0
    worse = monitor.check(lesson.denoiser, student)
    assert worse["monitor_score"] > 0.01
    exported = monitor.exported(student).weights
    assert all(torch.equal(weight, best.weights[name]) for name, weight in exported.items())
    again = Monitor(run, expert)
    again.resume(5)
    assert again.best == monitor.best
    again.resume(0)
    assert not again.file.exists() and again.exported(student).weights is student.average


def checks(run: Run, monkeypatch, *scores: list[float], ill: tuple[int, ...] = ()) -> Monitor:
    """A monitor after checks with these scores, whose weights are the number of the check."""
    monitor, lesson = monitored(run, "high")
    student = lesson.learners["student"]
    given = iter(scores)
    monkeypatch.setattr(
        "wan_distill.training.monitor.scores_without_each", lambda *_: list(next(given))
    )
    monkeypatch.setattr(
        "wan_distill.training.monitor.warnings",
        lambda values, config: ["it is ill"] if student.done in ill else [],
    )
    for student.done in range(len(scores)):
        for p in student.parameters.values():
            p.data.fill_(float(student.done))
        values = monitor.check(lesson.denoiser, student)
        assert values["monitor_score"] == scores[student.done][0]
        assert values["monitor_parameter_norm"] == pytest.approx(
            student.done * math.sqrt(sum(p.numel() for p in student.parameters.values()))
        )
    monitor.student = student
    return monitor


def test_a_score_of_other_clips_is_forgotten(make_run, monkeypatch):
    """`--monitor_samples` was changed: scores without each of fewer prompts are not comparable."""
    run = make_run(method="trajectory", monitor_steps=1)
    assert chosen(checks(run, monkeypatch, [1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0])) == 1


def chosen(monitor: Monitor) -> int:
    """The check whose weights are exported."""
    exported = monitor.exported(monitor.student).weights
    assert set(exported) == set(monitor.student.parameters)
    (number,) = {float(value) for weight in exported.values() for value in weight.unique()}
    return int(number)


def test_the_latest_that_cannot_be_told_from_the_best_is_exported(make_run, monkeypatch, capsys):
    """By the jackknife: two prompts whose scores differ by 0.1 in opposite directions have a
    standard error of 0.1.
    """
    run = make_run(method="trajectory", monitor_steps=1, ema_decay=0.0)
    best, close = [1.0, 0.9, 1.1], [1.09, 1.09, 1.09]
    assert jackknife_error(
        [a - b for a, b in zip(close[1:], best[1:], strict=True)]
    ) == pytest.approx(0.1)
    monitor = checks(run, monkeypatch, [3.0, 3.0, 3.0], best, close, [1.11, 1.11, 1.11])
    assert chosen(monitor) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "after 2 of 3 updates are exported: their score is 1.0900; the best, 1.0000" in said
    assert "no nearer" not in said
    after_a_stop = Monitor(run, "high")
    after_a_stop.resume(3)
    assert after_a_stop.best == best


def test_what_is_surely_better_replaces_everything_before(make_run, monkeypatch, capsys):
    run = make_run(method="trajectory", monitor_steps=1, ema_decay=0.0)
    monitor = checks(run, monkeypatch, [1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [0.51, 0.51, 0.51])
    assert chosen(monitor) == 1
    assert "their score is 0.5000, the best." in " ".join(capsys.readouterr().out.split())


def test_an_ill_student_is_exported_only_where_its_score_is_the_best(make_run, monkeypatch):
    run = make_run(method="trajectory", monitor_steps=1, ema_decay=0.0)
    best, close = [1.0, 0.9, 1.1], [1.09, 1.09, 1.09]
    assert chosen(checks(run, monkeypatch, [2.0] * 3, best, close, ill=(2,))) == 1
    monkeypatch.undo()
    assert chosen(checks(run, monkeypatch, [2.0] * 3, close, best, ill=(2,))) == 2


def test_best_weights_that_changed_on_the_disk_are_refused(make_run):
    run = make_run(method="trajectory", monitor_steps=1, ema_decay=0.0)
    monitor, lesson = monitored(run, "high")
    student = lesson.learners["student"]
    monitor.check(lesson.denoiser, student)
    data = monitor.file.read_bytes()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:40], b""):
        monitor.file.write_bytes(damaged)
        for use in (lambda: monitor.exported(student), lambda: Monitor(run, "high").resume(3)):
            with pytest.raises(UsageError, match=r"are damaged.*delete the file and run again"):
                use()


def test_a_check_leaves_the_student_as_it_is(make_run):
    run = make_run(method="trajectory", monitor_steps=1, ema_decay=0.5)
    monitor, lesson = monitored(run, "high", moved=0.02)
    student = lesson.learners["student"]
    for p in student.average.values():
        p.zero_()
    before = {name: p.detach().clone() for name, p in student.parameters.items()}
    checked = monitor.check(lesson.denoiser, student)
    assert all(torch.equal(p, before[name]) for name, p in student.parameters.items())
    for p in student.parameters.values():
        p.data.zero_()
    again = monitor.check(lesson.denoiser, student)
    assert checked["monitor_score"] == again["monitor_score"]  # it was the average's


def test_checks_are_due_at_their_interval_and_at_the_end(make_run):
    run = make_run(method="trajectory", monitor_steps=3)
    lesson, monitor = make_lesson(run, "high"), Monitor(run, "high")
    student = lesson.learners["student"]
    due = []
    for student.done in range(8):
        due.append(monitor.due(student, last=student.done == 7))
    assert [done for done in range(8) if due[done]] == [0, 3, 6, 7]
    run.runtime.samples_student = lambda: False  # not the main process
    assert not monitor.due(student, last=True)
    off = Monitor(make_run(method="trajectory", monitor_steps=0), "high")
    assert not off.due(student, last=True) and off.requests() == []


@pytest.mark.parametrize(
    ("asked", "prompts", "clips"), [(4, 2, 4), (5, 2, 4), (1, 1, 2), (99, 3, 6)]
)
def test_each_prompt_is_sampled_from_two_seeds(make_run, asked, prompts, clips):
    monitor = Monitor(make_run(method="trajectory", monitor_steps=1, monitor_samples=asked), "high")
    assert len(monitor.clips.prompts) == prompts and len(monitor.clips.rows) == clips


# --------------------------------------------------------------------------------------- warnings

DMD = Config(method="dmd", real_score="samples", output_dir="out")
HEALTHY = dict(motion=1.0, saturation=1.0, diversity=1.0, luminance=0.0)


@pytest.mark.parametrize(
    ("name", "last_healthy", "first_ill", "word"),
    [
        ("motion", 0.60, 0.59, "freezes"),
        ("luminance", 0.10, 0.11, "over-exposes"),
        ("saturation", 1.40, 1.41, "over-exposes"),
        ("diversity", 0.60, 0.59, "collapses"),
        ("departure", 0.60, 0.59, "holds on to the picture"),
        ("first_frame", 1.50, 1.51, "does not begin with the picture"),
    ],
)
def test_the_limits_of_a_healthy_student(name, last_healthy, first_ill, word):
    assert warnings(HEALTHY | {name: last_healthy}, DMD) == []
    (line,) = warnings(HEALTHY | {name: first_ill}, DMD)
    assert word in line and f"{first_ill:.2f}" in line and "--" in line


def test_warnings_are_plain_words():
    assert warnings(HEALTHY, DMD) == []
    for change, word in (
        (dict(motion=0.3), "freezes"),
        (dict(luminance=0.2), "over-exposes"),
        (dict(saturation=1.6), "over-exposes"),
        (dict(diversity=0.2), "collapses"),
    ):
        (line,) = warnings(HEALTHY | change, DMD)
        assert word in line and "--" in line
    assert len(warnings(dict(motion=0.1, saturation=3.0, diversity=0.1, luminance=0.5), DMD)) == 3
    assert warnings(dict(luminance=0.0), DMD) == []  # a still teacher has no motion to compare with
    teacher = dict(motion=float("nan"), saturation=0.5, luminance=0.4, diversity=2.0)
    assert relative(teacher, teacher) == dict(saturation=1.0, diversity=1.0, luminance=0.0)


def test_the_remedy_is_a_flag_of_the_stage_that_can_help():
    """Of a regression: train for longer. Of matching: at a lower rate, which a second stage has
    from a flag of its own; what begins with a student is not told to begin with one.
    """
    second = dataclasses.replace(DMD, init_student_from="out/trajectory", real_score="paired")
    other = dataclasses.replace(DMD, init_student_from="lightning")
    regression = dataclasses.replace(DMD, method="trajectory")
    said = {
        stage: " ".join(warnings(dict(motion=0.1, luminance=0.5, diversity=0.1), config))
        for stage, config in dict(dmd=DMD, second=second, other=other, first=regression).items()
    }
    assert "Lower --learning_rate, or begin with a regression" in said["dmd"]
    assert "scale" not in said["dmd"] and "scale" in said["second"]
    assert "--refine_learning_rate" in said["second"] and "--learning_rate" not in said["second"]
    assert "Lower --learning_rate." in said["other"] and "begin with" not in said["other"]
    assert "--max_train_steps" in said["first"] and "--critic_updates" not in said["first"]
    assert "--init_student_from" in said["first"]


def test_a_student_that_fell_ill_is_reported_but_not_before_training(make_run, monkeypatch, capsys):
    run = make_run(method="trajectory", monitor_steps=1)
    monitor, lesson = monitored(run, "high")
    frozen = HEALTHY | dict(motion=0.2)
    monkeypatch.setattr("wan_distill.training.monitor.relative", lambda *_: dict(frozen))
    student = lesson.learners["student"]
    capsys.readouterr()
    monitor.check(lesson.denoiser, student)
    assert "Warning" not in capsys.readouterr().out
    student.done = 5
    monitor.check(lesson.denoiser, student)
    said = capsys.readouterr().out
    assert "Warning, high expert after 5 updates" in said and "freezes" in said


# ------------------------------------------------------------------------------------------- score


def test_the_score_tells_sets_apart_by_content_and_by_motion():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 1, 3, 4, 4, generator=rng), torch.randn(64, 1, 3, 4, 4, generator=rng)
    frozen = b[:, :, :1].expand_as(b)
    assert abs(score(a, b)) < 0.02
    assert score(a + 1, b) > 0.1
    assert score(frozen, a) > 0.3
    assert math.isfinite(score(a[:, :, :1], b[:, :, :1]))  # a single frame
