"""Does a clip of a tiny teacher show what its caption says? Measured without a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wan_distill.maths.tiny_world import COLOURS, DIRECTIONS, Scene, World


class Verdict(NamedTuple):
    """What `Judge` says of one clip."""

    obeys: bool
    steadiness: float


@dataclass(frozen=True)
class Judge:
    """Judges the clips of one world."""

    world: World

    def obeys(self, clip: Tensor, caption: str) -> bool:
        """True if the clip [3, F, H, W] in [-1, 1] shows the colours and direction of its caption,
        and nothing that it names vanishes at its end.
        """
        return self.verdict(clip, caption).obeys

    def steadiness(self, clip: Tensor, caption: str) -> float:
        """The smallest area of the moving shape in any frame / its median area, in [0, 1]; 0 where
        there is none. A shape that vanishes half way has 0.
        """
        return self.verdict(clip, caption).steadiness

    def verdict(self, clip: Tensor, caption: str) -> Verdict:
        """Both at once, of a clip that is looked at once."""
        scene = Scene.parse(caption)
        pixels, blob = self._blob(clip)
        if scene.still is None:
            obeys = (
                self._stays(blob)
                and _colour(pixels[:, blob]) == scene.colour
                and self._direction(_travel(blob)) == scene.direction
            )
            return Verdict(obeys, _steadiness(blob))
        mover, still = self._masks(pixels, blob, scene)
        return Verdict(self._passes(mover, still, scene), _steadiness(mover))

    def _passes(self, mover: Tensor, still: Tensor, scene: Scene) -> bool:
        """Whether one shape moves as `scene` says, past another that hardly does."""
        if not (self._stays(mover) and self._stays(still)):
            return False
        travel, drift = _travel(mover), _travel(still)
        return self._direction(travel) == scene.direction and bool(drift.norm() < travel.norm() / 2)

    def _stays(self, mask: Tensor) -> bool:
        """Whether something is to be seen in the first frame of [F, H, W] and in the last."""
        least = 20 * self.world.scale**2  # the smallest triangle covers 64 pixels at scale 1
        return bool(min(mask[0].sum(), mask[-1].sum()) >= least)

    def _direction(self, travel: Tensor) -> str | None:
        """Where that leads, in pixels; None where the shape hardly moves."""
        along = {
            name: (travel * torch.tensor(step)).sum().item() for name, step in DIRECTIONS.items()
        }
        direction = max(along, key=lambda name: along[name])
        # The slowest shape moves SPEED[0] a frame.
        least = 0.375 * self.world.scale * (self.world.frames - 1)
        return direction if along[direction] > least else None

    def _blob(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1], and where they differ from the background, the clip's median colour:
        [F, H, W].
        """
        pixels = (clip.float().clamp(-1, 1) + 1) / 2
        background = pixels.flatten(1).median(dim=1).values
        blob = (pixels - background[:, None, None, None]).square().sum(dim=0) > 0.25**2
        return pixels, blob

    def _masks(self, pixels: Tensor, blob: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
        """Where the moving and the still shape's colours are: [F, H, W] each."""
        assert scene.still is not None
        palette = torch.tensor(list(COLOURS.values()))[:, :, None, None, None]
        nearest = (pixels[None] - palette).square().sum(dim=1).argmin(dim=0)
        names = list(COLOURS)
        mover, still = (names.index(colour) for colour in (scene.colour, scene.still[0]))
        return blob & (nearest == mover), blob & (nearest == still)


def _steadiness(mask: Tensor) -> float:
    area = mask.float().sum(dim=(1, 2))
    return (area.min() / area.median()).item() if area.median() > 0 else 0.0


def _colour(pixels: Tensor) -> str:
    """The name of the colour that is nearest to the median of pixels [3, N]."""
    median = pixels.median(dim=1).values
    return min(COLOURS, key=lambda name: float((median - torch.tensor(COLOURS[name])).norm()))


def _travel(mask: Tensor) -> Tensor:
    """From the centre in the first frame of [F, H, W] to that in the last: (x, y), in pixels."""
    return _centre(mask[-1]) - _centre(mask[0])


def _centre(mask: Tensor) -> Tensor:
    """(x, y) in pixels of the centre of a mask [H, W]."""
    return mask.nonzero().float().mean(dim=0).flip(0) + 0.5
