"""The world of the tiny teacher: one flat shape of one colour moves in one direction on grey.

A caption names the four attributes that the denoiser must learn from text. It does not name what
must stay random: where the shape starts, how fast it moves and how bright the background is.
Obedience to the caption and diversity can therefore be measured without a learned judge. Needs only
torch; `import tiny_world` with `scripts/` on the path.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FRAMES, HEIGHT, WIDTH = 17, 64, 64

SIZES = {"small": 7.0, "big": 12.0}  # radius, pixels
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


class Scene(NamedTuple):
    """The attributes that a caption names."""

    size: str
    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} moving {self.direction}"

    @classmethod
    def parse(cls, caption: str) -> "Scene":
        """The inverse of `caption`. Raises ValueError for any other sentence."""
        match caption.split():
            case ["a", size, colour, shape, "moving", direction]:
                scene = cls(size, colour, shape, direction)
                if scene in SCENES:
                    return scene
        raise ValueError(f"not a caption of the tiny world: {caption!r}; try {SCENES[0].caption!r}")


SCENES = [
    Scene(size, colour, shape, direction)
    for size in SIZES
    for colour in COLOURS
    for shape in SHAPES
    for direction in DIRECTIONS
]


def is_held_out(scene: Scene) -> bool:
    """True for 24 of the 144 scenes.

    A Latin square: each (size, shape, direction) lacks exactly one colour in training. Each pair of
    attribute values still occurs there, so a held-out caption is only a new combination.
    """
    size = list(SIZES).index(scene.size)
    colour = list(COLOURS).index(scene.colour)
    shape = SHAPES.index(scene.shape)
    direction = list(DIRECTIONS).index(scene.direction)
    return (3 * size + 2 * shape + direction - colour) % len(COLOURS) == 0


TRAINING_CAPTIONS = [scene.caption for scene in SCENES if not is_held_out(scene)]
HELDOUT_CAPTIONS = [scene.caption for scene in SCENES if is_held_out(scene)]


def render(captions: list[str], rng: torch.Generator) -> Tensor:
    """One random clip per caption: [B, 3, FRAMES, HEIGHT, WIDTH] in [-1, 1], with smooth edges."""
    scenes = [Scene.parse(caption) for caption in captions]
    radius = torch.tensor([SIZES[scene.size] for scene in scenes])
    colour = torch.tensor([COLOURS[scene.colour] for scene in scenes])
    heading = torch.tensor([DIRECTIONS[scene.direction] for scene in scenes], dtype=torch.float32)
    shape = torch.tensor([SHAPES.index(scene.shape) for scene in scenes])

    speed, shade, place_x, place_y = torch.rand(4, len(scenes), generator=rng)
    travel = heading * (SPEED[0] + (SPEED[1] - SPEED[0]) * speed)[:, None] * (FRAMES - 1)
    # The start is uniform over all places from which the whole path stays inside the frame.
    low = radius[:, None] - travel.clamp(max=0)
    high = torch.tensor([WIDTH, HEIGHT]) - radius[:, None] - travel.clamp(min=0)
    start = low + (high - low) * torch.stack([place_x, place_y], dim=1)

    progress = torch.linspace(0, 1, FRAMES)
    centre = start[:, None] + travel[:, None] * progress[None, :, None]  # [B, FRAMES, 2]
    coverage = _coverage(shape, centre, radius)[:, None]  # [B, 1, FRAMES, HEIGHT, WIDTH]
    background = (SHADE[0] + (SHADE[1] - SHADE[0]) * shade)[:, None, None, None, None]
    return 2 * (background + coverage * (colour[:, :, None, None, None] - background)) - 1


def _coverage(shape: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """The part of each pixel that the shape covers, in [0, 1], from the signed distance to it.

    Args:
        shape: [B], index into SHAPES.
        centre: [B, FRAMES, 2], pixels.
        radius: [B], pixels.
    Returns:
        [B, FRAMES, HEIGHT, WIDTH].
    """
    x = torch.arange(WIDTH) + 0.5 - centre[..., 0, None, None]
    y = torch.arange(HEIGHT)[:, None] + 0.5 - centre[..., 1, None, None]
    r = radius[:, None, None, None]
    circle = (x**2 + y**2).sqrt() - r
    square = torch.maximum(x.abs(), y.abs()) - 0.9 * r
    triangle = torch.maximum(0.866 * x.abs() - 0.5 * y, y + 0 * x) - 0.55 * r  # equilateral, tip up
    distance = torch.stack([circle, square, triangle])[shape, torch.arange(len(shape))]
    return (0.5 - distance).clamp(0, 1)


class Observation(NamedTuple):
    """What a clip shows, measured without a network."""

    colour: str | None  # None: too small an area differs from the background
    direction: str | None  # None as well where the shape hardly moves
    start: tuple[float, float]  # centre in the first frame, pixels
    travel: tuple[float, float]  # first to last frame, pixels
    area: float  # pixels, mean over frames
    shade: float  # grey level of the background, in [0, 1]


def observe(clip: Tensor) -> Observation:
    """Finds the shape of one clip [3, F, H, W] in [-1, 1], and where it moves.

    The shape is what differs from the background, the median colour of the clip.
    """
    pixels = (clip.float().clamp(-1, 1) + 1) / 2
    background = pixels.flatten(1).median(dim=1).values
    blob = (pixels - background[:, None, None, None]).norm(dim=0) > 0.25  # [F, H, W]
    area = blob.float().sum(dim=(1, 2))
    shade = background.mean().item()
    if area[0] < 20 or area[-1] < 20:  # the smallest triangle covers 64 pixels
        return Observation(None, None, (0.0, 0.0), (0.0, 0.0), area.mean().item(), shade)

    shape_colour = pixels[:, blob].median(dim=1).values
    colour = min(
        COLOURS, key=lambda name: float((shape_colour - torch.tensor(COLOURS[name])).norm())
    )
    first = _centre(blob[0])
    travel = _centre(blob[-1]) - first
    along = {name: (travel * torch.tensor(step)).sum().item() for name, step in DIRECTIONS.items()}
    direction = max(along, key=lambda name: along[name])
    moved = along[direction] > 6  # the slowest shape moves 16 pixels
    return Observation(
        colour,
        direction if moved else None,
        (first[0].item(), first[1].item()),
        (travel[0].item(), travel[1].item()),
        area.mean().item(),
        shade,
    )


def _centre(mask: Tensor) -> Tensor:
    """(x, y) in pixels of the centre of a mask [H, W]."""
    return mask.nonzero().float().mean(dim=0).flip(0) + 0.5


def obeys(clip: Tensor, caption: str) -> bool:
    """True if the clip [3, F, H, W] in [-1, 1] shows the colour and direction of its caption."""
    scene = Scene.parse(caption)
    observation = observe(clip)
    return (observation.colour, observation.direction) == (scene.colour, scene.direction)
