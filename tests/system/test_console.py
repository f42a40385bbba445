"""What a run shows, on a terminal and in a log."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from wan_distill.settings.config import Config
from wan_distill.system import console
from wan_distill.system.console import TrainingBar, escape_unencodable, progress_bar


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_log_gets_lines_and_no_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "QUIET_SECONDS", 0)
    with progress_bar(3, "prompts", "prompt", shown=True) as bar:
        for _ in range(3):
            bar.update()
    shown = lines(capsys)
    assert "3/3" in shown[-1] and all(line.startswith("prompts") for line in shown)


@pytest.mark.parametrize(("shown", "done"), [(False, 0), (True, 3)])
def test_other_processes_and_finished_work_show_nothing(
    capsys: pytest.CaptureFixture[str], shown: bool, done: int
) -> None:
    with progress_bar(3, "prompts", "prompt", shown, done) as bar:
        bar.update()
    assert lines(capsys) == []


@pytest.mark.parametrize(("expert", "left"), [("high", "01:20"), ("low", "00:36")])
def test_a_log_has_one_line_per_interval_with_losses_and_time_left(
    small_config: Callable[..., Config],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    expert: str,
    left: str,
) -> None:
    """Two seconds per update, 18 of 22 updates left; the low expert has 22 more."""
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    config = small_config(expert="both")
    assert config.experts == ("high", "low")
    with TrainingBar(expert, 2, 22, config, shown=True) as bar:
        bar.update()
        bar.update()
        bar.show({"student_loss": 0.123456, "step": 4, "learning_rate": 1.0})
    (line,) = (line for line in lines(capsys) if "loss" in line)
    assert "student_loss 0.1235, 2 s/update" in line and "learning_rate" not in line
    assert f"training left {left}" in line


def test_what_a_stream_cannot_encode_is_shown_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # not a stream of bytes: left alone
    escape_unencodable()
    print("色 and a", flush=True)
    assert written.getvalue() == b"\\u8272 and a\n"
