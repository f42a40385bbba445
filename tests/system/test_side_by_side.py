"""Clips next to each other: names above, a gap between, enlarged where they are small."""

from __future__ import annotations

import numpy
import pytest

from wan_distill.system.side_by_side import side_by_side


@pytest.mark.parametrize(("width", "scale"), [(64, 5), (100, 4), (320, 1), (832, 1)])
def test_each_clip_stands_below_its_name_and_apart_from_the_next(width: int, scale: int) -> None:
    rng = numpy.random.default_rng(0)
    clips = {name: rng.uniform(0.1, 1, (3, 33, width, 3)) for name in ("teacher", "student")}
    frames = side_by_side(clips)
    assert frames.shape[1] % 2 == frames.shape[2] % 2 == 0  # what videos need
    wide = scale * width
    band = next(y for y in range(99) if (frames[0, y, :wide] > 0.05).all())
    shown = frames[:, band : band + 33 * scale]
    gap = frames.shape[2] - 2 * wide
    assert gap >= 4 and not shown[:, :, wide : wide + gap].any()
    for clip, left in zip(clips.values(), (0, wide + gap), strict=True):
        own = shown[:, ::scale, left : left + wide : scale]
        numpy.testing.assert_allclose(own, clip, rtol=0, atol=1e-6)
        numpy.testing.assert_array_equal(
            shown[:, scale - 1 :: scale, left : left + wide : scale], own
        )
        name = frames[0, :band, left : left + wide]
        assert name.max() > 0.9 and not name[:, : wide // 20].any()  # whole, in the middle


def test_every_name_is_drawn() -> None:
    black = numpy.zeros((1, 8, 320, 3))
    frames = side_by_side({"teacher: 80 evaluations": black, "student: 4 evaluations": black})
    left, right = frames[0, :32, :320], frames[0, :32, 328:]
    assert left.any() and right.any() and (left != right).any()
