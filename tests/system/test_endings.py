"""How programs end: one line and an exit code; notices of imports where they may say why."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

import convert_lora
import sample
import test_umt5_weights
import train_distillation
from wan_distill.errors import FileError, Halted, UsageError
from wan_distill.system import notices
from wan_distill.system.endings import ended
from wan_distill.system.notices import keep_notices


def failing(error: BaseException) -> Callable[..., int]:
    def run(*_: object, **__: object) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("--x 1: no"), 2, "error: --x 1: no"),
        (FileError("a: is cut", "download it"), 2, "error: a: is cut; download it"),
        (Halted("cannot go on"), 1, "error: cannot go on"),
        (OSError(28, "No space left on device", "out/a"), 4, "error: out/a: No space left on"),
        (KeyboardInterrupt(), 130, "Away."),
    ],
)
def test_what_ends_a_program_is_one_line_and_a_code(error, code, line, capsys):
    assert ended(failing(error), stopped="Away.", disk_error=4) == code
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


def test_a_disk_is_described_by_where_the_program_writes(tmp_path, capsys):
    error = PermissionError(13, "Permission denied", str(tmp_path / "a"))
    ended(failing(error), writes_to=lambda: str(tmp_path))
    assert "once there is room and permission" in capsys.readouterr().err


def test_the_code_of_a_run_is_its_own_and_other_errors_are_raised():
    assert ended(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        ended(failing(ZeroDivisionError()))


@pytest.mark.parametrize("script", [train_distillation, sample, test_umt5_weights, convert_lora])
@pytest.mark.parametrize("cause", [ImportError("no .so"), None])
def test_notices_are_shown_where_a_package_did_not_load(script, cause, monkeypatch, capsys):
    """By every program, and by none where an error in one line says all."""
    monkeypatch.setattr(notices, "_kept", [])
    with keep_notices():
        print("Failed to load a library", file=sys.stderr)
    refusal = UsageError("--x: needs a package")
    refusal.__cause__ = cause
    monkeypatch.setattr(script, "run", failing(refusal))
    assert script.main([]) == 2
    said = capsys.readouterr().err
    assert said.endswith("error: --x: needs a package\n")
    assert ("Failed to load a library" in said) == (cause is not None)
