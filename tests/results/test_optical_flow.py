"""Optical flow of clips whose motion is known, and its place in the table."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from wan_distill.results import paired
from wan_distill.results.optical_flow import flow_magnitude
from wan_distill.results.table import cells

pytest.importorskip("cv2", reason="opencv-python-headless is not installed: no column")


def texture(height: int, width: int) -> torch.Tensor:
    """A smooth random picture [H, W, 3]."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=rng)
    return (
        F.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 1).permute(1, 2, 0)
    )


@pytest.mark.parametrize(("height", "pixels"), [(96, 1), (96, 3), (512, 4)])
def test_a_picture_that_is_pushed_moves_by_as_many_pixels(height, pixels):
    whole = texture(height, 2 * height)
    clip = torch.stack([whole[:, i * pixels : i * pixels + height] for i in range(4)])
    assert flow_magnitude(clip) == pytest.approx(pixels, rel=0.15)


def test_what_stands_still_does_not_flow_however_strong_its_contrast():
    still = texture(64, 64).expand(3, -1, -1, -1)
    assert flow_magnitude(still) == pytest.approx(0, abs=0.01)
    assert math.isnan(flow_magnitude(still[:1]))


def test_the_table_has_the_column_only_where_it_was_measured(monkeypatch):
    clip = torch.stack([texture(64, 80)[:, i : i + 64] for i in range(3)])[None]
    assert paired._statistics(clip)["optical_flow"] == pytest.approx(1, rel=0.15)
    monkeypatch.setattr(paired, "is_available", lambda: False)
    assert "optical_flow" not in paired._statistics(clip)
    row = dict(sampler="student 4", motion=1.0)
    assert cells(dict(rows=[row | dict(optical_flow=0.97)]))[0] == ["sampler", "motion", "flow"]
    assert cells(dict(rows=[row]))[0] == ["sampler", "motion"]
