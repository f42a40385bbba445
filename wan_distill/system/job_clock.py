"""How far a job is, and how long it still takes: the plan, corrected by what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The plan counts as much as this many seconds of measurement: of the job, and of the part at work.
TRUST_IN_PLAN = 30.0
TRUST_IN_OTHER_PARTS = 10.0


@dataclass(frozen=True)
class Leg:
    """A part of a job, in the order of time."""

    name: str
    seconds: float
    """as planned"""
    units: float | None = None
    """of work in it; None: those of its progress bar"""
    bars: int = 1
    """progress bars that show it: one, whose units are fewer where an earlier process did some; or
    several, each with a part of the units"""


class JobClock:
    """The legs of one job, passed in their order.

    Attributes:
        done: share in [0, 1] of the leg at work that is done.
    """

    def __init__(self, legs: Sequence[Leg], now: Callable[[], float] = time.perf_counter):
        """`now` tells the time in seconds."""
        self.legs = list(legs)
        self.now = now
        self.place = -1
        self.done = self.done_before = 0.0
        self.started = now()
        self._planned = self._spent = 0.0  # seconds of what was done in this process

    @property
    def leg(self) -> Leg:
        """The one at work."""
        return self.legs[self.place]

    def enter(self, name: str) -> None:
        """Goes on to the next leg of this name; those before it are over."""
        planned, spent = self._measured()
        self._planned += planned
        self._spent += spent
        later = range(self.place + 1, len(self.legs))
        found = next((i for i in later if self.legs[i].name == name), None)
        if found is None:  # nothing was planned for it
            found = self.place + 1
            self.legs.insert(found, Leg(name, 0.0))
        self.place = found
        self.done = self.done_before = 0.0
        self.started = self.now()

    def begin(self, total: float, already: float) -> float:
        """A progress bar of `total` units, `already` of which an earlier process made, begins.
        Returns the share of the leg that one unit is.
        """
        units = self.leg.units if self.leg.units is not None else total
        if self.leg.bars == 1:
            units = max(units, total)
            already += units - total
            self.done = self.done_before = already / units if units else 1.0
        return 1 / units if units else 0.0

    def advance(self, share: float) -> None:
        """`share` more of the leg is done."""
        self.done = min(1.0, self.done + share)

    def _measured(self) -> tuple[float, float]:
        """(planned, true) seconds of what this process did in the leg at work."""
        share = self.done - self.done_before
        if self.place < 0 or share <= 0:
            return 0.0, 0.0
        return self.leg.seconds * share, self.now() - self.started

    def share(self) -> float:
        """Of the whole job that is done, by planned seconds."""
        total = sum(leg.seconds for leg in self.legs)
        if not total or self.place < 0:
            return self.done
        before = sum(leg.seconds for leg in self.legs[: self.place])
        return (before + self.leg.seconds * self.done) / total

    def left(self) -> float:
        """Seconds until the job ends."""
        planned, spent = self._measured()
        slower = (TRUST_IN_PLAN + self._spent + spent) / (TRUST_IN_PLAN + self._planned + planned)
        later = sum(leg.seconds for leg in self.legs[self.place + 1 :])
        if self.place < 0:
            return later * slower
        weight = TRUST_IN_OTHER_PARTS
        here = (weight * slower + spent) / (weight + planned)
        if not self.leg.seconds and self.done > self.done_before:  # nothing was planned
            rest = spent * (1 - self.done) / (self.done - self.done_before)
            return rest + later * slower
        return self.leg.seconds * (1 - self.done) * here + later * slower
