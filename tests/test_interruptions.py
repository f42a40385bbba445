"""Ctrl-C before a run has begun, and in the other programs: one line and exit code 130."""

from __future__ import annotations

import pytest

import convert_lora
import sample
import test_umt5_weights
import train_distillation


@pytest.mark.parametrize(
    ("script", "first"),
    [
        (train_distillation, "parse_args"),
        (train_distillation, "read_teacher"),
        (sample, "build_parser"),
        (test_umt5_weights, "locate"),
        (convert_lora, "build_parser"),
    ],
)
def test_no_traceback(script, first, monkeypatch, capsys):
    def interrupted(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, first, interrupted)
    assert script.main([]) == 130
    said = capsys.readouterr().err
    assert said.startswith("Stopped") and said.count("\n") == 1
