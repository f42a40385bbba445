"""How far a job is, and how long it still takes: the plan, corrected by what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TRUST = 15.0  # seconds of work that what was expected before counts as much as
HALF_LIFE = 300.0  # seconds after which what was measured counts half: other work comes and goes


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


@dataclass
class Pace:
    """How much slower work goes than planned: true and planned seconds of what was done lately."""

    planned: float = 0.0
    spent: float = 0.0

    def add(self, planned: float, spent: float) -> None:
        """Work of `planned` seconds was done in `spent`."""
        fade = 0.5 ** (spent / HALF_LIFE)
        self.planned = fade * self.planned + planned
        self.spent = fade * self.spent + spent

    def slower(self, expected: float) -> float:
        """True over planned seconds; with little to go by, nearer to what is `expected`."""
        if not self.planned:
            return expected
        known = max(self.planned, self.spent)
        weight = known / (known + TRUST)
        found: float = expected ** (1 - weight) * (self.spent / self.planned) ** weight
        return found


class JobClock:
    """The legs of one job, passed in their order.

    Args:
        slower: how many times as long as planned everything is expected to take.
        now: tells the time in seconds.

    Attributes:
        done: share in [0, 1] of the leg at work that is done.
        listener: called whenever more of it is.
    """

    listener: Callable[[], object] | None = None

    def __init__(
        self,
        legs: Sequence[Leg],
        slower: float = 1.0,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.legs = list(legs)
        self.expected = slower
        self.now = now
        self.place = -1
        self.done = self.done_before = 0.0
        self.started = self.counted = now()
        self.job, self.here = Pace(), Pace()

    @property
    def leg(self) -> Leg:
        """The one at work."""
        return self.legs[self.place]

    def enter(self, name: str) -> None:
        """Goes on to the next leg of this name; those before it are over."""
        if self.place >= 0:
            self._count(0.0)  # what came after the last of its work
        later = range(self.place + 1, len(self.legs))
        found = next((i for i in later if self.legs[i].name == name), None)
        if found is None:  # nothing was planned for it
            found = self.place + 1
            self.legs.insert(found, Leg(name, 0.0))
        self.place = found
        self.done = self.done_before = 0.0
        self.started = self.counted = self.now()
        self.here = Pace()

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
        share = min(share, 1.0 - self.done)
        self.done += share
        self._count(share)
        if self.listener is not None:
            self.listener()

    def _count(self, share: float) -> None:
        """Time has passed while `share` of the leg was done."""
        now = self.now()
        for pace in (self.job, self.here):
            pace.add(self.leg.seconds * share, now - self.counted)
        self.counted = now

    def share(self) -> float:
        """Of the whole job that is done, by planned seconds."""
        total = sum(leg.seconds for leg in self.legs)
        if not total or self.place < 0:
            return self.done
        before = sum(leg.seconds for leg in self.legs[: self.place])
        return (before + self.leg.seconds * self.done) / total

    def left(self) -> float:
        """Seconds until the job ends."""
        slower = self.job.slower(self.expected)
        later = sum(leg.seconds for leg in self.legs[self.place + 1 :]) * slower
        if self.place < 0:
            return later
        if not self.leg.seconds and self.done > self.done_before:  # nothing was planned
            spent = self.now() - self.started
            return later + spent * (1 - self.done) / (self.done - self.done_before)
        return later + self.leg.seconds * (1 - self.done) * self.here.slower(slower)
