"""The numbers along the axes of charts."""

from __future__ import annotations

import math
from collections.abc import Sequence

TICKS = 4  # at most, on either axis


def span(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest of some values, with a little room; of a constant, around it."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        room = abs(low) / 2 or 0.5
        return low - room, high + room
    room = 0.04 * (high - low)
    return low - room, high + room


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, `TICKS` at most: multiples of 1, 2 or 5 times a power of
    ten.
    """
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]
