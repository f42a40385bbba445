"""What a job has taken: nested parts, interruptions, other processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from wan_distill.system import spent
from wan_distill.system.console import enter, on_progress, progress_bar, show_job
from wan_distill.system.job_clock import Leg
from wan_distill.system.spent import Spent, read_spent


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves on: `clock.now += 1`."""
    hands = SimpleNamespace(now=100.0)
    monkeypatch.setattr(spent.time, "perf_counter", lambda: hands.now)
    return hands


@pytest.fixture
def make(tmp_path):
    def make(is_main: bool = True, processes: int = 2) -> Spent:
        device = torch.device("cpu")
        return Spent(
            tmp_path / "spent.json",
            SimpleNamespace(is_main=is_main, device=device, processes=processes),
        )

    return make


def test_what_is_left_of_the_job_is_written_down(make):
    subject = make()
    with show_job([Leg("encode", 10.0), Leg("high", 60.0)]):
        enter("high")
        with subject.part("training"):
            assert read_spent(subject.file)["left"] == pytest.approx(60.0)
    subject.finish()
    assert read_spent(subject.file)["left"] is None


def test_only_the_innermost_part_counts(make, clock, tmp_path):
    subject = make()
    with subject.part("training"):
        clock.now += 5
        with subject.part("checks"):
            clock.now += 2
            assert read_spent(subject.file)["now"] == "checks"
        clock.now += 1
    clock.now += 50  # between parts
    with subject.part("evaluation"):
        clock.now += 3
    written = read_spent(subject.file)
    assert written["seconds"] == dict(training=6.0, checks=2.0, evaluation=3.0)
    assert written["now"] is None and written["finished"] is None and written["peak_bytes"] > 0
    assert (written["device"], written["gpu"], written["processes"]) == ("cpu", False, 2)
    subject.finish()
    assert read_spent(subject.file)["finished"] is not None


def test_what_an_interrupted_run_took_is_kept(make, clock):
    with pytest.raises(KeyboardInterrupt), make().part("training"):
        clock.now += 5
        raise KeyboardInterrupt
    again = make()
    began = read_spent(again.file)["began"]
    with again.part("training"):
        clock.now += 2
    assert read_spent(again.file)["seconds"] == dict(training=7.0)
    assert read_spent(again.file)["began"] == began


def test_each_run_counts_its_own_devices(make, clock):
    """Eight train, one measures afterwards."""
    with make(processes=8).part("training"):
        clock.now += 10
    after = make(processes=1)
    with after.part("evaluation"):
        clock.now += 5
    written = read_spent(after.file)
    assert spent.device_seconds(written) == 85.0 and written["processes"] == 1
    del written["device_seconds"]  # of an earlier version
    assert spent.device_seconds(written) == 15.0 and spent.device_seconds({}) == 0.0


def test_a_kill_loses_seconds_and_not_hours(make, clock):
    subject = make()
    with subject.part("training"):
        clock.now += spent.SAVED_EVERY + 1
        subject.tick()
        clock.now += 1
        subject.tick()  # too soon to be written again
        assert read_spent(subject.file)["seconds"] == dict(training=spent.SAVED_EVERY + 1)


def test_every_bar_of_the_job_counts_on(make, clock):
    """Of large teachers, samples are solved for many hours."""
    subject = make()
    with show_job([Leg("solve", 60.0)]), subject.part("solving samples"):
        on_progress(subject.tick)
        enter("solve")
        with progress_bar(4, "sample", "sample", shown=False) as bar:
            clock.now += spent.SAVED_EVERY + 1
            bar.update()
        assert read_spent(subject.file)["seconds"] == {"solving samples": spent.SAVED_EVERY + 1}
    with subject.part("more"), progress_bar(4, "sample", "sample", shown=False) as bar:
        clock.now += spent.SAVED_EVERY + 1
        bar.update()  # the job is over
        assert "more" not in read_spent(subject.file)["seconds"]


def test_other_processes_write_nothing(make, clock):
    other = make(is_main=False)
    with other.part("training"):
        clock.now += 1
    assert not other.file.exists()
