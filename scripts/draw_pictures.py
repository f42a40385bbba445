"""Draws assets/pictures: first frames and captions for runs that are given no --images.

Flat drawings, so that nobody holds rights in them. They are few and all of one style: enough to
try a run, not to train a student that people will use.

    python scripts/draw_pictures.py
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "pictures"
WIDTH, HEIGHT = 832, 480  # Wan's smaller clip
FINER = 3  # times as many pixels are drawn, for smooth edges
COLOURS = 64  # of each file
Draw = ImageDraw.ImageDraw


class Pen:
    """Draws in pixels of the finished picture, relative to a place and in units of a size."""

    def __init__(self, draw: Draw, x: float = 0, y: float = 0, size: float = 1):
        self.draw, self.x, self.y, self.size = draw, x, y, size

    def at(self, x: float, y: float, size: float) -> "Pen":
        return Pen(self.draw, x, y, size)

    def _place(self, x: float, y: float) -> tuple[float, float]:
        return (self.x + x * self.size) * FINER, (self.y + y * self.size) * FINER

    def box(
        self, x0: float, y0: float, x1: float, y1: float, colour: str, round: float = 0
    ) -> None:
        ends = (*self._place(x0, y0), *self._place(x1, y1))
        self.draw.rounded_rectangle(ends, round * self.size * FINER, fill=colour)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: str) -> None:
        self.draw.ellipse((*self._place(x - rx, y - ry), *self._place(x + rx, y + ry)), fill=colour)

    def shape(self, colour: str, *points: tuple[float, float]) -> None:
        self.draw.polygon([self._place(*point) for point in points], fill=colour)

    def line(self, colour: str, width: float, *points: tuple[float, float]) -> None:
        places = [self._place(*point) for point in points]
        self.draw.line(places, fill=colour, width=round(width * self.size * FINER), joint="curve")


# ------------------------------------------------------------------------------------- backgrounds


def meadow(pen: Pen) -> None:
    pen.box(0, 0, WIDTH, HEIGHT, "#9fd3f0")
    pen.oval(690, 90, 44, 44, "#ffe27a")
    for x, y in ((120, 90), (470, 70)):
        for dx, r in ((-40, 24), (0, 36), (42, 26)):
            pen.oval(x + dx, y, r * 1.3, r * 0.8, "#ffffff")
    pen.oval(200, 480, 420, 150, "#7fbf6a")
    pen.oval(680, 500, 400, 170, "#63a653")


def sea(pen: Pen) -> None:
    pen.box(0, 0, WIDTH, 270, "#f7c99b")
    pen.oval(600, 250, 70, 70, "#f58f5c")
    pen.box(0, 250, WIDTH, HEIGHT, "#2f7fa8")
    for row in range(5):
        for column in range(9):
            x, y = column * 104 + row % 2 * 52, 290 + row * 42
            pen.line("#7db8d1", 4, *((x + t * 6, y - 8 * math.sin(t / 2)) for t in range(7)))


def night(pen: Pen) -> None:
    pen.box(0, 0, WIDTH, HEIGHT, "#141b3d")
    pen.oval(130, 100, 46, 46, "#f2ecc2")
    pen.oval(150, 88, 40, 40, "#141b3d")
    for i in range(40):
        pen.oval((i * 211) % WIDTH, (i * 97) % 330, 1.6 + i % 3, 1.6 + i % 3, "#dfe6ff")
    pen.shape(
        "#262f5e", (0, 480), (0, 390), (210, 300), (400, 400), (620, 310), (832, 400), (832, 480)
    )


def room(pen: Pen) -> None:
    pen.box(0, 0, WIDTH, 350, "#e9dcc3")
    pen.box(0, 350, WIDTH, HEIGHT, "#a9754a")
    for x in range(-100, WIDTH, 140):
        pen.line("#8d5f3a", 4, (x + 120, 350), (x, 480))
    pen.box(560, 60, 760, 240, "#b98b5e")
    pen.box(574, 74, 746, 226, "#bfe3f2")
    pen.line("#b98b5e", 10, (660, 74), (660, 226))


# ----------------------------------------------------------------------------------------- subjects


def balloon(pen: Pen) -> None:
    pen.line("#6b4a2f", 0.03, (-0.3, 0.75), (-0.16, 1.2), (0.16, 1.2), (0.3, 0.75))
    pen.oval(0, 0, 0.8, 0.9, "#d8423b")
    pen.oval(0, 0, 0.42, 0.9, "#f2c14e")
    pen.oval(0, 0, 0.14, 0.9, "#d8423b")
    pen.box(-0.18, 1.15, 0.18, 1.42, "#8a5a33", 0.05)


def kite(pen: Pen) -> None:
    pen.line("#4a4a4a", 0.02, (0, 0.8), (0.25, 1.6), (-0.1, 2.3), (0.2, 3.0))
    pen.shape("#3f6fd1", (0, -1), (0.65, -0.1), (0, 0.8), (-0.65, -0.1))
    pen.shape("#f2c14e", (0, -1), (0.65, -0.1), (0, -0.1))
    for y in (1.2, 1.8, 2.4):
        pen.shape("#d8423b", (0.1, y), (0.35, y - 0.14), (0.35, y + 0.14))


def car(pen: Pen) -> None:
    pen.shape("#d8423b", (-0.6, -0.3), (-0.35, -0.75), (0.4, -0.75), (0.7, -0.3))
    pen.box(-1.1, -0.35, 1.1, 0.15, "#d8423b", 0.15)
    pen.shape("#cdeaf5", (-0.42, -0.34), (-0.26, -0.64), (0.02, -0.64), (0.02, -0.34))
    pen.shape("#cdeaf5", (0.1, -0.34), (0.1, -0.64), (0.34, -0.64), (0.52, -0.34))
    for x in (-0.6, 0.6):
        pen.oval(x, 0.18, 0.26, 0.26, "#2b2b2b")
        pen.oval(x, 0.18, 0.11, 0.11, "#cfcfcf")


def windmill(pen: Pen) -> None:
    pen.shape("#f1e7d0", (-0.35, 1.6), (-0.2, -0.1), (0.2, -0.1), (0.35, 1.6))
    pen.shape("#9c4a3c", (-0.28, -0.1), (0, -0.45), (0.28, -0.1))
    for turn in range(4):
        angle = turn * math.pi / 2 + 0.4
        across, along = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
        corners = ((0.06, 0.1), (0.3, 0.25), (0.3, 1.1), (0.06, 1.1))
        points = [(a * across[0] + b * along[0], a * across[1] + b * along[1]) for a, b in corners]
        pen.shape("#6b4a2f", *points)
    pen.oval(0, 0, 0.09, 0.09, "#3a2a1c")


def boat(pen: Pen) -> None:
    pen.line("#5a3b22", 0.06, (0, 0.1), (0, -1.5))
    pen.shape("#fbf6ea", (0.06, -1.45), (0.06, -0.1), (0.85, -0.1))
    pen.shape("#e7d9bd", (-0.06, -1.3), (-0.06, -0.1), (-0.6, -0.1))
    pen.shape("#8c3b2e", (-1, 0.05), (1.05, 0.05), (0.7, 0.5), (-0.7, 0.5))


def dolphin(pen: Pen) -> None:
    pen.oval(0, 0, 0.95, 0.3, "#5f7fa3")
    pen.oval(0.1, 0.1, 0.7, 0.17, "#cfdce8")
    pen.shape("#4d6b8d", (-0.15, -0.26), (0.0, -0.7), (0.25, -0.25))
    pen.shape("#4d6b8d", (-0.85, 0), (-1.35, -0.3), (-1.2, 0.05), (-1.35, 0.35))
    pen.shape("#5f7fa3", (0.8, -0.12), (1.25, 0.05), (0.8, 0.18))
    pen.oval(0.68, -0.06, 0.05, 0.05, "#16202b")


def gull(pen: Pen) -> None:
    pen.shape("#f7f7f7", (-0.1, 0), (-1, -0.55), (-0.35, 0.05), (0, 0.2))
    pen.shape("#e2e2e2", (0.1, 0), (1, -0.55), (0.35, 0.05), (0, 0.2))
    pen.oval(0, 0.1, 0.28, 0.15, "#ffffff")
    pen.shape("#f2a541", (0.24, 0.06), (0.42, 0.12), (0.24, 0.17))


def rocket(pen: Pen) -> None:
    pen.shape("#f58f3c", (-0.2, 1.0), (0, 1.75), (0.2, 1.0))
    pen.shape("#b93a33", (-0.34, 0.4), (-0.75, 1.05), (-0.3, 1.0))
    pen.shape("#b93a33", (0.34, 0.4), (0.75, 1.05), (0.3, 1.0))
    pen.oval(0, 0, 0.38, 1.1, "#f0f0f2")
    pen.box(-0.3, 0.75, 0.3, 1.05, "#f0f0f2")
    pen.oval(0, -0.2, 0.2, 0.2, "#4f86c6")


def train(pen: Pen) -> None:
    pen.box(-6, 0.42, 6, 0.48, "#8a8fa8")
    for x in (-2.3, -0.9, 0.5):
        pen.box(x, -0.5, x + 1.3, 0.25, "#c9513f" if x > 0 else "#d9a441", 0.1)
        pen.box(x + 0.15, -0.32, x + 0.55, -0.02, "#fff3c4")
        pen.box(x + 0.75, -0.32, x + 1.15, -0.02, "#fff3c4")
        pen.oval(x + 0.3, 0.3, 0.13, 0.13, "#20242f")
        pen.oval(x + 1.0, 0.3, 0.13, 0.13, "#20242f")


def lantern(pen: Pen) -> None:
    pen.oval(0, 0, 0.8, 0.9, "#f5a23c")
    pen.oval(0, 0.1, 0.45, 0.6, "#ffd98a")
    pen.box(-0.4, -0.98, 0.4, -0.8, "#7a2f23")
    pen.box(-0.4, 0.8, 0.4, 0.98, "#7a2f23")


def ball(pen: Pen) -> None:
    pen.oval(0.1, 1.0, 0.95, 0.14, "#8d5f3a")
    falling(pen)


def falling(pen: Pen) -> None:
    pen.oval(0, 0, 1, 1, "#3f6fd1")
    pen.oval(0, 0, 0.45, 1, "#f4f1e6")
    pen.oval(0, 0, 0.18, 1, "#d8423b")


def candle(pen: Pen) -> None:
    pen.box(-1.0, 1.2, 1.0, 1.35, "#c9a24a", 0.06)
    pen.box(-0.25, 0, 0.25, 1.2, "#f7f2e4", 0.05)
    pen.line("#3a2a1c", 0.05, (0, 0.02), (0, -0.16))
    pen.oval(0, -0.42, 0.15, 0.34, "#f58f3c")
    pen.oval(0, -0.34, 0.07, 0.18, "#fff0b0")


def cup(pen: Pen) -> None:
    pen.oval(0.95, 0.35, 0.38, 0.4, "#4a8f8c")
    pen.oval(0.95, 0.35, 0.22, 0.24, "#e9dcc3")
    pen.box(-0.9, -0.2, 0.9, 1.0, "#4a8f8c", 0.3)
    pen.oval(0, -0.2, 0.9, 0.2, "#5fb0ac")
    pen.oval(0, -0.2, 0.74, 0.14, "#4b2f1d")
    for x in (-0.35, 0.1, 0.5):
        steam = ((x + 0.1 * math.sin(t / 2), -0.5 - t * 0.1) for t in range(9))
        pen.line("#cbbf9f", 0.07, *steam)


Subject = tuple[Callable[[Pen], None], float, float, float, str]
SCENES: dict[Callable[[Pen], None], list[Subject]] = {
    meadow: [
        (balloon, 300, 190, 80, "a red and yellow hot-air balloon rises slowly over green hills"),
        (kite, 560, 160, 70, "a blue kite with red ribbons swings from side to side in the wind"),
        (car, 210, 400, 110, "a red car drives to the right across a meadow"),
        (windmill, 430, 240, 110, "the sails of a windmill on a hill turn steadily in the wind"),
    ],
    sea: [
        (boat, 240, 330, 110, "a sailing boat rocks on the waves and glides to the right"),
        (dolphin, 420, 300, 120, "a dolphin swims to the right through the waves"),
        (gull, 520, 130, 90, "a white gull beats its wings and flies to the right over the sea"),
        (boat, 620, 300, 60, "a small boat far away sails slowly to the left while the sun sets"),
    ],
    night: [
        (rocket, 420, 280, 100, "a white rocket lifts off and climbs into the starry sky"),
        (train, 480, 420, 90, "a train with bright windows rolls to the right at night"),
        (lantern, 300, 240, 70, "a glowing paper lantern floats upwards in the night sky"),
        (balloon, 560, 200, 70, "a hot-air balloon drifts to the left while stars twinkle"),
    ],
    room: [
        (ball, 220, 340, 70, "a striped ball rolls to the right over a wooden floor and stops"),
        (candle, 300, 300, 90, "the flame of a candle on a table flickers in a quiet room"),
        (cup, 330, 270, 100, "steam curls up from a cup of coffee on a wooden table"),
        (falling, 420, 130, 60, "a striped ball falls to the wooden floor and bounces"),
    ],
}  # fmt: skip


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    lines = []
    scenes = [(place, *scene) for place, scenes in SCENES.items() for scene in scenes]
    for number, (background, subject, x, y, size, caption) in enumerate(scenes, 1):
        image = Image.new("RGB", (WIDTH * FINER, HEIGHT * FINER))
        pen = Pen(ImageDraw.Draw(image))
        background(pen)
        subject(pen.at(x, y, size))
        image = image.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
        image = image.quantize(COLOURS, dither=Image.Dither.NONE)
        name = f"{number:02d}.png"  # no word that `datasets` takes for a split (train)
        image.save(FOLDER / name, optimize=True)
        text = f"{caption[0].upper()}{caption[1:]}, a flat, colourful drawing."
        lines.append(json.dumps({"file_name": name, "text": text}) + "\n")
    (FOLDER / "metadata.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"{len(lines)} pictures, {sum(f.stat().st_size for f in FOLDER.iterdir()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
