"""How far apart two sets of clips are, and what a set of clips is like, in numbers.

A set of latents is [N, C, F, H, W]; [N, D] is a set of vectors. Everything is on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REC_709 = (0.2126, 0.7152, 0.0722)  # weights of red, green and blue in luminance
SMALLEST_EIGENVALUE = 1e-12  # of a principal component; keeps a set of equal samples finite


# ------------------------------------------------------------------------- distances between sets


def score(student: Tensor, teacher: Tensor) -> float:
    """Energy distance of two sets of latents plus that of their frame differences.

    The energy distance of Szekely and Rizzo (2013) is 2 E|a - b| - E|a - a'| - E|b - b'|; here it
    is relative to the teacher's spread E|b - b'|. It is estimated without bias: 0 for two sets of
    one distribution on average, and sometimes below; lower is better. Pairs of equal index are left
    out of all three means: a_i and b_i may have the same prompt and noise, and the distance of a_i
    to itself is 0. Clips of one frame have no differences. Both sets have the same N >= 2.
    """
    return scores_without_each(student, teacher, prompts=0)[0]


def scores_without_each(student: Tensor, teacher: Tensor, prompts: int) -> list[float]:
    """The score of all samples, then those without prompt 0, 1, ...; sample i is of prompt i modulo
    `prompts`. At least two samples must be left without a prompt.
    """
    views = [_distances(student.flatten(1), teacher.flatten(1))]
    if student.shape[2] > 1:
        motion, teacher_motion = student.diff(dim=2), teacher.diff(dim=2)
        views.append(_distances(motion.flatten(1), teacher_motion.flatten(1)))
    # Nobody is left out first, then each prompt's samples.
    left_out = torch.zeros(1 + prompts, len(student), dtype=torch.float64)
    for prompt in range(prompts):
        left_out[1 + prompt, prompt::prompts] = 1
    scores: list[float] = torch.stack([_energies(v, left_out) for v in views]).sum(0).tolist()
    return scores


def jackknife_error(left_out: Sequence[float]) -> float:
    """The standard error of an estimate, from what it is without each part of the data in turn
    (Efron and Stein, The jackknife estimate of variance, 1981); 0 for less than two parts.
    """
    if len(left_out) < 2:
        return 0.0
    values = torch.tensor(left_out, dtype=torch.float64)
    return math.sqrt((len(left_out) - 1) * float(values.var(correction=0)))


def _distances(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances [N, N] between `a` and `b`, within `a` and within `b`."""
    a, b = a.double(), b.double()
    return torch.cdist(a, b), torch.cdist(a, a), torch.cdist(b, b)


def _energies(distances: tuple[Tensor, Tensor, Tensor], left_out: Tensor) -> Tensor:
    """The energy distances [K] without the samples that are 1 in each row of `left_out` [K, N]; see
    `score`.
    """
    between, within_a, within_b = (_means_without(d, left_out) for d in distances)
    return (2 * between - within_a - within_b) / within_b


def _means_without(distances: Tensor, left_out: Tensor) -> Tensor:
    """The mean [K] of `distances` [N, N] of pairs i != j, without the rows and columns of the
    samples that are 1 in each row of `left_out` [K, N].
    """
    distances = distances.clone().fill_diagonal_(0)
    # What is in both its rows and its columns was taken away twice.
    twice = (left_out @ distances * left_out).sum(1)
    total = distances.sum() - left_out @ (distances.sum(0) + distances.sum(1)) + twice
    kept = distances.shape[0] - left_out.sum(1)
    return total / (kept * (kept - 1))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets [N, D] (arXiv 1706.08500, eq. 6).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), where A and B are the covariances
    (divided by N - 1). In squared units of the vectors. nan where a set has fewer than two vectors.
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    covariance_a = torch.atleast_2d(torch.cov(a.T))  # cov of D = 1 has no dimensions
    covariance_b = torch.atleast_2d(torch.cov(b.T))
    root = _matrix_root(covariance_a)
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    return float(
        (a.mean(0) - b.mean(0)).square().sum()
        + covariance_a.trace()
        + covariance_b.trace()
        - 2 * cross
    )


def _matrix_root(symmetric: Tensor) -> Tensor:
    """The positive square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


# ----------------------------------------------------------------------------- principal components


@dataclass(frozen=True)
class PrincipalComponents:
    """An orthogonal projection onto the directions in which a set varies most."""

    mean: Tensor
    """[D], of the set."""
    directions: Tensor
    """[D, K], orthonormal columns; the variance along them increases with their index."""

    def __call__(self, samples: Tensor) -> Tensor:
        """Coordinates of `samples` [N, ...] from the mean, along each direction: [N, K] float64."""
        return (samples.flatten(1).double() - self.mean) @ self.directions


def principal_components(samples: Tensor, count: int) -> PrincipalComponents:
    """The `count` leading principal components of `samples` [N, ...], at most N - 1 of them."""
    flat = samples.flatten(1).double()
    mean = flat.mean(0)
    centred = flat - mean
    count = min(count, len(flat) - 1)
    # The Gram matrix is N x N; the covariance would be D x D, and D is far larger than N here.
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    scale = values[-count:].clamp_min(SMALLEST_EIGENVALUE).sqrt()
    return PrincipalComponents(mean, (centred.T @ vectors[:, -count:]) / scale)


# ------------------------------------------------------------------------ statistics of one set


def diversity(latents: Tensor, prompts: int) -> float:
    """Mean distance between two samples of one prompt, over all such pairs of all prompts.

    A distance is the root mean square of the difference of all latent values. Sample i belongs to
    prompt i % prompts. nan where no prompt has two samples.
    """
    distances = []
    for prompt in range(prompts):
        group = latents[prompt::prompts].flatten(1)
        if len(group) > 1:
            distances.append(torch.pdist(group) / group.shape[1] ** 0.5)
    return float(torch.cat(distances).mean()) if distances else float("nan")


def picture_statistics(frames: Tensor) -> dict[str, float]:
    """Means over clips [N, F, H, W, 3] of RGB in [0, 1].

    Returns:
        motion: absolute difference of successive frames; nan for clips of one frame.
        luminance: Rec. 709, in [0, 1].
        saturation: largest minus smallest of red, green and blue, in [0, 1].
    """
    motion = frames.diff(dim=1).abs().mean()  # the mean of no difference is nan
    luminance = frames @ torch.tensor(REC_709)
    saturation = frames.amax(-1) - frames.amin(-1)
    return dict(
        motion=float(motion), luminance=float(luminance.mean()), saturation=float(saturation.mean())
    )


def sharpness(frames: Tensor) -> float:
    """Mean absolute Laplacian of the luminance of clips [N, F, H, W, 3] of RGB in [0, 1]: how much
    neighbouring pixels differ, in units of luminance.
    """
    luminance = frames @ torch.tensor(REC_709)
    centre = luminance[..., 1:-1, 1:-1]
    beside = luminance[..., 1:-1, :-2] + luminance[..., 1:-1, 2:]
    above = luminance[..., :-2, 1:-1] + luminance[..., 2:, 1:-1]
    return float((beside + above - 4 * centre).abs().mean())


def relative(student: dict[str, float], teacher: dict[str, float]) -> dict[str, float]:
    """What the student's statistics are, compared with the teacher's.

    Ratios student / teacher, each left out where the teacher's is 0 or nan; for luminance the
    difference, since its zero is arbitrary.

    Args:
        student: statistics of a set by name, luminance among them.
        teacher: the same.
    """
    ratios = {
        name: student[name] / teacher[name]
        for name in student
        if name != "luminance" and teacher[name] > 0  # False for nan
    }
    return ratios | dict(luminance=student["luminance"] - teacher["luminance"])
