"""How far a job is, and how long it still takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from wan_distill.system.job_clock import JobClock, Leg

LEGS = [Leg("encode", 100.0, 10), Leg("solve", 400.0), Leg("high", 400.0), Leg("evaluate", 100.0)]


class Watch:
    """A clock that stands until it is told to go on."""

    def __init__(self) -> None:
        self.seconds = 50.0

    def __call__(self) -> float:
        return self.seconds


def work(clock: JobClock, watch: Watch, name: str, share: float, seconds: float) -> None:
    """A part of the job takes its time."""
    clock.enter(name)
    unit = clock.begin(10, 0)
    watch.seconds += seconds
    clock.advance(10 * share * unit)


def test_before_anything_is_done_the_plan_is_what_is_known() -> None:
    assert JobClock(LEGS, slower=2.5).left() == 2500  # other work is there from the start
    clock = JobClock(LEGS, now=Watch())
    assert clock.left() == 1000 and clock.share() == 0
    clock.enter("encode")
    assert clock.left() == 1000


@pytest.mark.parametrize("slower", [0.1, 1.0, 7.0])
def test_after_a_part_the_rest_is_expected_to_be_as_slow(slower: float) -> None:
    watch = Watch()
    clock = JobClock(LEGS, now=watch)
    work(clock, watch, "encode", 1.0, 100 * slower)
    work(clock, watch, "solve", 0.5, 200 * slower)
    assert clock.share() == pytest.approx(0.3)
    expected = 700 * slower
    assert abs(clock.left() - expected) < abs(700 - expected) * 0.12 + 1e-9


def test_a_part_that_is_slower_than_the_others_is_known_by_itself() -> None:
    """Half of `high` took four times as long as planned; what comes after it less so."""
    watch = Watch()
    clock = JobClock(LEGS, now=watch)
    work(clock, watch, "encode", 1.0, 100)
    work(clock, watch, "solve", 1.0, 400)
    work(clock, watch, "high", 0.5, 800)
    rest_of_high, after = 800, 100
    assert rest_of_high + after < clock.left() < rest_of_high + 4 * after


def test_what_an_earlier_process_did_is_done_and_took_no_time() -> None:
    watch = Watch()
    clock = JobClock(LEGS, now=watch)
    clock.enter("encode")
    assert clock.begin(4, 0) == 0.1 and clock.done == 0.6  # 4 of 10 prompts are left
    clock.enter("high")  # all samples are solved
    assert clock.begin(400, 100) == 1 / 400 and clock.done == 0.25
    assert clock.share() == pytest.approx(0.6)
    assert clock.left() == pytest.approx(0.75 * 400 + 100)


def test_several_bars_share_one_part() -> None:
    watch = Watch()
    clock = JobClock([Leg("evaluate", 100.0, 40, bars=4)], now=watch)
    clock.enter("evaluate")
    for total in (20, 10):
        unit = clock.begin(total, 0)
        clock.advance(total * unit)
    assert clock.share() == pytest.approx(0.75)
    clock.advance(99)
    assert clock.share() == 1 and clock.left() == 0


def test_a_part_that_nobody_planned_is_timed_by_itself() -> None:
    watch = Watch()
    clock = JobClock([Leg("encode", 0.0)], now=watch)
    work(clock, watch, "high", 0.25, 100)
    assert clock.leg.name == "high" and clock.share() == 0.25
    assert clock.left() == pytest.approx(300)


def test_a_part_that_nobody_planned_goes_on() -> None:
    """Half of it was made by an earlier process."""
    watch = Watch()
    clock = JobClock([], now=watch)
    clock.enter("high")
    unit = clock.begin(8, 4)
    watch.seconds += 100
    clock.advance(2 * unit)
    assert clock.left() == pytest.approx(100)


def expected_end(
    clock: JobClock, watch: Watch, rate: Callable[[float], float], until: float
) -> float:
    """When the clock expects the job of `LEGS` to end, `until` seconds after its beginning, of work
    that goes `rate(time)` times as slow as planned.
    """
    began = watch.seconds
    for leg in LEGS:
        clock.enter(leg.name)
        unit = clock.begin(100, 0)
        for _ in range(100):
            watch.seconds += leg.seconds / 100 * rate(watch.seconds - began)
            clock.advance(unit)
            if watch.seconds - began >= until:
                return watch.seconds - began + clock.left()
    return watch.seconds - began


@pytest.mark.parametrize("slower", [0.2, 0.5, 2.0, 5.0])
@pytest.mark.parametrize(("minutes", "factor"), [(1, 1.5), (2, 1.3), (4, 1.15)])
def test_a_wrong_plan_is_corrected_within_minutes(
    slower: float, minutes: int, factor: float
) -> None:
    watch = Watch()
    clock = JobClock(LEGS, now=watch)
    found = expected_end(clock, watch, lambda _: slower, 60.0 * minutes)
    true = 1000 * slower
    assert true / factor < found < true * factor or 60 * minutes > true


def test_other_work_that_ends_is_forgotten() -> None:
    """The first five minutes go four times as slow as planned; of them 75 s were planned."""
    watch = Watch()
    clock = JobClock(LEGS, slower=4.0, now=watch)
    true = 300 + 1000 - 75
    found = expected_end(clock, watch, lambda time: 4.0 if time < 300 else 1.0, 600.0)
    assert found == pytest.approx(true, rel=0.2)
