"""Products of lower rank."""

from __future__ import annotations

import pytest
import torch

from wan_distill.lora.ranks import cut, extract


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_a_cut_is_the_nearest_product_and_says_its_error(rank: int) -> None:
    rng = torch.Generator().manual_seed(0)
    down, up = torch.randn(6, 20, generator=rng), torch.randn(12, 6, generator=rng)
    product = up @ down
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    for result in (cut(down, up, rank), extract(product, rank)):
        torch.testing.assert_close(result.up @ result.down, best, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.up.norm(), result.down.norm(), rtol=1e-4, atol=1e-4)
        error = float((product - best).norm() / product.norm())
        assert (result.lost / result.total) ** 0.5 == pytest.approx(error, abs=1e-5)
