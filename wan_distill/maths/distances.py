"""How far two sets of clips are apart, and what a clip looks like in numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def relative(student: dict[str, float], teacher: dict[str, float]) -> dict[str, float]:
    """Student / teacher of each statistic, but the difference of luminance; a single frame has no
    motion.
    """
    ratios = {
        name: student[name] / teacher[name]
        for name in ("motion", "saturation", "diversity")
        if teacher[name] > 0
    }  # false for nan as well
    return ratios | dict(luminance=student["luminance"] - teacher["luminance"])


def score(student: Tensor, teacher: Tensor) -> float:
    """How far two sets of clips are apart, content plus motion; 0 = alike, lower is better."""
    sides = [(student, teacher)]
    if student.shape[2] > 1:
        sides.append((student.diff(dim=2), teacher.diff(dim=2)))
    return sum(energy_distance(a.flatten(1), b.flatten(1)) for a, b in sides)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """(2 E|a - b| - E|a - a'| - E|b - b'|) / E|b - b'| of sets [N, D] (Szekely and Rizzo, 2013),
    unbiased.

    a_i and b_i may share noise and prompt: such pairs are left out, as each sample's distance to
    itself is.
    """
    others = ~torch.eye(len(a), dtype=torch.bool)
    between, within_a, within_b = (
        torch.cdist(x.double(), y.double())[others].mean() for x, y in ((a, b), (a, a), (b, b))
    )
    return float((2 * between - within_a - within_b) / within_b)


def principal_components(latents: Tensor, count: int):
    """A projection onto the leading `count` principal components of `latents` [N, ...]; returns [n,
    count] float64.
    """
    flat = latents.flatten(1).double()
    mean = flat.mean(0)
    centred = flat - mean
    count = min(count, len(flat) - 1)
    values, vectors = torch.linalg.eigh(
        centred @ centred.T
    )  # N x N: samples are fewer than latent values
    directions = (centred.T @ vectors[:, -count:]) / values[-count:].clamp_min(1e-12).sqrt()
    return lambda x: (x.flatten(1).double() - mean) @ directions


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of two sets [N, D] (arXiv 1706.08500, eq.
    6).
    """
    covariance_a, covariance_b = torch.cov(a.T), torch.cov(b.T)
    root = _matrix_root(covariance_a)
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    return float(
        (a.mean(0) - b.mean(0)).square().sum()
        + covariance_a.trace()
        + covariance_b.trace()
        - 2 * cross
    )


def _matrix_root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def diversity(latents: Tensor, prompts: int) -> float:
    """Mean distance (root mean square) between samples of one prompt; sample i follows prompt i %
    prompts.
    """
    distances = []
    for prompt in range(prompts):
        group = latents[prompt::prompts].flatten(1)
        if len(group) > 1:
            distances.append(torch.pdist(group) / group.shape[1] ** 0.5)
    return float(torch.cat(distances).mean()) if distances else float("nan")


def picture_statistics(frames: Tensor) -> dict[str, float]:
    """Motion (mean absolute frame difference), luminance and saturation of clips [N, F, H, W, 3] in
    [0, 1].
    """
    motion = (
        (frames[:, 1:] - frames[:, :-1]).abs().mean()
        if frames.shape[1] > 1
        else torch.tensor(float("nan"))
    )
    luminance = frames @ torch.tensor([0.2126, 0.7152, 0.0722])  # Rec. 709
    saturation = frames.amax(-1) - frames.amin(-1)
    return dict(
        motion=float(motion), luminance=float(luminance.mean()), saturation=float(saturation.mean())
    )
