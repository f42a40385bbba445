"""Clips of student and teacher over one expert's phase: one per prompt, and what they show."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import PROMPTS
from lessons import Lesson, make_lesson

from wan_distill.data import solving
from wan_distill.data.solving import solve_missing
from wan_distill.maths.flow import euler_step, sigma_batch, x0_from_velocity
from wan_distill.model.student_files import save_lora
from wan_distill.training import previews
from wan_distill.training.phase_clips import PhaseClips
from wan_distill.training.previews import Previews


def distil_high(run) -> Lesson:
    """A distilled high expert with some effect, in the folder of the run."""
    high = make_lesson(run, "high", moved=0.05)
    weights = high.learners["student"].exported()
    save_lora(run.folder.lora("high"), weights, run.config, run.info, "high")
    return high


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_one_clip_per_prompt_is_solved_sampled_and_written(
    make_run, monkeypatch, expert, distilled
):
    """240 guided evaluations of a large teacher depend on it."""
    run = make_run(method="trajectory", validation_steps=1, sample_batch_size=2)
    if distilled:
        distil_high(run)
    lesson = make_lesson(run, expert)
    shown = Previews(run, expert, PROMPTS[::-1])  # not those that training has solved
    rows = {}
    for request in shown.requests():
        rows.setdefault(request.store.folder, set()).update(request.rows)
    starts_elsewhere = expert == "low" and distilled
    assert list(rows.values()) == [{0, 1, 2}] * (2 if starts_elsewhere else 1)

    carried = Counter()
    solve = solving._solve_batch

    def solving_batch(run, expert, denoiser, store, batch, bar):
        carried[store.spec.kind, expert] += len(batch)
        solve(run, expert, denoiser, store, batch, bar)

    monkeypatch.setattr(solving, "_solve_batch", solving_batch)
    solve_missing(run, shown.requests())
    solved = {("trajectories", "high"): 3, ("trajectories", "low"): 3}
    assert carried == solved | ({("handovers", "high"): 3} if starts_elsewhere else {})

    forwards, velocity = Counter(), lesson.denoiser.velocity

    def counting(x, sigma, condition, *, role):
        forwards[role] += len(x)
        return velocity(x, sigma, condition, role=role)

    lesson.denoiser.velocity = counting
    written = []
    monkeypatch.setattr(previews, "write_video", lambda file, clip, fps: written.append(file.name))
    student = lesson.learners["student"]
    for student.done in (0, 40):
        shown.write(lesson.denoiser, student)
    assert forwards == {"student": 2 * 3 * 2}  # twice, three clips, two steps of this expert
    whose = ("teacher", "000000", "000040")
    assert written == [f"{expert}-{who}-{prompt}.mp4" for who in whose for prompt in range(3)]


@pytest.mark.parametrize("expert", ["high", "low"])
def test_clips_show_the_x0_that_the_last_step_heads_for(make_run, expert):
    run = make_run(method="trajectory", sample_batch_size=2)
    lesson = make_lesson(run, expert, moved=0.05)
    clips = PhaseClips(run, expert, PROMPTS, 3)
    solve_missing(run, clips.requests())
    first, last, end = {"high": (1.0, 0.9375, 5 / 6), "low": (5 / 6, 0.625, 0.0)}[expert]
    x = clips.teacher.at(range(3), [first] * 3)
    condition = run.condition(PROMPTS)
    with torch.no_grad():
        start, now = sigma_batch(first, x), sigma_batch(last, x)
        velocity = lesson.denoiser.velocity(x, start, condition, role="student")
        x = euler_step(x, velocity, start, now)
        velocity = lesson.denoiser.velocity(x, now, condition, role="student")
    expected = x0_from_velocity(x, velocity, now)
    found = clips.student_x0(lesson.denoiser)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    before, after = (clips.teacher.at(range(3), [sigma] * 3) for sigma in (last, end))
    mean = (before - after) / (last - end)
    torch.testing.assert_close(clips.teacher_x0(), before - last * mean, rtol=1e-3, atol=1e-4)


def test_the_low_experts_clips_begin_with_the_distilled_high_experts_latents(make_run):
    run = make_run(method="trajectory")
    high = distil_high(run)
    clips = PhaseClips(run, "low", PROMPTS, 3)
    solve_missing(run, clips.requests())
    x = torch.stack([clips.teacher.noise(i) for i in range(3)])
    condition = run.condition(PROMPTS)
    for sigma, after in ((1.0, 0.9375), (0.9375, 5 / 6)):
        now = sigma_batch(sigma, x)
        with torch.no_grad():
            velocity = high.denoiser.velocity(x, now, condition, role="student")
        x = euler_step(x, velocity, now, sigma_batch(after, x))
    torch.testing.assert_close(clips.start.at(range(3), [5 / 6] * 3), x, rtol=1e-4, atol=1e-5)


def test_an_expert_without_a_step_shows_nothing(make_run):
    run = make_run(method="trajectory", sampling_steps=(1,))
    clips = PhaseClips(run, "low", PROMPTS, 3)
    assert not clips and clips.requests() == []
