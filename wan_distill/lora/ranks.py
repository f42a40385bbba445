"""One LoRA product in another rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Cut(NamedTuple):
    """A product of lower rank, and what was lost.

    Attributes:
        down, up: [rank, in] and [out, rank], float32; equally large.
        lost, total: squared Frobenius norms of what was cut off, and of the whole product.
    """

    down: Tensor
    up: Tensor
    lost: float
    total: float


def cut(down: Tensor, up: Tensor, rank: int) -> Cut:
    """The product `up @ down` [out, in] of at most `rank`: the best there is (Eckart-Young).

    The product itself is never formed: its singular values are those of a [r, r] matrix.
    """
    q_up, r_up = torch.linalg.qr(up.float())
    q_down, r_down = torch.linalg.qr(down.float().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    root = values[:rank].sqrt()
    squares = values.double().square()
    return Cut(
        down=root[:, None] * (right[:rank] @ q_down.T),
        up=(q_up @ left[:, :rank]) * root,
        lost=float(squares[rank:].sum()),
        total=float(squares.sum()),
    )


def cut_matrix(matrix: Tensor, rank: int) -> Cut:
    """A matrix [out, in] as a product of at most `rank`.

    Exact where it is small. Otherwise its first singular values are found by a randomised search
    (arXiv 0909.4061) from a fixed seed, which is within a few thousandths of the best and a
    hundred times faster; what is said to be lost is what is lost.
    """
    matrix = matrix.float()
    searched = 2 * rank + 16
    if min(matrix.shape) <= 2 * searched:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, columns = torch.svd_lowrank(matrix, q=searched, niter=4)
        right = columns.T
    root = values[:rank].sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root
    lost = (matrix - up @ down).double().square().sum()
    return Cut(down, up, float(lost), float(matrix.double().square().sum()))
