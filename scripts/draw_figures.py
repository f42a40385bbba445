#!/usr/bin/env python
"""Draws the figures of the documentation, as SVG, from data: python scripts/draw_figures.py

- docs/figures/quality.svg: the table of methods in benchmarks/RESULTS.md
- docs/figures/steps.svg: the sigmas of a 4-step student, and which expert owns which step
- docs/figures/frontier.svg: quality against evaluations, the table of frontier.py in RESULTS.md
- docs/figures/samples.svg: quality against the number of solved samples, rows of the same table
"""

from __future__ import annotations

import itertools
import re
import sys
from math import log
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from scatter import Point, scatter  # noqa: E402

from wan_distill.maths.sigmas import expert_of, sigma_grid  # noqa: E402

FOLDER = REPOSITORY / "docs" / "figures"
WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 620, 30, 250
COLOURS = {
    "trajectory+dmd": "#1565c0",
    "trajectory": "#42a5f5",
    "dmd": "#00897b",
    "consistency": "#8e24aa",
}
HIGH, LOW, GREY = "#ef6c00", "#1565c0", "#888888"


def text(x: float, y: float, words: str, colour: str = GREY, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" '
        f'font-family="sans-serif" font-size="13">{words}</text>'
    )


def line(points: list[tuple[float, float]], colour: str, width: float = 2) -> str:
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'


def page(title: str, shapes: list[str]) -> str:
    """Readable on light and on dark pages: no background, and grey letters."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            f"<title>{title}</title>",
            *shapes,
            "</svg>\n",
        ]
    )


def measured() -> dict[str, dict[int, float]]:
    """Recipe -> steps -> Fréchet distance, by the table of methods in RESULTS.md."""
    table = (REPOSITORY / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w+]+) \| (\d+) \| [-\d.]+ \| \d+ \| ([\d.]+) \|", table, re.M)
    found: dict[str, dict[int, float]] = {}
    for recipe, steps, distance in rows:
        found.setdefault(recipe, {})[int(steps)] = float(distance)
    return found


def yardsticks() -> dict[str, tuple[int, float]]:
    """Name -> (evaluations, Fréchet distance) of the teacher, as the same file says."""
    table = (REPOSITORY / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    told = re.search(r"floor (\S+),\s.*guided steps (\S+),\s.*unguided\s+steps (\S+)\.\n", table)
    assert told is not None
    floor, guided, unguided = map(float, told.groups())
    return {
        "teacher, 40 guided steps": (80, floor),
        "teacher, 4 guided steps": (8, guided),
        "teacher, 4 steps": (4, unguided),
    }


def quality() -> str:
    """Distance to the teacher's clips against evaluations per clip, both on logarithmic axes."""

    def place(evaluations: float, distance: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * log(evaluations) / log(100)
        share = log(distance / 110) / log(3500 / 110)
        return x, BOTTOM - (BOTTOM - TOP) * share

    shapes = [line([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], GREY, 1)]
    for value in (1, 2, 4, 8, 16, 40, 80):
        x, _ = place(value, 200)
        shapes += [line([(x, BOTTOM), (x, BOTTOM + 5)], GREY, 1)]
        shapes += [text(x, BOTTOM + 20, str(value), anchor="middle")]
    for value in (150, 300, 600, 1200, 2400):
        _, y = place(1, value)
        shapes += [line([(LEFT - 5, y), (LEFT, y)], GREY, 1)]
        shapes += [text(LEFT - 8, y + 4, str(value), anchor="end")]
    shapes.append(text((LEFT + RIGHT) / 2, BOTTOM + 40, "transformer evaluations per clip"))
    shapes.append(
        text(LEFT + 8, TOP - 8, "Fréchet distance to the teacher's clips (less is better)")
    )
    for number, (recipe, colour) in enumerate(COLOURS.items()):
        points = [place(steps, distance) for steps, distance in sorted(measured()[recipe].items())]
        shapes += [line(points, colour), *(dot(x, y, colour) for x, y in points)]
        shapes.append(text(RIGHT - 110, TOP + 20 + 18 * number, recipe, colour))
    for name, (evaluations, distance) in yardsticks().items():
        x, y = place(evaluations, distance)
        far_right = evaluations > 40
        shapes += [dot(x, y, GREY)]
        shapes += [
            text(x - 8 if far_right else x + 8, y - 8, name, anchor="end" if far_right else "start")
        ]
    return page("Fréchet distance against evaluations per clip", shapes)


def steps() -> str:
    """The sigmas of a 4-step student at shift 5, and the expert that owns each step."""
    sigmas = sigma_grid(4, 5.0)
    boundary = 0.875

    def x_of(sigma: float) -> float:
        return LEFT + (RIGHT - LEFT) * (1 - sigma)

    shapes = [
        text(LEFT, TOP, "sigma 1: noise"),
        text(RIGHT, TOP, "sigma 0: a clip", anchor="end"),
        line([(x_of(boundary), TOP + 20), (x_of(boundary), 200)], GREY, 1),
        text(x_of(boundary) + 6, TOP + 32, f"boundary {boundary:g}"),
    ]
    for number, (begin, end) in enumerate(itertools.pairwise(sigmas), start=1):
        expert = expert_of(begin, boundary)
        colour, y = (HIGH if expert == "high" else LOW), 60 + 34 * number
        shapes += [line([(x_of(begin), y), (x_of(end), y)], colour, 6), dot(x_of(begin), y, colour)]
        words = f"step {number}: {expert} expert, {begin:.4f} to {end:.4f}"
        beside = max(x_of(end), x_of(sigmas[2])) + 10  # right of the boundary's line
        last = number == len(sigmas) - 1
        shapes.append(
            text(x_of(begin) if last else beside, y + 24 if last else y + 4, words, colour)
        )
    shapes.append(text(LEFT, 250, "The low expert begins where the distilled high expert ends."))
    return page("The four steps of a student and their experts", shapes)


def priced() -> list[dict[str, str]]:
    """The rows of the table of frontier.py in RESULTS.md: column -> cell."""
    results = (REPOSITORY / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    found = results.partition("<!-- frontier -->")[2].partition("<!-- end of frontier -->")[0]
    lines = found.strip().splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows]


def point_of(row: dict[str, str], across: str, label: str) -> Point:
    low, high = map(float, row["95 % interval"].split(" to "))
    return Point(float(across.replace(",", "")), float(row["gap closed"]), low, high, label)


def frontier() -> str:
    """Gap closed against transformer evaluations, every recipe and seed."""
    points = [point_of(r, r["total"], f"{r['recipe']}, seed {r['seed']}") for r in priced()]
    return scatter(points, "transformer evaluations", "gap closed")


def samples() -> str:
    """Gap closed after 300 updates of 8 clips, against how many samples there are."""
    rows = {r["recipe"]: r for r in priced() if r["seed"] == "0"}
    points = [
        point_of(row, found[1], f"{found[1]} samples, read {300 * 8 / int(found[1]):.3g} times")
        for name, row in rows.items()
        if (found := re.fullmatch(r"300 updates, (\d+) samples", name))
    ]
    return scatter(points, "samples that are solved", "gap closed")


FIGURES = {
    "quality.svg": quality,
    "steps.svg": steps,
    "frontier.svg": frontier,
    "samples.svg": samples,
}


def main() -> int:
    """Writes every figure."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8", newline="\n")
        print(f"wrote docs/figures/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
