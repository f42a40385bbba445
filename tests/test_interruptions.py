"""Ctrl-C before a run has begun, and in the other programs: one line and exit code 130. Packages
that are not installed: one line and exit code 2.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

import convert_lora
import sample
import test_umt5_weights
import train_distillation
from wan_distill import interrupts

SCRIPTS = (train_distillation, sample, test_umt5_weights, convert_lora)
# A package that catches everything while it is imported, and an import that stands in its way.
PRESSED = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
raise SystemExit("the import went on")
"""
COMMAND = "import sys; from wan_distill import commands; sys.exit(commands.{}())"


@pytest.mark.parametrize(
    ("script", "first"),
    [
        (train_distillation, "parse_args"),
        (train_distillation, "read_teachers"),
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


def ended(tmp_path: Path, package: str, *command: str) -> tuple[int, str]:
    """The exit code, and what stderr says, where Ctrl-C comes while `package` is imported."""
    (tmp_path / f"{package}.py").write_text(PRESSED)
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    return run.returncode, run.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_while_a_program_is_imported(script, tmp_path):
    found = ended(tmp_path, "tqdm", script.__file__, "--help")
    assert found == (130, "Stopped before anything was begun.\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_the_requirements(script):
    bare = [sys.executable, "-S", script.__file__, "--help"]  # -S: no package of others is found
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    run = subprocess.run(bare, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    lacks = "error: huggingface_hub: not installed; pip install -r requirements.txt\n"
    assert run.stderr == lacks


def test_our_own_missing_module_is_a_traceback(capsys):
    error = ModuleNotFoundError("No module named 'wan_distill.x'", name="wan_distill.x")
    interrupts._tell(type(error), error, None)
    assert capsys.readouterr().err == "ModuleNotFoundError: No module named 'wan_distill.x'\n"


@pytest.mark.parametrize("name", ["train", "sample", "check", "convert"])
def test_while_a_command_is_imported(name, tmp_path):
    found = ended(tmp_path, "tqdm", "-c", COMMAND.format(name))
    assert found == (130, "Stopped before anything was begun.\n")


def test_while_torch_is_imported(tmp_path):
    found = ended(tmp_path, "torch", train_distillation.__file__, "--dry_run")
    assert found == (130, "Stopped before anything was begun.\n")
