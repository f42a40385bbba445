"""Distances and statistics against values worked out by hand or by another formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from wan_distill.maths.distances import (
    diversity,
    frechet_distance,
    jackknife_error,
    picture_statistics,
    principal_components,
    relative,
    score,
    scores_without_each,
)


def set_with(covariance: Tensor, mean: Tensor) -> Tensor:
    """Vectors [2 D, D] that have exactly this sample covariance [D, D] and mean [D]."""
    size = len(mean)
    scale = ((2 * size - 1) / 2) ** 0.5  # of points on the axes: their covariance is the identity
    axes = scale * torch.eye(size, dtype=torch.float64)
    return torch.cat([axes, -axes]) @ torch.linalg.cholesky(covariance).T + mean


def random_set(count: int, size: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=rng, dtype=torch.float64)
    return torch.randn(count, size, generator=rng, dtype=torch.float64) @ mix


# ----------------------------------------------------------------------------------------- Fréchet


def test_frechet_of_a_set_and_itself_is_zero():
    a = random_set(40, 5, seed=0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-9)  # order does not matter


def test_frechet_of_a_shifted_set_is_the_shift_squared():
    a = random_set(40, 3, seed=0)
    shift = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    assert frechet_distance(a, a + shift) == pytest.approx(5.25)


def test_frechet_of_a_scaled_set_is_the_scaled_trace():
    """A and s^2 A commute: tr(A + s^2 A - 2 s A) = (s - 1)^2 tr A."""
    a = random_set(40, 3, seed=0)
    a = a - a.mean(0)
    trace = float(a.square().sum() / 39)
    assert frechet_distance(a, 3 * a) == pytest.approx(4 * trace)


def test_frechet_of_covariances_that_do_not_commute():
    """In 2D, tr M^1/2 = sqrt(tr M + 2 sqrt(det M)); M = A^1/2 B A^1/2 is [[8, 2], [2, 2]]."""
    a = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    assert not torch.equal(a @ b, b @ a)
    origin = torch.zeros(2, dtype=torch.float64)
    mean = torch.tensor([3.0, 4.0], dtype=torch.float64)
    expected = 25 + 5 + 4 - 2 * math.sqrt(10 + 2 * math.sqrt(12))
    assert frechet_distance(set_with(a, origin), set_with(b, mean)) == pytest.approx(expected)
    assert frechet_distance(set_with(b, mean), set_with(a, origin)) == pytest.approx(expected)


def test_frechet_agrees_with_the_eigenvalues_of_the_product():
    """Another route to the cross term: the eigenvalues of A B are those of A^1/2 B A^1/2."""
    a, b = random_set(60, 6, seed=1).numpy(), random_set(30, 6, seed=2).numpy() + 0.3
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(covariance_a @ covariance_b).real).sum()
    means = np.square(a.mean(0) - b.mean(0)).sum()
    expected = means + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    found = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_of_single_values_and_of_too_few():
    a = torch.tensor([[0.0], [2.0]], dtype=torch.float64)  # mean 1, variance 2
    b = torch.tensor([[1.0], [9.0]], dtype=torch.float64)  # mean 5, variance 32
    assert frechet_distance(a, b) == pytest.approx(16 + (math.sqrt(32) - math.sqrt(2)) ** 2)
    pair = random_set(2, 3, seed=0)
    assert math.isnan(frechet_distance(pair[:1], pair))
    assert math.isnan(frechet_distance(pair, pair[:1]))


# ----------------------------------------------------------------------------- principal components


def test_the_components_of_a_set_on_one_axis():
    """Coordinates are distances from the mean along that axis; the sign of an axis is arbitrary."""
    axis = torch.tensor([2.0, 0.0, -1.0, 2.0]).view(2, 1, 2) / 3
    centre = torch.tensor([5.0, 5.0, 1.0, 0.0]).view(2, 1, 2)
    places = torch.tensor([-4.0, 0.0, 1.0, 7.0])  # mean 1
    components = principal_components(centre + places.view(-1, 1, 1, 1) * axis, 1)
    assert components.mean.tolist() == pytest.approx((centre + axis).flatten().tolist())
    sign = float(components.directions[:, 0] @ axis.flatten().double())
    assert abs(sign) == pytest.approx(1)
    elsewhere = (centre + 11 * axis)[None]
    assert sign * float(components(elsewhere)) == pytest.approx(10)
    across = torch.tensor([1.0, 0.0, 2.0, 0.0]).view(2, 1, 2)  # at a right angle to the axis
    assert sign * float(components(elsewhere + across)) == pytest.approx(10)


def test_the_leading_components_are_those_of_the_largest_variance():
    samples = torch.zeros(6, 5)
    for axis, spread in ((3, 4.0), (0, 2.0), (4, 1.0)):
        row = [3, 0, 4].index(axis)
        samples[2 * row, axis], samples[2 * row + 1, axis] = spread, -spread
    directions = principal_components(samples, 2).directions
    assert directions.abs().argmax(0).tolist() == [0, 3]  # in order of growing variance
    identity = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(directions.T @ directions, identity)


def test_as_many_components_as_samples_allow_keep_all_distances():
    samples = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    projected = principal_components(samples, 64)(samples)
    assert projected.shape == (5, 4) and projected.dtype == torch.float64
    torch.testing.assert_close(torch.pdist(projected), torch.pdist(samples.flatten(1).double()))


def test_the_components_of_equal_samples_are_finite():
    samples = torch.ones(3, 4)
    assert torch.equal(principal_components(samples, 2)(samples), torch.zeros(3, 2).double())


# ------------------------------------------------------------------------ energy distance and score


def test_the_energy_distance_of_two_points_each():
    a = torch.tensor([[0.0, 0.0], [3.0, 4.0]])  # 5 apart
    b = torch.tensor([[15.0, 9.0], [15.0, 20.0]])  # 11 apart; a_0 to b_1 is 25, a_1 to b_0 is 13
    a, b = a.view(2, 2, 1, 1, 1), b.view(2, 2, 1, 1, 1)
    assert score(a, b) == pytest.approx((2 * 19 - 5 - 11) / 11)
    assert score(b, a) == pytest.approx((2 * 19 - 5 - 11) / 5)


def test_the_energy_distance_leaves_out_pairs_of_equal_index():
    """a_0 = b_0, as with shared noise: counting that pair would make the sets look nearer."""
    a, b = (torch.tensor([0.0, far]).view(2, 1, 1, 1, 1) for far in (3.0, 4.0))
    assert score(a, b) == pytest.approx((2 * 3.5 - 3 - 4) / 4)


def test_the_score_is_content_plus_motion():
    a = torch.tensor([[0.0, 0.0], [9.0, 12.0]]).view(2, 1, 2, 1, 1)
    b = torch.tensor([[9.0, 15.0], [8.0, 15.0]]).view(2, 1, 2, 1, 1)
    content = (2 * (17 + 3) / 2 - 15 - 1) / 1
    motion = (2 * (7 + 3) / 2 - 3 - 1) / 1  # of the differences 0 and 3 with 6 and 7
    assert score(a, b) == pytest.approx(content + motion)
    first = (2 * (8 + 0) / 2 - 9 - 1) / 1
    assert score(a[:, :, :1], b[:, :, :1]) == pytest.approx(first)  # a single frame: content alone


# ------------------------------------------------------------------------------------------ one set


def test_diversity_is_between_samples_of_one_prompt():
    """Sample i follows prompt i % 2; the two prompts are 100 apart, which must not count."""
    latents = torch.tensor([[0.0, 0.0], [100.0, 0.0], [3.0, 4.0], [100.0, 2.0]])
    shaped = latents.view(4, 1, 1, 1, 2)
    assert diversity(shaped, 2) == pytest.approx((5 + 2) / 2 / math.sqrt(2))
    assert diversity(shaped, 4) != diversity(shaped, 4)  # nan: one sample per prompt


def test_diversity_counts_all_pairs_alike():
    latents = torch.tensor([[0.0], [50.0], [1.0], [57.0], [3.0]]).view(5, 1, 1, 1, 1)
    assert diversity(latents, 2) == pytest.approx((1 + 3 + 2 + 7) / 4)
    assert diversity(latents[:4], 3) == pytest.approx(57)  # only prompt 0 has a pair


def test_motion_is_the_mean_difference_of_successive_frames_of_a_clip():
    frames = torch.zeros(2, 3, 1, 2, 3)
    frames[0, 1], frames[0, 2] = 0.5, 0.25  # up by 0.5, down by 0.25
    frames[1] = 1.0  # still
    assert picture_statistics(frames)["motion"] == pytest.approx((0.5 + 0.25 + 0 + 0) / 4)
    single = picture_statistics(frames[:, 1:2])
    assert math.isnan(single["motion"]) and single["luminance"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    "colour, luminance, saturation",
    [
        ((1.0, 0.0, 0.0), 0.2126, 1.0),
        ((0.0, 1.0, 0.0), 0.7152, 1.0),
        ((0.0, 0.0, 1.0), 0.0722, 1.0),
        ((0.4, 0.4, 0.4), 0.4, 0.0),
        ((0.9, 0.5, 0.2), 0.9 * 0.2126 + 0.5 * 0.7152 + 0.2 * 0.0722, 0.7),
    ],
)
def test_luminance_is_rec_709_and_saturation_the_range_of_the_channels(
    colour, luminance, saturation
):
    frames = torch.tensor(colour).expand(1, 2, 2, 2, 3)
    found = picture_statistics(frames)
    assert found["luminance"] == pytest.approx(luminance)
    assert found["saturation"] == pytest.approx(saturation) and found["motion"] == 0


def test_statistics_are_means_over_all_pixels():
    frames = torch.zeros(1, 1, 1, 4, 3)
    frames[..., 0, 1] = 1.0  # one green pixel of four
    found = picture_statistics(frames)
    assert found["luminance"] == pytest.approx(0.7152 / 4) and found["saturation"] == 0.25


def test_relative_statistics_are_ratios_and_for_luminance_a_difference():
    teacher = dict(motion=0.2, saturation=0.5, diversity=2.0, luminance=0.4)
    student = dict(motion=0.1, saturation=0.6, diversity=3.0, luminance=0.3)
    expected = dict(motion=0.5, saturation=1.2, diversity=1.5, luminance=-0.1)
    assert relative(student, teacher) == pytest.approx(expected)
    still = teacher | dict(motion=0.0, diversity=float("nan"))
    assert relative(student, still) == pytest.approx(dict(saturation=1.2, luminance=-0.1))


# ------------------------------------------------------------- is a difference of scores real?


def test_scores_without_a_prompt_are_those_of_the_other_samples():
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 2, 3, 2, 2, generator=rng) for _ in range(2))
    scores = scores_without_each(student, teacher, prompts=3)
    assert scores[0] == pytest.approx(score(student, teacher), rel=1e-12)
    for prompt, value in enumerate(scores[1:]):
        kept = [i for i in range(6) if i % 3 != prompt]
        assert value == pytest.approx(score(student[kept], teacher[kept]), rel=1e-12)
    assert len(scores) == 4


def test_the_standard_error_is_what_scores_of_new_prompts_vary_by():
    """Of the difference of two students, over many draws of prompts; those of one draw share their
    teacher's samples.
    """
    rng = torch.Generator().manual_seed(1)
    differences, errors = [], []
    for _ in range(200):
        teacher = torch.randn(24, 1, 1, 2, 2, generator=rng)
        near, far = (
            teacher + size * torch.randn(24, 1, 1, 2, 2, generator=rng) for size in (0.5, 0.7)
        )
        a, b = (scores_without_each(clips, teacher, prompts=12) for clips in (near, far))
        differences.append(a[0] - b[0])
        errors.append(jackknife_error([x - y for x, y in zip(a[1:], b[1:], strict=True)]))
    spread = torch.tensor(differences).std()
    assert torch.tensor(errors).mean() == pytest.approx(float(spread), rel=0.25)
    assert jackknife_error([1.0]) == 0
