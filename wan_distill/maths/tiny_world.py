"""The worlds of the tiny teachers: flat shapes of one colour move on grey.

A caption names the attributes that a denoiser must learn from text. It does not name what must stay
random: where a shape starts, how fast it moves and how bright the background is. Obedience to the
caption, steadiness and diversity can therefore be measured without a learned judge.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

SIZES = {"small": 7.0, "big": 12.0}  # radius, pixels of the embedded teacher's frame
COLOURS = {  # RGB in [0, 1]; 60 degrees of hue apart
    "red": (0.90, 0.10, 0.10),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.10, 0.70, 0.15),
    "cyan": (0.10, 0.80, 0.90),
    "blue": (0.10, 0.20, 0.95),
    "magenta": (0.90, 0.15, 0.85),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}  # (dx, dy), y grows downwards

SPEED = (1.0, 1.5)  # pixels per frame
SHADE = (0.10, 0.50)  # grey level of the background, in [0, 1]
STILL_COLOUR = "blue"  # of the second shape; the first one then has another
STILL_SIZE = 9.0  # its radius, pixels: of smaller ones the VAE loses some
STILL_PLACES = 16  # that are tried for it, so that the first shape does not hide it


class Scene(NamedTuple):
    """The attributes that a caption names."""

    size: str
    colour: str
    shape: str
    direction: str
    still: tuple[str, str] | None = None
    """Colour (STILL_COLOUR) and shape of a second object, which stands still."""

    @property
    def caption(self) -> str:
        first = f"a {self.size} {self.colour} {self.shape} moving {self.direction}"
        return first if self.still is None else f"{first} past a {' '.join(self.still)}"

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """The inverse of `caption`. Raises ValueError for any other sentence."""
        scene: Scene | None
        match caption.split():
            case ["a", size, colour, shape, "moving", direction]:
                scene = cls(size, colour, shape, direction)
            case ["a", size, colour, shape, "moving", direction, "past", "a", other, what]:
                scene = cls(size, colour, shape, direction, (other, what))
            case _:
                scene = None
        if scene is not None and scene in _KNOWN:
            return scene
        raise ValueError(f"not a caption of the tiny world: {caption!r}; try {ALONE[0].caption!r}")

    @property
    def is_held_out(self) -> bool:
        """True for a sixth of the scenes.

        A Latin square: each (size, shape, direction) lacks exactly one colour in training. Each
        pair of attribute values still occurs there, so a held-out caption is only a new
        combination.
        """
        size = list(SIZES).index(self.size)
        colour = list(COLOURS).index(self.colour)
        direction = list(DIRECTIONS).index(self.direction)
        total = 3 * size + 2 * SHAPES.index(self.shape) + direction - colour
        if self.still is not None:
            total += SHAPES.index(self.still[1])
        return total % len(COLOURS) == 0


ALONE = [Scene(*values) for values in itertools.product(SIZES, COLOURS, SHAPES, DIRECTIONS)]
PAIRS = [
    scene._replace(still=(STILL_COLOUR, shape))
    for scene in ALONE
    for shape in SHAPES
    if scene.colour != STILL_COLOUR
]
_KNOWN = {*ALONE, *PAIRS}


def is_caption(text: str) -> bool:
    """Whether `Scene.parse` understands it."""
    try:
        Scene.parse(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class World:
    """Clips of one size; what they show is judged by `tiny_judge.Judge`."""

    frames: int = 17
    height: int = 64
    width: int = 64
    scale: float = 1.0
    """Of every length, the speed included, in the embedded teacher's pixels."""
    pairs: bool = False
    """Whether a second shape stands still in the scene, and in the caption."""

    @cached_property
    def training_captions(self) -> list[str]:
        return self._captions(held_out=False)

    @cached_property
    def heldout_captions(self) -> list[str]:
        return self._captions(held_out=True)

    def _captions(self, held_out: bool) -> list[str]:
        scenes = PAIRS if self.pairs else ALONE
        return [scene.caption for scene in scenes if scene.is_held_out == held_out]

    def render(self, captions: list[str], rng: torch.Generator) -> Tensor:
        """One random clip per caption: [B, 3, frames, height, width] in [-1, 1], smooth edges."""
        scenes = [Scene.parse(caption) for caption in captions]
        radius = self.scale * torch.tensor([SIZES[scene.size] for scene in scenes])
        heading = torch.tensor([DIRECTIONS[scene.direction] for scene in scenes])

        speed, shade, place_x, place_y = torch.rand(4, len(scenes), generator=rng)
        speed = self.scale * (SPEED[0] + (SPEED[1] - SPEED[0]) * speed)
        travel = heading * speed[:, None] * (self.frames - 1)
        # The start is uniform over all places from which the whole path stays inside the frame.
        room = torch.tensor([self.width, self.height])
        low = radius[:, None] - travel.clamp(max=0)
        high = room - radius[:, None] - travel.clamp(min=0)
        start = low + (high - low) * torch.stack([place_x, place_y], dim=1)

        progress = torch.linspace(0, 1, self.frames)
        centre = start[:, None] + travel[:, None] * progress[None, :, None]  # [B, frames, 2]
        background = (SHADE[0] + (SHADE[1] - SHADE[0]) * shade)[:, None, None, None, None]
        clip = background.expand(-1, 3, self.frames, self.height, self.width)
        stills = [scene.still for scene in scenes if scene.still is not None]
        if stills:
            size = torch.full((len(stills),), self.scale * STILL_SIZE)
            places = torch.rand(len(stills), STILL_PLACES, 2, generator=rng)
            places = size[:, None, None] + places * (room - 2 * size[:, None, None])
            ends = centre[:, (0, -1)]
            nearest = (places[:, :, None] - ends[:, None]).norm(dim=-1).amin(dim=-1)
            place = places[torch.arange(len(stills)), nearest.argmax(dim=1)]
            still = place[:, None].expand(-1, self.frames, -1)
            clip = self._paint(clip, [s[0] for s in stills], [s[1] for s in stills], still, size)
        colours, shapes = [scene.colour for scene in scenes], [scene.shape for scene in scenes]
        return 2 * self._paint(clip, colours, shapes, centre, radius) - 1

    def _paint(
        self, clip: Tensor, colours: list[str], shapes: list[str], centre: Tensor, radius: Tensor
    ) -> Tensor:
        """`clip` with one shape per sample on top; its centre [B, frames, 2] and radius [B]."""
        colour = torch.tensor([COLOURS[name] for name in colours])[:, :, None, None, None]
        shape = torch.tensor([SHAPES.index(name) for name in shapes])
        x = torch.arange(self.width) + 0.5 - centre[..., 0, None, None]
        y = torch.arange(self.height)[:, None] + 0.5 - centre[..., 1, None, None]
        r = radius[:, None, None, None]
        circle = (x**2 + y**2).sqrt() - r
        square = torch.maximum(x.abs(), y.abs()) - 0.9 * r
        triangle = torch.maximum(0.866 * x.abs() - 0.5 * y, y + 0 * x) - 0.55 * r  # tip up
        distance = torch.stack([circle, square, triangle])[shape, torch.arange(len(shape))]
        coverage = (0.5 - distance).clamp(0, 1)[:, None]  # of each pixel, from the signed distance
        return clip + coverage * (colour - clip)
