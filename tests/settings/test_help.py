"""The help that the documentation shows is the one that the program prints."""

from __future__ import annotations

import subprocess
import sys

from conftest import REPOSITORY

from wan_distill.settings.command_line import build_parser


def test_help_is_the_one_in_the_docs():
    file = REPOSITORY / "docs" / "help.txt"
    assert build_parser().format_help() == file.read_text(encoding="utf-8"), (
        "python train_distillation.py --help > docs/help.txt"
    )


def test_no_script_needs_torch_to_answer():
    """So `--help` and a mistyped flag are answered at once."""
    code = (
        "import sys, train_distillation, sample, test_umt5_weights, convert_lora\n"
        "print(*{'torch', 'diffusers', 'transformers'} & set(sys.modules))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
