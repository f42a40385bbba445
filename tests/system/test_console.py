"""What a run shows, on a terminal and in a log."""

from __future__ import annotations

import io
import sys

import pytest

from wan_distill.system import console
from wan_distill.system.console import (
    TrainingBar,
    about,
    enter,
    escape_unencodable,
    progress_bar,
    show_job,
)
from wan_distill.system.job_clock import Leg


@pytest.fixture(autouse=True)
def first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line was written before."""
    monkeypatch.setattr(console._Lines, "last", float("-inf"))


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_log_gets_lines_and_no_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "QUIET_SECONDS", 0)
    with progress_bar(3, "prompt", "prompt", shown=True) as bar:
        for _ in range(3):
            bar.update()
    shown = lines(capsys)
    assert "100% of the job, prompt 3 of 3" in shown[-1] and "\r" not in "".join(shown)


def test_all_bars_together_write_one_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: clock[0])
    for number in range(20):
        with progress_bar(9, f"bar {number}", "unit", shown=True) as bar:
            clock[0] += 15
            bar.refresh()
    assert [line.split(", ")[1] for line in lines(capsys)] == [
        f"bar {number} 0 of 9" for number in (0, 3, 7, 11, 15, 19)
    ]


@pytest.mark.parametrize(("shown", "done"), [(False, 0), (True, 3)])
def test_other_processes_and_finished_work_show_nothing(
    capsys: pytest.CaptureFixture[str], shown: bool, done: int
) -> None:
    with progress_bar(3, "prompts", "prompt", shown, done) as bar:
        bar.update()
    assert lines(capsys) == []


def test_every_bar_shows_the_whole_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1000 s, the first tenth is encoding; a quarter of the rest was made before."""
    monkeypatch.setattr(console, "QUIET_SECONDS", 0)
    with show_job([Leg("encode", 100.0, 4), Leg("high", 900.0)]):
        enter("encode")
        with progress_bar(2, "prompt", "prompt", shown=True):
            pass  # an earlier process has encoded the other two
        enter("high")
        with TrainingBar(1, 4, shown=True) as bar:
            bar.show({"student_loss": 0.123456, "step": 4, "learning_rate": 1.0})
            bar.update()
    first, *_, last = lines(capsys)
    assert first.startswith("encode:   5% of the job, prompt 0 of 2, about 16 minutes left")
    assert last.startswith("high:  55% of the job, update 2 of 4, under a minute ")
    assert "student_loss 0.1235" in last and "learning_rate" not in last


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (20, "under a minute"),
        (80, "about a minute"),
        (700, "about 12 minutes"),
        (9000, "2.5 hours"),
    ],
)
def test_times_are_as_rough_as_they_are_known(seconds: float, words: str) -> None:
    assert words in about(seconds)


def test_what_a_stream_cannot_encode_is_shown_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # not a stream of bytes: left alone
    escape_unencodable()
    print("色 and a", flush=True)
    assert written.getvalue() == b"\\u8272 and a\n"
