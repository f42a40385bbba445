"""How far what is shown moves: dense optical flow, by OpenCV where that is installed."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from torch import Tensor

MEASURED = 256
"""Pixels of the shorter side on which flow is measured: more costs time and changes little."""
SCALE, LEVELS, WINDOW, ITERATIONS, NEIGHBOURS, SMOOTHING = 0.5, 3, 15, 3, 5, 1.2
"""Farneback's settings in OpenCV's own example: a pyramid, and how each pixel's motion is found."""


def is_available() -> bool:
    """Whether `pip install opencv-python-headless` was done."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        return False
    return True


def flow_magnitude(frames: Tensor) -> float:
    """Mean length of the motion between successive frames of a clip [F, H, W, 3] of RGB in [0, 1],
    in pixels of that clip; nan for a single frame.

    The motion of every pixel is estimated by polynomial expansion (Farneback, SCIA 2003). Unlike
    the difference of frames it does not grow with contrast: flicker is little flow, and a pale
    object that moves is much.
    """
    import cv2

    factor = min(1.0, MEASURED / min(frames.shape[1:3]))
    pictures = [
        cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        for picture in np.ascontiguousarray((frames.numpy() * 255).round(), np.uint8)
    ]
    grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in pictures]
    settings = (SCALE, LEVELS, WINDOW, ITERATIONS, NEIGHBOURS, SMOOTHING, 0)
    flows = [
        cv2.calcOpticalFlowFarneback(before, after, np.empty(0), *settings)
        for before, after in pairwise(grey)
    ]
    return float(np.linalg.norm(flows, axis=-1).mean()) / factor if flows else math.nan
