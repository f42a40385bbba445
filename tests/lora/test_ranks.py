"""Products of lower rank."""

from __future__ import annotations

import pytest
import torch

from wan_distill.lora.ranks import cut, cut_matrix


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_a_cut_is_the_nearest_product_and_says_its_error(rank: int) -> None:
    rng = torch.Generator().manual_seed(0)
    down, up = torch.randn(6, 20, generator=rng), torch.randn(12, 6, generator=rng)
    product = up @ down
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    for result in (cut(down, up, rank), cut_matrix(product, rank)):
        torch.testing.assert_close(result.up @ result.down, best, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.up.norm(), result.down.norm(), rtol=1e-4, atol=1e-4)
        error = float((product - best).norm() / product.norm())
        assert (result.lost / result.total) ** 0.5 == pytest.approx(error, abs=1e-5)


def test_a_large_matrix_is_cut_nearly_as_well_and_the_same_each_time() -> None:
    rng = torch.Generator().manual_seed(0)
    decay = torch.diag(0.8 ** torch.arange(80.0))
    matrix = torch.randn(150, 80, generator=rng) @ decay @ torch.randn(80, 140, generator=rng)
    result = cut_matrix(matrix, 8)
    error = float((result.up @ result.down - matrix).norm() / matrix.norm())
    assert (result.lost / result.total) ** 0.5 == pytest.approx(error, rel=1e-3)
    values = torch.linalg.svdvals(matrix)
    best = float(values[8:].norm() / values.norm())
    assert (1 - 1e-5) * best <= error < 1.01 * best  # the optimum itself, but for rounding
    assert torch.equal(cut_matrix(matrix, 8).up, result.up)
