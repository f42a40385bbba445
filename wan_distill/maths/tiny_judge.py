"""Does a clip of a tiny teacher show what its caption says? Measured without a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wan_distill.maths.tiny_world import COLOURS, DIRECTIONS, Scene, World


class Observation(NamedTuple):
    """What a clip shows, measured without a network."""

    colour: str | None  # None: too small an area differs from the background
    direction: str | None  # None as well where the shape hardly moves
    start: tuple[float, float]  # centre in the first frame, pixels
    travel: tuple[float, float]  # first to last frame, pixels
    area: float  # pixels, mean over frames
    shade: float  # grey level of the background, in [0, 1]


@dataclass(frozen=True)
class Judge:
    """Judges the clips of one world."""

    world: World

    def observe(self, clip: Tensor) -> Observation:
        """Finds the shape of one clip [3, F, H, W] in [-1, 1], and where it moves.

        The shape is what differs from the background, the median colour of the clip.
        """
        pixels, blob, shade = self._blob(clip)
        area = blob.float().sum(dim=(1, 2))
        if min(area[0], area[-1]) < self._least_area:
            return Observation(None, None, (0.0, 0.0), (0.0, 0.0), area.mean().item(), shade)
        shape_colour = pixels[:, blob].median(dim=1).values
        colour = min(
            COLOURS, key=lambda name: float((shape_colour - torch.tensor(COLOURS[name])).norm())
        )
        start, travel = _centre(blob[0]), _centre(blob[-1]) - _centre(blob[0])
        return Observation(
            colour,
            self._direction(travel),
            (start[0].item(), start[1].item()),
            (travel[0].item(), travel[1].item()),
            area.mean().item(),
            shade,
        )

    def obeys(self, clip: Tensor, caption: str) -> bool:
        """True if the clip [3, F, H, W] in [-1, 1] shows the colours and direction of its caption,
        and nothing that it names vanishes at its end.
        """
        scene = Scene.parse(caption)
        if scene.still is None:
            observation = self.observe(clip)
            return (observation.colour, observation.direction) == (scene.colour, scene.direction)
        mover, still = self._masks(clip, scene)
        least = self._least_area
        if any(mask[i].sum() < least for mask in (mover, still) for i in (0, -1)):
            return False
        drift = (_centre(still[-1]) - _centre(still[0])).norm()
        travel = _centre(mover[-1]) - _centre(mover[0])
        return self._direction(travel) == scene.direction and bool(drift < travel.norm() / 2)

    def steadiness(self, clip: Tensor, caption: str) -> float:
        """The smallest area of the moving shape in any frame / its median area, in [0, 1]; 0 where
        there is none. A shape that vanishes half way has 0.
        """
        scene = Scene.parse(caption)
        mask = self._blob(clip)[1] if scene.still is None else self._masks(clip, scene)[0]
        area = mask.float().sum(dim=(1, 2))
        return (area.min() / area.median()).item() if area.median() > 0 else 0.0

    @property
    def _least_area(self) -> float:
        return 20 * self.world.scale**2  # the smallest triangle covers 64 pixels at scale 1

    def _direction(self, travel: Tensor) -> str | None:
        along = {
            name: (travel * torch.tensor(step)).sum().item() for name, step in DIRECTIONS.items()
        }
        direction = max(along, key=lambda name: along[name])
        # The slowest shape moves SPEED[0] a frame.
        least = 0.375 * self.world.scale * (self.world.frames - 1)
        return direction if along[direction] > least else None

    def _blob(self, clip: Tensor) -> tuple[Tensor, Tensor, float]:
        """Pixels in [0, 1], where they differ from the background [F, H, W], and its grey level."""
        pixels = (clip.float().clamp(-1, 1) + 1) / 2
        background = pixels.flatten(1).median(dim=1).values
        blob = (pixels - background[:, None, None, None]).square().sum(dim=0) > 0.25**2
        return pixels, blob, background.mean().item()

    def _masks(self, clip: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
        """Where the moving and the still shape's colours are: [F, H, W] each."""
        assert scene.still is not None
        pixels, blob, _ = self._blob(clip)
        palette = torch.tensor(list(COLOURS.values()))[:, :, None, None, None]
        nearest = (pixels[None] - palette).square().sum(dim=1).argmin(dim=0)
        names = list(COLOURS)
        mover, still = (names.index(colour) for colour in (scene.colour, scene.still[0]))
        return blob & (nearest == mover), blob & (nearest == still)


def _centre(mask: Tensor) -> Tensor:
    """(x, y) in pixels of the centre of a mask [H, W]."""
    return mask.nonzero().float().mean(dim=0).flip(0) + 0.5
