"""Consistency distillation: its loss where velocities are known, and on which inputs it learns."""

from __future__ import annotations

import math

import pytest
import torch
from lessons import make_lesson

from wan_distill.maths.randomness import generator
from wan_distill.maths.sigmas import expert_of
from wan_distill.methods.consistency import points_inside, pseudo_huber


def test_the_consistency_loss_vanishes_for_a_straight_flow(make_run):
    """Where every velocity is one constant, one step of the teacher and the student's jump from
    there end exactly at one point.
    """
    lesson = make_lesson(make_run(method="consistency"), "high")
    constant = torch.full((16, 2, 4, 4), 0.3)
    lesson.denoiser.velocity = lambda x, sigma, condition, *, role: constant.expand_as(x)
    for step in range(4):
        assert lesson.loss("student", lesson.batch(step), generator("c", step)) < 1e-6
    lesson.denoiser.velocity = lambda x, sigma, condition, *, role: (
        constant.expand_as(x) * (1.5 if role == "student" else 1)
    )
    assert lesson.loss("student", lesson.batch(0), generator("c")) > 1e-4


@pytest.mark.parametrize("expert", ["high", "low"])
def test_consistency_is_learned_where_the_sampler_will_be(make_run, expert):
    """Inputs lie on the chord of the teacher's path; where a student step begins, they are its
    stored latents to the bit. One student step per update.
    """
    lesson = make_lesson(make_run(method="consistency", solver_points=8), expert)
    samples = lesson.inputs.samples["trajectories"]
    inner, calls = lesson.denoiser.velocity, []

    def velocity(x, sigma, condition, *, role):
        calls.append((x, sigma))
        return inner(x, sigma, condition, role=role)

    lesson.denoiser.velocity = velocity
    begun = 0
    for step in range(12):
        calls.clear()
        batch = lesson.batch(step)
        points = batch.points
        lesson.loss("student", batch, generator("where", step))
        # The first call is the guided teacher's, with both prompts in one forward.
        x, sigma = (both.chunk(2)[0] for both in calls[0])
        for j in range(len(x)):
            along = (points[0] - float(sigma[j])) / (points[0] - points[-1])
            chord = batch.x_start[j] + along * (batch.x_end[j] - batch.x_start[j])
            torch.testing.assert_close(x[j], chord)
            if float(sigma[j]) == points[0]:
                assert torch.equal(x[j], batch.x_start[j])
                begun += 1
        rows = lesson.method.rows_at(step, step)["trajectories"]
        assert torch.equal(batch.x_start, samples.at(rows, [points[0]] * len(rows)))
        assert torch.equal(batch.x_end, samples.at(rows, [points[-1]] * len(rows)))
        assert torch.equal(batch.condition.prompt, samples.condition(rows).prompt)
    assert begun


def test_the_solvers_points_lie_inside_a_student_step_at_the_students_shift():
    """8 points at shift 5: 5u / (1 + 4u) for u = 1, 7/8, ...; those strictly between the ends."""
    inside = points_inside(5 / 6, 0.0, 8, 5.0)
    expected = [5 * u / (1 + 4 * u) for u in (4 / 8, 3 / 8, 2 / 8, 1 / 8, 0)]
    assert inside == pytest.approx(expected) and inside[0] == 5 / 6
    assert points_inside(1.0, 0.9, 8, 5.0) == pytest.approx([1, 35 / 36, 15 / 16, 0.9])


def test_the_pseudo_huber_distance_is_linear_far_off_and_square_nearby():
    far, near = torch.tensor([3.0, -4.0]), torch.tensor([1e-4, -1e-4])
    assert float(pseudo_huber(far, 1e-3)) == pytest.approx(3.5, rel=1e-3)
    assert float(pseudo_huber(near.double(), 1e-2)) == pytest.approx(1e-8 / 2e-2, rel=1e-3)
    both = float(pseudo_huber(torch.tensor([3.0]), 4.0))
    assert both == pytest.approx(math.sqrt(9 + 16) - 4)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_every_point_of_a_student_step_belongs_to_its_expert(make_run, expert):
    """All but the end, which may lie beyond the boundary; however many points the solver has."""
    lesson = make_lesson(make_run(method="consistency", solver_points=40), expert)
    ends = set()
    for step in range(12):
        points = lesson.batch(step).points
        assert len(points) > 2
        assert {expert_of(sigma, 0.875) for sigma in points[:-1]} == {expert}
        ends.add(expert_of(points[-1], 0.875))
    assert "low" in ends
