"""Grids of noise levels and their experts: known values, and what holds for any grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_distill.maths.flow import shift_sigmas
from wan_distill.maths.sigmas import (
    expert_of,
    expert_sigmas,
    handover,
    insert_sigmas,
    score_range,
    shift_sigma,
    sigma_grid,
    steps_of,
    unshift_sigma,
)

BOUNDARY = 0.875

quick = settings(max_examples=60, deadline=None)
steps = st.integers(1, 16)
shifts = st.floats(0.3, 20)


# -------------------------------------------------------------------------------------------- grids


def test_the_shift_has_its_published_values_and_keeps_both_ends():
    assert shift_sigma(0.75, 5.0) == pytest.approx(0.9375)  # 5 * 0.75 / (1 + 4 * 0.75)
    assert unshift_sigma(0.9375, 5.0) == pytest.approx(0.75)
    for shift in (0.3, 1.0, 3.0, 12.7):
        assert shift_sigma(0.0, shift) == 0.0 and shift_sigma(1.0, shift) == 1.0


@quick
@given(st.floats(0, 1), shifts)
def test_the_two_forms_of_the_shift_agree_and_have_one_inverse(u, shift):
    sigma = shift_sigma(u, shift)
    assert float(shift_sigmas(torch.tensor(u, dtype=torch.float64), shift)) == pytest.approx(sigma)
    assert unshift_sigma(sigma, shift) == pytest.approx(u, abs=1e-12)


@quick
@given(steps, shifts)
def test_a_grid_descends_from_1_to_0_and_is_what_the_stock_scheduler_gives(count, shift):
    sigmas = sigma_grid(count, shift)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and all(a > b for a, b in itertools.pairwise(sigmas))
    scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(count)
    assert scheduler.sigmas.tolist() == pytest.approx(sigmas, abs=2e-7)
    finer = sigma_grid(2 * count, shift)  # nested: each is also a point of twice as many steps
    assert [finer[2 * i] for i in range(count + 1)] == pytest.approx(sigmas, rel=1e-12, abs=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_the_exported_scheduler_gives_our_sigmas(steps):
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(steps)
    assert scheduler.sigmas.tolist() == pytest.approx(sigma_grid(steps, 5.0), abs=1e-15)


@pytest.mark.parametrize(
    "sigmas, grid, merged",
    [
        ((1.0, 0.75, 0.0), (1.0, 0.8, 0.6, 0.4, 0.0), (1.0, 0.75, 0.6, 0.4, 0.0)),
        ((0.55, 0.45), (1.0, 0.5, 0.0), (1.0, 0.55, 0.45, 0.0)),  # no point is left: added
        ((0.5, 0.45), (1.0, 0.5, 0.0), (1.0, 0.5, 0.45, 0.0)),  # a shared point is not replaced
        ((0.99,), (1.0, 0.5, 0.0), (1.0, 0.99, 0.0)),  # nor are the ends
    ],
)
def test_inserted_sigmas_replace_the_nearest_points(sigmas, grid, merged):
    assert insert_sigmas(sigmas, grid) == merged


def test_student_sigmas_become_solver_points_at_no_extra_cost():
    teacher, student = sigma_grid(40, 12.0), sigma_grid(4, 5.0)
    merged = insert_sigmas(student, teacher)
    assert len(merged) == len(teacher) and set(student) <= set(merged)
    assert sorted(merged, reverse=True) == list(merged)


@quick
@given(steps, shifts, st.integers(2, 60), shifts)
def test_the_teachers_grid_takes_up_the_students_sigmas(count, shift, teacher_steps, teacher_shift):
    sigmas, grid = sigma_grid(count, shift), sigma_grid(teacher_steps, teacher_shift)
    merged = insert_sigmas(sigmas, grid)
    assert set(sigmas) <= set(merged) and list(merged) == sorted(set(merged), reverse=True)
    assert len(grid) <= len(merged) <= max(len(grid), len(set(grid) | set(sigmas)))


# ------------------------------------------------------------------------------------------ experts


def test_the_boundary_itself_is_the_high_experts():
    assert expert_of(BOUNDARY, BOUNDARY) == "high"
    assert expert_of(BOUNDARY - 1e-9, BOUNDARY) == "low"
    assert expert_of(0.0, None) == "high"  # a teacher with one expert


def test_the_default_grid_and_its_handover():
    sigmas = sigma_grid(4, 5.0)
    assert sigmas == pytest.approx((1, 0.9375, 5 / 6, 0.625, 0))
    assert steps_of("high", sigmas, BOUNDARY) == [0, 1]
    assert steps_of("low", sigmas, BOUNDARY) == [2, 3]
    assert expert_sigmas(sigmas, "high", BOUNDARY) == sigmas[:3]
    assert expert_sigmas(sigmas, "low", BOUNDARY) == sigmas[2:]
    for even in (2, 4, 6, 8):
        assert handover(sigma_grid(even, 5.0), BOUNDARY) == pytest.approx(5 / 6)


def test_an_expert_without_steps_has_no_sigmas():
    assert expert_sigmas((1.0, 0.0), "low", BOUNDARY) == ()
    assert handover((1.0, 0.0), BOUNDARY) == 0
    grid = sigma_grid(4, 5.0)
    assert expert_sigmas(grid, "high", None) == grid and expert_sigmas(grid, "low", None) == ()


@quick
@given(steps, shifts, st.floats(0.05, 0.95))
def test_each_step_has_one_expert_and_the_high_one_comes_first(count, shift, boundary):
    sigmas = sigma_grid(count, shift)
    high, low = steps_of("high", sigmas, boundary), steps_of("low", sigmas, boundary)
    assert high + low == list(range(count)) and 0 in high
    assert handover(sigmas, boundary) == (sigmas[low[0]] if low else 0)
    assert all(
        (expert_of(sigmas[i], boundary) == "high") == (sigmas[i] * 1000 >= boundary * 1000)
        for i in range(count)
    )
    first, second = (expert_sigmas(sigmas, expert, boundary) for expert in ("high", "low"))
    assert first + second[1:] == sigmas and (not second or first[-1] == second[0])


def test_scores_stay_in_the_range_of_their_teacher():
    assert score_range("high", 0.875, 5 / 6, 0.98) == (0.875, 0.98)
    assert score_range("high", 0.875, 0.0, 0.98) == (0.875, 0.98)  # a single step
    low, high = score_range("low", 0.875, 0.0, 0.98)
    assert low == 0.02 and 0.87 < high < 0.875
    assert score_range("low", 0.875, 0.0, 0.5) == (0.02, 0.5)
    assert score_range("high", None, 0.0, 0.98) == (0.02, 0.98)
    # The target's noise is unbounded at the end of the phase.
    assert score_range("high", 0.875, 0.87, 0.98)[0] == pytest.approx(0.89)
