"""Does a clip begin with the picture that it was given, and does it leave it?"""

from __future__ import annotations

from torch import Tensor


def distance_from(frames: Tensor, pictures: Tensor) -> Tensor:
    """Root mean square difference of each frame [N, F, H, W, 3] from its clip's picture
    [N, H, W, 3], both RGB in [0, 1]: [N, F].
    """
    return (frames - pictures[:, None]).square().flatten(2).mean(2).sqrt()


def first_frame_statistics(frames: Tensor, pictures: Tensor) -> dict[str, float]:
    """Means over clips [N, F, H, W, 3] whose pictures [N, H, W, 3] were given, RGB in [0, 1].

    Returns:
        first_frame: the first frame's distance from the picture: 0 for the picture itself.
        departure: that of the frames after it; nan for clips of one frame. Students that freeze on
            the picture have little.
    """
    distance = distance_from(frames, pictures)
    return dict(first_frame=float(distance[:, 0].mean()), departure=float(distance[:, 1:].mean()))
