"""Clips next to each other in one video, each below its name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy
from PIL import Image, ImageDraw, ImageFont

LEAST_WIDTH = 320  # pixels of one side: smaller clips are enlarged by whole numbers
LARGEST_TEXT = 28  # pixels
LIGHT = 0.95  # of the names, on black


def side_by_side(clips: Mapping[str, numpy.ndarray]) -> numpy.ndarray:
    """One clip [F, h, w, 3] of several, from left to right, with a gap between them.

    Args:
        clips: name -> frames [F, H, W, 3] in [0, 1], all of one size.
    """
    length, height, width, _ = next(iter(clips.values())).shape
    scale = -(-LEAST_WIDTH // width)
    text = min(LARGEST_TEXT, scale * width // 20)
    band, gap = 2 * text, 2 * max(2, scale * width // 80)
    size = (length, band + scale * height, len(clips) * (scale * width + gap) - gap, 3)
    frames = numpy.zeros((size[0], size[1] + size[1] % 2, size[2] + size[2] % 2, 3), "float32")
    for place, (name, clip) in enumerate(clips.items()):
        left = place * (scale * width + gap)
        side = frames[:, :, left : left + scale * width]
        side[:, :band] = _named(name, scale * width, band, text)
        enlarged = clip.repeat(scale, axis=1).repeat(scale, axis=2)
        side[:, band : band + scale * height] = enlarged
    return frames


def _named(name: str, width: int, height: int, text: int) -> numpy.ndarray:
    """A band [height, width, 3] with `name` in its middle."""
    font = ImageFont.load_default(text)
    band = Image.new("L", (width, height))
    place = ((width - font.getlength(name)) / 2, height / 2)
    ImageDraw.Draw(band).text(place, name, font=font, anchor="lm", fill=round(255 * LIGHT))
    return numpy.repeat(numpy.asarray(band)[:, :, None] / 255, 3, axis=2)
